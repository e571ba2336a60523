"""Where rows lie in memory, as `ctkd.ops.cuda.operators.place_of` gives it to kernels."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["row_number", "row_start"]


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
