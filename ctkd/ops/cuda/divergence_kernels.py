"""Kernels of divergences on shared columns, and what they share with other kernels.

A row is read in tiles of R by C columns, folded along R: a lane rescales its sum of exponentials
once a tile, not once an entry.
"""

# The language gives types and shapes that no annotation can name.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ctkd.ops.cuda.addressing import row_number, row_start

__all__ = [
    "Part",
    "bpm_rows",
    "fold_sum",
    "pair_columns",
    "shared_kl_rows",
    "shared_terms",
    "total_of_lanes",
]

_LOG_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pair_columns(student_ids, teacher_ids, partners, count, student_width, BLOCK: tl.constexpr):
    """Write each shared column's partner: the student's V columns, then the teacher's W."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    student = tl.load(student_ids + number, mask=inside, other=0)
    teacher = tl.load(teacher_ids + number, mask=inside, other=0)
    tl.store(partners + student, teacher.to(tl.int32), mask=inside)
    tl.store(partners + student_width + teacher, student.to(tl.int32), mask=inside)


@triton.jit
def fold_sum(largest, total, logits, scale):
    """Largest logits (C,) and sums of ``2^((logits - largest) * scale)`` with a tile (R, C) more.

    Minus infinity adds nothing, to lanes of nothing else either.
    """
    new = tl.maximum(largest, tl.max(logits, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2((largest - base) * scale)
    return new, total + tl.sum(tl.exp2((logits - base[None, :]) * scale), 0)


@triton.jit
def total_of_lanes(largest, total, scale):
    """The largest logit of all lanes, and their sum."""
    top = tl.max(largest, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(total * tl.exp2((largest - base) * scale), 0)


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` for x up to 0."""
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))
    series = 1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series))
    return tl.where(x > -0.35, x * (1.0 + x / 2.0 * series), tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for x from -1 to 0."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 1.0 / 9.0 + square * (1.0 / 11.0 + square * (1.0 / 13.0 + square / 15.0))
    series = 1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square * series)))
    # From -1/2 down 1 + x is exact.
    return tl.where(x > -0.5, 2.0 * ratio * series, tl.log(1.0 + x))


@triton.jit
def _divergence_terms(gap, student_probs, teacher_probs, beta, KIND: tl.constexpr):
    """Terms of a divergence, and their derivatives by the student's log-probabilities.

    Args:
        gap: log s - log t, finite.
        student_probs: s.
        teacher_probs: t.
        beta: Weight of the teacher in the mixture.
        KIND: 0 where beta is 0, 1 where it is 1, else 2.
    """
    if KIND == 0:
        change = student_probs - teacher_probs
        return change - gap * teacher_probs, change
    elif KIND == 1:
        change = gap * student_probs
        return change + (teacher_probs - student_probs), change
    else:
        # log m = max(log s, log t) + mixed: nothing overflows, and equal rows give exactly 0.
        weight = tl.where(gap > 0.0, beta, 1.0 - beta)
        mixed = _log1p(weight * _expm1(-tl.abs(gap)))
        below = tl.where(gap < 0.0, gap, 0.0)
        change = (mixed - below) * student_probs * (beta - 1.0)
        return change - (gap - below + mixed) * teacher_probs * beta, change


@triton.jit
def _log_ratio(exponents, offset, other_exponents, other_offset, floor):
    """Gaps of log-probabilities ``exponent * log 2 + offset``, each raised to the floor."""
    lowest = (floor - offset) * _LOG2_E
    other_lowest = (floor - other_offset) * _LOG2_E
    # Unlike a maximum, this keeps nan.
    exponents = tl.where(exponents < lowest, lowest, exponents)
    other_exponents = tl.where(other_exponents < other_lowest, other_lowest, other_exponents)
    return (exponents - other_exponents) * _LOG_2 + (offset - other_offset)


class Part(NamedTuple):
    """A row's probabilities on shared columns: ``exp((logit - top) * scale * log 2 + offset)``."""

    row: Any
    top: Any
    scale: Any
    offset: Any


class _Sums(NamedTuple):
    """Largest logit and sum of exponentials of shared columns, and of the others."""

    top: Any
    total: Any
    rest_top: Any
    rest_total: Any


