"""Queries answered from rows of raw logits, for logits of a tensor and of a model's head.

Views of one source share its log-normalizers and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd import ops
from ctkd.errors import BatchError
from ctkd.logits.base import Logits, check_columns, check_ids, check_k, checked_mask
from ctkd.logits.sources import (
    Pending,
    PendingRowLoss,
    RowSource,
    anchored,
    file_pending,
    version_of,
)
from ctkd.ops import Packed, RowLoss, Rows, SoftmaxTerm, Which, is_whole

__all__ = ["AlignedValues", "RowLogits", "map_rows"]


class RowLogits(Logits):
    """Positions of a source of raw logits.

    Args:
        source: B * L rows.
        mask: (B, S) bool, scored positions; default all of them.
        rows: (B, S) int64, which of a sequence's L rows holds each position; default its own index.
        vocab_size: Columns to keep, V; default all of them.

    Raises:
        BatchError: If the shapes do not fit, or ``vocab_size`` exceeds the columns there are.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> None:
        batch_size, length, width = source.shape
        if vocab_size is not None and not 1 <= vocab_size <= width:
            raise BatchError(
                f"the tokenizer has {vocab_size} tokens, but the logits only {width} columns; "
                "these logits belong to another tokenizer"
            )
        expected = torch.Size((batch_size, length)) if rows is None else rows.shape
        self.source, self.inputs, self.dtype = source, source.inputs, source.dtype
        self.rows = rows
        if mask is not None:
            self.mask = checked_mask(mask, expected, source.device)
        self.shape = (expected[0], expected[1], vocab_size or width)

    @cached_property  # Where positions are packed it is never made.
    def mask(self) -> Tensor:  # type: ignore[override]
        """Scored positions, (B, S) bool; all of them, made when asked for, if none was given."""
        return checked_mask(None, torch.Size(self.shape[:2]), self.source.device)

    def masked(self, mask: Tensor) -> Self:
        if mask is vars(self).get("mask"):
            return self
        view = self.at(self.rows, mask, self.shape[2])
        if "all_rows" in vars(self):
            view.all_rows = self.all_rows
        return view

    def at(self, rows: Tensor | None, mask: Tensor, vocab_size: int | None = None) -> Self:
        """The same source at other positions; both share normalizers and a backward pass."""
        view = type(self).__new__(type(self))
        RowLogits.__init__(view, self.source, mask=mask, rows=rows, vocab_size=vocab_size)
        return view

    def packed_at(self, packed: Packed, vocab_size: int | None = None) -> Self:
        """The same source at the positions that are scored."""
        view = self.at(packed.rows, packed.mask, vocab_size)
        view.index, view.all_rows = packed.scored_rows, packed.all_rows
        return view

    @cached_property
    def all_rows(self) -> Tensor:
        """Row of the source that holds each position, (B * S,) int64."""
        batch_size, length, _ = self.source.shape
        first = torch.arange(batch_size, device=self.mask.device).unsqueeze(1) * length
        rows = torch.arange(length, device=self.mask.device) if self.rows is None else self.rows
        return (first + rows).flatten()

    @cached_property
    def index(self) -> Tensor:
        """Row of the source that holds each scored position, (B * S,) int64, -1 elsewhere."""
        return self.all_rows.masked_fill(self.padding.flatten(), -1)

    @cached_property
    def padding(self) -> Tensor:
        """Positions that are not scored, (B, S, 1) bool."""
        return ~self.mask.unsqueeze(-1)

    @cached_property
    def _sequence(self) -> Tensor:
        """Sequence of each position, (B * S,) int64."""
        return self.all_rows // max(self.source.shape[1], 1)

    @ops.not_traced
    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardize: bool = False
    ) -> tuple[Tensor, ...]:
        check_ids(ids, self.shape)
        answers: tuple[Tensor, ...] = _LogSoftmax.apply(  # type: ignore[no-untyped-call]
            self, ids, temperatures, standardize, None, None, anchored(self.source)
        )
        return answers

    @ops.not_traced
    def log_mass(self, columns: Tensor, *, temperature: float = 1.0) -> Tensor:
        check_columns(columns, self.shape)
        anchor = anchored(self.source)
        (part,), (whole,) = (
            _LogSoftmax.apply(self, None, [temperature], False, one, None, anchor)  # type: ignore[no-untyped-call]
            for one in (columns, None)
        )
        return (whole - part).squeeze(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def top_ids(self, k: int) -> Tensor:
        check_k(k, self.shape)
        chunks = self.source.chunks(self.index, self.shape[2])
        ids = self._joined([(which, ops.top_k(rows, k)[0].t()) for which, rows in chunks], k)
        return ids.t().view(*self.shape[:2], k).masked_fill(self.padding, 0)

    @ops.not_traced
    def sorted_probs(self, k: int, *, temperature: float = 1.0) -> Tensor:
        check_k(k, self.shape)
        count = self.index.shape[0]
        ids, raw = self.index.new_zeros((count, k)), self._zeros(count, k)
        normalizers = self._zeros(1, count)
        # One reading of a chunk says which entries are largest, what they are, and of which sum.
        with torch.no_grad():
            for which, rows in self.source.chunks(self.index, self.shape[2]):
                ids[which], raw[which] = ops.top_k(rows, k)
                normalizers[:, which] = ops.log_normalizers(rows, [temperature])
        self.source.normalizers().keep(self.index, [temperature], False, self.shape[2], normalizers)
        ids, raw = ids.view(*self.shape[:2], k), raw.view(*self.shape[:2], k)
        (log_probs,) = _LogSoftmax.apply(  # type: ignore[no-untyped-call]
            self, ids, [temperature], False, None, raw, anchored(self.source)
        )
        return log_probs.exp().masked_fill(~self.mask.unsqueeze(-1), 0.0)  # type: ignore[no-any-return]

    @torch.no_grad()
    def column_mass(
        self, *, temperature: float = 1.0, standardize: bool = False, prefetch: Sequence[float] = ()
    ) -> Tensor:
        # Each once, and first the one whose probabilities are summed.
        temperatures = list(dict.fromkeys([temperature, *prefetch]))
        parts = []
        total: Tensor | None = None
        for which, rows in self.source.chunks(self.index, self.shape[2]):
            mass, normalizers = ops.column_mass(
                rows, self._sequence[which], self.shape[0], temperatures, standardize=standardize
            )
            parts.append((which, normalizers))
            total = mass if total is None else total.add_(mass)
        known, normalizers = self.source.normalizers(), self._joined(parts, len(temperatures))
        known.keep(self.index, temperatures, standardize, self.shape[2], normalizers)
        return self._zeros(self.shape[0], self.shape[2]) if total is None else total

    @torch.no_grad()
    def column_distance(self, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
        targets = targets.flatten(0, 1).to(self.dtype)
        distance = self._zeros(self.shape[0], targets.shape[1], self.shape[2])
        (normalizers,) = self.log_normalizers([temperature], False)
        for which, rows in self.source.chunks(self.index, self.shape[2]):
            given = self._sequence[which], targets[which], normalizers[which], temperature
            ops.add_column_distance_(distance, rows, *given)
        return distance

    def chunks(
        self, index: Tensor, *, temperature: float = 1.0, spread_tail: bool = False
    ) -> Iterable[tuple[Which, Rows]]:
        return self.source.chunks(self.rows_at(index), self.shape[2])

    def rows_at(self, index: Tensor) -> Tensor:
        """Rows of the source (N,) that hold flattened positions, -1 for -1."""
        return F.pad(self.all_rows, (0, 1), value=-1)[index]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Flattened scored positions (n,) and their rows (n, V), not to be written to."""
        numbers = torch.arange(self.index.shape[0], device=self.mask.device)
        for which, rows in self.source.chunks(self.index, self.shape[2]):
            for inner, block in rows.blocks():
                yield numbers[which][inner], block

    def log_normalizers(
        self, temperatures: Sequence[float], standardize: bool, columns: Tensor | None = None
    ) -> Tensor:
        """`ctkd.ops.log_normalizers` of the position's rows; undefined where one is not scored."""
        known, width = self.source.normalizers(), self.shape[2]
        if columns is not None:
            parts = [
                (which, ops.log_normalizers(rows, temperatures, columns=columns))
                for which, rows in self.source.chunks(self.index, width)
            ]
            return self._joined(parts, len(temperatures))
        answers, index = known.look_up(self.index, temperatures, standardize, width)
        if index is None:
            # None is missing, so all are known.
            return answers  # type: ignore[return-value]
        parts = []
        for which, rows in self.source.chunks(index, width):
            new = ops.log_normalizers(rows, temperatures, standardize=standardize)
            parts.append((which, new))
        if answers is None:
            answers = self._joined(parts, len(temperatures))
        else:
            for which, new in parts:
                # What is known stays as it is: a second answer must not differ in its last digit.
                old = answers[..., which]
                answers[..., which] = torch.where(old.isnan(), new, old)
        known.keep(index, temperatures, standardize, width, answers)
        return answers

    def _joined(self, parts: Sequence[tuple[Which, Tensor]], *size: int) -> Tensor:
        """Answers (..., N) from those for chunks of rows, which come in their order.

        Args:
            parts: Of each chunk.
            size: Of a row's answer, used if there are no parts.
        """
        if len(parts) == 1 and parts[0][1].shape[-1] == self.index.shape[0]:
            return parts[0][1]
        answers = self._zeros(*size, self.index.shape[0])
        if parts:
            answers = parts[0][1].new_zeros(*parts[0][1].shape[:-1], self.index.shape[0])
        for which, part in parts:
            answers[..., which] = part
        return answers

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=self.source.dtype, device=self.mask.device)


class _LogSoftmax(torch.autograd.Function):
    """Chosen entries over a temperature, less the log of the softmax denominator.

    The denominator may be that of some columns alone. Without ids an entry is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: RowLogits,
        ids: Tensor | None,
        temperatures: Sequence[float],
        standardize: bool,
        columns: Tensor | None,
        raw: Tensor | None,
        _: Tensor,
    ) -> tuple[Tensor, ...]:
        source, index = logits.source, logits.index
        normalizers = logits.log_normalizers(temperatures, standardize, columns)
        if ids is not None and raw is None:
            given = normalizers, temperatures
            answers = source.chosen_log_probs(index, ids, logits.shape[1], *given)
        else:
            entries = logits._zeros(*logits.shape[:2], 1) if raw is None else raw
            answers = ops.log_probs_of(entries, index, normalizers, temperatures)
        # Kept only so that torch sees it if one of them is overwritten.
        queried = columns if ids is None else ids
        is_seen = queried is not None and not queried.is_inference()
        ctx.save_for_backward(*source.inputs, *([queried] if is_seen else []))
        ctx.logits, ctx.ids, ctx.columns, ctx.normalizers = logits, ids, columns, normalizers
        ctx.temperatures, ctx.pending = temperatures, source.anchor.pending
        return tuple(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        logits: RowLogits = ctx.logits
        ids = logits.index.new_zeros((*logits.shape[:2], 0)) if ctx.ids is None else ctx.ids
        ids = ids.expand(-1, logits.shape[1], -1).flatten(0, 1)
        terms = []
        for temperature, normalizer, gradient in zip(
            ctx.temperatures, ctx.normalizers, gradients, strict=True
        ):
            weights = gradient.masked_fill(logits.padding, 0.0).flatten(0, 1)
            terms.append(
                SoftmaxTerm(
                    temperature=temperature,
                    width=logits.shape[2],
                    columns=ctx.columns,
                    log_normalizers=normalizer,
                    totals=weights.squeeze(1) if weights.shape[1] == 1 else weights.sum(-1),
                    ids=ids,
                    weights=weights[:, : ids.shape[1]],
                )
            )
        return *(None,) * 6, file_pending(ctx.pending, Pending(logits.index, tuple(terms)))


class AlignedValues(NamedTuple):
    """Values at N aligned positions.

    Attributes:
        values: (N,), differentiable.
        parts: (N, P), which sum to them, detached.
    """

    values: Tensor
    parts: Tensor


@ops.not_traced
def map_rows(
    student: Logits,
    teacher: Logits,
    positions: Tensor,
    function: Callable[..., Tensor] | RowLoss,
    *,
    per_row: Tensor | None = None,
    teacher_temperature: float = 1.0,
    spread_tail: bool = False,
) -> AlignedValues:
    """Apply a function to whole rows of both sides, a chunk at a time.

    The gradient into a tensor of student logits is computed with the values, so that each row is
    worked through once; that into a head is computed in the backward pass, unless its logits are
    few enough to keep it (`HeadLogits`). The teacher gets none.

    Shape:
        ``positions`` (N, 2) int64: flattened positions, b * S + i on the student's side and
        b * T + j on the teacher's. ``per_row`` (N, E).

    Args:
        student: Logits of S positions and V columns.
        teacher: Logits of T positions and W columns.
        positions: What is compared; where an entry is negative the value is 0. A student's
            position must not occur twice.
        function: Takes raw logits (n, V) and (n, W), and (n, E) where there are numbers per row;
            returns values (n,). It is differentiated by autograd with respect to the first and
            the third. A `RowLoss` also names its parts and its kernel.
        per_row: Numbers that belong to each row, differentiable.
        teacher_temperature: What the function divides the teacher's logits by.
        spread_tail: Take a teacher of whose rows only the largest entries are stored.

    Raises:
        BatchError: If the student's rows are not whole, the teacher has no `Logits`, or its rows
            are not whole.

    Example:
        >>> from ctkd import DenseLogits
        >>> student, teacher = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, 0.5, 3.0]]])
        >>> gap = lambda x, y: x.amax(-1) - y.amax(-1)
        >>> map_rows(DenseLogits(student), DenseLogits(teacher), torch.tensor([[0, 0]]), gap).values
        tensor([-1.])
    """
    if not isinstance(student, RowLogits):
        raise BatchError(
            "whole rows of the student's logits are needed, as a tensor or from its head, got "
            f"{type(student).__name__}"
        )
    if not isinstance(teacher, Logits):
        raise BatchError(f"map_rows needs the teacher's Logits, got {type(teacher).__name__}")
    left_out = (positions < 0).any(-1)
    compared = PendingRowLoss(
        loss=function if isinstance(function, RowLoss) else RowLoss("", function),
        width=student.shape[2],
        teacher=teacher,
        teacher_index=positions[:, 1].masked_fill(left_out, -1),
        options={"temperature": teacher_temperature, "spread_tail": spread_tail},
    )
    index = student.rows_at(positions[:, 0].masked_fill(left_out, -1))
    options = torch.is_grad_enabled(), anchored(student.source), per_row
    return AlignedValues(*_Mapped.apply(student.source, index, compared, *options))  # type: ignore[no-untyped-call]


class _Mapped(torch.autograd.Function):
    """Values at aligned positions."""

    @staticmethod
    def forward(
        ctx: Any,
        source: RowSource,
        index: Tensor,
        compared: PendingRowLoss,
        grad_enabled: bool,
        _: Tensor,
        per_row: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*source.inputs, *([] if per_row is None else [per_row]))
        of_rows, of_numbers = ctx.needs_input_grad[4:]
        compared = replace(
            compared,
            per_row=per_row,
            buffer=source.gradient_buffer(index) if grad_enabled and of_rows else None,
        )
        parts, ctx.per_row_gradient = _solve(source, index, compared, grad_enabled and of_numbers)
        ctx.source, ctx.index, ctx.pending = source, index, source.anchor.pending
        ctx.compared = replace(compared, per_row=None)
        ctx.teacher_version = version_of(compared.teacher.inputs)
        ctx.mark_non_differentiable(parts)
        return parts.sum(-1), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved, source = ctx.saved_tensors, ctx.source
        weights = gradient.masked_fill(ctx.index < 0, 0.0)
        per_row_gradient = ctx.per_row_gradient
        if per_row_gradient is not None:
            per_row_gradient = per_row_gradient * weights.unsqueeze(-1)
        if not ctx.needs_input_grad[4]:
            return *(None,) * 5, per_row_gradient
        compared = replace(
            ctx.compared,
            per_row=saved[-1] if len(saved) > len(source.inputs) else None,
            weights=weights,
        )
        ctx.compared = replace(ctx.compared, buffer=None)
        if compared.buffer is None:
            if version_of(compared.teacher.inputs) != ctx.teacher_version:
                raise BatchError(
                    "the teacher's logits were overwritten after the loss had been computed of "
                    "them, and its backward pass reads them again; keep them until then"
                )
            # Of a second backward pass through a retained graph: the first used the buffer up.
            compared = replace(compared, buffer=source.gradient_buffer(ctx.index))
            if compared.buffer is not None:
                _solve(source, ctx.index, compared, False)
        anchor_gradient = file_pending(ctx.pending, Pending(ctx.index, row_loss=compared))
        return *(None,) * 4, anchor_gradient, per_row_gradient


def _solve(
    source: RowSource, index: Tensor, compared: PendingRowLoss, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Parts (N, P), and the gradient (N, E) of their sum by the numbers per row, if requested.

    The gradient by the student's logits goes into the buffer, if there is one.
    """
    loss, buffer, per_row = compared.loss, compared.buffer, compared.per_row
    found: list[tuple[Which, Tensor]] = []
    per_row_gradient = None if per_row is None or not differentiate else torch.zeros_like(per_row)
    for which, rows in source.chunks(index, compared.width):
        teacher_index = compared.teacher_index[which]
        for inner, teacher in compared.teacher.chunks(teacher_index, **compared.options):
            some = _inside(which, inner, index)
            out = None if buffer is None else Rows(buffer, index[some], buffer.shape[1])
            given = None if per_row is None else per_row[some]
            answer = ops.row_loss(loss, rows[inner], teacher, given, out, differentiate)
            found.append((some, answer.values))
            if per_row_gradient is not None and answer.per_row_gradient is not None:
                per_row_gradient[some] = answer.per_row_gradient.to(per_row_gradient.dtype)
    if len(found) == 1 and is_whole(found[0][0]):
        return found[0][1], per_row_gradient
    parts = torch.zeros((len(index), loss.parts), dtype=source.dtype, device=index.device)
    for some, values in found:
        parts[some] = values
    return parts, per_row_gradient


def _inside(which: Which, inner: Which, index: Tensor) -> Which:
    """Which rows of an index those are that a part of a part holds."""
    if is_whole(which):
        return inner
    if is_whole(inner):
        return which
    return torch.arange(index.shape[0], device=index.device)[which][inner]
