"""The largest entries of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctkd.kernels.compiling import compiled
from ctkd.kernels.numbers import as_ordered, widened

__all__ = ["put_top"]

_LEAST = np.int32(-(2**31))
_LOWER_BITS = 0xFFFFFFFF
# So many groups for each entry that is wanted, and at least so many.
_GROUPS_PER_ENTRY = 4
_LEAST_GROUPS = 512


@compiled
def _put_keys(row: Any, keys: Any) -> None:
    zero = np.float32(0.0)
    for column in range(keys.size):
        # A negative zero is a zero.
        keys[column] = as_ordered(widened(row[column]) + zero)


@compiled
def _count_of_top(keys: Any, bound: Any) -> int:
    count = 0
    for column in range(keys.size):
        count += keys[column] >= bound
    return count


@compiled
def _raise_to(maxima: Any, keys: Any) -> None:
    for group in range(maxima.size):
        maxima[group] = max(maxima[group], keys[group])


@compiled
def _bound_of_top(keys: Any, maxima: Any, k: int) -> Any:
    """At most the k-th largest key, and seldom much less."""
    if keys.size < 4 * maxima.size:
        return _LEAST
    maxima[:] = _LEAST
    for start in range(0, keys.size - maxima.size + 1, maxima.size):
        _raise_to(maxima, keys[start : start + maxima.size])
    # Of k groups with the largest maxima, each has a key that is no less than this.
    return np.partition(maxima, maxima.size - k)[maxima.size - k]


@compiled
def put_top(
    values: Any, starts: Any, first: int, last: int, width: int, ids: Any, entries: Any
) -> None:
    """Put the columns of the k largest entries of each row, (n, k), largest first, and these.

    Ties go to the lower column; nan counts as larger than all, or, where its sign says so, as
    smaller.

    Args:
        values: float32, or bfloat16 as uint16.
        starts: (n,) where each row begins in them.
        first: Row to begin with.
        last: Row before which to end.
        width: V, at least k.
        ids: (n, k) int64.
        entries: (n, k) float32.
    """
    k = ids.shape[1]
    keys = np.empty(width, np.int32)
    maxima = np.empty(max(_GROUPS_PER_ENTRY * k, _LEAST_GROUPS), np.int32)
    for index in range(first, last):
        _put_keys(values[starts[index] : starts[index] + width], keys)
        bound = _bound_of_top(keys, maxima, k)
        packed = np.empty(_count_of_top(keys, bound), np.int64)
        count = 0
        for column in range(width):
            if keys[column] >= bound:
                # Rising, so the largest key comes first, and of equal ones the lowest column.
                packed[count] = (~np.int64(keys[column]) << 32) | column
                count += 1
        packed.sort()
        for place in range(k):
            column = packed[place] & _LOWER_BITS
            ids[index, place] = column
            entries[index, place] = widened(values[starts[index] + column])
