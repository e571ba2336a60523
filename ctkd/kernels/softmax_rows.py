"""Softmax of rows: what is summed up of it, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ctkd.kernels.compiling import compiled, compiled_sum
from ctkd.kernels.numbers import (
    LOG2_E,
    as_ordered,
    exp2,
    from_ordered,
    put,
    row_of,
)

__all__ = [
    "add_softmax_gradients",
    "largest",
    "put_log_normalisers",
    "put_powers",
    "total_of",
]

_LEAST = np.int32(-(2**31))


@compiled
def largest(row: Any) -> Any:
    """The largest entry."""
    found = _LEAST
    for column in range(row.size):
        found = max(found, as_ordered(row[column]))
    return from_ordered(found)


@compiled_sum
def total_of(row: Any) -> Any:
    """The sum of float32 in float64."""
    total = 0.0
    for column in range(row.size):
        total += np.float64(row[column])
    return total


@compiled
def put_powers(row: Any, top: Any, scale: Any, powers: Any) -> None:
    """Put ``2 ** ((row - top) * scale)`` into a row."""
    for column in range(row.size):
        powers[column] = exp2((row[column] - top) * scale)


@compiled_sum
def _deviation(row: Any) -> Any:
    """Mean and unbiased standard deviation, float64."""
    mean = total_of(row) / row.size
    total = 0.0
    for column in range(row.size):
        gap = np.float64(row[column]) - mean
        total += gap * gap
    return mean, math.sqrt(total / (row.size - 1))


@compiled
def _add_scaled(row: Any, factor: Any, sums: Any) -> None:
    for column in range(row.size):
        sums[column] += row[column] * factor


@compiled
def put_log_normalisers(
    values: Any,
    starts: Any,
    first: int,
    last: int,
    width: int,
    temperatures: Any,
    epsilon: float,
    answers: Any,
    is_summed: Any,
    mass: Any,
) -> None:
    """Put the log of the softmax denominator of each row, at each temperature.

    Args:
        values: float32, or bfloat16 as uint16.
        starts: (n,) where each row begins in them.
        first: Row to begin with.
        last: Row before which to end.
        width: V.
        temperatures: (T,) float64.
        epsilon: Added to the deviation that rows are divided by first; below 0, they are not.
        answers: (T, n).
        is_summed: (n,) of which rows probabilities at the first temperature are added up.
        mass: (V,) takes the sum.
    """
    room = np.empty(width, np.float32)
    powers = np.empty(width, np.float32)
    for index in range(first, last):
        row = row_of(values, starts[index], room)
        top = largest(row)
        divisor = 1.0
        if epsilon >= 0.0:
            _, deviation = _deviation(row)
            divisor = deviation + epsilon
        # Each by itself, so that what is asked beside it changes no answer in its last digit.
        for place in range(temperatures.size):
            temperature = temperatures[place] * divisor
            put_powers(row, top, LOG2_E / np.float32(temperature), powers)
            total = total_of(powers)
            answers[place, index] = np.float32(np.float64(top) / temperature + math.log(total))
            if place == 0 and is_summed[index]:
                _add_scaled(powers, np.float32(1.0 / total), mass)


@compiled
def _put_scaled(values: Any, start: Any, factor: Any, row: Any) -> None:
    here = row_of(values, start, row)
    for column in range(row.size):
        row[column] = here[column] * factor


@compiled
def _add_softmax(row: Any, shift: Any, scale: Any, factor: Any, gradient: Any) -> None:
    for column in range(row.size):
        gradient[column] += exp2(row[column] * scale + shift) * factor


@compiled
def _add_two_softmaxes(
    row: Any, shift: Any, scale: Any, factor: Any, factor_of_square: Any, gradient: Any
) -> None:
    for column in range(row.size):
        power = exp2(row[column] * scale + shift)
        gradient[column] += power * (power * factor_of_square + factor)


@compiled_sum
def _product(one: Any, other: Any) -> Any:
    total = 0.0
    for column in range(one.size):
        total += np.float64(one[column]) * np.float64(other[column])
    return total


@compiled
def _add_through_deviation(
    row: Any, change: Any, temperature: Any, epsilon: Any, gradient: Any
) -> None:
    """Carry a change of rows that were divided by their own deviation back to the rows."""
    mean, deviation = _deviation(row)
    divisor = deviation + epsilon
    along = 0.0
    # A constant row has no direction in which its deviation grows.
    if deviation != 0.0:
        spread = deviation * (row.size - 1) * divisor * divisor * temperature
        along = _product(change, row) / spread
    direct, slope = np.float32(1.0 / (divisor * temperature)), np.float32(along)
    middle = np.float32(mean)
    for column in range(row.size):
        gradient[column] += change[column] * direct - (row[column] - middle) * slope


@compiled
def add_softmax_gradients(
    values: Any,
    starts: Any,
    first: int,
    last: int,
    widths: Any,
    temperatures: Any,
    epsilons: Any,
    ahead: int,
    shifts: Any,
    factors: Any,
    factors_of_square: Any,
    bounds: Any,
    ids: Any,
    weights: Any,
    known: Any,
    known_starts: Any,
    known_weights: Any,
    gradients: Any,
    gradient_starts: Any,
    gradient_width: int,
) -> None:
    """Put the gradient of each row: that of softmaxes, and a multiple of a known one.

    Args:
        values: float32, or bfloat16 as uint16. May be the gradients.
        starts: (m,) where each row begins in them.
        first: Row to begin with.
        last: Row before which to end.
        widths: (T,) columns of each term.
        temperatures: (T,) float64.
        epsilons: (T,) as in `put_log_normalisers`.
        ahead: Rows of the following before the first of these.
        shifts: (T, n) log-normalisers, negated, times log2 e.
        factors: (T, n) what multiplies the softmax.
        factors_of_square: (T, n) what multiplies its square; or (T, 0).
        bounds: (T + 1,) which of the ids belong to each term.
        ids: (n, K).
        weights: (n, K) what is added there; for a row that was divided by its deviation, before
            it is carried back.
        known: A gradient that is added, float32, or bfloat16 as uint16. May be the gradients.
        known_starts: (m,) where each row begins in it.
        known_weights: (n,) what multiplies it; empty where none is added.
        gradients: As values.
        gradient_starts: (m,).
        gradient_width: Of all its columns.
    """
    room = np.empty(widths.max() if widths.size else 0, np.float32)
    change = np.empty(room.size if epsilons.size and epsilons.max() >= 0.0 else 0, np.float32)
    gradient = np.empty(gradient_width, np.float32)
    for row_index in range(first, last):
        index = row_index + ahead
        # What stands there for rows that nobody else asked about may be garbage.
        if known_weights.size and known_weights[index] != 0:
            _put_scaled(known, known_starts[row_index], known_weights[index], gradient)
        else:
            gradient[:] = np.float32(0.0)
        for term in range(widths.size):
            width = widths[term]
            row = row_of(values, starts[row_index], room[:width])
            shift, factor = shifts[term, index], factors[term, index]
            scale = LOG2_E / np.float32(temperatures[term])
            begin, end = bounds[term], bounds[term + 1]
            if epsilons[term] >= 0.0:
                _, deviation = _deviation(row)
                scale /= np.float32(deviation + epsilons[term])
                change[:width] = np.float32(0.0)
                _add_softmax(row, shift, scale, factor, change[:width])
                for place in range(begin, end):
                    change[ids[index, place]] += weights[index, place]
                _add_through_deviation(
                    row, change[:width], temperatures[term], epsilons[term], gradient[:width]
                )
                continue
            if factors_of_square.shape[1]:
                square = factors_of_square[term, index]
                _add_two_softmaxes(row, shift, scale, factor, square, gradient[:width])
            else:
                _add_softmax(row, shift, scale, factor, gradient[:width])
            for place in range(begin, end):
                gradient[ids[index, place]] += weights[index, place]
        put(gradient, gradients, gradient_starts[row_index])
