"""Where rows lie in memory, given to kernels as a `ctkd.ops.cuda.operators.Place`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["row_number", "row_start"]


@triton.jit
def row_number(rows, number):
    """Row of the tensor that is the given one of N, -1 for none."""
    number = number.to(tl.int64)
    if rows.numbers is not None:
        number = tl.load(rows.numbers + number)
    return number


@triton.jit
def row_start(rows, row):
    """First entry of a row."""
    return (row // rows.length) * rows.outer + (row % rows.length) * rows.inner
