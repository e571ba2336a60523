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

A side is the tuple (low, half, top, is_far, scale, shift): the bits of the largest number that is
as good as 0, classes above 0 but the last, the row's largest logit, whether that is in the last
class, and what makes a logit log2 of a probability: ``(logit - top) * scale - shift``.

A program works on one row after another, with scratch memory of its own. What its threads write
there is read by others after a barrier.
"""

# The language gives types and shapes that no annotation can name.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ctkd.ops.cuda.addressing import row_number, row_start
from ctkd.ops.cuda.divergence_kernels import (
    divergence_terms,
    fold_sum,
    log_ratio,
    total_of_lanes,
)

__all__ = ["gold_rows", "sorted_uld_rows", "uld_rows"]

# Above all ranks.
_FAR = tl.constexpr(1 << 30)
_LOG_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bits(pointers, mask):
    """Bits of 16-bit entries as int32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _logits_of(bits, BF16: tl.constexpr):
    if BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _class_of(bits, low, half):
    """Class of entries, and whether they are far from 0, which is the last class, 2 half + 1."""
    offset = tl.maximum((bits & 0x7FFF) - low, 0)
    is_far = offset > half
    near = tl.where(bits > 0x7FFF, half - offset, half + offset)
    return tl.where(is_far, 2 * half + 1, near), is_far


@triton.jit
def _class_log_probs(number, side, BF16: tl.constexpr):
    """log2 of the probabilities of classes, ascending; the last class is that of the top logit."""
    low, half, top, is_far, scale, shift = side
    offset = tl.abs(number - half)
    bits = tl.where(offset > 0, offset + low, 0) + tl.where(number < half, 0x8000, 0)
    logits = tl.where(is_far, float("-inf"), _logits_of(bits, BF16))
    return (tl.where(number > 2 * half, top, logits) - top) * scale - shift


