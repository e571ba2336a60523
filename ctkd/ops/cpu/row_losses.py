"""Losses on pairs of whole rows: `uld`, `gold`, `shared_kl` and `bpm`, values and gradients.

Every kernel takes n pairs of a student's and a teacher's row and writes the loss of each pair to
``values``, and its gradient by the student's raw logits to ``gradients``, whose values are empty
where no gradient is wanted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ctkd.ops.cpu.arrays import (
    BPMSettings,
    GoldSettings,
    RowArray,
    SharedKLSettings,
    UldSettings,
)
from ctkd.ops.cpu.compiling import compiled
from ctkd.ops.cpu.divergence_terms import divergence_terms
from ctkd.ops.cpu.numbers import LOG2_E, LOG_2, exp2, load, narrowed, store, widened
from ctkd.ops.cpu.ranks import Entries, rank_signs
from ctkd.ops.cpu.softmax_rows import largest, total_of

__all__ = ["bpm", "gold", "shared_kl", "uld"]

_TILE = 1024
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


# LLVM vectorizes a loop over several rows where it can tell that they do not overlap. So each row
# has a buffer of its own, and a loop that works in place works on one row alone.


@compiled
def _scale(row: Any, top: Any, scale: Any) -> None:
    for column in range(row.size):
        row[column] = (row[column] - top) * scale


@compiled
def _exponentiate(row: Any) -> None:
    for column in range(row.size):
        row[column] = exp2(row[column])


@compiled
def _powers(exponents: Any, powers: Any) -> None:
    for column in range(exponents.size):
        powers[column] = exp2(exponents[column])


@compiled
def _multiply(row: Any, factor: Any) -> None:
    for column in range(row.size):
        row[column] *= factor


@compiled
def _softmax(values: Any, start: Any, temperature: Any, probs: Any) -> None:
    load(values, start, probs)
    _scale(probs, largest(probs), LOG2_E / np.float32(temperature))
    _exponentiate(probs)
    _multiply(probs, np.float32(1.0 / total_of(probs)))


@compiled
def _carry_to_logits(change: Any, probs: Any, total: Any, temperature: Any) -> None:
    """Turn derivatives by log-probabilities, of which ``total`` is the sum, to those by logits."""
    total, factor = np.float32(total), np.float32(1.0 / temperature)
    for column in range(change.size):
        change[column] = (change[column] - probs[column] * total) * factor


@compiled
def uld(
    which: Any,
    student: RowArray,
    teacher: RowArray,
    settings: UldSettings,
    tails: Any,
    values: Any,
    tail_gradients: Any,
    gradients: RowArray,
) -> None:
    """L1 distance between probabilities in descending order.

    Args:
        which: Indices of the pairs to work on, int64.
        student: n rows of logits.
        teacher: n rows of logits or, with tails, of probabilities.
        settings: Columns and temperatures.
        tails: (n, 2) float32, one more probability of the teacher and how often it occurs; (n, 0):
            no tails.
        values: Output, (n, 1) float64.
        tail_gradients: Not written: tails are the teacher's.
        gradients: Output, by the student's logits.
    """
    probs = np.empty(settings.student_columns.size, np.float32)
    change = np.empty(settings.student_columns.size, np.float32)
    teacher_probs = np.empty(settings.teacher_columns.size, np.float32)
    entries = Entries(probs, settings.student_columns, _ONE)
    others = Entries(teacher_probs, settings.teacher_columns, _ONE)
    temperature = settings.student_temperature
    for pair in which:
        _softmax(student.values, student.starts[pair], temperature, probs)
        tail, tail_count = _ZERO, 0
        if tails.shape[1]:
            load(teacher.values, teacher.starts[pair], teacher_probs)
            tail, tail_count = np.float32(tails[pair, 0]), int(tails[pair, 1])
        else:
            start = teacher.starts[pair]
            _softmax(teacher.values, start, settings.teacher_temperature, teacher_probs)
        values[pair, 0] = rank_signs(entries, others, tail, tail_count, _ONE, change)
        if gradients.values.size:
            _carry_to_logits(change, probs, total_of(change), temperature)
            store(change, gradients.values, gradients.starts[pair])


@compiled
def _exponents_and_probs(
    values: Any, start: Any, temperature: Any, exponents: Any, probs: Any
) -> float:
    """Write e and p of ``p = 2 ** e / total``, and return the log of the total."""
    load(values, start, exponents)
    _scale(exponents, largest(exponents), LOG2_E / np.float32(temperature))
    _powers(exponents, probs)
    total = total_of(probs)
    _multiply(probs, np.float32(1.0 / total))
    return math.log(total)


@compiled
def _lowest_exponent(log_floor: float, offset: float) -> Any:
    return np.float32((log_floor - offset) / math.log(2.0))


class _GoldSide(NamedTuple):
    """A row with ``log p = exponents * log 2 + offset`` and ``p = probs * scale``."""

    exponents: Any
    probs: Any
    offset: Any
    scale: Any


class _Tiles(NamedTuple):
    gaps: Any
    terms: Any
    probs: Any
    teacher_probs: Any


@compiled
def _matched_terms(
    student: _GoldSide, teacher: _GoldSide, settings: GoldSettings, tiles: _Tiles
) -> float:
    """Divergence on shared columns; its derivatives overwrite the student's exponents there."""
    columns, teacher_columns = settings.student_columns, settings.teacher_columns
    exponents, teacher_exponents = student.exponents, teacher.exponents
    floor = _lowest_exponent(settings.log_floor, student.offset)
    teacher_floor = _lowest_exponent(settings.log_floor, teacher.offset)
    difference = np.float32(student.offset - teacher.offset)
    weight = np.float32(settings.matched_weight)
    matched = 0.0
    for begin in range(0, settings.shared, _TILE):
        size = min(_TILE, settings.shared - begin)
        gaps, terms = tiles.gaps[:size], tiles.terms[:size]
        probs, teacher_probs = tiles.probs[:size], tiles.teacher_probs[:size]
        for index in range(size):
            column = columns[begin + index]
            teacher_column = teacher_columns[begin + index]
            exponent = max(exponents[column], floor)
            teacher_exponent = max(teacher_exponents[teacher_column], teacher_floor)
            gaps[index] = (exponent - teacher_exponent) * LOG_2 + difference
            probs[index] = student.probs[column] * student.scale
            teacher_probs[index] = teacher.probs[teacher_column] * teacher.scale
        divergence_terms(gaps, probs, teacher_probs, np.float32(settings.beta), terms)
        matched += total_of(gaps)
        for index in range(size):
            exponents[columns[begin + index]] = terms[index] * weight
    return matched


