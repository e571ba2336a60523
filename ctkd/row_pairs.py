"""A function of whole rows of both models, a block of pairs at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.compiled import RowArray, has_kernels, is_readable
from ctkd.errors import BatchError
from ctkd.logits import Logits
from ctkd.pair_solvers import CompiledSolver, PairArrays, RowFunction, RowSolution, RowSolver
from ctkd.paired_rows import PairedRows
from ctkd.row_gradients import anchored, file_requests
from ctkd.row_logits import RowLogits
from ctkd.row_requests import AddedRequest, AddGradient, Places
from ctkd.row_sources import FillArray, RowSource
from ctkd.rows import place_of_rows
from ctkd.teacher_rows import RowsAhead, TeacherRows
from ctkd.threads import over_rows
from ctkd.tracing import not_traced

__all__ = ["map_row_pairs", "map_row_pairs_to_parts", "solve_row_pairs"]


def map_row_pairs(
    student: Logits,
    teacher: Logits,
    rows: Tensor,
    function: RowFunction,
    *,
    per_pair: Tensor | None = None,
    teacher_temperature: float = 1.0,
    spread_tail: bool = False,
) -> Tensor:
    """Apply a function to pairs of whole rows, a block of pairs at a time.

    The gradient into the student's logits is computed with the values, so that each block is
    worked through once; the teacher gets none.

    Shape:
        ``rows`` (N, 2) int64: flattened positions, b * S + i on the student's side and
        b * T + j on the teacher's. ``per_pair`` (N, E). The answer is (N,), differentiable.

    Args:
        student: Logits of S positions and V columns.
        teacher: Logits of T positions and W columns.
        rows: Pairs; one with a negative entry is left out and gives 0. A student row must not
            occur twice.
        function: Takes raw logits (n, V) and (n, W), and (n, E) where there are numbers per pair;
            returns values (n,). It is differentiated by autograd with respect to the first and
            the third.
        per_pair: Numbers that belong to each pair, differentiable.
        teacher_temperature: What the function divides the teacher's logits by.
        spread_tail: Take a teacher of whose rows only the largest entries are stored.

    Raises:
        BatchError: If the student's rows are not whole, the teacher has no `Logits`, or its rows
            are not whole.
    """

    def one_part(*arguments: Tensor) -> Tensor:
        return function(*arguments).unsqueeze(-1)

    return map_row_pairs_to_parts(
        student,
        teacher,
        rows,
        one_part,
        parts=1,
        per_pair=per_pair,
        teacher_temperature=teacher_temperature,
        spread_tail=spread_tail,
    )[0]


def map_row_pairs_to_parts(
    student: Logits,
    teacher: Logits,
    rows: Tensor,
    function: RowFunction,
    *,
    parts: int,
    per_pair: Tensor | None = None,
    teacher_temperature: float = 1.0,
    spread_tail: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do what `map_row_pairs` does for a function whose values are sums of parts.

    Shape:
        ``function`` returns (n, P). The answers are the sums over parts, (N,), differentiable,
        and the parts themselves, (N, P), detached.
    """

    def solver(
        student_logits: Tensor,
        teacher_logits: Tensor,
        numbers: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        inputs = [student_logits] if numbers is None else [student_logits, numbers]
        if not with_gradient:
            return RowSolution(function(inputs[0], teacher_logits, *inputs[1:]))
        with torch.enable_grad():
            inputs = [one.detach().requires_grad_() for one in inputs]
            value = function(inputs[0], teacher_logits, *inputs[1:])
            found = torch.autograd.grad(value.sum(), inputs)
        return RowSolution(value.detach(), *found)

    return solve_row_pairs(
        student,
        teacher,
        rows,
        solver,
        parts=parts,
        per_pair=per_pair,
        teacher_temperature=teacher_temperature,
        spread_tail=spread_tail,
    )


@not_traced
def solve_row_pairs(
    student: Logits,
    teacher: Logits,
    rows: Tensor,
    solver: RowSolver,
    *,
    compiled: Callable[[], CompiledSolver] | None = None,
    parts: int = 1,
    per_pair: Tensor | None = None,
    teacher_temperature: float = 1.0,
    spread_tail: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do what `map_row_pairs` does, with values and gradients in closed form.

    Shape:
        ``rows`` (N, 2), ``per_pair`` (N, E). The answers are the sums over parts, (N,),
        differentiable, and the parts themselves, (N, P), detached.

    Args:
        student: As in `map_row_pairs`.
        teacher: As in `map_row_pairs`.
        rows: As in `map_row_pairs`.
        solver: See `RowSolver`.
        compiled: Makes what does the same where there are compiled loops.
        parts: P.
        per_pair: As in `map_row_pairs`.
        teacher_temperature: What the solver divides the teacher's logits by.
        spread_tail: As in `map_row_pairs`.

    Raises:
        BatchError: As in `map_row_pairs`.
    """
    if not isinstance(student, RowLogits):
        raise BatchError(
            "whole rows of the student's logits are needed, as a tensor or from its head, got "
            f"{type(student).__name__}"
        )
    if not isinstance(teacher, Logits):
        raise BatchError(f"map_row_pairs needs the teacher's Logits, got {type(teacher).__name__}")
    if per_pair is None:
        per_pair = torch.zeros((rows.shape[0], 0), dtype=student.dtype, device=rows.device)
    teacher_rows = TeacherRows(teacher, teacher_temperature, spread_tail)
    made = None
    if compiled is not None and has_kernels(student.device, student.dtype):
        made = compiled()
    pairs = PairedRows(student, teacher_rows, rows, solver, made, parts)
    anchor, requests, _ = anchored(student.source)
    values, found = _RowPairs.apply(  # type: ignore[no-untyped-call]
        pairs, parts, torch.is_grad_enabled(), requests, anchor, per_pair
    )
    return values, found


@dataclass(frozen=True, slots=True, eq=False)
class _PairRequest(AddedRequest):
    """Gradient of pairs of rows, weighted with what reached them.

    Args:
        source: Where the student's rows come from.
        places: Which pair stands in which row.
        pairs: The pairs.
        per_pair: (N, E).
        incoming: (N,).
        known: The unweighted gradient, if the forward pass had room for it.
    """

    source: RowSource
    places: Places
    pairs: PairedRows
    per_pair: Tensor
    incoming: Tensor
    known: Tensor | None

    @property
    def buffer(self) -> Tensor | None:
        return self.known

    def known_weights(self, rows: Tensor) -> Tensor:
        return self.places.at(rows, self.incoming)

    def filler(self, rows: Tensor) -> FillArray | None:
        compiled = self.pairs.compiled
        if compiled is None:
            return None
        pair = self.places.table[rows].clamp_min(0)
        teacher_rows = RowsAhead(self.pairs.teacher, self.pairs.rows[pair, 1].clamp_min(0))
        width = self.pairs.student.shape[2]

        def fill(which: slice, student: RowArray, gradients: RowArray) -> None:
            count = which.stop - which.start
            numbers = self.per_pair.detach()[pair[which]]
            arrays = PairArrays(
                student,
                teacher_rows.array(which),
                numbers.numpy(),
                np.empty((count, self.pairs.parts)),
                gradients,
                np.empty(numbers.shape, np.float32),
            )
            over_rows(count, functools.partial(compiled, arrays))
            beyond = self.source.shape[2] - width
            for start in gradients.starts if beyond else ():
                gradients.values[start + width : start + width + beyond] = 0.0

        return fill

    def adder(self, rows: Tensor, *, in_buffer: bool) -> AddGradient:
        weights = self.known_weights(rows).unsqueeze(-1)
        known = self.known
        if in_buffer:

            def scale(which: slice, _: Tensor, gradient: Tensor) -> None:
                gradient.mul_(weights[which])

            return scale

        if known is not None:

            def add_known(which: slice, _: Tensor, gradient: Tensor) -> None:
                part = known[rows[which], : gradient.shape[1]].to(gradient.dtype)
                gradient += part.mul_(weights[which])

            return add_known

        pair = self.places.table[rows].clamp_min(0)
        teacher_rows = RowsAhead(self.pairs.teacher, self.pairs.rows[pair, 1].clamp_min(0))

        def add(which: slice, block: Tensor, gradient: Tensor) -> None:
            numbers = self.per_pair[pair[which]] if self.per_pair.shape[1] else None
            solution = self.pairs.solve_block(block, teacher_rows.read(which), numbers, True)
            if solution.student_gradient is not None:
                part = solution.student_gradient.mul_(weights[which])
                # What was read for rows without a pair may be garbage.
                gradient += part.masked_fill_(weights[which] == 0, 0.0)

        return add


class _RowPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pairs: PairedRows,
        parts: int,
        grad_enabled: bool,
        requests: dict[Any, Any],
        _: Tensor,
        per_pair: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*pairs.student.source.inputs, per_pair)
        ctx.pairs, ctx.requests, ctx.places = pairs, requests, pairs.places()
        ctx.question = object()
        wanted = grad_enabled and any(ctx.needs_input_grad[4:])
        ctx.buffer = pairs.student.source.row_buffer(ctx.places.rows) if wanted else None
        ctx.per_pair_gradient = torch.zeros_like(per_pair) if wanted else None
        values = torch.zeros(
            (pairs.rows.shape[0], parts), dtype=pairs.student.dtype, device=pairs.rows.device
        )
        _solve(pairs, ctx.places, per_pair, values, ctx.buffer, ctx.per_pair_gradient)
        ctx.mark_non_differentiable(values)
        return values.sum(-1), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *_, per_pair = ctx.saved_tensors
        pairs: PairedRows = ctx.pairs
        buffer, ctx.buffer = ctx.buffer, None
        if buffer is None:
            # A second backward pass through a retained graph: the first one used the buffer up.
            buffer = pairs.student.source.row_buffer(ctx.places.rows)
            if buffer is not None:
                _solve(pairs, ctx.places, per_pair, None, buffer, None)
        incoming = incoming.masked_fill(~pairs.valid, 0.0)
        request = _PairRequest(pairs.student.source, ctx.places, pairs, per_pair, incoming, buffer)
        anchor_gradient = file_requests(ctx.requests, ctx.question, [request])
        per_pair_gradient = ctx.per_pair_gradient * incoming.unsqueeze(-1)
        return None, None, None, None, anchor_gradient, per_pair_gradient


def _solve(
    pairs: PairedRows,
    places: Places,
    per_pair: Tensor,
    values: Tensor | None,
    buffer: Tensor | None,
    per_pair_gradient: Tensor | None,
) -> None:
    """Fill in the values of all pairs, and the gradients there is room for."""
    if pairs.compiled is not None and (buffer is None or is_readable(buffer)):
        _solve_compiled(pairs, places, pairs.compiled, per_pair, values, buffer, per_pair_gradient)
        return
    numbers_wanted = per_pair_gradient is not None and per_pair.shape[1] > 0
    for pair, student_block, teacher_block in pairs.blocks(places):
        left_out = pairs.rows[pair].amin(-1, keepdim=True) < 0
        solution = pairs.solve_block(
            student_block,
            teacher_block,
            per_pair[pair] if per_pair.shape[1] else None,
            buffer is not None or numbers_wanted,
        )
        # What was read for a pair that is left out may be garbage.
        if values is not None:
            values[pair] = solution.values.masked_fill(left_out, 0.0).to(values.dtype)
        if buffer is not None:
            gradient, place = solution.student_gradient, place_of_rows(places.rows[pair])
            if gradient is None:
                gradient = student_block[:, :0]
            if not isinstance(place, slice):
                gradient = gradient.to(buffer.dtype)
            buffer[place, : gradient.shape[1]] = gradient
            buffer[place, gradient.shape[1] :] = 0.0
        if per_pair_gradient is not None and solution.per_pair_gradient is not None:
            gradient = solution.per_pair_gradient.masked_fill(left_out, 0.0)
            per_pair_gradient[pair] = gradient.to(per_pair_gradient.dtype)


def _solve_compiled(
    pairs: PairedRows,
    places: Places,
    compiled: CompiledSolver,
    per_pair: Tensor,
    values: Tensor | None,
    buffer: Tensor | None,
    per_pair_gradient: Tensor | None,
) -> None:
    for pair, student, teacher in pairs.arrays(places):
        found = np.empty((pair.shape[0], pairs.parts))
        numbers = per_pair.detach()[pair]
        of_numbers = torch.zeros_like(numbers if per_pair_gradient is not None else numbers[:, :0])
        if buffer is None:
            gradients = RowArray(np.empty(0, np.float32), np.empty(0, np.int64))
        else:
            gradients = RowArray.of(buffer, places.rows[pair])
        arrays = PairArrays(student, teacher, numbers.numpy(), found, gradients, of_numbers.numpy())
        over_rows(pair.shape[0], functools.partial(compiled, arrays))
        if values is not None:
            values[pair] = torch.from_numpy(found).to(values.dtype)
        if per_pair_gradient is not None:
            per_pair_gradient[pair] = of_numbers
    if buffer is not None:
        buffer[:, pairs.student.shape[2] :] = 0.0