@triton.jit
def _class_sums(row, width, partners, settings, FORM: tl.constexpr):
    """Sums of a row, of the others with REST only."""
    R: tl.constexpr = FORM.tile[0]
    C: tl.constexpr = FORM.tile[1]
    scale = settings.scale
    places = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    largest = tl.full((C,), float("-inf"), tl.float32)
    total = tl.zeros((C,), tl.float32)
    rest_largest = tl.full((C,), float("-inf"), tl.float32)
    rest_total = tl.zeros((C,), tl.float32)
    for first in range(0, width, R * C):
        columns = first + places
        inside = columns < width
        is_shared = tl.load(partners + columns, mask=inside, other=-1) >= 0
        wanted = inside if FORM.rest else is_shared
        logits = tl.load(row + columns, mask=wanted, other=0.0).to(tl.float32)
        logits = tl.where(logits < settings.lowest, settings.lowest, logits)
        shared = tl.where(is_shared, logits, float("-inf"))
        largest, total = fold_sum(largest, total, shared, scale)
        if FORM.rest:
            others = tl.where(inside & (is_shared == 0), logits, float("-inf"))
            rest_largest, rest_total = fold_sum(rest_largest, rest_total, others, scale)
    top, total = total_of_lanes(largest, total, scale)
    rest_top, rest_total = total_of_lanes(rest_largest, rest_total, scale)
    return _Sums(top, total, rest_top, rest_total)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _class_logs(sums, settings, REST: tl.constexpr):
    """The offset of log-probabilities of shared columns, and the log-probability of the rest."""
    offset = -tl.log(sums.total)
    log_rest = 0.0 * offset
    if REST:
        lead = (sums.top - sums.rest_top) / settings.temperature + tl.log(sums.total)
        lead -= tl.log(sums.rest_total)
        # Low enough for the floor to apply, high enough not to lose the exponents' digits.
        offset += tl.maximum(-_softplus(-lead), 2.0 * settings.floor)
        log_rest = tl.maximum(-_softplus(lead), settings.floor)
    return offset, log_rest


@triton.jit
def shared_terms(logits, partners, student, teacher, settings, KIND: tl.constexpr):
    """Terms of shared columns, derivatives and probabilities; 0 elsewhere.

    Args:
        logits: The student's.
        partners: Of their columns, -1 for none.
        student: Its `Part`.
        teacher: Its `Part`.
        settings: With beta, the floor of log-probabilities and the lowest of logits, if any.
        KIND: Of the divergence.
    """
    is_shared = partners >= 0
    others = tl.load(teacher.row + partners, mask=is_shared, other=0.0).to(tl.float32)
    if settings.lowest is not None:
        others = tl.where(others < settings.lowest, settings.lowest, others)
    # Elsewhere nothing may overflow.
    exponents = tl.where(is_shared, (logits - student.top) * student.scale, 0.0)
    other_exponents = tl.where(is_shared, (others - teacher.top) * teacher.scale, 0.0)
    probs = tl.exp2(exponents + student.offset * _LOG2_E)
    other_probs = tl.exp2(other_exponents + teacher.offset * _LOG2_E)
    gap = _log_ratio(exponents, student.offset, other_exponents, teacher.offset, settings.floor)
    terms, changes = _divergence_terms(gap, probs, other_probs, settings.beta, KIND)
    zero = tl.zeros_like(probs)
    return (
        tl.where(is_shared, terms, zero),
        tl.where(is_shared, changes, zero),
        tl.where(is_shared, probs, zero),
    )