@compiled
def _unmatched_distance(student: _GoldSide, teacher: _GoldSide, settings: GoldSettings) -> float:
    """Distance on other columns; its derivatives overwrite the student's exponents there."""
    columns = settings.student_columns[settings.shared :]
    teacher_columns = settings.teacher_columns[settings.shared :]
    weight = np.float32(settings.unmatched_weight)
    entries = Entries(student.probs, columns, student.scale)
    others = Entries(teacher.probs, teacher_columns, teacher.scale)
    return rank_signs(entries, others, _ZERO, 0, weight, student.exponents)


@compiled
def _gold_terms(
    student: _GoldSide,
    teacher: _GoldSide,
    settings: GoldSettings,
    tiles: _Tiles,
    pair: int,
    values: Any,
) -> None:
    """Both weighted terms; their derivatives overwrite the student's exponents."""
    # A weight of 0 leaves a term out, even if it is not finite.
    matched = 0.0
    if settings.matched_weight:
        matched = _matched_terms(student, teacher, settings, tiles)
    else:
        student.exponents[:] = _ZERO
    values[pair, 0] = matched * settings.matched_weight
    values[pair, 1] = 0.0
    if settings.unmatched_weight:
        distance = _unmatched_distance(student, teacher, settings)
        values[pair, 1] = settings.unmatched_weight * distance
    else:
        columns = settings.student_columns
        for index in range(settings.shared, columns.size):
            student.exponents[columns[index]] = _ZERO


