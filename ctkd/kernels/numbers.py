"""Arithmetic on single numbers that a compiler turns into vector instructions.

All take and return float32, unless they say otherwise, and have no branches. nan stays nan.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from ctkd.kernels.compiling import compiled, compiled_for_types

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
    "put",
    "row_of",
    "widened",
]

LOG_2 = np.float32(math.log(2.0))
LOG2_E = np.float32(1.0 / math.log(2.0))

# Added to and taken from a number below 2^22, it leaves the nearest whole number, and before it is
# taken away that number stands in the lower bits.
_ROUNDING = np.float32(1.5 * 2**23)
_ROUNDING_BITS = np.int32(0x4B400000)
_LEAST_EXPONENT = np.float32(-127.0)
_BIAS = np.int32(127)
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
    """An int32 that is larger where a float32 is; that of nan is largest or smallest."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & _ALL_BUT_SIGN)


@compiled
def from_ordered(bits: Any) -> Any:
    """The float32 of which `as_ordered` is this."""
    bits = np.int32(bits)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _ALL_BUT_SIGN)).view(np.float32)


@compiled
def _power(whole: Any) -> Any:
    return np.int32((whole + _BIAS) << _MANTISSA_BITS).view(np.float32)


@compiled
def _exp2_minus_1_near_0(fraction: Any) -> Any:
    found = _Q5 * fraction + _Q4
    found = found * fraction + _Q3
    found = found * fraction + _Q2
    found = found * fraction + _Q1
    return (found * fraction + _Q0) * fraction


@compiled
def exp2(exponent: Any) -> Any:
    """2 to the power of at most 0; below the smallest normal number it is 0."""
    if exponent < _LEAST_EXPONENT:
        exponent = _LEAST_EXPONENT
    rounding = np.float32(exponent + _ROUNDING)
    whole = rounding.view(np.int32) - _ROUNDING_BITS
    fraction = exponent - (rounding - _ROUNDING)
    return (_exp2_minus_1_near_0(fraction) + _ONE) * _power(whole)


@compiled
def exp2_minus_1(exponent: Any) -> Any:
    """2 to the power of at most 0, minus 1, to the last digits also near 0."""
    if exponent < _LEAST_EXPONENT:
        exponent = _LEAST_EXPONENT
    rounding = np.float32(exponent + _ROUNDING)
    whole = rounding.view(np.int32) - _ROUNDING_BITS
    fraction = exponent - (rounding - _ROUNDING)
    power = _power(whole)
    return _exp2_minus_1_near_0(fraction) * power + (power - _ONE)


@compiled
def log1p(value: Any) -> Any:
    """Logarithm of 1 plus a value above -1 and up to 0."""
    beyond = np.float32(_ONE + value)
    bits = beyond.view(np.int32)
    whole = (bits - _HALF_ROOT_BITS) >> _MANTISSA_BITS
    mantissa = np.int32(bits - (whole << _MANTISSA_BITS)).view(np.float32)
    if whole != np.int32(0):
        value = mantissa - _ONE
    ratio = value / (value + _TWO)
    square = ratio * ratio
    found = _A3 * square + _A2
    found = found * square + _A1
    found = found * square + _A0
    found = found * ratio + np.float32(whole) * LOG_2
    if beyond != beyond:
        found = beyond
    return found


def widened(value: Any) -> Any:
    """A float32, or the bits of a bfloat16 as uint16, as float32."""
    raise NotImplementedError("for compiled code")


@compiled_for_types(widened)
def _widened(value: Any) -> Any:
    def from_bits(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    def same(value: Any) -> Any:
        return value

    return from_bits if value == numba.uint16 else same


def narrowed(value: Any, like: Any) -> Any:
    """A float32 as what ``like`` is: float32, or the bits of the nearest bfloat16, ties to even."""
    raise NotImplementedError("for compiled code")


@compiled_for_types(narrowed)
def _narrowed(value: Any, like: Any) -> Any:
    def same(value: Any, like: Any) -> Any:
        return value

    def rounded(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        last = (bits >> np.uint32(16)) & np.uint32(1)
        found = (bits + np.uint32(0x7FFF) + last) >> np.uint32(16)
        if value != value:
            found = np.uint32(0x7FC0)
        return np.uint16(found)

    return rounded if like == numba.uint16 else same


def row_of(values: Any, start: Any, room: Any) -> Any:
    """As many float32 as there is room for: themselves where they lie, or widened in the room."""
    raise NotImplementedError("for compiled code")


@compiled_for_types(row_of)
def _row_of(values: Any, start: Any, room: Any) -> Any:
    def in_place(values: Any, start: Any, room: Any) -> Any:
        return values[start : start + room.size]

    def widened_row(values: Any, start: Any, room: Any) -> Any:
        # Without wrap-around of its indices a loop is vectorised.
        row = values[start : start + room.size]
        for column in range(room.size):
            room[column] = widened(row[column])
        return room

    return widened_row if values.dtype == numba.uint16 else in_place


@compiled
def load(values: Any, start: Any, row: Any) -> None:
    """Put what begins somewhere into a row of float32."""
    place = values[start : start + row.size]
    for column in range(row.size):
        row[column] = widened(place[column])


@compiled
def put(row: Any, values: Any, start: Any) -> None:
    """Write a row of float32 to where it belongs, rounded as that is."""
    place = values[start : start + row.size]
    for column in range(row.size):
        place[column] = narrowed(row[column], place[column])
