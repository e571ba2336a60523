"""Distance between ranked rows without sorting, against numpy's stable sort in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ctkd.ops.cpu.ranks import Entries, rank_signs
from tests.ops.sorted_rows import KINDS, probs_of

ONE = np.float32(1.0)
# Entries are float32 and are added in float64: what is left is the rounding of the float32
# products, of which a distance of up to 2 is made.
TOLERANCE = {"rtol": 1e-6, "atol": 2e-7}


def entries_of(row) -> Entries:
    return Entries(np.ascontiguousarray(row), np.arange(row.size, dtype=np.uint32), ONE)


def by_counting(row, other, tail: float = 0.0, tail_count: int = 0):
    """Distance, and entries with their signs."""
    out = np.full(row.size, np.nan, np.float32)
    tail = np.float32(tail)
    distance = rank_signs(entries_of(row), entries_of(other), tail, tail_count, ONE, out)
    return distance, out


def by_sorting(row, other):
    """The same in float64 by a stable sort."""
    row, other = np.float64(row), np.float64(other)
    order = np.argsort(-row, kind="stable")
    width = max(row.size, other.size)
    ranked = np.pad(row[order], (0, width - row.size))
    gap = ranked - np.pad(np.sort(other)[::-1], (0, width - other.size))
    signed = np.empty_like(row)
    signed[order] = (np.sign(gap) * ranked)[: row.size]
    return np.abs(gap).sum(), signed


def check(student, teacher) -> None:
    for row, other in zip(np.asarray(student), np.asarray(teacher), strict=True):
        distance, signed = by_counting(row, other)
        expected, expected_signed = by_sorting(row, other)
        assert np.array_equal(signed, expected_signed)
        np.testing.assert_allclose(distance, expected, **TOLERANCE)


@settings(max_examples=600, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    other_kind=st.sampled_from([*KINDS, "nearly the same", "the same", "reversed"]),
    widths=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    seed=st.integers(0, 10**6),
)
def test_distance_and_signs_are_those_of_a_stable_sort(kind, other_kind, widths, seed):
    student = probs_of(kind, widths[0], seed)
    if other_kind in KINDS:
        teacher = probs_of(other_kind, widths[1], seed + 1)
    else:
        teacher = student.flip(-1) if other_kind == "reversed" else student
        if other_kind == "nearly the same":
            noise = torch.rand(student.shape, generator=torch.Generator().manual_seed(seed))
            teacher = student * (1.0 + 0.1 * (noise - 0.5))
            teacher = F.pad(teacher, (0, widths[1] % 7), value=1e-6)
    check(student, teacher)


@pytest.mark.parametrize("kind", ["smooth", "bfloat16"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3])
def test_a_vocabulary(kind, spread):
    student = probs_of(kind, 50_257, 1)
    noise = 1.0 + spread * torch.randn(2, 32_000, generator=torch.Generator().manual_seed(2))
    check(student, (student[:, :32_000] * noise).abs())


def test_few_many_and_no_entries_in_mixed_bins():
    student = torch.cat([torch.linspace(0.1, 0.2, 300), torch.full((20,), 0.01)])[None]
    check(student, student * 0.25)
    check(student, torch.cat([student[:, :-4] * 0.25, student[:, -4:] * 1.001], -1))
    check(torch.tensor([[0.5] * 40 + [0.1, 0.2]]), torch.tensor([[0.4] * 40 + [0.1001, 0.1002]]))
    check(student, student * 1.0001)
    # More entries of one bin than are sorted by insertion, of one value and of many.
    check(torch.full((1, 500), 0.25), torch.full((1, 400), 0.25))
    one_bin = 1.0 + 2e-6 * torch.arange(900)
    check(one_bin[None, ::2], one_bin[None, 1::2].flip(-1))


def test_a_tail_spread_evenly():
    """A stored teacher's row, of which few entries differ."""
    student = probs_of("smooth", 6000, 11)
    for k in (0, 5, 256):
        teacher = probs_of("smooth", 5000, 12)
        ids = teacher.topk(k).indices
        rest = (1.0 - teacher.gather(1, ids).sum(-1, keepdim=True)) / (5000 - k)
        teacher = rest.expand_as(teacher).clone().scatter_(1, ids, teacher.gather(1, ids))
        check(student, teacher)
        check(teacher, student)


def test_ties_at_a_change_of_sign_go_to_the_lower_column():
    student, teacher = np.float32([0.2, 0.1, 0.2, 0.2]), np.float32([0.1, 0.3, 0.2, 0.1])
    _, signed = by_counting(student, teacher)
    assert np.array_equal(signed, np.float32([-0.2, 0.0, 0.0, 0.2]))


def test_some_columns_with_factors_and_a_weight():
    student, teacher = probs_of("smooth", 90, 3)[0].numpy(), probs_of("ties", 70, 4)[0].numpy()
    columns, others = np.arange(5, 90, 2, dtype=np.uint32), np.arange(0, 70, 3, dtype=np.uint32)
    out = np.full(90, 7.0, np.float32)
    distance = rank_signs(
        Entries(student, columns, np.float32(0.5)),
        Entries(teacher, others, np.float32(0.25)),
        np.float32(0.0),
        0,
        np.float32(3.0),
        out,
    )
    expected, expected_signed = by_sorting(student[5::2] * 0.5, teacher[::3] * 0.25)
    np.testing.assert_allclose(distance, expected, **TOLERANCE)
    np.testing.assert_allclose(out[5::2], expected_signed * 3.0, **TOLERANCE)
    assert (np.delete(out, columns) == 7.0).all()


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    widths=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    tail_count=st.sampled_from([0, 1, 2, 40, 500]),
    tail=st.sampled_from([0.0, 1e-6, 0.003, 0.25, "one of the teacher's", "one of the student's"]),
    seed=st.integers(0, 10**6),
)
def test_a_tail_counts_as_several_entries(kind, widths, tail_count, tail, seed):
    student = probs_of(kind, widths[0], seed)[0].numpy()
    teacher = probs_of("ties", widths[1], seed + 1)[0].numpy()
    if isinstance(tail, str):
        row = teacher if "teacher" in tail else student
        tail = row[seed % row.size] if row.size else 0.0
    distance, signed = by_counting(student, teacher, tail, tail_count)
    whole = np.concatenate([teacher, np.full(tail_count, tail, np.float32)])
    expected, expected_signed = by_sorting(student, whole)
    assert np.array_equal(signed, expected_signed)
    np.testing.assert_allclose(distance, expected, **TOLERANCE)


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), -0.5, 2.0, float("inf")])
def test_a_value_out_of_range_gives_nan(side, value):
    sides = [probs_of("smooth", width, 4)[0].numpy() for width in (3000, 2000)]
    sides[side][7] = value
    distance, signed = by_counting(*sides)
    assert np.isnan(distance) and np.isnan(signed).all()
