"""Elementary functions of float32 that LLVM vectorizes, and loads and stores of rows.

Functions of one number have no branches and keep nan. Arguments and results are float32 unless
stated otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from ctkd.ops.cpu.compiling import compiled, compiled_for_types

__all__ = [
    "LOG2_E",
    "LOG_2",
    "as_ordered",
    "exp2",
    "exp2_minus_1",
    "from_ordered",
    "load",
    "log1p",
    "narrowed",
    "row_of",
    "store",
    "widened",
]

LOG_2 = np.float32(math.log(2.0))
LOG2_E = np.float32(1.0 / math.log(2.0))

# A number below 2^22 plus this constant, minus it again, is rounded to the nearest integer; the sum
# has that integer in its lower bits.
_ROUNDING = np.float32(1.5 * 2**23)
_ROUNDING_BITS = np.int32(0x4B400000)
_LOWEST_EXPONENT = np.float32(-127.0)
_EXPONENT_BIAS = np.int32(127)
_MANTISSA_BITS = np.int32(23)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)

# (2^f - 1) / f on [-1/2, 1/2], relative error 1.1e-8.
_Q0 = np.float32(0.69314718246)
_Q1 = np.float32(0.24022649229)
_Q2 = np.float32(0.05550357327)
_Q3 = np.float32(0.00961823761)
_Q4 = np.float32(0.00133907353)
_Q5 = np.float32(0.00015403508)

# 2 atanh(r) / r as a function of r^2 up to 0.0295, relative error 7e-10.
_A0 = np.float32(2.0)
_A1 = np.float32(0.66666816)
_A2 = np.float32(0.3997479)
_A3 = np.float32(0.29925781)
_HALF_ROOT_BITS = np.int32(0x3F3504F3)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)


@compiled
def as_ordered(value: Any) -> Any:
    """The int32 that sorts as a float32 does; nan is largest or, with its sign bit, smallest."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & _ALL_BUT_SIGN)


@compiled
def from_ordered(bits: Any) -> Any:
    """The inverse of `as_ordered`."""
    bits = np.int32(bits)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _ALL_BUT_SIGN)).view(np.float32)


@compiled
def _power_of_2(exponent: Any) -> Any:
    return np.int32((exponent + _EXPONENT_BIAS) << _MANTISSA_BITS).view(np.float32)


@compiled
def _exp2_minus_1_near_0(fraction: Any) -> Any:
    polynomial = _Q5 * fraction + _Q4
    polynomial = polynomial * fraction + _Q3
    polynomial = polynomial * fraction + _Q2
    polynomial = polynomial * fraction + _Q1
    return (polynomial * fraction + _Q0) * fraction


@compiled
def exp2(exponent: Any) -> Any:
    """2 to the power of an exponent of at most 0; flushed to 0 below the smallest normal number."""
    if exponent < _LOWEST_EXPONENT:
        exponent = _LOWEST_EXPONENT
    shifted = np.float32(exponent + _ROUNDING)
    integer = shifted.view(np.int32) - _ROUNDING_BITS
    fraction = exponent - (shifted - _ROUNDING)
    return (_exp2_minus_1_near_0(fraction) + _ONE) * _power_of_2(integer)


@compiled
def exp2_minus_1(exponent: Any) -> Any:
    """2 to the power of an exponent of at most 0, minus 1, accurate near 0."""
    if exponent < _LOWEST_EXPONENT:
        exponent = _LOWEST_EXPONENT
    shifted = np.float32(exponent + _ROUNDING)
    integer = shifted.view(np.int32) - _ROUNDING_BITS
    fraction = exponent - (shifted - _ROUNDING)
    power = _power_of_2(integer)
    return _exp2_minus_1_near_0(fraction) * power + (power - _ONE)


@compiled
def log1p(value: Any) -> Any:
    """Logarithm of 1 plus a value, which is above -1 and at most 0."""
    argument = np.float32(_ONE + value)
    bits = argument.view(np.int32)
    exponent = (bits - _HALF_ROOT_BITS) >> _MANTISSA_BITS
    mantissa = np.int32(bits - (exponent << _MANTISSA_BITS)).view(np.float32)
    if exponent != np.int32(0):
        value = mantissa - _ONE
    ratio = value / (value + _TWO)
    square = ratio * ratio
    result = _A3 * square + _A2
    result = result * square + _A1
    result = result * square + _A0
    result = result * ratio + np.float32(exponent) * LOG_2
    if argument != argument:
        result = argument
    return result


def widened(value: Any) -> Any:
    """A float32, or the bits of a bfloat16 as uint16, converted to float32."""
    raise NotImplementedError("for compiled code")


@compiled_for_types(widened)
def _widened(value: Any) -> Any:
    def from_bits(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    def same(value: Any) -> Any:
        return value

    return from_bits if value == numba.uint16 else same


def narrowed(value: Any, like: Any) -> Any:
    """A float32 converted to the dtype of ``like``; to bfloat16 with ties to even."""
    raise NotImplementedError("for compiled code")


@compiled_for_types(narrowed)
def _narrowed(value: Any, like: Any) -> Any:
    def same(value: Any, like: Any) -> Any:
        return value

    def rounded(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        last = (bits >> np.uint32(16)) & np.uint32(1)
        upper = (bits + np.uint32(0x7FFF) + last) >> np.uint32(16)
        if value != value:
            upper = np.uint32(0x7FC0)
        return np.uint16(upper)

    return rounded if like == numba.uint16 else same


def row_of(values: Any, start: Any, buffer: Any) -> Any:
    """A row as wide as the buffer: a view of float32 values, or the buffer, if it is converted."""
    raise NotImplementedError("for compiled code")


@compiled_for_types(row_of)
def _row_of(values: Any, start: Any, buffer: Any) -> Any:
    def view(values: Any, start: Any, buffer: Any) -> Any:
        return values[start : start + buffer.size]

    def converted(values: Any, start: Any, buffer: Any) -> Any:
        load(values, start, buffer)
        return buffer

    return converted if values.dtype == numba.uint16 else view


@compiled
def load(values: Any, start: Any, row: Any) -> None:
    """Copy values into a row of float32."""
    # A loop over a slice is vectorized: its indices cannot wrap around.
    source = values[start : start + row.size]
    for column in range(row.size):
        row[column] = widened(source[column])


@compiled
def store(row: Any, values: Any, start: Any) -> None:
    """Copy a row of float32 to where it belongs, rounded to the dtype of the values."""
    target = values[start : start + row.size]
    for column in range(row.size):
        target[column] = narrowed(row[column], target[column])
