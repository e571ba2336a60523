"""Sizes, ends and sums of chunks by a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops.costs import Cost
from ctkd.ops.cuda.operators import Matrix, kernels, nbytes, operator

__all__ = ["chunk_sums", "chunk_table"]

_TILE = 64
_WARPS = 4


def chunk_table(mask: Tensor, chunk_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each chunk, its first and its last position, (B, C) each; 0 where it has none.

    Args:
        mask: (B, S) bool, scored positions.
        chunk_ids: (B, S) chunk of each position, below 0 for none.
        count: C.
    """
    sizes, first, last, _ = _chunk_table(mask, chunk_ids, None, count)
    return sizes, first, last


def chunk_sums(
    values: Tensor, mask: Tensor, chunk_ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Sums of a value per position over each chunk, (B, C) float64, and its tokens.

    Args:
        values: (B, S), differentiable.
        mask: As of `chunk_table`.
        chunk_ids: As of `chunk_table`.
        count: C.
    """
    found: tuple[Tensor, Tensor] = _Sums.apply(values, mask, chunk_ids, count)
    return found


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, mask: Tensor, chunk_ids: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        sizes, _, _, sums = _chunk_table(mask, chunk_ids, values, count)
        ctx.save_for_backward(mask, chunk_ids)
        ctx.mark_non_differentiable(sizes)
        return sums, sizes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _chunk_values(gradient, *ctx.saved_tensors), None, None, None


@dataclass(frozen=True)
class _Table:
    """Sizes, ends and sums of chunks, (B, C) each."""

    mask: Tensor
    chunk_ids: Tensor
    values: Tensor | None
    count: int

    def answers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size, make = (self.mask.shape[0], self.count), self.chunk_ids.new_empty
        sums = (0, 0) if self.values is None else size
        return make(size), make(size), make(size), make(sums, dtype=torch.float64)

    def start(self, answers: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        batch, positions = self.mask.shape
        if answers[0].numel():
            kernels("row_kernels").chunk_table[(-(-self.count // _TILE), batch)](
                Matrix.of(self.mask),
                Matrix.of(self.chunk_ids),
                None if self.values is None else Matrix.of(self.values),
                answers,
                positions,
                self.count,
                TILE=_TILE,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        # Each tile of chunks looks at all positions.
        read = nbytes(self.mask, self.chunk_ids, self.values) * -(-self.count // _TILE)
        answers = 3 if self.values is None else 4
        return Cost(1, read + 8 * answers * self.mask.shape[0] * self.count, 0)


@dataclass(frozen=True)
class _Values:
    """The number of each position's chunk, (B, S) float32; 0 where it is in none."""

    numbers: Tensor
    mask: Tensor
    chunk_ids: Tensor

    def answers(self) -> Tensor:
        return self.numbers.new_empty(self.mask.shape, dtype=torch.float32)

    def start(self, answers: Tensor) -> None:
        batch, positions = self.mask.shape
        if answers.numel():
            kernels("row_kernels").chunk_values[(-(-positions // _TILE), batch)](
                Matrix.of(self.numbers),
                Matrix.of(self.mask),
                Matrix.of(self.chunk_ids),
                answers,
                positions,
                TILE=_TILE,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        # At the most each position reads a number of its own.
        return Cost(1, nbytes(self.mask, self.chunk_ids) + 12 * self.mask.numel(), 0)


_chunk_table = operator("chunk_table", _Table)
_chunk_values = operator("chunk_values", _Values)
