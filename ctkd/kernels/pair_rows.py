"""Losses on pairs of whole rows: `uld`, `gold` and `shared_kl`, values and gradients.

Every function takes pairs (n,) of rows of both sides and puts their values into ``answers``, and
the gradient of the student's raw logits where there is room for it: ``gradients`` is empty where
none is wanted. The sides' values are float32, or bfloat16 as uint16; ``starts`` (n,) say where rows
begin in them; pairs from ``first`` to before ``last`` are worked on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ctkd.kernels.compiling import compiled
from ctkd.kernels.divergence_terms import put_divergence_terms
from ctkd.kernels.numbers import LOG2_E, LOG_2, exp2, load, narrowed, put, widened
from ctkd.kernels.ranks import put_rank_signs
from ctkd.kernels.softmax_rows import largest, total_of

__all__ = ["put_gold", "put_shared_kl", "put_uld"]

_TILE = 1024


# A loop over several rows is vectorised where they are known to lie apart: each has memory of its
# own, and what is done in place is done with one row alone.


@compiled
def _scale(row: Any, top: Any, scale: Any) -> None:
    for column in range(row.size):
        row[column] = (row[column] - top) * scale


@compiled
def _raise(row: Any) -> None:
    for column in range(row.size):
        row[column] = exp2(row[column])


@compiled
def _put_powers_of(exponents: Any, powers: Any) -> None:
    for column in range(exponents.size):
        powers[column] = exp2(exponents[column])


@compiled
def _put_probs(values: Any, start: Any, temperature: Any, probs: Any) -> None:
    load(values, start, probs)
    _scale(probs, largest(probs), LOG2_E / np.float32(temperature))
    _raise(probs)
    _multiply(probs, np.float32(1.0 / total_of(probs)))


@compiled
def _multiply(row: Any, factor: Any) -> None:
    for column in range(row.size):
        row[column] *= factor


@compiled
def _take_total_off(change: Any, probs: Any, total: Any, temperature: Any) -> None:
    """From derivatives by log-probabilities to those by logits."""
    total, factor = np.float32(total), np.float32(1.0 / temperature)
    for column in range(change.size):
        change[column] = (change[column] - probs[column] * total) * factor


@compiled
def put_uld(
    values: Any,
    starts: Any,
    teacher_values: Any,
    teacher_starts: Any,
    first: int,
    last: int,
    columns: Any,
    teacher_columns: Any,
    temperature: float,
    teacher_temperature: float,
    tails: Any,
    answers: Any,
    gradients: Any,
    gradient_starts: Any,
) -> None:
    """Put the distance between ranked probabilities, (n, 1).

    ``columns`` are all of the student's, (V,) uint32, ``teacher_columns`` all of the teacher's.
    Where ``tails`` (n, 2) is not (n, 0), the teacher's values are probabilities, and it has one
    more, ``tails[:, 0]``, ``tails[:, 1]`` times.
    """
    probs = np.empty(columns.size, np.float32)
    change = np.empty(columns.size, np.float32)
    teacher_probs = np.empty(teacher_columns.size, np.float32)
    one = np.float32(1.0)
    for pair in range(first, last):
        _put_probs(values, starts[pair], temperature, probs)
        tail, tail_count = np.float32(0.0), 0
        if tails.shape[1]:
            load(teacher_values, teacher_starts[pair], teacher_probs)
            tail, tail_count = np.float32(tails[pair, 0]), int(tails[pair, 1])
        else:
            _put_probs(teacher_values, teacher_starts[pair], teacher_temperature, teacher_probs)
        answers[pair, 0] = put_rank_signs(
            probs,
            columns,
            one,
            teacher_probs,
            teacher_columns,
            one,
            tail,
            tail_count,
            one,
            change,
        )
        if gradients.size:
            _take_total_off(change, probs, total_of(change), temperature)
            put(change, gradients, gradient_starts[pair])


@compiled
def _put_exponents_and_probs(
    values: Any, start: Any, temperature: Any, exponents: Any, probs: Any
) -> float:
    """Put e and p of ``p = 2 ** e / total``, and return the log of the total."""
    load(values, start, exponents)
    _scale(exponents, largest(exponents), LOG2_E / np.float32(temperature))
    _put_powers_of(exponents, probs)
    total = total_of(probs)
    _multiply(probs, np.float32(1.0 / total))
    return math.log(total)


@compiled
def _least_exponent(log_floor: float, offset: float) -> Any:
    return np.float32((log_floor - offset) / math.log(2.0))


@compiled
def put_gold(
    values: Any,
    starts: Any,
    teacher_values: Any,
    teacher_starts: Any,
    first: int,
    last: int,
    columns: Any,
    teacher_columns: Any,
    shared: int,
    temperature: float,
    teacher_temperature: float,
    beta: float,
    matched_weight: float,
    unmatched_weight: float,
    log_floor: float,
    log_scales: Any,
    answers: Any,
    scale_gradients: Any,
    gradients: Any,
    gradient_starts: Any,
) -> None:
    """Put both weighted terms, (n, 2), and the gradient of the student's log scale.

    ``columns`` (V,) uint32 are first the ``shared`` ones, in an order that is that of
    ``teacher_columns`` (W,) too, then the others, ascending. Below ``log_floor`` a logarithm counts
    as that. ``log_scales`` are (n, 2), or (n, 0) without; ``scale_gradients`` (n, 2) takes the
    gradient, or is empty.
    """
    exponents = np.empty(columns.size, np.float32)
    probs = np.empty(columns.size, np.float32)
    teacher_exponents = np.empty(teacher_columns.size, np.float32)
    teacher_probs = np.empty(teacher_columns.size, np.float32)
    gaps, terms = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    tile, teacher_tile = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for pair in range(first, last):
        offset = -_put_exponents_and_probs(values, starts[pair], temperature, exponents, probs)
        teacher_offset = -_put_exponents_and_probs(
            teacher_values,
            teacher_starts[pair],
            teacher_temperature,
            teacher_exponents,
            teacher_probs,
        )
        scale = teacher_scale = np.float32(1.0)
        if log_scales.shape[1]:
            offset += log_scales[pair, 0]
            teacher_offset += log_scales[pair, 1]
            scale = np.float32(math.exp(log_scales[pair, 0]))
            teacher_scale = np.float32(math.exp(log_scales[pair, 1]))
        floor = _least_exponent(log_floor, offset)
        teacher_floor = _least_exponent(log_floor, teacher_offset)
        difference = np.float32(offset - teacher_offset)
        matched = 0.0
        # A weight of 0 leaves a term out, whatever it is.
        if not matched_weight:
            exponents[:] = np.float32(0.0)
        for begin in range(0, shared if matched_weight else 0, _TILE):
            size = min(_TILE, shared - begin)
            gap, term, student, teacher = (
                gaps[:size],
                terms[:size],
                tile[:size],
                teacher_tile[:size],
            )
            for place in range(size):
                column = columns[begin + place]
                other = teacher_columns[begin + place]
                here = max(exponents[column], floor)
                there = max(teacher_exponents[other], teacher_floor)
                gap[place] = (here - there) * LOG_2 + difference
                student[place] = probs[column] * scale
                teacher[place] = teacher_probs[other] * teacher_scale
            put_divergence_terms(gap, student, teacher, np.float32(beta), term)
            matched += total_of(gap)
            for place in range(size):
                exponents[columns[begin + place]] = term[place] * np.float32(matched_weight)
        answers[pair, 0] = matched * matched_weight
        answers[pair, 1] = 0.0
        if unmatched_weight:
            answers[pair, 1] = unmatched_weight * put_rank_signs(
                probs,
                columns[shared:],
                scale,
                teacher_probs,
                teacher_columns[shared:],
                teacher_scale,
                np.float32(0.0),
                0,
                np.float32(unmatched_weight),
                exponents,
            )
        else:
            for place in range(shared, columns.size):
                exponents[columns[place]] = np.float32(0.0)
        if gradients.size or scale_gradients.size:
            total = total_of(exponents)
            if scale_gradients.size:
                scale_gradients[pair, 0] = np.float32(total)
            if gradients.size:
                _take_total_off(exponents, probs, total, temperature)
                put(exponents, gradients, gradient_starts[pair])


@compiled
def _gather(values: Any, columns: Any, lowest: Any, row: Any) -> None:
    for place in range(columns.size):
        value = widened(values[columns[place]])
        if value < lowest:
            value = lowest
        row[place] = value


@compiled
def _put_shared(
    row: Any,
    columns: Any,
    others: Any,
    temperature: Any,
    lowest: Any,
    log_floor: Any,
    exponents: Any,
    probs: Any,
    rest: Any,
) -> tuple[float, float]:
    """Put e and p of shared columns, and powers of the rest if there is one.

    Returns:
        The offset of ``log p = e log 2 + offset``, and the log-probability of the rest.
    """
    scale = LOG2_E / np.float32(temperature)
    _gather(row, columns, lowest, exponents)
    top = largest(exponents)
    _scale(exponents, top, scale)
    _put_powers_of(exponents, probs)
    total = total_of(probs)
    offset, log_rest = -math.log(total), 0.0
    if others.size:
        _gather(row, others, lowest, rest)
        rest_top = largest(rest)
        _scale(rest, rest_top, scale)
        _raise(rest)
        rest_total = total_of(rest)
        log_shared = np.float64(top) / temperature + math.log(total)
        log_rest = np.float64(rest_top) / temperature + math.log(rest_total)
        highest = max(log_shared, log_rest)
        normaliser = highest + math.log(
            math.exp(log_shared - highest) + math.exp(log_rest - highest)
        )
        # Low enough for the floor to have the last word, high enough not to swamp exponents.
        offset += max(log_shared - normaliser, 2.0 * log_floor)
        log_rest = max(log_rest - normaliser, log_floor)
        # Its powers, as parts of the rest.
        _multiply(rest, np.float32(1.0 / rest_total))
    _multiply(probs, np.float32(math.exp(offset)))
    return offset, log_rest


@compiled
def _put_gap(exponents: Any, least: Any, others: Any, other_least: Any, difference: Any) -> None:
    """Put the gap of logarithms in place of exponents, with a floor under either side's."""
    for place in range(exponents.size):
        here, there = exponents[place], others[place]
        if here < least:
            here = least
        if there < other_least:
            there = other_least
        exponents[place] = (here - there) * LOG_2 + difference


