r"""Distance between two rows in descending order, without sorting them.

.. math:: \sum_k |s_{(k)} - t_{(k)}| = \int |N_s(x) - N_t(x)| \, dx

N counts the entries above x, and an entry is added or subtracted by the sign of that difference
at its own value. A histogram of each row gives the sign for all entries of most bins at once. Only
entries of the remaining, mixed bins, in which the sign changes, are sorted, digit by digit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ctkd.ops.cpu.compiling import compiled

__all__ = ["Entries", "rank_signs"]

# The bin of a float32 of at least 0 is its upper bits: the exponent and six of the mantissa.
_DROPPED_BITS = np.int32(17)
# Of values from 0 up to, but without, 2.
_BINS = 0x40000000 >> 17
_DIGIT_BITS = np.int32(9)
_DIGITS = (np.int32(0), _DIGIT_BITS)
# Runs up to this length are sorted by insertion.
_SHORT = 32


class Entries(NamedTuple):
    """Some entries of a row.

    Attributes:
        values: The row, float32, from 0 up to, but without, 2.
        columns: Which columns count, ascending, uint32.
        factor: Multiplies the values, float32.
    """

    values: Any
    columns: Any
    factor: Any


class _Tail(NamedTuple):
    """One more value of the other row, which occurs ``count`` times there."""

    bits: Any
    count: Any


class _Signs(NamedTuple):
    """Signs of whole bins.

    Attributes:
        signs: int8, 0 where a bin is mixed.
        surpluses: int32, entries in bins above that are not mixed, minus the other row's there.
        is_mixed: Whether any bin is.
    """

    signs: Any
    surpluses: Any
    is_mixed: Any


class _Sorted(NamedTuple):
    """Entries of mixed bins, descending, ties to the lower column."""

    bits: Any
    columns: Any


@compiled
def _bits_of(value: Any) -> Any:
    # A negative zero becomes a positive one.
    return np.float32(value + np.float32(0.0)).view(np.int32)


@compiled
def _value_of(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@compiled
def _bin_of(value: Any) -> Any:
    return np.uint32(_bits_of(value) >> _DROPPED_BITS)


@compiled
def _histogram(entries: Entries, counts: Any) -> bool:
    """Count the entries in each bin; False where one is in none."""
    values, columns, factor = entries.values, entries.columns, entries.factor
    # Neighbors are often in one bin: with two counters, neither waits for the other.
    odd_counts = np.zeros(_BINS, np.int32)
    for index in range(1, columns.size, 2):
        even = _bin_of(values[columns[index - 1]] * factor)
        odd = _bin_of(values[columns[index]] * factor)
        if max(even, odd) >= _BINS:
            return False
        counts[even] += np.int32(1)
        odd_counts[odd] += np.int32(1)
    if columns.size % 2:
        last = _bin_of(values[columns[columns.size - 1]] * factor)
        if last >= _BINS:
            return False
        counts[last] += np.int32(1)
    for key in range(_BINS):
        counts[key] += odd_counts[key]
    return True


@compiled
def _signs_of_bins(counts: Any, other_counts: Any) -> Any:
    signs, surpluses = np.zeros(_BINS, np.int8), np.zeros(_BINS, np.int32)
    surplus = surplus_unmixed = np.int32(0)
    is_mixed = False
    for key in range(_BINS - 1, -1, -1):
        surpluses[key] = surplus_unmixed
        if surplus >= other_counts[key]:
            signs[key] = 1
        elif surplus + counts[key] <= 0:
            signs[key] = -1
        else:
            is_mixed = True
        surplus += counts[key] - other_counts[key]
        if signs[key] != 0:
            surplus_unmixed += counts[key] - other_counts[key]
    return _Signs(signs, surpluses, is_mixed)


@compiled
def _sorted_mixed(entries: Entries, counts: Any, signs: Any, ends: Any) -> Any:
    """Sort the entries of mixed bins.

    Args:
        entries: Of the row.
        counts: Entries in each bin.
        signs: Of each bin; 0 where it is mixed.
        ends: Buffer, one int64 for each bin.
    """
    values, factor = entries.values, entries.factor
    total = 0
    for key in range(counts.size - 1, -1, -1):
        if signs[key] == 0:
            ends[key] = total
            total += counts[key]
    bits, columns = np.empty(total, np.int32), np.empty(total, np.int32)
    for index in range(entries.columns.size):
        column = entries.columns[index]
        entry = _bits_of(values[column] * factor)
        entry_bin = np.uint32(entry >> _DROPPED_BITS)
        if signs[entry_bin] == 0:
            bits[ends[entry_bin]] = entry
            columns[ends[entry_bin]] = column
            ends[entry_bin] += 1
    # Each bin is a run now. Within it, sort by the lower bits.
    first = 0
    for key in range(counts.size - 1, -1, -1):
        if signs[key] == 0 and counts[key] > 0:
            _sort_run(bits[first : first + counts[key]], columns[first : first + counts[key]])
            first += counts[key]
    return _Sorted(bits, columns)


@compiled
def _insertion_sort(bits: Any, columns: Any) -> None:
    for index in range(1, bits.size):
        entry, column = bits[index], columns[index]
        target = index
        while target > 0 and bits[target - 1] < entry:
            bits[target], columns[target] = bits[target - 1], columns[target - 1]
            target -= 1
        bits[target], columns[target] = entry, column


@compiled
def _sort_run(bits: Any, columns: Any) -> None:
    """Sort the entries of one bin in place, descending and stable."""
    if bits.size <= _SHORT:
        _insertion_sort(bits, columns)
        return
    least, most = bits[0], bits[0]
    for index in range(bits.size):
        least, most = min(least, bits[index]), max(most, bits[index])
    if least == most:
        return
    sorted_bits, sorted_columns = np.empty_like(bits), np.empty_like(columns)
    mask = (np.int32(1) << _DIGIT_BITS) - np.int32(1)
    ends = np.empty(mask + 1, np.int64)
    for shift in _DIGITS:
        ends[:] = 0
        for index in range(bits.size):
            ends[mask - ((bits[index] >> shift) & mask)] += 1
        total = 0
        for digit in range(ends.size):
            ends[digit], total = total, total + ends[digit]
        for index in range(bits.size):
            digit = mask - ((bits[index] >> shift) & mask)
            sorted_bits[ends[digit]] = bits[index]
            sorted_columns[ends[digit]] = columns[index]
            ends[digit] += 1
        # To assign whole slices would take seconds to compile: shapes might differ.
        for index in range(bits.size):
            bits[index], columns[index] = sorted_bits[index], sorted_columns[index]


@compiled
def _signs_of_mixed(bits: Any, others: Any, tail: _Tail, surpluses: Any, signs: Any) -> None:
    """Signs of the entries of mixed bins.

    Args:
        bits: The entries, descending.
        others: Those of the other row, descending.
        tail: Of the other row.
        surpluses: As `_Signs` has them.
        signs: Output, (n,) int8.
    """
    at_least = above = first = 0
    while first < bits.size:
        entry, last = bits[first], first + 1
        while last < bits.size and bits[last] == entry:
            last += 1
        while at_least < others.size and others[at_least] >= entry:
            at_least += 1
        while above < others.size and others[above] > entry:
            above += 1
        surplus = surpluses[entry >> _DROPPED_BITS]
        larger_from = at_least - surplus + (tail.count if tail.bits >= entry else 0)
        smaller_until = above - surplus + (tail.count if tail.bits > entry else 0)
        for rank in range(first, last):
            signs[rank] = (rank >= larger_from) - (rank < smaller_until)
        first = last


@compiled
def _sum_of_mixed(others: Any, tail: _Tail, bits: Any, surpluses: Any) -> float:
    """Sum of the other row's entries of mixed bins, each with its own sign.

    Args:
        others: The other row's entries, descending.
        tail: Of the other row.
        bits: The entries of this row, descending.
        surpluses: As `_Signs` has them, of this row.
    """
    total = 0.0
    at_least = above = index = rank = 0
    has_tail = tail.count > 0
    while index < others.size or has_tail:
        is_tail = has_tail and (index == others.size or tail.bits >= others[index])
        entry = tail.bits if is_tail else others[index]
        count = 0
        if is_tail:
            count, has_tail = tail.count, False
        while index < others.size and others[index] == entry:
            count += 1
            index += 1
        while at_least < bits.size and bits[at_least] >= entry:
            at_least += 1
        while above < bits.size and bits[above] > entry:
            above += 1
        surplus = -surpluses[entry >> _DROPPED_BITS]
        larger = rank + count - max(rank, at_least - surplus)
        smaller = min(rank + count, above - surplus) - rank
        total += np.float64(_value_of(entry)) * (max(larger, 0) - max(smaller, 0))
        rank += count
    return total


@compiled
def _unmixed_distance(
    entries: Entries, others: Entries, signs: Any, weight: Any, out: Any
) -> float:
    """Write the entries with the signs of their bins, and return their part of the distance."""
    distance = 0.0
    for index in range(entries.columns.size):
        column = entries.columns[index]
        value = entries.values[column] * entries.factor
        value *= np.float32(signs[_bin_of(value)])
        distance += np.float64(value)
        out[column] = value * weight
    for index in range(others.columns.size):
        value = others.values[others.columns[index]] * others.factor
        distance -= np.float64(value * np.float32(signs[_bin_of(value)]))
    return distance


@compiled
def rank_signs(
    entries: Entries, others: Entries, tail: Any, tail_count: int, weight: Any, out: Any
) -> float:
    """Weight times entry, by the sign of the difference at the entry's rank; and the distance.

    Args:
        entries: Of one row.
        others: Of the other row.
        tail: One more value of the other row, float32.
        tail_count: How often the other row has it.
        weight: float32.
        out: Output, float32, as wide as the row; other columns than those of the entries are left.

    Returns:
        The distance; nan, and nan in the entries' columns, where a value is out of range.
    """
    counts, other_counts = np.zeros(_BINS, np.int32), np.zeros(_BINS, np.int32)
    tail_bin = _bin_of(tail)
    if not (tail_bin < _BINS and _histogram(entries, counts) and _histogram(others, other_counts)):
        for index in range(entries.columns.size):
            out[entries.columns[index]] = np.float32(np.nan)
        return np.nan
    other_counts[tail_bin] += np.int32(tail_count)
    bins = _signs_of_bins(counts, other_counts)
    signs, surpluses = bins.signs, bins.surpluses
    distance = _unmixed_distance(entries, others, signs, weight, out)
    distance -= np.float64(tail) * np.float64(signs[tail_bin]) * tail_count
    if not bins.is_mixed:
        return distance
    other_counts[tail_bin] -= np.int32(tail_count)
    mixed_tail = _Tail(_bits_of(tail), tail_count if signs[tail_bin] == 0 else 0)
    ends = np.empty(_BINS, np.int64)
    mixed = _sorted_mixed(entries, counts, signs, ends)
    other_mixed = _sorted_mixed(others, other_counts, signs, ends)
    mixed_signs = np.empty(mixed.bits.size, np.int8)
    _signs_of_mixed(mixed.bits, other_mixed.bits, mixed_tail, surpluses, mixed_signs)
    for rank in range(mixed.bits.size):
        value = np.float32(mixed_signs[rank]) * _value_of(mixed.bits[rank])
        distance += np.float64(value)
        out[mixed.columns[rank]] = value * weight
    return distance + _sum_of_mixed(other_mixed.bits, mixed_tail, mixed.bits, surpluses)
