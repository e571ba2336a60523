"""Largest entries of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctkd.ops.cpu.arrays import RowArray
from ctkd.ops.cpu.compiling import compiled
from ctkd.ops.cpu.numbers import as_ordered, widened

__all__ = ["top_k"]

_LEAST = np.int32(-(2**31))
_MOST = np.int32(2**31 - 1)
_LOWER_BITS = 0xFFFFFFFF
# The groups whose maxima bound the k-th largest key.
_GROUPS_PER_ENTRY = 4
_LEAST_GROUPS = 512


@compiled
def _keys_of(row: Any, keys: Any) -> None:
    zero = np.float32(0.0)
    for column in range(keys.size):
        # A negative zero becomes a positive one.
        keys[column] = as_ordered(widened(row[column]) + zero)


@compiled
def _count_at_least(keys: Any, bound: Any) -> int:
    count = 0
    for column in range(keys.size):
        count += keys[column] >= bound
    return count


@compiled
def _raise_to(maxima: Any, keys: Any) -> None:
    for group in range(maxima.size):
        maxima[group] = max(maxima[group], keys[group])


@compiled
def _lower_bound(keys: Any, maxima: Any, k: int) -> Any:
    """A lower bound of the k-th largest key, seldom far below it."""
    if keys.size < 4 * maxima.size:
        return _LEAST
    maxima[:] = _LEAST
    for start in range(0, keys.size - maxima.size + 1, maxima.size):
        _raise_to(maxima, keys[start : start + maxima.size])
    # The largest number that k maxima reach: the k-th largest of them.
    least, most = np.int64(_LEAST), np.int64(_MOST)
    while least < most:
        middle = (least + most + 1) >> 1
        if _count_at_least(maxima, np.int32(middle)) >= k:
            least = middle
        else:
            most = middle - 1
    return np.int32(least)


@compiled
def _columns_of_largest(keys: Any, maxima: Any, k: int) -> Any:
    """Columns of the k largest keys, and numbers without a meaning behind them."""
    bound = _lower_bound(keys, maxima, k)
    packed = np.empty(_count_at_least(keys, bound), np.int64)
    count = 0
    for column in range(keys.size):
        if keys[column] >= bound:
            # In ascending order the largest key is first, and of equal ones the lowest column.
            packed[count] = (~np.int64(keys[column]) << 32) | column
            count += 1
    packed.sort()
    for rank in range(k):
        packed[rank] &= _LOWER_BITS
    return packed


@compiled
def top_k(which: Any, rows: RowArray, width: int, ids: Any, entries: Any) -> None:
    """Columns and values of the k largest entries of rows, largest first.

    Ties go to the lower column; nan counts as larger than all numbers or, with its sign bit set, as
    smaller.

    Args:
        which: Indices of the rows to work on, int64.
        rows: n of them.
        width: V, at least k.
        ids: Output, (n, k) int64, of which k is at least 1.
        entries: Output, (n, k) float32.
    """
    k = ids.shape[1]
    keys = np.empty(width, np.int32)
    maxima = np.empty(max(_GROUPS_PER_ENTRY * k, _LEAST_GROUPS), np.int32)
    for index in which:
        row = rows.values[rows.starts[index] : rows.starts[index] + width]
        _keys_of(row, keys)
        columns = _columns_of_largest(keys, maxima, k)
        for rank in range(k):
            ids[index, rank] = columns[rank]
            entries[index, rank] = widened(row[columns[rank]])
