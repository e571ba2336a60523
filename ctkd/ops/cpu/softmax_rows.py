"""Softmax of rows: log-normalizers, column mass, and the gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ctkd.ops.cpu.arrays import RowArray, SoftmaxTerms
from ctkd.ops.cpu.compiling import compiled, compiled_sum
from ctkd.ops.cpu.numbers import LOG2_E, as_ordered, exp2, from_ordered, row_of, store

__all__ = [
    "column_mass",
    "largest",
    "log_normalizers",
    "softmax_gradients",
    "total_of",
]

_LEAST = np.int32(-(2**31))
_ZERO = np.float32(0.0)


class _Moments(NamedTuple):
    mean: Any
    deviation: Any


class _Buffers(NamedTuple):
    """Memory for one row of each kind; of no columns where no term needs it."""

    row: Any
    restricted: Any
    change: Any


@compiled
def largest(row: Any) -> Any:
    """Largest entry of a row."""
    key = _LEAST
    for column in range(row.size):
        key = max(key, as_ordered(row[column]))
    return from_ordered(key)


@compiled_sum
def total_of(row: Any) -> Any:
    """Sum of float32 in float64."""
    total = 0.0
    for column in range(row.size):
        total += np.float64(row[column])
    return total


@compiled_sum
def _moments(row: Any) -> Any:
    """Mean and unbiased standard deviation in float64."""
    mean = total_of(row) / row.size
    total = 0.0
    for column in range(row.size):
        gap = np.float64(row[column]) - mean
        total += gap * gap
    return _Moments(mean, math.sqrt(total / (row.size - 1)))


@compiled
def _powers(row: Any, top: Any, scale: Any, powers: Any) -> None:
    for column in range(row.size):
        powers[column] = exp2((row[column] - top) * scale)


@compiled
def _normalizer(row: Any, top: Any, temperature: Any, powers: Any) -> Any:
    """Sum of ``exp((row - top) / temperature)``; its terms are left in ``powers``."""
    _powers(row, top, LOG2_E / np.float32(temperature), powers)
    return total_of(powers)


@compiled
def _log_of(normalizer: Any, top: Any, temperature: Any) -> Any:
    return np.float32(np.float64(top) / temperature + math.log(normalizer))


@compiled
def _divisor(row: Any, epsilon: Any) -> Any:
    """Divisor that standardizes a row; 1 without standardization."""
    if epsilon < 0.0:
        return 1.0
    return _moments(row).deviation + epsilon


@compiled
def _restrict(row: Any, bias: Any, restricted: Any) -> None:
    for column in range(row.size):
        restricted[column] = row[column] + bias[column]


@compiled
def _log_normalizers_of(
    row: Any, temperatures: Any, divisor: Any, powers: Any, index: Any, answers: Any
) -> None:
    top = largest(row)
    # One pass for each temperature, so that an answer does not depend on the other temperatures.
    for term in range(temperatures.size):
        temperature = temperatures[term] * divisor
        normalizer = _normalizer(row, top, temperature, powers)
        answers[term, index] = _log_of(normalizer, top, temperature)


@compiled
def log_normalizers(
    which: Any,
    rows: RowArray,
    width: int,
    temperatures: Any,
    epsilon: float,
    bias: Any,
    answers: Any,
    deviations: Any,
) -> None:
    """Logarithms of the softmax denominators of rows, at each temperature.

    Args:
        which: Indices of the rows to work on, int64.
        rows: n of them.
        width: V.
        temperatures: (T,) float64.
        epsilon: Added to the standard deviation by which rows are divided first; negative: rows
            are not standardized.
        bias: (V,) float32 of 0 and -inf, added to the logits to restrict the softmax to some
            columns; empty: all columns. The standard deviation is that of all columns nevertheless.
        answers: Output, (T, n) float32; -inf where the bias leaves no column.
        deviations: Output, (n,) float32, if rows are standardized.
    """
    buffer = np.empty(width, np.float32)
    powers = np.empty(width, np.float32)
    restricted = np.empty(bias.size, np.float32)
    for index in which:
        row = row_of(rows.values, rows.starts[index], buffer)
        divisor = _divisor(row, epsilon)
        if epsilon >= 0.0:
            deviations[index] = np.float32(divisor - epsilon)
        if not bias.size:
            _log_normalizers_of(row, temperatures, divisor, powers, index, answers)
            continue
        _restrict(row, bias, restricted)
        if largest(restricted) == -np.inf:
            answers[:, index] = -np.inf
        else:
            _log_normalizers_of(restricted, temperatures, divisor, powers, index, answers)


@compiled
def _add_scaled(row: Any, factor: Any, sums: Any) -> None:
    for column in range(row.size):
        sums[column] += row[column] * factor


@compiled
def column_mass(
    which: Any,
    rows: RowArray,
    width: int,
    temperatures: Any,
    epsilon: float,
    answers: Any,
    deviations: Any,
    mass: Any,
) -> None:
    """Sum of the probabilities of rows in each column, and the rows' log-normalizers.

    Args:
        which: As in `log_normalizers`, and so are the following.
        rows: n of them.
        width: V.
        temperatures: (T,) float64; probabilities are those at the first one.
        epsilon: Negative: rows are not standardized.
        answers: Output, (T, n) float32.
        deviations: Output, (n,) float32, if rows are standardized.
        mass: (V,) float32, to which the sum is added.
    """
    buffer = np.empty(width, np.float32)
    powers = np.empty(width, np.float32)
    for index in which:
        row = row_of(rows.values, rows.starts[index], buffer)
        top = largest(row)
        divisor = _divisor(row, epsilon)
        if epsilon >= 0.0:
            deviations[index] = np.float32(divisor - epsilon)
        for term in range(temperatures.size):
            temperature = temperatures[term] * divisor
            normalizer = _normalizer(row, top, temperature, powers)
            answers[term, index] = _log_of(normalizer, top, temperature)
            if term == 0:
                _add_scaled(powers, np.float32(1.0 / normalizer), mass)


@compiled
def _load_scaled(values: Any, start: Any, factor: Any, row: Any) -> None:
    source = row_of(values, start, row)
    for column in range(row.size):
        row[column] = source[column] * factor


# The difference comes before the product: near the largest entry, whatever its size, it is exact.
@compiled
def _add_softmax(row: Any, center: Any, scale: Any, factor: Any, gradient: Any) -> None:
    for column in range(row.size):
        gradient[column] += exp2((row[column] - center) * scale) * factor


@compiled
def _add_softmax_and_square(
    row: Any, center: Any, scale: Any, factor: Any, square: Any, gradient: Any
) -> None:
    for column in range(row.size):
        prob = exp2((row[column] - center) * scale)
        gradient[column] += prob * (prob * square + factor)


@compiled
def _add_at_ids(terms: SoftmaxTerms, term: int, index: int, gradient: Any) -> None:
    for entry in range(terms.bounds[term], terms.bounds[term + 1]):
        gradient[terms.ids[index, entry]] += terms.weights[index, entry]


@compiled_sum
def _dot(row: Any, other: Any) -> Any:
    total = 0.0
    for column in range(row.size):
        total += np.float64(row[column]) * np.float64(other[column])
    return total


@compiled
def _add_through_deviation(
    row: Any, change: Any, temperature: Any, epsilon: Any, gradient: Any
) -> None:
    """Add the gradient of rows, given that of the same rows divided by their deviation."""
    moments = _moments(row)
    divisor = moments.deviation + epsilon
    along = 0.0
    # A constant row has no direction in which its deviation grows.
    if moments.deviation != 0.0:
        spread = moments.deviation * (row.size - 1) * divisor * divisor * temperature
        along = _dot(change, row) / spread
    direct, slope = np.float32(1.0 / (divisor * temperature)), np.float32(along)
    mean = np.float32(moments.mean)
    for column in range(row.size):
        gradient[column] += change[column] * direct - (row[column] - mean) * slope


@compiled
def _add_term(
    row: Any, logits: Any, terms: SoftmaxTerms, term: int, index: int, change: Any, gradient: Any
) -> None:
    """Add one term to the gradient of a row; ``logits`` are the row plus the term's bias."""
    normalizer, factor = terms.log_normalizers[term, index], terms.factors[term, index]
    temperature, epsilon = terms.temperatures[term], terms.epsilons[term]
    divisor = temperature * _divisor(row, epsilon)
    center, scale = np.float32(normalizer * divisor), LOG2_E / np.float32(divisor)
    # A softmax of which the bias leaves no column is 0.
    is_empty = normalizer == -np.inf
    if epsilon >= 0.0:
        change[:] = _ZERO
        if not is_empty:
            _add_softmax(logits, center, scale, factor, change)
        _add_at_ids(terms, term, index, change)
        _add_through_deviation(row, change, temperature, epsilon, gradient)
        return
    if is_empty:
        pass
    elif terms.squares.shape[1]:
        square = terms.squares[term, index]
        _add_softmax_and_square(logits, center, scale, factor, square, gradient)
    else:
        _add_softmax(logits, center, scale, factor, gradient)
    _add_at_ids(terms, term, index, gradient)