@triton.jit
def _first_class(bound, side, STRICT: tl.constexpr, BF16: tl.constexpr, STEPS: tl.constexpr):
    """First class whose log-probability is at least, or STRICT above, each bound; one more: none.

    STEPS is log2 of the number of classes, rounded up.
    """
    first = tl.zeros_like(bound).to(tl.int32)
    last = first + 2 * side[1] + 2
    for _ in range(STEPS):
        middle = (first + last) >> 1
        found = _class_log_probs(middle, side, BF16)
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
def _count(
    row,
    width,
    partners,
    counts,
    low,
    half,
    scale,
    SELECTED: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count the entries of each class but the last; the largest logit, nan if there is one.

    SELECTED: only entries without a partner; and log2 of the softmax denominator of all.
    """
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    sums = tl.zeros((TILE,), tl.float32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        bits = _bits(row + columns, inside)
        logits = tl.where(inside, _logits_of(bits, BF16), float("-inf"))
        if SELECTED:
            largest, sums = fold_sum(largest, sums, logits[None, :], scale)
            inside = inside & (tl.load(partners + columns, mask=inside, other=0) < 0)
        else:
            largest = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
        number, is_far = _class_of(bits, low, half)
        tl.atomic_add(counts + number, 1, mask=inside & (is_far == 0), sem="relaxed")
    if SELECTED:
        top, total = total_of_lanes(largest, sums, scale)
        is_nan = total != total
        log_total = tl.log2(total)
    else:
        top = tl.max(largest, 0)
        is_nan = tl.max((largest != largest).to(tl.int32), 0) > 0
        log_total = 0.0
    return tl.where(is_nan, float("nan"), top), log_total


@triton.jit
def _count_top(
    row, width, partners, top, SELECTED: tl.constexpr, BF16: tl.constexpr, TILE: tl.constexpr
):
    """Entries that are the largest."""
    count = tl.zeros((TILE,), tl.int32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        logits = _logits_of(_bits(row + columns, inside), BF16)
        if SELECTED:
            inside = inside & (tl.load(partners + columns, mask=inside, other=0) < 0)
        count += (inside & (logits == top)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _sum_up(counts, size, side, BF16: tl.constexpr, CLASSES: tl.constexpr):
    """Add to the count of each class those above; the sum of all entries' powers of 2."""
    sums = tl.zeros((CLASSES,), tl.float32)
    above = 0
    for done in range(0, size, CLASSES):
        number = size - CLASSES - done + tl.arange(0, CLASSES)
        count = tl.load(counts + number)
        log_probs = tl.where(count > 0, _class_log_probs(number, side, BF16), float("-inf"))
        sums += count.to(tl.float32) * tl.exp2(log_probs)
        tl.debug_barrier()
        tl.store(counts + number, tl.cumsum(count, 0, reverse=True) + above)
        above += tl.sum(count, 0)
    return tl.sum(sums, 0)


@triton.jit
def _signed_mass(
    counts,
    ends,
    size,
    side,
    others,
    other,
    MARK: tl.constexpr,
    BF16: tl.constexpr,
    OTHER_BF16: tl.constexpr,
    OTHER_STEPS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Sum of a row's probabilities, each with its sign against the other row's at its rank.

    With MARK, counts are overwritten by the end of the entries of sign -1 within their class, and
    ``ends`` by that of the entries of sign 0; both are far away where a class has one sign.
    """
    sums = tl.zeros((CLASSES,), tl.float32)
    for first in range(0, size, CLASSES):
        number = first + tl.arange(0, CLASSES)
        rank = tl.load(counts + number + 1, mask=number + 1 < size, other=0)
        count = tl.load(counts + number) - rank
        if tl.max(count, 0) > 0:
            log_probs = tl.where(count > 0, _class_log_probs(number, side, BF16), float("-inf"))
            place = _first_class(log_probs, other, False, OTHER_BF16, OTHER_STEPS)
            is_any = place < 2 * other[1] + 2
            not_smaller = tl.load(others + place, mask=is_any, other=0)
            larger = not_smaller
            is_equal = is_any & (_class_log_probs(place, other, OTHER_BF16) == log_probs)
            if tl.max((is_equal & (count > 0)).to(tl.int32), 0) > 0:
                place = _first_class(log_probs, other, True, OTHER_BF16, OTHER_STEPS)
                larger = tl.load(others + place, mask=place < 2 * other[1] + 2, other=0)
            behind = tl.minimum(tl.maximum(larger - rank, 0), count)
            ahead = tl.minimum(tl.maximum(rank + count - not_smaller, 0), count)
            sums += (ahead - behind).to(tl.float32) * tl.exp2(log_probs)
            if MARK:
                is_open = (behind < count) & (ahead < count) & (behind + ahead > 0)
                far = tl.where(behind == count, _FAR, -_FAR)
                tl.debug_barrier()
                tl.store(counts + number, tl.where(is_open, behind, far))
                far = tl.where(ahead == count, -_FAR, _FAR)
                tl.store(ends + number, tl.where(is_open, count - ahead, far))
    return tl.sum(sums, 0)


@triton.jit
def _count_off(
    row,
    out,
    columns,
    live,
    minus_ends,
    zero_ends,
    side,
    factors,
    BF16: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the gradient of the next entries of classes of several signs, ascending columns."""
    low, half, top, is_top_far, scale, shift = side
    weight, total, temperature = factors
    place = tl.arange(0, GROUP)
    bits = _bits(row + columns, live)
    number, _ = _class_of(bits, low, half)
    minus_end = tl.load(minus_ends + number, mask=live, other=0)
    zero_end = tl.load(zero_ends + number, mask=live, other=0)
    is_same = (number[:, None] == number[None, :]) & live[None, :]
    is_before = place[None, :] < place[:, None]
    rank = tl.sum((is_same & is_before).to(tl.int32), 1)
    together = tl.sum(is_same.to(tl.int32), 1)
    sign = (rank >= zero_end).to(tl.float32) - (rank < minus_end).to(tl.float32)
    # Where there is no entry, nothing may overflow.
    logits = tl.where(live, _logits_of(bits, BF16), float("-inf"))
    gradient = tl.exp2((logits - top) * scale - shift) * (weight * sign - total) / temperature
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=live)
    # What is left of each class for the next entries; all of one class write the same.
    tl.debug_barrier()
    tl.store(minus_ends + number, minus_end - together, mask=live)
    tl.store(zero_ends + number, zero_end - together, mask=live)
    tl.debug_barrier()


@triton.jit
def _matched_terms(logits, partner, is_shared, side, match, BETA_KIND: tl.constexpr):
    """Terms of the divergence on shared columns and their derivatives, 0 elsewhere.

    ``match`` is the teacher's row, its top logit, scale and offset, the student's offset, beta and
    the floor. Offsets make natural log-probabilities, scaled ones.
    """
    _, _, top, _, scale, _ = side
    other_row, other_top, other_scale, other_offset, offset, beta, floor = match
    others = tl.load(other_row + partner, mask=is_shared, other=0.0).to(tl.float32)
    # Elsewhere nothing may overflow.
    exponents = tl.where(is_shared, (logits - top) * scale, 0.0)
    other_exponents = tl.where(is_shared, (others - other_top) * other_scale, 0.0)
    probs = tl.exp2(exponents + offset * _LOG2_E)
    other_probs = tl.exp2(other_exponents + other_offset * _LOG2_E)
    gap = log_ratio(exponents, offset, other_exponents, other_offset, floor)
    terms, changes = divergence_terms(gap, probs, other_probs, beta, BETA_KIND)
    return tl.where(is_shared, terms, 0.0), tl.where(is_shared, changes, 0.0)


@triton.jit
def _matched_sums(
    row,
    width,
    partners,
    side,
    match,
    BETA_KIND: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Divergence on shared columns, and the sum of its derivatives by log-probabilities."""
    values = tl.zeros((TILE,), tl.float32)
    totals = tl.zeros((TILE,), tl.float32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        partner = tl.load(partners + columns, mask=columns < width, other=-1)
        logits = _logits_of(_bits(row + columns, partner >= 0), BF16)
        terms, changes = _matched_terms(logits, partner, partner >= 0, side, match, BETA_KIND)
        values += terms
        totals += changes
    return tl.sum(values, 0), tl.sum(totals, 0)


@triton.jit
def _write_gradient(
    row,
    out,
    width,
    out_width,
    partners,
    minus_ends,
    zero_ends,
    waiting,
    side,
    factors,
    match,
    matched_weight,
    SELECTED: tl.constexpr,
    MATCHED: tl.constexpr,
    RANKED: tl.constexpr,
    BETA_KIND: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the gradient ``p (weight * sign - total) / temperature`` of a row's logits.

    Where SELECTED, columns with a partner have no sign, but the terms of a divergence if MATCHED;
    others have one if RANKED. ``side`` makes probabilities that sum to 1, classes are marked as
    `_signed_mass` does, ``factors`` are the weight, the total and the temperature, and ``waiting``
    is scratch for the columns of a tile.
    """
    low, half, top, is_top_far, scale, shift = side
    weight, total, temperature = factors
    for first in range(0, out_width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        bits = _bits(row + columns, inside)
        logits = tl.where(inside, _logits_of(bits, BF16), float("-inf"))
        probs = tl.exp2((logits - top) * scale - shift)
        change = tl.zeros((TILE,), tl.float32)
        is_ranked = inside
        if SELECTED:
            partner = tl.load(partners + columns, mask=inside, other=-1)
            is_ranked = inside & (partner < 0)
            if MATCHED:
                terms, changes = _matched_terms(
                    logits, partner, partner >= 0, side, match, BETA_KIND
                )
                change = changes * matched_weight
        is_open = is_ranked & (columns < 0)
        if RANKED:
            number, is_far = _class_of(bits, low, half)
            # Of what is far only the largest has a probability, so that others need no sign.
            is_ranked = is_ranked & ((is_far == 0) | (logits == top))
            minus_end = tl.load(minus_ends + number, mask=is_ranked, other=-_FAR)
            zero_end = tl.load(zero_ends + number, mask=is_ranked, other=_FAR)
            is_open = (minus_end > -_FAR) & (minus_end < _FAR)
            sign = (zero_end <= 0).to(tl.float32) - (minus_end > 0).to(tl.float32)
            change += probs * (weight * sign)
        gradient = tl.where(inside, (change - probs * total) / temperature, 0.0)
        tl.store(
            out + columns,
            gradient.to(out.dtype.element_ty),
            mask=(columns < out_width) & (is_open == 0),
        )
        if RANKED:
            opened = is_open.to(tl.int32)
            count = tl.sum(opened, 0)
            if count > 0:
                tl.debug_barrier()
                tl.store(waiting + tl.cumsum(opened, 0) - 1, columns, mask=is_open)
                tl.debug_barrier()
                for begin in range(0, count, GROUP):
                    place = begin + tl.arange(0, GROUP)
                    column = tl.load(waiting + place, mask=place < count, other=0)
                    _count_off(
                        row,
                        out,
                        column,
                        place < count,
                        minus_ends,
                        zero_ends,
                        side,
                        factors,
                        BF16,
                        GROUP,
                    )


@triton.jit
def _is_far(top, far):
    """True of nan, too."""
    return (tl.abs(top) < far) == 0


@triton.jit
def uld_rows(
    values,
    student,
    student_index,
    student_length,
    student_outer,
    student_inner,
    teacher,
    teacher_index,
    teacher_length,
    teacher_outer,
    teacher_inner,
    out,
    out_index,
    out_length,
    out_outer,
    out_inner,
    scratch,
    count,
    student_width,
    teacher_width,
    out_width,
    temperature,
    student_scale,
    teacher_scale,
    student_low,
    student_half,
    student_far,
    teacher_low,
    teacher_half,
    teacher_far,
    student_size,
    teacher_size,
    STUDENT_INDEXED: tl.constexpr,
    TEACHER_INDEXED: tl.constexpr,
    OUT_INDEXED: tl.constexpr,
    WRITES: tl.constexpr,
    STUDENT_BF16: tl.constexpr,
    TEACHER_BF16: tl.constexpr,
    STUDENT_STEPS: tl.constexpr,
    TEACHER_STEPS: tl.constexpr,
    TILE: tl.constexpr,
    CLASSES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Distance between the probabilities of 16-bit rows in descending order.

    Rows are given as `ctkd.ops.cuda.addressing` has them, scales are log2(e) over the temperatures.
    A program's scratch memory holds the student's classes twice, the teacher's and a tile.
    """
    program = tl.program_id(0).to(tl.int64)
    scratch += program * (2 * student_size + teacher_size + TILE)
    ends = scratch + student_size
    others = ends + student_size
    waiting = others + teacher_size
    for begin in range(0, count, tl.num_programs(0)):
        number = begin + tl.program_id(0)
        row = program * 0 - 1
        other_row = row
        if number < count:
            row = row_number(student_index, number, STUDENT_INDEXED)
            other_row = row_number(teacher_index, number, TEACHER_INDEXED)
            tl.store(values + number, 0.0)
        if (row >= 0) & (other_row >= 0):
            logits = student + row_start(row, student_length, student_outer, student_inner)
            other_logits = teacher + row_start(
                other_row, teacher_length, teacher_outer, teacher_inner
            )
            tl.debug_barrier()
            _clear(scratch, student_size, CLASSES)
            _clear(others, teacher_size, CLASSES)
            tl.debug_barrier()
            top, _ = _count(
                logits,
                student_width,
                values,
                scratch,
                student_low,
                student_half,
                student_scale,
                False,
                STUDENT_BF16,
                TILE,
            )
            other_top, _ = _count(
                other_logits,
                teacher_width,
                values,
                others,
                teacher_low,
                teacher_half,
                teacher_scale,
                False,
                TEACHER_BF16,
                TILE,
            )
            is_far = _is_far(top, student_far)
            other_is_far = _is_far(other_top, teacher_far)
            if is_far:
                tops = _count_top(logits, student_width, values, top, False, STUDENT_BF16, TILE)
                tl.store(scratch + 2 * student_half + 1, tl.maximum(tops, 1))
            if other_is_far:
                tops = _count_top(
                    other_logits, teacher_width, values, other_top, False, TEACHER_BF16, TILE
                )
                tl.store(others + 2 * teacher_half + 1, tl.maximum(tops, 1))
            tl.debug_barrier()
            side = (student_low, student_half, top, is_far, student_scale, 0.0)
            other = (teacher_low, teacher_half, other_top, other_is_far, teacher_scale, 0.0)
            shift = tl.log2(_sum_up(scratch, student_size, side, STUDENT_BF16, CLASSES))
            other_shift = tl.log2(_sum_up(others, teacher_size, other, TEACHER_BF16, CLASSES))
            side = (student_low, student_half, top, is_far, student_scale, shift)
            other = (teacher_low, teacher_half, other_top, other_is_far, teacher_scale, other_shift)
            tl.debug_barrier()
            value = _signed_mass(
                others,
                ends,
                teacher_size,
                other,
                scratch,
                side,
                False,
                TEACHER_BF16,
                STUDENT_BF16,
                STUDENT_STEPS,
                CLASSES,
            )
            tl.debug_barrier()
            total = _signed_mass(
                scratch,
                ends,
                student_size,
                side,
                others,
                other,
                WRITES,
                STUDENT_BF16,
                TEACHER_BF16,
                TEACHER_STEPS,
                CLASSES,
            )
            tl.store(values + number, value + total)
            if WRITES:
                target = row_number(out_index, number, OUT_INDEXED)
                tl.debug_barrier()
                if target >= 0:
                    _write_gradient(
                        logits,
                        out + row_start(target, out_length, out_outer, out_inner),
                        student_width,
                        out_width,
                        values,
                        scratch,
                        ends,
                        waiting,
                        side,
                        (1.0, total, temperature),
                        (0,),
                        0.0,
                        False,
                        False,
                        True,
                        0,
                        STUDENT_BF16,
                        TILE,
                        GROUP,
                    )


@triton.jit
def gold_rows(
    values,
    student,
    student_index,
    student_length,
    student_outer,
    student_inner,
    teacher,
    teacher_index,
    teacher_length,
    teacher_outer,
    teacher_inner,
    out,
    out_index,
    out_length,
    out_outer,
    out_inner,
    scratch,
    count,
    student_width,
    teacher_width,
    out_width,
    temperature,
    student_scale,
    teacher_scale,
    student_low,
    student_half,
    student_far,
    teacher_low,
    teacher_half,
    teacher_far,
    student_size,
    teacher_size,
    partners,
    log_scales,
    scale_gradients,
    beta,
    floor,
    matched_weight,
    unmatched_weight,
    STUDENT_INDEXED: tl.constexpr,
    TEACHER_INDEXED: tl.constexpr,
    OUT_INDEXED: tl.constexpr,
    WRITES: tl.constexpr,
    STUDENT_BF16: tl.constexpr,
    TEACHER_BF16: tl.constexpr,
    STUDENT_STEPS: tl.constexpr,
    TEACHER_STEPS: tl.constexpr,
    TILE: tl.constexpr,
    CLASSES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_GRADIENTS: tl.constexpr,
    MATCHED: tl.constexpr,
    RANKED: tl.constexpr,
    BETA_KIND: tl.constexpr,
):
    """Divergence of 16-bit rows on shared columns and ranked distance on the others, weighted.

    Arguments as of `uld_rows`; ``partners`` as `divergence_kernels.pair_columns` writes them,
    ``log_scales`` (N, 2) are added to both sides' log-probabilities. Written are values (N, 2) and
    column 0 of ``scale_gradients`` (N, 2).
    """
    other_partners = partners + student_width
    program = tl.program_id(0).to(tl.int64)
    scratch += program * (2 * student_size + teacher_size + TILE)
    ends = scratch + student_size
    others = ends + student_size
    waiting = others + teacher_size
    for begin in range(0, count, tl.num_programs(0)):
        number = begin + tl.program_id(0)
        row = program * 0 - 1
        other_row = row
        if number < count:
            row = row_number(student_index, number, STUDENT_INDEXED)
            other_row = row_number(teacher_index, number, TEACHER_INDEXED)
            tl.store(values + 2 * number, 0.0)
            tl.store(values + 2 * number + 1, 0.0)
        if (row >= 0) & (other_row >= 0):
            logits = student + row_start(row, student_length, student_outer, student_inner)
            other_logits = teacher + row_start(
                other_row, teacher_length, teacher_outer, teacher_inner
            )
            tl.debug_barrier()
            _clear(scratch, student_size, CLASSES)
            _clear(others, teacher_size, CLASSES)
            tl.debug_barrier()
            top, log_total = _count(
                logits,
                student_width,
                partners,
                scratch,
                student_low,
                student_half,
                student_scale,
                True,
                STUDENT_BF16,
                TILE,
            )
            other_top, other_log_total = _count(
                other_logits,
                teacher_width,
                other_partners,
                others,
                teacher_low,
                teacher_half,
                teacher_scale,
                True,
                TEACHER_BF16,
                TILE,
            )
            is_far = _is_far(top, student_far)
            other_is_far = _is_far(other_top, teacher_far)
            if is_far:
                tops = _count_top(logits, student_width, partners, top, True, STUDENT_BF16, TILE)
                tl.store(scratch + 2 * student_half + 1, tops)
            if other_is_far:
                tops = _count_top(
                    other_logits, teacher_width, other_partners, other_top, True, TEACHER_BF16, TILE
                )
                tl.store(others + 2 * teacher_half + 1, tops)
            tl.debug_barrier()
            log_scale = 0.0
            other_log_scale = 0.0
            if SCALED:
                log_scale = tl.load(log_scales + 2 * number).to(tl.float32)
                other_log_scale = tl.load(log_scales + 2 * number + 1).to(tl.float32)
            shift = log_total - log_scale * _LOG2_E
            other_shift = other_log_total - other_log_scale * _LOG2_E
            side = (student_low, student_half, top, is_far, student_scale, shift)
            other = (teacher_low, teacher_half, other_top, other_is_far, teacher_scale, other_shift)
            match = (
                other_logits,
                other_top,
                teacher_scale,
                other_log_scale - other_log_total * _LOG_2,
                log_scale - log_total * _LOG_2,
                beta,
                floor,
            )
            total = 0.0
            if RANKED:
                _sum_up(scratch, student_size, side, STUDENT_BF16, CLASSES)
                _sum_up(others, teacher_size, other, TEACHER_BF16, CLASSES)
                tl.debug_barrier()
                distance = _signed_mass(
                    others,
                    ends,
                    teacher_size,
                    other,
                    scratch,
                    side,
                    False,
                    TEACHER_BF16,
                    STUDENT_BF16,
                    STUDENT_STEPS,
                    CLASSES,
                )
                tl.debug_barrier()
                mass = _signed_mass(
                    scratch,
                    ends,
                    student_size,
                    side,
                    others,
                    other,
                    WRITES,
                    STUDENT_BF16,
                    TEACHER_BF16,
                    TEACHER_STEPS,
                    CLASSES,
                )
                tl.store(values + 2 * number + 1, unmatched_weight * (distance + mass))
                total += unmatched_weight * mass
            if MATCHED:
                divergence, change = _matched_sums(
                    logits, student_width, partners, side, match, BETA_KIND, STUDENT_BF16, TILE
                )
                tl.store(values + 2 * number, matched_weight * divergence)
                total += matched_weight * change
            if SCALE_GRADIENTS:
                tl.store(scale_gradients + 2 * number, total)
            if WRITES:
                target = row_number(out_index, number, OUT_INDEXED)
                tl.debug_barrier()
                if target >= 0:
                    _write_gradient(
                        logits,
                        out + row_start(target, out_length, out_outer, out_inner),
                        student_width,
                        out_width,
                        partners,
                        scratch,
                        ends,
                        waiting,
                        (student_low, student_half, top, is_far, student_scale, log_total),
                        (unmatched_weight * tl.exp(log_scale), total, temperature),
                        match,
                        matched_weight,
                        True,
                        MATCHED,
                        RANKED,
                        BETA_KIND,
                        STUDENT_BF16,
                        TILE,
                        GROUP,
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
def sorted_uld_rows(
    values,
    student,
    order,
    student_index,
    teacher,
    teacher_index,
    tails,
    out,
    out_index,
    out_length,
    out_outer,
    out_inner,
    student_width,
    teacher_width,
    out_width,
    temperature,
    student_scale,
    teacher_scale,
    STUDENT_INDEXED: tl.constexpr,
    TEACHER_INDEXED: tl.constexpr,
    OUT_INDEXED: tl.constexpr,
    WRITES: tl.constexpr,
    TAILS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Distance between rows that are sorted, descending, float32.

    ``student`` and ``teacher`` hold logits (N, V) and (N, W) or, with TAILS, probabilities of the
    teacher, to which ``tails`` (N, 2) float32 adds one that occurs so often. ``order`` holds the
    columns of the student's entries.
    """
    number = tl.program_id(0)
    row = row_number(student_index, number, STUDENT_INDEXED)
    other_row = row_number(teacher_index, number, TEACHER_INDEXED)
    if (row < 0) | (other_row < 0):
        tl.store(values + number, 0.0)
        return
    student += number.to(tl.int64) * student_width
    order += number.to(tl.int64) * student_width
    teacher += number.to(tl.int64) * teacher_width
    top, shift = _sorted_log_total(student, student_width, student_scale, TILE)
    tail = 0.0
    tail_first = 0
    tail_count = 0
    if TAILS:
        tail = tl.load(tails + 2 * number)
        tail_count = tl.load(tails + 2 * number + 1).to(tl.int32)
        tail_first = _count_above(teacher, teacher_width, tail, TILE)
    else:
        other_top, other_shift = _sorted_log_total(teacher, teacher_width, teacher_scale, TILE)
    distances = tl.zeros((TILE,), tl.float32)
    changes = tl.zeros((TILE,), tl.float32)
    total = 0.0
    if WRITES:
        target = row_number(out_index, number, OUT_INDEXED)
        out += row_start(target, out_length, out_outer, out_inner)
    # The sum of all signed probabilities is known after the first of two passes.
    for step in tl.static_range(2 if WRITES else 1):
        end = student_width if step == 1 else tl.maximum(student_width, teacher_width + tail_count)
        for first in range(0, end, TILE):
            rank = first + tl.arange(0, TILE)
            inside = rank < student_width
            logits = tl.load(student + rank, mask=inside, other=float("-inf"))
            probs = tl.exp2(tl.where(inside, (logits - top) * student_scale - shift, float("-inf")))
            if TAILS:
                is_tail = (rank >= tail_first) & (rank < tail_first + tail_count)
                place = tl.where(rank < tail_first, rank, rank - tail_count)
                is_stored = (is_tail == 0) & (place < teacher_width)
                others = tl.load(teacher + place, mask=is_stored, other=0.0)
                others = tl.where(is_tail, tail, others)
            else:
                is_stored = rank < teacher_width
                others = tl.load(teacher + rank, mask=is_stored, other=float("-inf"))
                others = (others - other_top) * teacher_scale - other_shift
                others = tl.exp2(tl.where(is_stored, others, float("-inf")))
            signed = tl.where(probs < others, -probs, tl.where(probs > others, probs, 0.0))
            # Neither is true of nan.
            signed = tl.where(probs == probs, signed, probs)
            if step == 0:
                distances += tl.abs(probs - others)
                changes += signed
            else:
                columns = tl.load(order + rank, mask=inside, other=0)
                gradient = (signed - probs * total) / temperature
                tl.store(
                    out + columns,
                    gradient.to(out.dtype.element_ty),
                    mask=inside & (target >= 0),
                )
        total = tl.sum(changes, 0)
    tl.store(values + number, tl.sum(distances, 0))
    if WRITES:
        for first in range(student_width, out_width, TILE):
            columns = first + tl.arange(0, TILE)
            zeros = tl.zeros((TILE,), tl.float32).to(out.dtype.element_ty)
            tl.store(out + columns, zeros, mask=(columns < out_width) & (target >= 0))
