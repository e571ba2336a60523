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