@triton.jit
def shared_kl_rows(values, student, teacher, out, partners, settings, FORM: tl.constexpr):
    """Divergence of a row on shared columns and, with REST, the class of the rest.

    Derivatives by log-probabilities sum to 0 where beta is 0; else their sum takes a pass over the
    row of its own. Rows are given as `ctkd.ops.cuda.addressing` has them.

    Args:
        values: (N,) what is written.
        student: Rows of logits.
        teacher: Rows of logits.
        out: Rows that gradients are written to, if there are any.
        partners: As `pair_columns` writes them.
        settings: A `ctkd.ops.cuda.row_losses.SharedKLSettings`.
        FORM: A `ctkd.ops.cuda.row_losses.SharedKLForm`.
    """
    KIND: tl.constexpr = FORM.kind
    R: tl.constexpr = FORM.tile[0]
    C: tl.constexpr = FORM.tile[1]
    temperature, scale, lowest = settings.temperature, settings.scale, settings.lowest
    number = tl.program_id(0)
    row = row_number(student, number)
    other_row = row_number(teacher, number)
    if (row < 0) | (other_row < 0):
        tl.store(values + number, 0.0)
        return
    own = student.tensor + row_start(student, row)
    other = teacher.tensor + row_start(teacher, other_row)
    sums = _class_sums(own, student.width, partners, settings, FORM)
    other_sums = _class_sums(other, teacher.width, partners + student.width, settings, FORM)
    offset, log_rest = _class_logs(sums, settings, FORM.rest)
    other_offset, other_log_rest = _class_logs(other_sums, settings, FORM.rest)
    part = Part(own, sums.top, scale, offset)
    other_part = Part(other, other_sums.top, scale, other_offset)
    places = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    value_lanes = tl.zeros((C,), tl.float32)
    change = 0.0
    if KIND != 0:
        change_lanes = tl.zeros((C,), tl.float32)
        for first in range(0, student.width, R * C):
            columns = first + places
            partner = tl.load(partners + columns, mask=columns < student.width, other=-1)
            logits = tl.load(own + columns, mask=partner >= 0, other=0.0).to(tl.float32)
            logits = tl.where(logits < lowest, lowest, logits)
            terms, changes, _ = shared_terms(logits, partner, part, other_part, settings, KIND)
            value_lanes += tl.sum(terms, 0)
            change_lanes += tl.sum(changes, 0)
        change = tl.sum(change_lanes, 0)
    rest_term = 0.0
    rest_factor = 0.0
    if FORM.rest:
        rest_prob = tl.exp(log_rest)
        rest_term, rest_change = _divergence_terms(
            log_rest - other_log_rest, rest_prob, tl.exp(other_log_rest), settings.beta, KIND
        )
        if KIND != 0:
            change += rest_change
        rest_factor = (rest_change - rest_prob * change) / (sums.rest_total * temperature)
    if out.tensor is not None:
        target = row_number(out, number)
        gradient = out.tensor + row_start(out, target)
    if (out.tensor is not None) or KIND == 0:
        end = student.width if out.tensor is None else out.width
        for first in range(0, end, R * C):
            columns = first + places
            inside = columns < student.width
            partner = tl.load(partners + columns, mask=inside, other=-1)
            is_shared = partner >= 0
            wanted = inside if FORM.rest else is_shared
            raw = tl.load(own + columns, mask=wanted, other=0.0).to(tl.float32)
            logits = tl.where(raw < lowest, lowest, raw)
            terms, changes, probs = shared_terms(logits, partner, part, other_part, settings, KIND)
            if KIND == 0:
                value_lanes += tl.sum(terms, 0)
            if out.tensor is not None:
                gradients = (changes - probs * change) / temperature
                if FORM.rest:
                    others = tl.where(is_shared, sums.rest_top, logits)
                    parts = tl.exp2((others - sums.rest_top) * scale) * rest_factor
                    gradients = tl.where(is_shared, gradients, parts)
                # No gradient passes where a logit was raised to the lowest.
                gradients = tl.where(inside & (raw >= lowest), gradients, 0.0)
                gradients = tl.where(raw != raw, raw, gradients)
                tl.store(
                    gradient + columns,
                    gradients.to(gradient.dtype.element_ty),
                    mask=(columns < out.width) & (target >= 0),
                )
    tl.store(values + number, tl.sum(value_lanes, 0) + rest_term)


@triton.jit
def _joined(top, total, other_top, other_total, scale):
    """Largest logit and sum of exponentials of two parts of a row."""
    joint = tl.maximum(top, other_top)
    base = tl.where(joint == float("-inf"), 0.0, joint)
    total = total * tl.exp2((top - base) * scale)
    return joint, total + other_total * tl.exp2((other_top - base) * scale)


@triton.jit
def _raised(logits, lowest):
    """Logits of at least the lowest; unlike a maximum, this keeps nan."""
    return tl.where(logits < lowest, lowest, logits)


@triton.jit
def _image_sums(row, width, in_image, settings, FORM: tl.constexpr):
    """Sums of a student's row on the image, and on its other columns."""
    R: tl.constexpr = FORM.tile[0]
    C: tl.constexpr = FORM.tile[1]
    scale = settings.scale
    places = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    largest = tl.full((C,), float("-inf"), tl.float32)
    total = tl.zeros((C,), tl.float32)
    rest_largest = tl.full((C,), float("-inf"), tl.float32)
    rest_total = tl.zeros((C,), tl.float32)
    for first in range(0, width, R * C):
        columns = first + places
        inside = columns < width
        is_image = tl.load(in_image + columns, mask=inside, other=0) != 0
        logits = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        logits = _raised(logits, settings.lowest)
        image = tl.where(is_image, logits, float("-inf"))
        largest, total = fold_sum(largest, total, image, scale)
        others = tl.where(inside & (is_image == 0), logits, float("-inf"))
        rest_largest, rest_total = fold_sum(rest_largest, rest_total, others, scale)
    top, total = total_of_lanes(largest, total, scale)
    rest_top, rest_total = total_of_lanes(rest_largest, rest_total, scale)
    return _Sums(top, total, rest_top, rest_total)


