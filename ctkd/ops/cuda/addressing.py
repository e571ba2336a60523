"""Where rows lie in memory, for a host that starts kernels and for the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ctkd.ops.rows import Rows

__all__ = ["Place", "place_of", "row_number", "row_start"]


class Place(NamedTuple):
    """First arguments of a kernel that reads or writes rows, in this order.

    Attributes:
        tensor: What holds them.
        index: (N,) int64, number of each row, -1 for none; any tensor where all rows are meant.
        length: Rows of a sequence, L.
        outer: Entries from a sequence to the next.
        inner: Entries from a row to the next.
    """

    tensor: Tensor
    index: Tensor  # type: ignore[assignment]
    length: int
    outer: int
    inner: int


def place_of(rows: Rows) -> tuple[Place, dict[str, Any]]:
    """Arguments of a kernel, and whether it is to look into the index: ``INDEXED``."""
    tensor = rows.tensor.detach()
    if tensor.ndim == 2:
        length, outer, inner = max(tensor.shape[0], 1), 0, tensor.stride(0)
    else:
        length, (outer, inner) = max(tensor.shape[1], 1), tensor.stride()[:2]
    index = tensor if rows.index is None else rows.index
    return Place(tensor, index, length, outer, inner), {"INDEXED": rows.index is not None}


@triton.jit
def row_number(index, number, INDEXED: tl.constexpr):
    """Row of the tensor that is the given one of N, -1 for none."""
    number = number.to(tl.int64)
    if INDEXED:
        number = tl.load(index + number)
    return number


@triton.jit
def row_start(row, length, outer, inner):
    """First entry of a row."""
    return (row // length) * outer + (row % length) * inner
