"""Sizes and ends of chunks by a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.cuda.operators import kernels, operator

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
    sizes, first, last = torch.ops.ctkd.chunk_table(mask, chunk_ids, count)
    return sizes, first, last


def _table(mask: Tensor, chunk_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    size = chunk_ids.shape[0], count
    return chunk_ids.new_empty(size), chunk_ids.new_empty(size), chunk_ids.new_empty(size)


@operator("chunk_table", _table)
def _chunk_table(mask: Tensor, chunk_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    answers = _table(mask, chunk_ids, count)
    if answers[0].numel():
        kernels("row_kernels").chunk_table[(chunk_ids.shape[0],)](
            mask,
            chunk_ids,
            *answers,
            *mask.stride(),
            *chunk_ids.stride(),
            chunk_ids.shape[1],
            count,
            TILE=_TILE,
            num_warps=_WARPS,
        )
    return answers


def _cost(mask: Tensor, chunk_ids: Tensor, count: int) -> Cost:
    # Each answer is written, counted in and, the first positions, looked at again.
    table = 8 * chunk_ids.shape[0] * count
    return Cost(1, mask.nbytes + chunk_ids.nbytes + 3 * table + 6 * chunk_ids.nbytes + 2 * table, 0)


DECLARED["chunk_table"] = _cost