@triton.jit
def _row_sum(row, width, settings, FORM: tl.constexpr):
    """Largest logit and sum of exponentials of a row."""
    R: tl.constexpr = FORM.tile[0]
    C: tl.constexpr = FORM.tile[1]
    places = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    largest = tl.full((C,), float("-inf"), tl.float32)
    total = tl.zeros((C,), tl.float32)
    for first in range(0, width, R * C):
        inside = first + places < width
        logits = tl.load(row + first + places, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, _raised(logits, settings.lowest), float("-inf"))
        largest, total = fold_sum(largest, total, logits, settings.scale)
    return total_of_lanes(largest, total, settings.scale)


class _Entries(NamedTuple):
    """Teacher tokens that may follow, by class, and the sum of their exponentials."""

    first: Any
    last: Any
    row: Any
    top: Any
    total: Any


@triton.jit
def _entry_sum(row, first, last, lists, settings, FORM: tl.constexpr):
    """`_Entries` of a teacher's row."""
    R: tl.constexpr = FORM.tile[0]
    C: tl.constexpr = FORM.tile[1]
    places = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    largest = tl.full((C,), float("-inf"), tl.float32)
    total = tl.zeros((C,), tl.float32)
    for start in range(first, last, R * C):
        inside = start + places < last
        ids = tl.load(lists.teacher_ids + start + places, mask=inside, other=0)
        logits = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, _raised(logits, settings.lowest), float("-inf"))
        largest, total = fold_sum(largest, total, logits, settings.scale)
    top, total = total_of_lanes(largest, total, settings.scale)
    return _Entries(first, last, row, top, total)


@triton.jit
def add_in_class(total, is_new, more, more_is_new):
    """Sums since a class began; whether one did."""
    return tl.where(more_is_new != 0, more, total + more), is_new | more_is_new


@triton.jit
def _class_probs(start, carried, entries, lists, settings, FORM: tl.constexpr):
    """Classes that end among some entries, -1 where none does, and their probabilities.

    Last the sum of the class that goes on behind them.
    """
    COUNT: tl.constexpr = FORM.entries
    lanes = tl.arange(0, COUNT)
    places = start + lanes
    inside = places < entries.last
    classes = tl.load(lists.student_ids + places, mask=inside, other=-1)
    before = tl.load(
        lists.student_ids + places - 1, mask=inside & (places > entries.first), other=-1
    )
    behind = tl.load(lists.student_ids + places + 1, mask=places + 1 < entries.last, other=-1)
    ids = tl.load(lists.teacher_ids + places, mask=inside, other=0)
    logits = tl.load(entries.row + ids, mask=inside, other=0.0).to(tl.float32)
    logits = _raised(logits, settings.lowest)
    probs = tl.exp2((logits - entries.top) * settings.scale) / entries.total
    probs = tl.where(inside, probs, 0.0)
    is_new = (classes != before).to(tl.int32)
    sums, begun = tl.associative_scan((probs, is_new), 0, add_in_class)
    sums = tl.where(begun != 0, sums, sums + carried)
    carried = tl.sum(tl.where(lanes == COUNT - 1, sums, 0.0), 0)
    return tl.where(classes != behind, classes, -1), sums, carried