@compiled
def _buffers_of(terms: SoftmaxTerms) -> Any:
    width = 0
    is_restricted = is_standardized = False
    for term in range(terms.widths.size):
        width = max(width, terms.widths[term])
        is_restricted |= terms.bias_of[term] >= 0
        is_standardized |= terms.epsilons[term] >= 0.0
    return _Buffers(
        np.empty(width, np.float32),
        np.empty(width if is_restricted else 0, np.float32),
        np.empty(width if is_standardized else 0, np.float32),
    )


@compiled
def softmax_gradients(
    which: Any,
    rows: RowArray,
    terms: SoftmaxTerms,
    known: RowArray,
    known_weights: Any,
    out: RowArray,
    out_width: int,
) -> None:
    """Gradient of rows: the sum of terms, plus a multiple of a known gradient.

    Args:
        which: Indices of the rows to work on, int64.
        rows: n of them.
        terms: What is added.
        known: A gradient. May share memory with ``out``.
        known_weights: (n,) float32, multiply ``known``; a weight of 0 ignores its row, even nan.
            Empty: nothing is known.
        out: Output. May share memory with ``rows``.
        out_width: Columns of a row of ``known`` and ``out``.
    """
    buffers = _buffers_of(terms)
    gradient = np.empty(out_width, np.float32)
    for index in which:
        if known_weights.size and known_weights[index] != 0:
            _load_scaled(known.values, known.starts[index], known_weights[index], gradient)
        else:
            gradient[:] = _ZERO
        for term in range(terms.widths.size):
            width = terms.widths[term]
            row = row_of(rows.values, rows.starts[index], buffers.row[:width])
            change, target = buffers.change[:width], gradient[:width]
            if terms.bias_of[term] < 0:
                _add_term(row, row, terms, term, index, change, target)
            else:
                restricted = buffers.restricted[:width]
                _restrict(row, terms.biases[terms.bias_of[term]], restricted)
                _add_term(row, restricted, terms, term, index, change, target)
        store(gradient, out.values, out.starts[index])