@compiled
def gold(
    which: Any,
    student: RowArray,
    teacher: RowArray,
    settings: GoldSettings,
    log_scales: Any,
    values: Any,
    scale_gradients: Any,
    gradients: RowArray,
) -> None:
    """Weighted divergence on shared columns, and weighted ranked L1 distance on the others.

    Args:
        which: Indices of the pairs to work on, int64.
        student: n rows of logits.
        teacher: n rows of logits.
        settings: Columns, temperatures and weights.
        log_scales: (n, 2), added to the log-probabilities of either side; (n, 0): not scaled.
        values: Output, (n, 2) float64.
        scale_gradients: Output, (n, 2) float32, of which column 0 is written: the gradient by the
            student's log scale. Empty: none is wanted.
        gradients: Output, by the student's logits.
    """
    exponents = np.empty(settings.student_columns.size, np.float32)
    probs = np.empty(settings.student_columns.size, np.float32)
    teacher_exponents = np.empty(settings.teacher_columns.size, np.float32)
    teacher_probs = np.empty(settings.teacher_columns.size, np.float32)
    gaps, terms = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    tiles = _Tiles(gaps, terms, np.empty(_TILE, np.float32), np.empty(_TILE, np.float32))
    temperature, teacher_temperature = settings.student_temperature, settings.teacher_temperature
    for pair in which:
        start, teacher_start = student.starts[pair], teacher.starts[pair]
        offset = -_exponents_and_probs(student.values, start, temperature, exponents, probs)
        teacher_offset = -_exponents_and_probs(
            teacher.values, teacher_start, teacher_temperature, teacher_exponents, teacher_probs
        )
        scale = teacher_scale = _ONE
        if log_scales.shape[1]:
            offset += log_scales[pair, 0]
            teacher_offset += log_scales[pair, 1]
            scale = np.float32(math.exp(log_scales[pair, 0]))
            teacher_scale = np.float32(math.exp(log_scales[pair, 1]))
        _gold_terms(
            _GoldSide(exponents, probs, offset, scale),
            _GoldSide(teacher_exponents, teacher_probs, teacher_offset, teacher_scale),
            settings,
            tiles,
            pair,
            values,
        )
        if gradients.values.size or scale_gradients.size:
            total = total_of(exponents)
            if scale_gradients.size:
                scale_gradients[pair, 0] = np.float32(total)
            if gradients.values.size:
                _carry_to_logits(exponents, probs, total, temperature)
                store(exponents, gradients.values, gradients.starts[pair])


class _SharedSide(NamedTuple):
    """Buffers for a row's exponents and probabilities, and for those of the class of the rest."""

    exponents: Any
    probs: Any
    rest: Any


class _SharedLogs(NamedTuple):
    """The offset of ``log p = exponents * log 2 + offset``, and the log-probability of the rest."""

    offset: Any
    log_rest: Any


@compiled
def _gather(values: Any, columns: Any, lowest: Any, row: Any) -> None:
    for index in range(columns.size):
        value = widened(values[columns[index]])
        if value < lowest:
            value = lowest
        row[index] = value


