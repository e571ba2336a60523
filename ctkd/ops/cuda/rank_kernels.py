"""Kernels of distances between rows in descending order, by counting classes instead of sorting.

Entries of 16 bits have few values that matter: a logit is in a class with those of the same bits.
Entries next to 0, whose probabilities are equal in float32, are in one class; those so far from 0
that the next value is out of reach of an exponential are in one, too, of which only the largest
logit of the row counts. So a histogram of a row holds its softmax denominator and all of its ranks.

A class of c entries behind f larger ones has ranks f to f + c, in the order of columns. Of these
the entries before the rank of the other row's first entry that is not larger have the sign -1, and
those from its first smaller entry on +1. Classes of one sign need no more. In the others, entries
are counted off in the order of columns: a tile's are collected, and ranked by comparing each with
those before it.

A program works on one row after another, with scratch memory of its own. What its threads write
there is read by others after a barrier.
"""

# The language gives types and shapes that no annotation can name.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ctkd.ops.cuda.addressing import row_number, row_start
from ctkd.ops.cuda.divergence_kernels import Part, fold_sum, shared_terms, total_of_lanes

__all__ = ["gold_rows", "sorted_uld_rows", "uld_rows"]

# Above all ranks.
_FAR = tl.constexpr(1 << 30)
_LOG_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


class _Memory(NamedTuple):
    """Scratch memory of a program: classes of the student twice, of the teacher, and a tile."""

    counts: Any
    ends: Any
    others: Any
    waiting: Any


class _Side(NamedTuple):
    """A row whose classes are counted.

    Attributes:
        row: Its first entry.
        width: Its columns.
        counts: Entries of each class, then of each and those above.
        classes: A `ctkd.ops.cuda.row_losses.Classes`.
        top: The largest logit.
        is_far: Whether that is in the last class.
        scale: With the shift makes a logit log2 of a probability: (logit - top) * scale - shift.
        shift: See there.
    """

    row: Any
    width: Any
    counts: Any
    classes: Any
    top: Any
    is_far: Any
    scale: Any
    shift: Any


class _Factors(NamedTuple):
    """Of a gradient ``p (weight * sign - total) / temperature``; no weight: no signs."""

    weight: Any
    total: Any
    temperature: Any


@triton.jit
def _bits(pointers, mask):
    """Bits of 16-bit entries as int32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _logits_of(bits, row):
    """Logits of bits of a row's entries."""
    if row.dtype.element_ty == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _class_of(bits, classes):
    """Class of entries, and whether they are far from 0, which is the last class, 2 half + 1."""
    half = classes.half
    offset = tl.maximum((bits & 0x7FFF) - classes.low, 0)
    is_far = offset > half
    near = tl.where(bits > 0x7FFF, half - offset, half + offset)
    return tl.where(is_far, 2 * half + 1, near), is_far


@triton.jit
def _class_log_probs(number, side):
    """log2 of the probabilities of classes, ascending; the last class is that of the top logit."""
    half, top = side.classes.half, side.top
    offset = tl.abs(number - half)
    bits = tl.where(offset > 0, offset + side.classes.low, 0) + tl.where(number < half, 0x8000, 0)
    logits = tl.where(side.is_far, float("-inf"), _logits_of(bits, side.row))
    return (tl.where(number > 2 * half, top, logits) - top) * side.scale - side.shift


@triton.jit
def _first_class(bound, side, STRICT: tl.constexpr, STEPS: tl.constexpr):
    """First class whose log-probability is at least, or STRICT above, each bound; one more: none.

    STEPS is log2 of the number of classes, rounded up.
    """
    first = tl.zeros_like(bound).to(tl.int32)
    last = first + 2 * side.classes.half + 2
    for _ in range(STEPS):
        middle = (first + last) >> 1
        found = _class_log_probs(middle, side)
        if STRICT:
            is_enough = found > bound
        else:
            is_enough = found >= bound
        is_open = first < last
        last = tl.where(is_open & is_enough, middle, last)
        first = tl.where(is_open & (is_enough == 0), middle + 1, first)
    return first


@triton.jit
def _clear(counts, size, CLASSES: tl.constexpr):
    zeros = tl.zeros((CLASSES,), tl.int32)
    for first in range(0, size, CLASSES):
        tl.store(counts + first + tl.arange(0, CLASSES), zeros)


