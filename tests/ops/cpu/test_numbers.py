"""Arithmetic of compiled loops against float64."""

import math

import numpy as np
import pytest
import torch

from ctkd.ops.cpu import numbers
from ctkd.ops.cpu.compiling import compiled

SPECIAL = [0.0, -0.0, 1e-43, -1e-43, 1.0, -1.0, 3e38, -3e38, math.inf, -math.inf]


@compiled
def exp2(values, answers):
    for index in range(values.size):
        answers[index] = numbers.exp2(values[index])


@compiled
def exp2_minus_1(values, answers):
    for index in range(values.size):
        answers[index] = numbers.exp2_minus_1(values[index])


@compiled
def log1p(values, answers):
    for index in range(values.size):
        answers[index] = numbers.log1p(values[index])


@compiled
def ordered_and_back(values, integers, answers):
    for index in range(values.size):
        integers[index] = numbers.as_ordered(values[index])
        answers[index] = numbers.from_ordered(integers[index])


@compiled
def row_at(values, start, buffer):
    return numbers.row_of(values, start, buffer).copy()


def mapped(function, values):
    values = np.asarray(values, np.float32)
    answers = np.empty_like(values)
    function(values, answers)
    return answers


def test_powers_of_two():
    exponents = np.concatenate([np.linspace(-125.9, 0, 400_001), np.arange(-126.0, 1.0)])
    actual = mapped(exp2, exponents).astype(np.float64)
    exact = np.exp2(exponents.astype(np.float32).astype(np.float64))
    assert np.abs(actual / exact - 1).max() < 2.5e-7
    assert mapped(exp2, [-128.0, -1e30, -math.inf]).tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(mapped(exp2, [math.nan, -math.nan])).all()
    assert mapped(exp2, [0.0, -1.0, -40.0]).tolist() == [1.0, 0.5, 2.0**-40]


def test_powers_of_two_minus_1_have_all_digits_near_0():
    exponents = -np.concatenate([np.logspace(-30, 2.1, 200_001), [0.0]]).astype(np.float32)
    actual = mapped(exp2_minus_1, exponents).astype(np.float64)
    exact = np.expm1(exponents.astype(np.float64) * math.log(2))
    assert actual[-1] == 0.0
    assert np.abs(actual[:-1] / exact[:-1] - 1).max() < 2.5e-7
    assert mapped(exp2_minus_1, [-math.inf]).tolist() == [-1.0]
    assert np.isnan(mapped(exp2_minus_1, [math.nan])).all()


def test_logarithms_have_all_digits_near_0():
    values = -np.concatenate([np.logspace(-30, -1e-6, 200_001), np.linspace(0.2, 0.9999, 99_999)])
    values = values.astype(np.float32)
    actual, exact = mapped(log1p, values).astype(np.float64), np.log1p(values.astype(np.float64))
    assert np.abs(actual / exact - 1).max() < 4e-7
    assert mapped(log1p, [0.0]).tolist() == [0.0]
    assert np.isnan(mapped(log1p, [math.nan])).all()


def test_integers_in_the_order_of_floats():
    # A negative zero is smaller than a zero, which numpy does not see.
    special = [value for value in SPECIAL if value or math.copysign(1.0, value) > 0]
    values = np.sort(np.array([*special, *np.random.default_rng(0).normal(size=999)], np.float32))
    integers, back = np.empty(values.size, np.int32), np.empty_like(values)
    ordered_and_back(values, integers, back)
    steps = np.diff(integers.astype(np.int64))
    assert (steps >= 0).all()
    assert np.array_equal(back.view(np.int32), values.view(np.int32))
    assert (steps[values[1:] > values[:-1]] > 0).all()


def test_bfloat16_is_read_and_rounded_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.tensor(SPECIAL), 3 * torch.randn(5000, generator=generator)])
    # Exactly between two of them: to the even one.
    halves = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8])
    values = torch.cat([values, halves])
    stored = np.zeros(len(values) + 2, np.uint16)
    numbers.store(values.numpy(), stored, 1)
    rounded = values.bfloat16()
    assert np.array_equal(stored[1:-1], rounded.view(torch.uint16).numpy())
    assert stored[0] == stored[-1] == 0
    row = np.empty(len(values), np.float32)
    numbers.load(stored, 1, row)
    assert np.array_equal(row, rounded.float().numpy())
    assert np.array_equal(row_at(stored, 1, np.empty_like(row)), row)
    numbers.store(np.array([math.nan, -math.nan], np.float32), stored, 0)
    assert torch.from_numpy(stored[:2].copy()).view(torch.bfloat16).isnan().all()


def test_a_row_of_float32_is_a_view():
    values = np.arange(9, dtype=np.float32)
    assert row_at(values, 4, np.empty(3, np.float32)).tolist() == [4.0, 5.0, 6.0]
    numbers.store(np.array([1.5], np.float32), values, 8)
    assert values[8] == 1.5


@pytest.mark.parametrize(
    "call",
    [
        lambda: numbers.widened(1.0),
        lambda: numbers.narrowed(1.0, 1.0),
        lambda: numbers.row_of(np.zeros(1), 0, np.zeros(1)),
    ],
)
def test_what_depends_on_types_is_for_compiled_code(call):
    with pytest.raises(NotImplementedError, match="compiled"):
        call()