@compiled
def _shared_softmax(
    row: Any, columns: Any, others: Any, settings: SharedKLSettings, side: _SharedSide
) -> Any:
    """Softmax on shared columns and, if there are others, the class of the rest.

    Of the rest, each column's part of the class is written.
    """
    lowest, temperature = np.float32(settings.lowest_logit), settings.temperature
    scale = LOG2_E / np.float32(temperature)
    _gather(row, columns, lowest, side.exponents)
    top = largest(side.exponents)
    _scale(side.exponents, top, scale)
    _powers(side.exponents, side.probs)
    total = total_of(side.probs)
    offset, log_rest = -math.log(total), 0.0
    if others.size:
        _gather(row, others, lowest, side.rest)
        rest_top = largest(side.rest)
        _scale(side.rest, rest_top, scale)
        _exponentiate(side.rest)
        rest_total = total_of(side.rest)
        log_shared = np.float64(top) / temperature + math.log(total)
        log_rest = np.float64(rest_top) / temperature + math.log(rest_total)
        highest = max(log_shared, log_rest)
        log_normalizer = highest + math.log(
            math.exp(log_shared - highest) + math.exp(log_rest - highest)
        )
        # Low enough for the floor to apply, high enough not to lose the exponents' digits.
        offset += max(log_shared - log_normalizer, 2.0 * settings.log_floor)
        log_rest = max(log_rest - log_normalizer, settings.log_floor)
        _multiply(side.rest, np.float32(1.0 / rest_total))
    _multiply(side.probs, np.float32(math.exp(offset)))
    return _SharedLogs(offset, log_rest)


@compiled
def _gaps(exponents: Any, floor: Any, others: Any, other_floor: Any, difference: Any) -> None:
    """Overwrite exponents by the gaps of log-probabilities, each side's raised to its floor."""
    for index in range(exponents.size):
        exponent, other = exponents[index], others[index]
        if exponent < floor:
            exponent = floor
        if other < other_floor:
            other = other_floor
        exponents[index] = (exponent - other) * LOG_2 + difference


@compiled
def _clear(row: Any) -> None:
    zero = narrowed(_ZERO, row[0])
    for column in range(row.size):
        row[column] = zero


@compiled
def _scatter(changes: Any, columns: Any, row: Any, lowest: Any, gradient: Any) -> None:
    """Write changes to their columns, except where a logit was raised to the lowest."""
    for index in range(columns.size):
        column = columns[index]
        if not widened(row[column]) < lowest:
            gradient[column] = narrowed(changes[index], gradient[column])


@compiled
def _write_shared_gradient(
    changes: Any,
    side: _SharedSide,
    rest_change: float,
    row: Any,
    settings: SharedKLSettings,
    gradient: Any,
) -> None:
    lowest = np.float32(settings.lowest_logit)
    _clear(gradient)
    _scatter(changes, settings.student_ids, row, lowest, gradient)
    _multiply(side.rest, np.float32(rest_change / settings.temperature))
    _scatter(side.rest, settings.student_others, row, lowest, gradient)


@compiled
def shared_kl(
    which: Any,
    student: RowArray,
    teacher: RowArray,
    settings: SharedKLSettings,
    numbers: Any,
    values: Any,
    number_gradients: Any,
    gradients: RowArray,
) -> None:
    """Divergence on shared columns and, if there are others, the class of the rest.

    Args:
        which: Indices of the pairs to work on, int64.
        student: n rows of logits.
        teacher: n rows of logits.
        settings: Columns, temperature and floors.
        numbers: Not read.
        values: Output, (n, 1) float64.
        number_gradients: Not written.
        gradients: Output, by the student's logits.
    """
    ids, others, beta = settings.student_ids, settings.student_others, np.float32(settings.beta)
    exponents, probs = np.empty(ids.size, np.float32), np.empty(ids.size, np.float32)
    side = _SharedSide(exponents, probs, np.empty(others.size, np.float32))
    changes, teacher_probs = np.empty(ids.size, np.float32), np.empty(ids.size, np.float32)
    teacher_rest = np.empty(settings.teacher_others.size, np.float32)
    teacher_side = _SharedSide(changes, teacher_probs, teacher_rest)
    # Gap, both probabilities and change of the class of the rest.
    rest = np.empty((4, 1), np.float32)
    for pair in which:
        row = student.values[student.starts[pair] :]
        teacher_row = teacher.values[teacher.starts[pair] :]
        logs = _shared_softmax(row, ids, others, settings, side)
        teacher_logs = _shared_softmax(
            teacher_row, settings.teacher_ids, settings.teacher_others, settings, teacher_side
        )
        _gaps(
            exponents,
            _lowest_exponent(settings.log_floor, logs.offset),
            teacher_side.exponents,
            _lowest_exponent(settings.log_floor, teacher_logs.offset),
            np.float32(logs.offset - teacher_logs.offset),
        )
        # The changes overwrite the teacher's exponents, which are not needed any more.
        divergence_terms(exponents, probs, teacher_probs, beta, changes)
        value, total = total_of(exponents), total_of(changes)
        rest_change = 0.0
        if others.size:
            rest_prob = math.exp(logs.log_rest)
            rest[0] = np.float32(logs.log_rest - teacher_logs.log_rest)
            rest[1] = np.float32(rest_prob)
            rest[2] = np.float32(math.exp(teacher_logs.log_rest))
            divergence_terms(rest[0], rest[1], rest[2], beta, rest[3])
            value += rest[0, 0]
            rest_change = np.float64(rest[3, 0])
            total += rest_change
            rest_change -= rest_prob * total
        values[pair, 0] = value
        if gradients.values.size:
            _carry_to_logits(changes, probs, total, settings.temperature)
            start = gradients.starts[pair]
            gradient = gradients.values[start : start + settings.student_width]
            _write_shared_gradient(changes, side, rest_change, row, settings, gradient)


