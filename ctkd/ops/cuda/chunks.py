"""Sizes and ends of chunks by a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctkd.ops.costs import Cost
from ctkd.ops.cuda.operators import Matrix, kernels, operator

__all__ = ["chunk_table"]

_TILE = 1024
_WARPS = 4


def chunk_table(mask: Tensor, chunk_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each chunk, its first and its last position, (B, C) each; 0 where it has none.

    Args:
        mask: (B, S) bool, scored positions.
        chunk_ids: (B, S) chunk of each position, below 0 for none.
        count: C.
    """
    sizes, first, last = _chunk_table(mask, chunk_ids, count)
    return sizes, first, last


@dataclass(frozen=True)
class _Table:
    """Arguments as of `chunk_table`."""

    mask: Tensor
    chunk_ids: Tensor
    count: int

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        size = self.chunk_ids.shape[0], self.count
        make = self.chunk_ids.new_empty
        return make(size), make(size), make(size)

    def start(self, answers: tuple[Tensor, Tensor, Tensor]) -> None:
        if answers[0].numel():
            batch, positions = self.chunk_ids.shape
            kernels("row_kernels").chunk_table[(batch,)](
                Matrix.of(self.mask),
                Matrix.of(self.chunk_ids),
                answers,
                positions,
                self.count,
                TILE=_TILE,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        # Each answer is written, counted in and, the first positions, looked at again.
        table = 8 * self.chunk_ids.shape[0] * self.count
        read = self.mask.nbytes + 7 * self.chunk_ids.nbytes
        return Cost(1, read + 5 * table, 0)


_chunk_table = operator("chunk_table", _Table)