@compiled
def _clear(place: Any) -> None:
    zero = narrowed(np.float32(0.0), place[0])
    for column in range(place.size):
        place[column] = zero


@compiled
def _scatter(changes: Any, columns: Any, row: Any, lowest: Any, gradient: Any) -> None:
    """Put changes where they belong. Where a logit was cut off it has no influence: 0."""
    for place in range(columns.size):
        column = columns[place]
        if not widened(row[column]) < lowest:
            gradient[column] = narrowed(changes[place], gradient[column])


@compiled
def put_shared_kl(
    values: Any,
    starts: Any,
    teacher_values: Any,
    teacher_starts: Any,
    first: int,
    last: int,
    columns: Any,
    teacher_columns: Any,
    others: Any,
    teacher_others: Any,
    temperature: float,
    beta: float,
    lowest: float,
    log_floor: float,
    answers: Any,
    gradients: Any,
    gradient_starts: Any,
    gradient_width: int,
) -> None:
    """Put the divergence on shared tokens and, if there are others, the class of the rest, (n, 1).

    ``columns`` (M,) uint32 and ``teacher_columns`` (M,) are the shared tokens, ``others`` and
    ``teacher_others`` those of the rest, empty without such a class. Logits below ``lowest`` and
    logarithms below ``log_floor`` count as these. ``gradient_width`` is V.
    """
    exponents, probs = np.empty(columns.size, np.float32), np.empty(columns.size, np.float32)
    teacher_exponents = np.empty(columns.size, np.float32)
    teacher_probs = np.empty(columns.size, np.float32)
    rest = np.empty(others.size, np.float32)
    teacher_rest = np.empty(teacher_others.size, np.float32)
    of_rest = np.empty((4, 1), np.float32)
    least = np.float32(lowest)
    for pair in range(first, last):
        row = values[starts[pair] :]
        offset, log_rest = _put_shared(
            row, columns, others, temperature, least, log_floor, exponents, probs, rest
        )
        teacher_offset, teacher_log_rest = _put_shared(
            teacher_values[teacher_starts[pair] :],
            teacher_columns,
            teacher_others,
            temperature,
            least,
            log_floor,
            teacher_exponents,
            teacher_probs,
            teacher_rest,
        )
        _put_gap(
            exponents,
            _least_exponent(log_floor, offset),
            teacher_exponents,
            _least_exponent(log_floor, teacher_offset),
            np.float32(offset - teacher_offset),
        )
        put_divergence_terms(exponents, probs, teacher_probs, np.float32(beta), teacher_exponents)
        value, total = total_of(exponents), total_of(teacher_exponents)
        rest_change = rest_prob = 0.0
        if others.size:
            rest_prob = math.exp(log_rest)
            of_rest[0] = np.float32(log_rest - teacher_log_rest)
            of_rest[1] = np.float32(rest_prob)
            of_rest[2] = np.float32(math.exp(teacher_log_rest))
            put_divergence_terms(of_rest[0], of_rest[1], of_rest[2], np.float32(beta), of_rest[3])
            value += of_rest[0, 0]
            rest_change = np.float64(of_rest[3, 0])
            total += rest_change
            rest_change -= rest_prob * total
        answers[pair, 0] = value
        if gradients.size:
            _take_total_off(teacher_exponents, probs, total, temperature)
            here = gradients[gradient_starts[pair] : gradient_starts[pair] + gradient_width]
            _clear(here)
            _scatter(teacher_exponents, columns, row, least, here)
            _multiply(rest, np.float32(rest_change / temperature))
            _scatter(rest, others, row, least, here)
