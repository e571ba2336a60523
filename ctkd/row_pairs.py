"""A function of whole rows of both models, a block of pairs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, Logits
from ctkd.rows import block_rows, skips_padding

__all__ = ["RowFunction", "map_row_pairs"]

RowFunction = Callable[[Tensor, Tensor], Tensor]


def map_row_pairs(student: Logits, teacher: Logits, rows: Tensor, function: RowFunction) -> Tensor:
    """Apply a function to pairs of whole rows, a block of pairs at a time.

    The gradient into the student's logits is computed with the values, so that each block is
    worked through once; the teacher gets none.

    Shape:
        ``rows`` (N, 2) int64: flattened positions, b * S + i on the student's side and
        b * T + j on the teacher's. The answer is (N,), differentiable.

    Args:
        student: Logits of S positions and V columns.
        teacher: Logits of T positions and W columns.
        rows: Pairs; one with a negative entry is left out and gives 0. A student row must not
            occur twice.
        function: Takes raw logits (n, V) and (n, W), returns values (n,). It is differentiated by
            autograd with respect to its first argument.
    """
    if not isinstance(student, DenseLogits) or not isinstance(teacher, DenseLogits):
        raise BatchError("map_row_pairs needs whole rows of logits on both sides")
    result: Tensor = _RowPairs.apply(  # type: ignore[no-untyped-call]
        student, teacher, rows, function, torch.is_grad_enabled(), student.tensor
    )
    return result


class _RowPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: DenseLogits,
        teacher: DenseLogits,
        rows: Tensor,
        function: RowFunction,
        grad_enabled: bool,
        tensor: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(tensor, rows)
        ctx.student, ctx.teacher, ctx.function = student, teacher, function
        ctx.scores = None
        values = tensor.new_zeros(rows.shape[0], dtype=student.dtype)
        if grad_enabled and ctx.needs_input_grad[5]:
            ctx.scores = _row_buffer(tensor)
        _work_through_pairs(student, teacher, rows, function, values, ctx.scores)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        tensor, rows = ctx.saved_tensors
        student: DenseLogits = ctx.student
        scores, ctx.scores = ctx.scores, None
        if scores is None:
            # A second backward pass through a retained graph: the first one used the buffer up.
            scores = _row_buffer(tensor)
            values = torch.zeros_like(incoming)
            _work_through_pairs(student, ctx.teacher, rows, ctx.function, values, scores)
        for pair, batch_index, position, _, _ in _pair_blocks(student, ctx.teacher, rows):
            row = _buffer_rows(student, batch_index, position, rows[pair])
            scores[row] *= incoming[pair].unsqueeze(-1).to(scores.dtype)
        return None, None, None, None, None, scores[:-1].view(tensor.shape)


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
    teacher: DenseLogits,
    rows: Tensor,
    function: RowFunction,
    values: Tensor,
    scores: Tensor | None,
) -> None:
    """Fill in the values of all pairs and, if asked for, their gradients."""
    for pair, batch_index, position, teacher_batch_index, teacher_position in _pair_blocks(
        student, teacher, rows
    ):
        valid = rows[pair].amin(-1) >= 0
        student_block = student._read(batch_index, position)
        teacher_block = teacher._read(teacher_batch_index, teacher_position)
        with torch.set_grad_enabled(scores is not None):
            student_block.requires_grad_(scores is not None)
            value = function(student_block, teacher_block)
            if scores is not None:
                (gradient,) = torch.autograd.grad(
                    value.masked_fill(~valid, 0.0).sum(), student_block
                )
                row = _buffer_rows(student, batch_index, position, rows[pair])
                scores[row, : student.shape[2]] = gradient.to(scores.dtype)
        values[pair] = value.detach().masked_fill(~valid, 0.0).to(values.dtype)


def _pair_blocks(
    student: DenseLogits, teacher: DenseLogits, rows: Tensor
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