@triton.jit
def bpm_rows(values, student, teacher, out, lists, settings, FORM: tl.constexpr):
    """Divergence of a row from the teacher's probabilities of classes.

    Entries of a class follow each other: their probabilities are added as they come, and the class
    counts at its last one. Rows are given as `ctkd.ops.cuda.addressing` has them.

    Args:
        values: (N,) what is written.
        student: Rows of logits.
        teacher: Rows of logits.
        out: Rows that gradients are written to, if there are any.
        lists: A `ctkd.ops.cuda.row_losses.Lists`.
        settings: A `ctkd.ops.cuda.row_losses.BPMSettings`.
        FORM: A `ctkd.ops.cuda.row_losses.BPMForm`.
    """
    COUNT: tl.constexpr = FORM.entries
    R: tl.constexpr = FORM.tile[0]
    C: tl.constexpr = FORM.tile[1]
    temperature, scale, lowest = settings.temperature, settings.scale, settings.lowest
    number = tl.program_id(0)
    row = row_number(student, number)
    other_row = row_number(teacher, number)
    if (row < 0) | (other_row < 0):
        tl.store(values + number, 0.0)
        return
    own = student.tensor + row_start(student, row)
    other = teacher.tensor + row_start(teacher, other_row)
    first = tl.load(lists.ranges + 2 * number.to(tl.int64)).to(tl.int32)
    last = tl.load(lists.ranges + 2 * number.to(tl.int64) + 1).to(tl.int32)
    is_root = first == 0
    entries = _entry_sum(other, first, last, lists, settings, FORM)
    # Inside a token the teacher must expect at all that it goes on.
    counts = is_root
    if is_root == 0:
        top, total = _row_sum(other, teacher.width, settings, FORM)
        mass = tl.exp2((entries.top - top) * scale) * entries.total / total
        counts = (mass <= settings.least_mass) == 0
    sums = _image_sums(own, student.width, lists.in_image, settings, FORM)
    top, total = _joined(sums.top, sums.total, sums.rest_top, sums.rest_total, scale)
    # What is no class is compared only where all of the row is.
    has_others = (is_root == 0) | FORM.rest
    if has_others == 0:
        top, total = sums.top, sums.total
    log_total = tl.log(total)
    log_rest = (sums.rest_top - top) / temperature + tl.log(sums.rest_total) - log_total
    width = student.width

    lanes = tl.zeros((COUNT,), tl.float32)
    kept_lanes = tl.zeros((COUNT,), tl.float32)
    rest_prob = 0.0
    carried = 0.0
    for start in range(first, last, COUNT):
        classes, probs, carried = _class_probs(start, carried, entries, lists, settings, FORM)
        is_column = (classes >= 0) & (classes < width)
        logits = tl.load(own + classes, mask=is_column, other=0.0).to(tl.float32)
        logs = (_raised(logits, lowest) - top) / temperature - log_total
        logs = tl.where(is_column, logs, log_rest)
        is_low = logs < settings.floor
        logs = tl.where(is_low, settings.floor, logs)
        terms = tl.where(probs == 0.0, 0.0, probs * (tl.log(probs) - logs))
        lanes += tl.where(classes >= 0, terms, 0.0)
        kept = tl.where((classes >= 0) & (is_low == 0), probs, 0.0)
        kept_lanes += kept
        rest_prob += tl.sum(tl.where(classes == width, kept, 0.0), 0)
    value = tl.sum(lanes, 0)
    # A garbage row that does not count must not spoil the sum.
    tl.store(values + number, tl.where(counts, value, 0.0))
    if out.tensor is None:
        return
    kept = tl.sum(kept_lanes, 0)
    target = row_number(out, number)
    gradient = out.tensor + row_start(out, target)
    places = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    for begin in range(0, out.width, R * C):
        columns = begin + places
        inside = columns < width
        is_image = tl.load(lists.in_image + columns, mask=inside, other=0) != 0
        raw = tl.load(own + columns, mask=inside, other=0.0).to(tl.float32)
        logits = _raised(raw, lowest)
        probs = tl.exp2((logits - top) * scale) / total
        shares = tl.exp2((logits - sums.rest_top) * scale) / sums.rest_total
        others = probs * kept - tl.where(is_root, shares * rest_prob, 0.0)
        gradients = tl.where(is_image, probs * kept, others) / temperature
        gradients = tl.where(raw != raw, raw, gradients)
        # No gradient passes where a logit was raised to the lowest, or is not compared.
        is_compared = inside & (is_image | has_others) & counts
        gradients = tl.where(is_compared & ((raw < lowest) == 0), gradients, 0.0)
        tl.store(
            gradient + columns,
            gradients.to(gradient.dtype.element_ty),
            mask=(columns < out.width) & (target >= 0),
        )
    # Columns of classes are written once more, with what the teacher expects of them.
    tl.debug_barrier()
    carried = 0.0
    for start in range(first, last, COUNT):
        classes, probs, carried = _class_probs(start, carried, entries, lists, settings, FORM)
        is_column = (classes >= 0) & (classes < width)
        raw = tl.load(own + classes, mask=is_column, other=0.0).to(tl.float32)
        logits = _raised(raw, lowest)
        is_low = (logits - top) / temperature - log_total < settings.floor
        own_probs = tl.exp2((logits - top) * scale) / total
        gradients = (own_probs * kept - tl.where(is_low, 0.0, probs)) / temperature
        gradients = tl.where(raw != raw, raw, gradients)
        gradients = tl.where(counts & ((raw < lowest) == 0), gradients, 0.0)
        tl.store(
            gradient + classes,
            gradients.to(gradient.dtype.element_ty),
            mask=is_column & (target >= 0),
        )