class _BPMRow(NamedTuple):
    """Buffers for a student's row, and the numbers of its softmax.

    Attributes:
        exponents: ``log p = exponents * log 2 - log_total``; minus infinity where not compared.
        probs: p.
        rest: Of the columns outside the image, each one's part of them.
        log_total: Log of the sum of 2 to the exponents.
        log_rest: Log-probability of the columns outside the image.
    """

    exponents: Any
    probs: Any
    rest: Any
    log_total: Any
    log_rest: Any


@compiled
def _raise(row: Any, lowest: Any) -> None:
    for column in range(row.size):
        if row[column] < lowest:
            row[column] = lowest


@compiled
def _bpm_softmax(row: _BPMRow, settings: BPMSettings, is_root: bool) -> _BPMRow:
    """Softmax of the logits in ``exponents``; where there is no rest, on the image alone."""
    scale, image = LOG2_E / np.float32(settings.temperature), settings.in_image
    _raise(row.exponents, np.float32(settings.lowest_logit))
    for column in range(image.size):
        row.rest[column] = -np.inf if image[column] else row.exponents[column]
        if is_root and not (settings.has_rest or image[column]):
            row.exponents[column] = -np.inf
    top, rest_top = largest(row.exponents), largest(row.rest)
    _scale(row.exponents, top, scale)
    _powers(row.exponents, row.probs)
    total = total_of(row.probs)
    _multiply(row.probs, np.float32(1.0 / total))
    log_total, log_rest = math.log(total), 0.0
    if is_root and settings.has_rest:
        _scale(row.rest, rest_top, scale)
        _exponentiate(row.rest)
        rest_total = total_of(row.rest)
        _multiply(row.rest, np.float32(1.0 / rest_total))
        distance = (np.float64(rest_top) - np.float64(top)) / settings.temperature
        log_rest = distance + math.log(rest_total) - log_total
    return _BPMRow(row.exponents, row.probs, row.rest, log_total, log_rest)


@compiled
def _entry_probs(row: Any, ids: Any, settings: BPMSettings, probs: Any) -> Any:
    """Softmax of some columns; the largest logit and the sum of exponentials."""
    _gather(row, ids, np.float32(settings.lowest_logit), probs)
    top = largest(probs)
    _scale(probs, top, LOG2_E / np.float32(settings.temperature))
    _exponentiate(probs)
    total = total_of(probs)
    _multiply(probs, np.float32(1.0 / total))
    return top, total


@compiled
def _mass(top: Any, total: Any, row: Any, settings: BPMSettings) -> Any:
    """Part of a row's probability that some of its columns have."""
    _raise(row, np.float32(settings.lowest_logit))
    row_top = largest(row)
    _scale(row, row_top, LOG2_E / np.float32(settings.temperature))
    _exponentiate(row)
    distance = (np.float64(top) - np.float64(row_top)) / settings.temperature
    return math.exp(distance) * total / total_of(row)


