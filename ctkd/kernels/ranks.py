r"""The distance between two rows in descending order, without sorting them.

.. math:: \sum_k |s_{(k)} - t_{(k)}| = \int |N_s(x) - N_t(x)| \, dx

N counts the entries above x, and an entry is added or subtracted by the sign of that difference
where it stands. Counting entries by classes of nearby values says the sign for whole classes, but
for the few in which it changes; only entries of those are sorted, digit by digit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ctkd.kernels.compiling import compiled

__all__ = ["put_rank_signs"]

# A float32 of at least 0 is classed by its upper bits: exponent and six of the mantissa.
_DROPPED_BITS = np.int32(17)
# From 0 up to, but without, 2.
_CLASSES = 0x40000000 >> 17
_DIGIT_BITS = np.int32(9)
_DIGITS = (np.int32(0), _DIGIT_BITS)
# Runs up to this length are sorted by insertion.
_SHORT = 32


@compiled
def _bits(value: Any) -> Any:
    # A negative zero is a zero.
    return np.float32(value + np.float32(0.0)).view(np.int32)


@compiled
def _value_of(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@compiled
def _class_of(value: Any) -> Any:
    return np.uint32(_bits(value) >> _DROPPED_BITS)


@compiled
def _count(values: Any, columns: Any, factor: Any, counts: Any) -> bool:
    """Count entries by classes; False where one is in none."""
    # Neighbours are often of one class: two counters do not wait for each other.
    others = np.zeros(_CLASSES, np.int32)
    for place in range(1, columns.size, 2):
        first = _class_of(values[columns[place - 1]] * factor)
        second = _class_of(values[columns[place]] * factor)
        if max(first, second) >= _CLASSES:
            return False
        counts[first] += np.int32(1)
        others[second] += np.int32(1)
    if columns.size % 2:
        last = _class_of(values[columns[columns.size - 1]] * factor)
        if last >= _CLASSES:
            return False
        counts[last] += np.int32(1)
    for one in range(_CLASSES):
        counts[one] += others[one]
    return True


@compiled
def _sorted_mixed(
    values: Any, columns: Any, factor: Any, counts: Any, signs: Any, ends: Any
) -> tuple[Any, Any]:
    """Entries of mixed classes, descending, ties to the lower column: their bits and columns.

    Args:
        values: Of the row.
        columns: Which of them count, ascending.
        factor: What multiplies them.
        counts: Of each class.
        signs: Of each class; 0 where it is mixed.
        ends: (classes,) int64, room.
    """
    total = 0
    for one in range(counts.size - 1, -1, -1):
        if signs[one] == 0:
            ends[one] = total
            total += counts[one]
    bits, places = np.empty(total, np.int32), np.empty(total, np.int32)
    for place in range(columns.size):
        found = _bits(values[columns[place]] * factor)
        which = np.uint32(found >> _DROPPED_BITS)
        if signs[which] == 0:
            bits[ends[which]] = found
            places[ends[which]] = columns[place]
            ends[which] += 1
    # Each class is a run by now. In it, sort by the lower bits.
    first = 0
    for one in range(counts.size - 1, -1, -1):
        if signs[one] == 0 and counts[one] > 0:
            _sort_run(bits[first : first + counts[one]], places[first : first + counts[one]])
            first += counts[one]
    return bits, places


@compiled
def _sort_run(bits: Any, places: Any) -> None:
    """Sort a run descending, stable; all of it is in one class."""
    if bits.size <= _SHORT:
        for one in range(1, bits.size):
            key, place = bits[one], places[one]
            where = one
            while where > 0 and bits[where - 1] < key:
                bits[where], places[where] = bits[where - 1], places[where - 1]
                where -= 1
            bits[where], places[where] = key, place
        return
    least, most = bits[0], bits[0]
    for one in range(bits.size):
        least, most = min(least, bits[one]), max(most, bits[one])
    if least == most:
        return
    other_bits, other_places = np.empty_like(bits), np.empty_like(places)
    mask = (np.int32(1) << _DIGIT_BITS) - np.int32(1)
    ends = np.empty(mask + 1, np.int64)
    for digit in _DIGITS:
        ends[:] = 0
        for one in range(bits.size):
            ends[mask - ((bits[one] >> digit) & mask)] += 1
        total = 0
        for value in range(ends.size):
            ends[value], total = total, total + ends[value]
        for one in range(bits.size):
            value = mask - ((bits[one] >> digit) & mask)
            other_bits[ends[value]] = bits[one]
            other_places[ends[value]] = places[one]
            ends[value] += 1
        bits[:] = other_bits
        places[:] = other_places


@compiled
def _put_mixed(
    bits: Any, others: Any, tail_bits: Any, tail_count: int, ahead: Any, found: Any
) -> None:
    """Put the signs of entries in mixed classes, given the other side's.

    Args:
        bits: Descending.
        others: Descending.
        tail_bits: Of one more entry of the other side,
        tail_count: which it has so often.
        ahead: For each class, how many more entries in no mixed class stand above it than the
            other side has there.
        found: (n,) int8 takes the signs.
    """
    at_least = more = first = 0
    while first < bits.size:
        value, last = bits[first], first + 1
        while last < bits.size and bits[last] == value:
            last += 1
        while at_least < others.size and others[at_least] >= value:
            at_least += 1
        while more < others.size and others[more] > value:
            more += 1
        lead = ahead[value >> _DROPPED_BITS]
        larger_from = at_least - lead + (tail_count if tail_bits >= value else 0)
        smaller_until = more - lead + (tail_count if tail_bits > value else 0)
        for rank in range(first, last):
            found[rank] = (rank >= larger_from) - (rank < smaller_until)
        first = last


@compiled
def _sum_of_mixed(bits: Any, tail_bits: Any, tail_count: int, others: Any, ahead: Any) -> float:
    """Sum up the entries of mixed classes, each with its sign, given the other side's.

    Args:
        bits: Descending.
        tail_bits: Of one more entry,
        tail_count: which is there so often.
        others: Descending.
        ahead: For each class, how many more entries in no mixed class the other side has above it.
    """
    total = 0.0
    at_least = more = place = rank = 0
    waits = tail_count > 0
    while place < bits.size or waits:
        is_tail = waits and (place == bits.size or tail_bits >= bits[place])
        value = tail_bits if is_tail else bits[place]
        count = 0
        if is_tail:
            count, waits = tail_count, False
        while place < bits.size and bits[place] == value:
            count += 1
            place += 1
        while at_least < others.size and others[at_least] >= value:
            at_least += 1
        while more < others.size and others[more] > value:
            more += 1
        lead = -ahead[value >> _DROPPED_BITS]
        above = rank + count - max(rank, at_least - lead)
        below = min(rank + count, more - lead) - rank
        total += np.float64(_value_of(value)) * (max(above, 0) - max(below, 0))
        rank += count
    return total


@compiled
def put_rank_signs(
    values: Any,
    columns: Any,
    factor: Any,
    others: Any,
    other_columns: Any,
    other_factor: Any,
    tail: Any,
    tail_count: int,
    weight: Any,
    out: Any,
) -> float:
    """Put weight times sign times entry, by the sign of the difference at each entry's rank.

    Args:
        values: One side's float32, from 0 up to, but without, 2.
        columns: Which of them count, ascending, uint32.
        factor: What multiplies them.
        others: The other side's.
        other_columns: As the columns.
        other_factor: As the factor.
        tail: One more entry of the other side, float32,
        tail_count: which it has so often.
        weight: Multiplies what is put.
        out: Takes it in these columns, as wide as values.

    Returns:
        The distance; nan, and nan in all columns, where any entry lies elsewhere.
    """
    counts, other_counts = np.zeros(_CLASSES, np.int32), np.zeros(_CLASSES, np.int32)
    tail_class = _class_of(tail)
    if not (
        tail_class < _CLASSES
        and _count(values, columns, factor, counts)
        and _count(others, other_columns, other_factor, other_counts)
    ):
        for place in range(columns.size):
            out[columns[place]] = np.float32(np.nan)
        return np.nan
    other_counts[tail_class] += np.int32(tail_count)
    signs, ahead = np.zeros(_CLASSES, np.int8), np.zeros(_CLASSES, np.int32)
    lead = lead_unmixed = np.int32(0)
    is_mixed = False
    for one in range(_CLASSES - 1, -1, -1):
        ahead[one] = lead_unmixed
        if lead >= other_counts[one]:
            signs[one] = 1
        elif lead + counts[one] <= 0:
            signs[one] = -1
        else:
            is_mixed = True
        lead += counts[one] - other_counts[one]
        if signs[one] != 0:
            lead_unmixed += counts[one] - other_counts[one]
    distance = 0.0
    for place in range(columns.size):
        column = columns[place]
        value = values[column] * factor
        value *= np.float32(signs[_class_of(value)])
        distance += np.float64(value)
        out[column] = value * weight
    for place in range(other_columns.size):
        value = others[other_columns[place]] * other_factor
        distance -= np.float64(value * np.float32(signs[_class_of(value)]))
    distance -= np.float64(tail) * np.float64(signs[tail_class]) * tail_count
    if not is_mixed:
        return distance
    other_counts[tail_class] -= np.int32(tail_count)
    tail_bits = _bits(tail)
    mixed_tail_count = tail_count if signs[tail_class] == 0 else 0
    ends = np.empty(_CLASSES, np.int64)
    bits, places = _sorted_mixed(values, columns, factor, counts, signs, ends)
    other_bits, _ = _sorted_mixed(others, other_columns, other_factor, other_counts, signs, ends)
    found = np.empty(bits.size, np.int8)
    _put_mixed(bits, other_bits, tail_bits, mixed_tail_count, ahead, found)
    for rank in range(bits.size):
        value = np.float32(found[rank]) * _value_of(bits[rank])
        distance += np.float64(value)
        out[places[rank]] = value * weight
    return distance + _sum_of_mixed(other_bits, tail_bits, mixed_tail_count, bits, ahead)
