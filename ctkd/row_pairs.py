"""A function of whole rows of both models, a block of pairs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, Logits
from ctkd.rows import block_rows, skips_padding

__all__ = ["RowFunction", "map_row_pairs", "map_row_pairs_to_parts"]

RowFunction = Callable[..., Tensor]


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
        BatchError: If the student's logits are no tensor, the teacher has no `Logits`, or its rows
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
    if not isinstance(student, DenseLogits):
        raise BatchError(
            f"map_row_pairs needs the student's logits as a tensor, got {type(student).__name__}"
        )
    if not isinstance(teacher, Logits):
        raise BatchError(f"map_row_pairs needs the teacher's Logits, got {type(teacher).__name__}")
    if per_pair is None:
        per_pair = student.tensor.new_zeros((rows.shape[0], 0), dtype=student.dtype)
    teacher_rows = _TeacherRows(teacher, teacher_temperature, spread_tail)
    values, found = _RowPairs.apply(  # type: ignore[no-untyped-call]
        student,
        teacher_rows,
        rows,
        function,
        parts,
        torch.is_grad_enabled(),
        student.tensor,
        per_pair,
    )
    return values, found


@dataclass(frozen=True, slots=True, eq=False)
class _TeacherRows:
    """Whole rows of a teacher, as the loss reads them."""

    logits: Logits
    temperature: float
    spread_tail: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.logits.shape

    def read(self, batch_index: Tensor, position: Tensor) -> Tensor:
        return self.logits.whole_rows(
            batch_index,
            position,
            temperature=self.temperature,
            spread_tail=self.spread_tail,
        )


class _RowPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: DenseLogits,
        teacher: _TeacherRows,
        rows: Tensor,
        function: RowFunction,
        parts: int,
        grad_enabled: bool,
        tensor: Tensor,
        per_pair: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tensor, rows, per_pair)
        ctx.student, ctx.teacher, ctx.function = student, teacher, function
        ctx.gradients = None
        values = tensor.new_zeros((rows.shape[0], parts), dtype=student.dtype)
        if grad_enabled and any(ctx.needs_input_grad[6:]):
            ctx.gradients = _row_buffer(tensor), torch.zeros_like(per_pair)
        _work_through_pairs(student, teacher, rows, function, per_pair, values, ctx.gradients)
        ctx.mark_non_differentiable(values)
        return values.sum(-1), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensor, rows, per_pair = ctx.saved_tensors
        student: DenseLogits = ctx.student
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second backward pass through a retained graph: the first one used the buffer up.
            gradients = _row_buffer(tensor), torch.zeros_like(per_pair)
            _work_through_pairs(student, ctx.teacher, rows, ctx.function, per_pair, None, gradients)
        scores, per_pair_gradient = gradients
        for pair, batch_index, position, _, _ in _pair_blocks(student, ctx.teacher, rows):
            row = _buffer_rows(student, batch_index, position, rows[pair])
            scores[row] *= incoming[pair].unsqueeze(-1).to(scores.dtype)
        score_gradient = scores[:-1].view(tensor.shape)
        per_pair_gradient = per_pair_gradient * incoming.unsqueeze(-1)
        return None, None, None, None, None, None, score_gradient, per_pair_gradient


def _row_buffer(tensor: Tensor) -> Tensor:
    """A gradient of (B, L, V') as rows, and one more row for pairs that are left out."""
    return tensor.new_zeros(tensor.shape[0] * tensor.shape[1] + 1, tensor.shape[2])


def _buffer_rows(
    student: DenseLogits, batch_index: Tensor, position: Tensor, pairs: Tensor
) -> Tensor:
    size = student.tensor.shape[1]
    row = batch_index * size + student._source_rows(batch_index, position)
    return row.masked_fill(pairs.amin(-1) < 0, student.tensor.shape[0] * size)


def _work_through_pairs(
    student: DenseLogits,
    teacher: _TeacherRows,
    rows: Tensor,
    function: RowFunction,
    per_pair: Tensor,
    values: Tensor | None,
    gradients: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill in the values of all pairs and the gradients, whichever is asked for."""
    for pair, batch_index, position, teacher_batch_index, teacher_position in _pair_blocks(
        student, teacher, rows
    ):
        left_out = rows[pair].amin(-1, keepdim=True) < 0
        inputs = [student._read(batch_index, position)]
        teacher_block = teacher.read(teacher_batch_index, teacher_position)
        if per_pair.shape[1]:
            inputs.append(per_pair[pair].detach())
        with torch.set_grad_enabled(gradients is not None):
            for differentiated in inputs:
                differentiated.requires_grad_(gradients is not None)
            value = function(inputs[0], teacher_block, *inputs[1:]).masked_fill(left_out, 0.0)
            if gradients is not None:
                found = torch.autograd.grad(value.sum(), inputs)
                row = _buffer_rows(student, batch_index, position, rows[pair])
                gradients[0][row, : student.shape[2]] = found[0].to(gradients[0].dtype)
                if per_pair.shape[1]:
                    # What was read for a pair that is left out may be garbage.
                    per_pair_gradient = found[1].masked_fill(left_out, 0.0)
                    gradients[1][pair] = per_pair_gradient.to(gradients[1].dtype)
        if values is not None:
            values[pair] = value.detach().to(values.dtype)


def _pair_blocks(
    student: DenseLogits, teacher: _TeacherRows, rows: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Yield (index into rows, student b, student i, teacher b, teacher j), block by block."""
    pairs = torch.arange(rows.shape[0], device=rows.device)
    if skips_padding(rows.device):
        pairs = pairs[(rows >= 0).all(-1)]
    size = block_rows(max(student.shape[2], teacher.shape[2]), rows.device)
    for start in range(0, pairs.shape[0], size):
        pair = pairs[start : start + size]
        student_row, teacher_row = rows[pair].clamp_min(0).unbind(-1)
        yield (
            pair,
            student_row // student.shape[1],
            student_row % student.shape[1],
            teacher_row // teacher.shape[1],
            teacher_row % teacher.shape[1],
        )