@compiled
def _bpm_terms(row: _BPMRow, classes: Any, probs: Any, settings: BPMSettings) -> Any:
    """Value, what the classes above the floor have together, and what the rest has of it.

    Of each class the last entry takes the sum, 0 if it is below the floor, and others -1.
    """
    value, kept, rest, mass = 0.0, 0.0, 0.0, 0.0
    for entry in range(classes.size):
        mass += np.float64(probs[entry])
        probs[entry] = -_ONE
        if entry + 1 == classes.size or classes[entry + 1] != classes[entry]:
            log_prob = row.log_rest
            is_rest = classes[entry] == settings.student_width
            if not is_rest:
                exponent = np.float64(row.exponents[classes[entry]])
                log_prob = exponent * math.log(2.0) - row.log_total
            is_low = log_prob < settings.log_floor
            if is_low:
                log_prob = settings.log_floor
            if mass != 0.0:
                value += mass * (math.log(mass) - log_prob)
            if is_low:
                mass = 0.0
            probs[entry] = np.float32(mass)
            kept += mass
            if is_rest:
                rest = mass
            mass = 0.0
    return value, kept, rest


@compiled
def bpm(
    which: Any,
    student: RowArray,
    teacher: RowArray,
    settings: BPMSettings,
    ranges: Any,
    values: Any,
    number_gradients: Any,
    gradients: RowArray,
) -> None:
    """Divergence of rows from the teacher's probabilities of classes of its tokens.

    Args:
        which: Indices of the pairs to work on, int64.
        student: n rows of logits.
        teacher: n rows of logits.
        settings: Entries, temperature and floors.
        ranges: (n, 2) int64, the first entry and the last plus one. From 0 on, nothing was read.
        values: Output, (n, 1) float64.
        number_gradients: Not written.
        gradients: Output, by the student's logits.
    """
    width, lowest = settings.student_width, np.float32(settings.lowest_logit)
    exponents, probs = np.empty(width, np.float32), np.empty(width, np.float32)
    buffers = _BPMRow(exponents, probs, np.empty(width, np.float32), 0.0, 0.0)
    teacher_row = np.empty(settings.teacher_width, np.float32)
    entry_probs = np.empty(settings.teacher_width, np.float32)
    for pair in which:
        first, last = ranges[pair, 0], ranges[pair, 1]
        is_root, classes = first == 0, settings.student_ids[first:last]
        expected = entry_probs[: last - first]
        start, teacher_start = student.starts[pair], teacher.starts[pair]
        top, total = _entry_probs(
            teacher.values[teacher_start:], settings.teacher_ids[first:last], settings, expected
        )
        load(student.values, start, exponents)
        row = _bpm_softmax(buffers, settings, is_root)
        value, kept, rest = _bpm_terms(row, classes, expected, settings)
        counts = True
        if not is_root:
            load(teacher.values, teacher_start, teacher_row)
            counts = not _mass(top, total, teacher_row, settings) <= settings.least_mass
        values[pair, 0] = value if counts else 0.0
        if not gradients.values.size:
            continue
        begin = gradients.starts[pair]
        gradient = gradients.values[begin : begin + width]
        if not counts:
            _clear(gradient)
            continue
        _multiply(probs, np.float32(kept))
        if is_root and settings.has_rest:
            for column in range(width):
                probs[column] -= row.rest[column] * np.float32(rest)
        for entry in range(classes.size):
            if expected[entry] != -_ONE and classes[entry] < width:
                probs[classes[entry]] -= expected[entry]
        _multiply(probs, np.float32(1.0 / settings.temperature))
        logits = student.values[start : start + width]
        for column in range(width):
            # No gradient passes where a logit was raised to the lowest.
            change = _ZERO if widened(logits[column]) < lowest else probs[column]
            gradient[column] = narrowed(change, gradient[column])