@triton.jit
def _count(row, width, partners, counts, classes, scale, TILE: tl.constexpr):
    """Count the entries of each class but the last; the largest logit, nan if there is one.

    With partners only entries without one; and log2 of the softmax denominator of all.
    """
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    sums = tl.zeros((TILE,), tl.float32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        bits = _bits(row + columns, inside)
        logits = tl.where(inside, _logits_of(bits, row), float("-inf"))
        if partners is not None:
            largest, sums = fold_sum(largest, sums, logits[None, :], scale)
            inside = inside & (tl.load(partners + columns, mask=inside, other=0) < 0)
        else:
            largest = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
        number, is_far = _class_of(bits, classes)
        tl.atomic_add(counts + number, 1, mask=inside & (is_far == 0), sem="relaxed")
    if partners is not None:
        top, total = total_of_lanes(largest, sums, scale)
        is_nan = total != total
        log_total = tl.log2(total)
    else:
        top = tl.max(largest, 0)
        is_nan = tl.max((largest != largest).to(tl.int32), 0) > 0
        log_total = 0.0
    return tl.where(is_nan, float("nan"), top), log_total


@triton.jit
def _count_top(row, width, partners, top, TILE: tl.constexpr):
    """Entries that are the largest."""
    count = tl.zeros((TILE,), tl.int32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        logits = _logits_of(_bits(row + columns, inside), row)
        if partners is not None:
            inside = inside & (tl.load(partners + columns, mask=inside, other=0) < 0)
        count += (inside & (logits == top)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _is_far(top, far):
    """True of nan, too."""
    return (tl.abs(top) < far) == 0


@triton.jit
def _counted(given, row, partners, counts, TILE: tl.constexpr):
    """A row of a side with its classes counted, and log2 of its softmax denominator.

    With partners only columns without one are counted. Triton before 3.7 returns no None.
    """
    entries, width = given.rows.tensor + row_start(given.rows, row), given.rows.width
    classes, scale = given.classes, given.scale
    top, log_total = _count(entries, width, partners, counts, classes, scale, TILE)
    is_far = _is_far(top, classes.far)
    if is_far:
        tops = _count_top(entries, width, partners, top, TILE)
        if partners is None:
            tops = tl.maximum(tops, 1)
        tl.store(counts + 2 * classes.half + 1, tops)
    return _Side(entries, width, counts, classes, top, is_far, scale, 0.0), log_total


@triton.jit
def _shifted(side, shift):
    """The same side with probabilities in place of their ratios to the largest."""
    row, width, counts, classes, top, is_far, scale, _ = side
    return _Side(row, width, counts, classes, top, is_far, scale, shift)


@triton.jit
def _sum_up(side, CLASSES: tl.constexpr):
    """Add to the count of each class those above; the sum of all entries' powers of 2."""
    counts, size = side.counts, side.classes.size
    sums = tl.zeros((CLASSES,), tl.float32)
    above = 0
    for done in range(0, size, CLASSES):
        number = size - CLASSES - done + tl.arange(0, CLASSES)
        count = tl.load(counts + number)
        log_probs = tl.where(count > 0, _class_log_probs(number, side), float("-inf"))
        sums += count.to(tl.float32) * tl.exp2(log_probs)
        tl.debug_barrier()
        tl.store(counts + number, tl.cumsum(count, 0, reverse=True) + above)
        above += tl.sum(count, 0)
    return tl.sum(sums, 0)


@triton.jit
def _signed_mass(side, other, ends, STEPS: tl.constexpr, CLASSES: tl.constexpr):
    """Sum of a row's probabilities, each with its sign against the other row's at its rank.

    With ends, counts are overwritten by the end of the entries of sign -1 within their class, and
    ``ends`` by that of the entries of sign 0; both are far away where a class has one sign. STEPS
    is log2 of the number of the other's classes, rounded up.
    """
    counts, others, size = side.counts, other.counts, side.classes.size
    sums = tl.zeros((CLASSES,), tl.float32)
    for first in range(0, size, CLASSES):
        number = first + tl.arange(0, CLASSES)
        rank = tl.load(counts + number + 1, mask=number + 1 < size, other=0)
        count = tl.load(counts + number) - rank
        if tl.max(count, 0) > 0:
            log_probs = tl.where(count > 0, _class_log_probs(number, side), float("-inf"))
            place = _first_class(log_probs, other, False, STEPS)
            is_any = place < 2 * other.classes.half + 2
            not_smaller = tl.load(others + place, mask=is_any, other=0)
            larger = not_smaller
            is_equal = is_any & (_class_log_probs(place, other) == log_probs)
            if tl.max((is_equal & (count > 0)).to(tl.int32), 0) > 0:
                place = _first_class(log_probs, other, True, STEPS)
                larger = tl.load(others + place, mask=place < 2 * other.classes.half + 2, other=0)
            behind = tl.minimum(tl.maximum(larger - rank, 0), count)
            ahead = tl.minimum(tl.maximum(rank + count - not_smaller, 0), count)
            sums += (ahead - behind).to(tl.float32) * tl.exp2(log_probs)
            if ends is not None:
                is_open = (behind < count) & (ahead < count) & (behind + ahead > 0)
                far = tl.where(behind == count, _FAR, -_FAR)
                tl.debug_barrier()
                tl.store(counts + number, tl.where(is_open, behind, far))
                far = tl.where(ahead == count, -_FAR, _FAR)
                tl.store(ends + number, tl.where(is_open, count - ahead, far))
    return tl.sum(sums, 0)


@triton.jit
def _count_off(out, columns, live, side, ends, factors, GROUP: tl.constexpr):
    """Write the gradient of the next entries of classes of several signs, ascending columns."""
    minus_ends = side.counts
    weight, total, temperature = factors
    place = tl.arange(0, GROUP)
    bits = _bits(side.row + columns, live)
    number, _ = _class_of(bits, side.classes)
    minus_end = tl.load(minus_ends + number, mask=live, other=0)
    zero_end = tl.load(ends + number, mask=live, other=0)
    is_same = (number[:, None] == number[None, :]) & live[None, :]
    is_before = place[None, :] < place[:, None]
    rank = tl.sum((is_same & is_before).to(tl.int32), 1)
    together = tl.sum(is_same.to(tl.int32), 1)
    sign = (rank >= zero_end).to(tl.float32) - (rank < minus_end).to(tl.float32)
    # Where there is no entry, nothing may overflow.
    logits = tl.where(live, _logits_of(bits, side.row), float("-inf"))
    probs = tl.exp2((logits - side.top) * side.scale - side.shift)
    gradient = probs * (weight * sign - total) / temperature
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=live)
    # What is left of each class for the next entries; all of one class write the same.
    tl.debug_barrier()
    tl.store(minus_ends + number, minus_end - together, mask=live)
    tl.store(ends + number, zero_end - together, mask=live)
    tl.debug_barrier()


@triton.jit
def _matched_sums(side, match, KIND: tl.constexpr, TILE: tl.constexpr):
    """Divergence on shared columns, and the sum of its derivatives by log-probabilities."""
    part, other, settings = match
    values = tl.zeros((TILE,), tl.float32)
    totals = tl.zeros((TILE,), tl.float32)
    for first in range(0, side.width, TILE):
        columns = first + tl.arange(0, TILE)
        partner = tl.load(settings.partners + columns, mask=columns < side.width, other=-1)
        logits = _logits_of(_bits(side.row + columns, partner >= 0), side.row)
        terms, changes, _ = shared_terms(logits, partner, part, other, settings, KIND)
        values += terms
        totals += changes
    return tl.sum(values, 0), tl.sum(totals, 0)


@triton.jit
def _write_gradient(out, number, side, memory, factors, partners, match, FORM: tl.constexpr):
    """Write the gradient of a row's logits.

    Where there are partners, columns with one have no sign, but the terms of a divergence. The
    side makes probabilities that sum to 1, and its classes are marked as `_signed_mass` does.
    """
    TILE: tl.constexpr = FORM.tile
    weight, total, temperature = factors
    target = row_number(out, number)
    tl.debug_barrier()
    if target >= 0:
        gradients = out.tensor + row_start(out, target)
        for first in range(0, out.width, TILE):
            columns = first + tl.arange(0, TILE)
            inside = columns < side.width
            bits = _bits(side.row + columns, inside)
            logits = tl.where(inside, _logits_of(bits, side.row), float("-inf"))
            probs = tl.exp2((logits - side.top) * side.scale - side.shift)
            change = tl.zeros((TILE,), tl.float32)
            is_ranked = inside
            if partners is not None:
                part, other, settings = match
                partner = tl.load(partners + columns, mask=inside, other=-1)
                is_ranked = inside & (partner < 0)
                if settings.matched_weight is not None:
                    terms, changes, _ = shared_terms(
                        logits, partner, part, other, settings, FORM.kind
                    )
                    change = changes * settings.matched_weight
            is_open = is_ranked & (columns < 0)
            if weight is not None:
                number_of_class, is_far = _class_of(bits, side.classes)
                # Of what is far only the largest has a probability, so that others need no sign.
                is_ranked = is_ranked & ((is_far == 0) | (logits == side.top))
                minus_end = tl.load(side.counts + number_of_class, mask=is_ranked, other=-_FAR)
                zero_end = tl.load(memory.ends + number_of_class, mask=is_ranked, other=_FAR)
                is_open = (minus_end > -_FAR) & (minus_end < _FAR)
                sign = (zero_end <= 0).to(tl.float32) - (minus_end > 0).to(tl.float32)
                change += probs * (weight * sign)
            gradient = tl.where(inside, (change - probs * total) / temperature, 0.0)
            tl.store(
                gradients + columns,
                gradient.to(gradients.dtype.element_ty),
                mask=(columns < out.width) & (is_open == 0),
            )
            if weight is not None:
                opened = is_open.to(tl.int32)
                count = tl.sum(opened, 0)
                if count > 0:
                    tl.debug_barrier()
                    tl.store(memory.waiting + tl.cumsum(opened, 0) - 1, columns, mask=is_open)
                    tl.debug_barrier()
                    for begin in range(0, count, FORM.group):
                        place = begin + tl.arange(0, FORM.group)
                        live = place < count
                        column = tl.load(memory.waiting + place, mask=live, other=0)
                        _count_off(gradients, column, live, side, memory.ends, factors, FORM.group)


@triton.jit
def _memory_of(scratch, student, teacher, TILE: tl.constexpr):
    """This program's part of the scratch memory."""
    size, other_size = student.classes.size, teacher.classes.size
    counts = scratch + tl.program_id(0).to(tl.int64) * (2 * size + other_size + TILE)
    return _Memory(counts, counts + size, counts + 2 * size, counts + 2 * size + other_size)


@triton.jit
def _clear_both(memory, student, teacher, CLASSES: tl.constexpr):
    """Zeros for counts, which no thread needs any more."""
    tl.debug_barrier()
    _clear(memory.counts, student.classes.size, CLASSES)
    _clear(memory.others, teacher.classes.size, CLASSES)
    tl.debug_barrier()


@triton.jit
def uld_rows(values, student, teacher, out, scratch, count, FORM: tl.constexpr):
    """Distance between the probabilities of 16-bit rows in descending order.

    Args:
        values: (N,) what is written.
        student: A `ctkd.ops.cuda.row_losses.Counted`.
        teacher: A `ctkd.ops.cuda.row_losses.Counted`.
        out: Rows that gradients are written to, if there are any.
        scratch: A `_Memory` for each program.
        count: N.
        FORM: A `ctkd.ops.cuda.row_losses.CountingForm`.
    """
    # Triton before 3.7 loses a number 1 of a tuple in a tuple within a loop, if it is not assigned.
    student, teacher = student, teacher
    memory = _memory_of(scratch, student, teacher, FORM.tile)
    for begin in range(0, count, tl.num_programs(0)):
        number = begin + tl.program_id(0)
        row = tl.program_id(0).to(tl.int64) * 0 - 1
        other_row = row
        if number < count:
            row = row_number(student.rows, number)
            other_row = row_number(teacher.rows, number)
            tl.store(values + number, 0.0)
        if (row >= 0) & (other_row >= 0):
            _clear_both(memory, student, teacher, FORM.classes)
            ratios, _ = _counted(student, row, None, memory.counts, FORM.tile)
            other_ratios, _ = _counted(teacher, other_row, None, memory.others, FORM.tile)
            tl.debug_barrier()
            side = _shifted(ratios, tl.log2(_sum_up(ratios, FORM.classes)))
            other = _shifted(other_ratios, tl.log2(_sum_up(other_ratios, FORM.classes)))
            tl.debug_barrier()
            value = _signed_mass(other, side, None, FORM.steps[0], FORM.classes)
            tl.debug_barrier()
            ends = None if out.tensor is None else memory.ends
            total = _signed_mass(side, other, ends, FORM.steps[1], FORM.classes)
            tl.store(values + number, value + total)
            if out.tensor is not None:
                factors = _Factors(1.0, total, student.temperature)
                _write_gradient(out, number, side, memory, factors, None, None, FORM)


@triton.jit
def gold_rows(answers, student, teacher, out, scratch, count, settings, FORM: tl.constexpr):
    """Divergence of 16-bit rows on shared columns and ranked distance on the others, weighted.

    Args:
        answers: What is written: values (N, 2) and, or None, (N, 2) of whose columns the first has
            gradients by the student's scales.
        student: As of `uld_rows`.
        teacher: As of `uld_rows`.
        out: As of `uld_rows`.
        scratch: As of `uld_rows`.
        count: N.
        settings: A `ctkd.ops.cuda.row_losses.GOLDSettings`.
        FORM: As of `uld_rows`.
    """
    values, scale_gradients = answers
    # Triton before 3.7 loses a number 1 of a tuple in a tuple within a loop, if it is not assigned.
    student, teacher = student, teacher
    memory = _memory_of(scratch, student, teacher, FORM.tile)
    other_partners = settings.partners + student.rows.width
    for begin in range(0, count, tl.num_programs(0)):
        number = begin + tl.program_id(0)
        row = tl.program_id(0).to(tl.int64) * 0 - 1
        other_row = row
        if number < count:
            row = row_number(student.rows, number)
            other_row = row_number(teacher.rows, number)
            tl.store(values + 2 * number, 0.0)
            tl.store(values + 2 * number + 1, 0.0)
        if (row >= 0) & (other_row >= 0):
            _clear_both(memory, student, teacher, FORM.classes)
            ratios, log_total = _counted(student, row, settings.partners, memory.counts, FORM.tile)
            other_ratios, other_log_total = _counted(
                teacher, other_row, other_partners, memory.others, FORM.tile
            )
            tl.debug_barrier()
            log_scale = 0.0
            other_log_scale = 0.0
            if settings.log_scales is not None:
                log_scale = tl.load(settings.log_scales + 2 * number).to(tl.float32)
                other_log_scale = tl.load(settings.log_scales + 2 * number + 1).to(tl.float32)
            part = Part(ratios.row, ratios.top, ratios.scale, log_scale - log_total * _LOG_2)
            other_part = Part(
                other_ratios.row,
                other_ratios.top,
                other_ratios.scale,
                other_log_scale - other_log_total * _LOG_2,
            )
            match = part, other_part, settings
            total = 0.0
            if settings.unmatched_weight is not None:
                side = _shifted(ratios, log_total - log_scale * _LOG2_E)
                other = _shifted(other_ratios, other_log_total - other_log_scale * _LOG2_E)
                _sum_up(side, FORM.classes)
                _sum_up(other, FORM.classes)
                tl.debug_barrier()
                distance = _signed_mass(other, side, None, FORM.steps[0], FORM.classes)
                tl.debug_barrier()
                ends = None if out.tensor is None else memory.ends
                mass = _signed_mass(side, other, ends, FORM.steps[1], FORM.classes)
                tl.store(values + 2 * number + 1, settings.unmatched_weight * (distance + mass))
                total += settings.unmatched_weight * mass
            if settings.matched_weight is not None:
                divergence, change = _matched_sums(ratios, match, FORM.kind, FORM.tile)
                tl.store(values + 2 * number, settings.matched_weight * divergence)
                total += settings.matched_weight * change
            if scale_gradients is not None:
                tl.store(scale_gradients + 2 * number, total)
            if out.tensor is not None:
                weight = None
                if settings.unmatched_weight is not None:
                    weight = settings.unmatched_weight * tl.exp(log_scale)
                _write_gradient(
                    out,
                    number,
                    _shifted(ratios, log_total),
                    memory,
                    _Factors(weight, total, student.temperature),
                    settings.partners,
                    match,
                    FORM,
                )


@triton.jit
def _sorted_log_total(row, width, scale, TILE: tl.constexpr):
    """log2 of the softmax denominator of sorted logits."""
    top = tl.load(row)
    sums = tl.zeros((TILE,), tl.float32)
    for first in range(0, width, TILE):
        place = first + tl.arange(0, TILE)
        logits = tl.load(row + place, mask=place < width, other=float("-inf"))
        sums += tl.exp2((logits - top) * scale)
    return top, tl.log2(tl.sum(sums, 0))


@triton.jit
def _count_above(row, width, bound, TILE: tl.constexpr):
    count = tl.zeros((TILE,), tl.int32)
    for first in range(0, width, TILE):
        place = first + tl.arange(0, TILE)
        count += (tl.load(row + place, mask=place < width, other=float("-inf")) > bound).to(
            tl.int32
        )
    return tl.sum(count, 0)


@triton.jit
def sorted_uld_rows(values, student, teacher, tails, out, TILE: tl.constexpr):
    """Distance between rows that are sorted, descending, float32.

    Args:
        values: (N,) what is written.
        student: A `ctkd.ops.cuda.row_losses.Sorted` of logits.
        teacher: Likewise or, with tails, of probabilities.
        tails: (N, 2) float32 one more probability of the teacher and how often it occurs, or None.
        out: Rows that gradients are written to, if there are any.
        TILE: Columns of a tile.
    """
    number = tl.program_id(0)
    row = row_number(student, number)
    other_row = row_number(teacher, number)
    if (row < 0) | (other_row < 0):
        tl.store(values + number, 0.0)
        return
    own = student.entries + number.to(tl.int64) * student.width
    order = student.order + number.to(tl.int64) * student.width
    other = teacher.entries + number.to(tl.int64) * teacher.width
    top, shift = _sorted_log_total(own, student.width, student.scale, TILE)
    tail = 0.0
    tail_first = 0
    tail_count = 0
    if tails is not None:
        tail = tl.load(tails + 2 * number)
        tail_count = tl.load(tails + 2 * number + 1).to(tl.int32)
        tail_first = _count_above(other, teacher.width, tail, TILE)
    else:
        other_top, other_shift = _sorted_log_total(other, teacher.width, teacher.scale, TILE)
    distances = tl.zeros((TILE,), tl.float32)
    changes = tl.zeros((TILE,), tl.float32)
    total = 0.0
    if out.tensor is not None:
        target = row_number(out, number)
        gradients = out.tensor + row_start(out, target)
    # The sum of all signed probabilities is known after the first of two passes.
    for step in tl.static_range(1 if out.tensor is None else 2):
        end = student.width if step == 1 else tl.maximum(student.width, teacher.width + tail_count)
        for first in range(0, end, TILE):
            rank = first + tl.arange(0, TILE)
            inside = rank < student.width
            logits = tl.load(own + rank, mask=inside, other=float("-inf"))
            probs = tl.exp2(tl.where(inside, (logits - top) * student.scale - shift, float("-inf")))
            if tails is not None:
                is_tail = (rank >= tail_first) & (rank < tail_first + tail_count)
                place = tl.where(rank < tail_first, rank, rank - tail_count)
                is_stored = (is_tail == 0) & (place < teacher.width)
                others = tl.load(other + place, mask=is_stored, other=0.0)
                others = tl.where(is_tail, tail, others)
            else:
                is_stored = rank < teacher.width
                others = tl.load(other + rank, mask=is_stored, other=float("-inf"))
                others = (others - other_top) * teacher.scale - other_shift
                others = tl.exp2(tl.where(is_stored, others, float("-inf")))
            signed = tl.where(probs < others, -probs, tl.where(probs > others, probs, 0.0))
            # Neither is true of nan.
            signed = tl.where(probs == probs, signed, probs)
            if step == 0:
                distances += tl.abs(probs - others)
                changes += signed
            else:
                columns = tl.load(order + rank, mask=inside, other=0)
                gradient = (signed - probs * total) / student.temperature
                tl.store(
                    gradients + columns,
                    gradient.to(gradients.dtype.element_ty),
                    mask=inside & (target >= 0),
                )
        total = tl.sum(changes, 0)
    tl.store(values + number, tl.sum(distances, 0))
    if out.tensor is not None:
        for first in range(student.width, out.width, TILE):
            columns = first + tl.arange(0, TILE)
            zeros = tl.zeros((TILE,), tl.float32).to(gradients.dtype.element_ty)
            tl.store(gradients + columns, zeros, mask=(columns < out.width) & (target >= 0))
