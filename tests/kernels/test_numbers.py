"""Arithmetic of compiled loops against float64."""

import importlib
import math

import numpy as np
import pytest
import torch

pytest.importorskip("numba", exc_type=ImportError)
numbers = importlib.import_module("ctkd.kernels.numbers")
compiled = importlib.import_module("ctkd.kernels.compiling").compiled

SPECIAL = [0.0, -0.0, 1e-43, -1e-43, 1.0, -1.0, 3e38, -3e38, math.inf, -math.inf]


@compiled
def raised(values, answers):
    for place in range(values.size):
        answers[place] = numbers.exp2(values[place])


@compiled
def raised_minus_1(values, answers):
    for place in range(values.size):
        answers[place] = numbers.exp2_minus_1(values[place])


@compiled
def log1p(values, answers):
    for place in range(values.size):
        answers[place] = numbers.log1p(values[place])


@compiled
def to_integers_and_back(values, integers, answers):
    for place in range(values.size):
        integers[place] = numbers.as_ordered(values[place])
        answers[place] = numbers.from_ordered(integers[place])


@compiled
def row_at(values, start, room):
    return numbers.row_of(values, start, room).copy()


def mapped(function, values):
    values = np.asarray(values, np.float32)
    answers = np.empty_like(values)
    function(values, answers)
    return answers


def test_powers_of_two():
    exponents = np.concatenate([np.linspace(-125.9, 0, 400_001), np.arange(-126.0, 1.0)])
    found = mapped(raised, exponents).astype(np.float64)
    exact = np.exp2(exponents.astype(np.float32).astype(np.float64))
    assert np.abs(found / exact - 1).max() < 2.5e-7
    assert mapped(raised, [-128.0, -1e30, -math.inf]).tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(mapped(raised, [math.nan, -math.nan])).all()
    assert mapped(raised, [0.0, -1.0, -40.0]).tolist() == [1.0, 0.5, 2.0**-40]


def test_powers_of_two_minus_1_have_all_digits_near_0():
    exponents = -np.concatenate([np.logspace(-30, 2.1, 200_001), [0.0]]).astype(np.float32)
    found = mapped(raised_minus_1, exponents).astype(np.float64)
    exact = np.expm1(exponents.astype(np.float64) * math.log(2))
    assert found[-1] == 0.0
    assert np.abs(found[:-1] / exact[:-1] - 1).max() < 2.5e-7
    assert mapped(raised_minus_1, [-math.inf]).tolist() == [-1.0]
    assert np.isnan(mapped(raised_minus_1, [math.nan])).all()


def test_logarithms_have_all_digits_near_0():
    values = -np.concatenate([np.logspace(-30, -1e-6, 200_001), np.linspace(0.2, 0.9999, 99_999)])
    values = values.astype(np.float32)
    found, exact = mapped(log1p, values).astype(np.float64), np.log1p(values.astype(np.float64))
    assert np.abs(found / exact - 1).max() < 4e-7
    assert mapped(log1p, [0.0]).tolist() == [0.0]
    assert np.isnan(mapped(log1p, [math.nan])).all()


def test_integers_in_the_order_of_floats():
    # A negative zero is smaller than a zero, which numpy does not see.
    special = [one for one in SPECIAL if one or math.copysign(1.0, one) > 0]
    values = np.sort(np.array([*special, *np.random.default_rng(0).normal(size=999)], np.float32))
    integers, back = np.empty(values.size, np.int32), np.empty_like(values)
    to_integers_and_back(values, integers, back)
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
    place = np.zeros(len(values) + 2, np.uint16)
    numbers.put(values.numpy(), place, 1)
    rounded = values.bfloat16()
    assert np.array_equal(place[1:-1], rounded.view(torch.uint16).numpy())
    assert place[0] == place[-1] == 0
    row = np.empty(len(values), np.float32)
    numbers.load(place, 1, row)
    assert np.array_equal(row, rounded.float().numpy())
    assert np.array_equal(row_at(place, 1, np.empty_like(row)), row)
    numbers.put(np.array([math.nan, -math.nan], np.float32), place, 0)
    assert torch.from_numpy(place[:2].copy()).view(torch.bfloat16).isnan().all()


def test_float32_is_read_where_it_lies():
    values = np.arange(9, dtype=np.float32)
    assert row_at(values, 4, np.empty(3, np.float32)).tolist() == [4.0, 5.0, 6.0]
    numbers.put(np.array([1.5], np.float32), values, 8)
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
