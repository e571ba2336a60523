"""Distances between ranks, and largest entries, held against torch's stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctkd import compiled
from ctkd.sorting import ranked_l1, stable_top_ids
from tests.sorted_rows import KINDS, probs_of, rows_of, stable


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 9000),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_top_ids_are_those_of_a_stable_sort(kind, width, share, seed, dtype):
    rows = rows_of(kind, width, seed).to(dtype)
    k = 1 + int(share**4 * (width - 1))
    assert torch.equal(stable_top_ids(rows, k), stable(rows)[1][:, :k])


@pytest.mark.parametrize("kind", KINDS)
def test_top_ids_of_a_vocabulary(kind):
    rows = rows_of(kind, 50_257, 3)
    for k in (0, 1, 50, 256, 5000, 50_257):
        assert torch.equal(stable_top_ids(rows, k), stable(rows)[1][:, :k])


@pytest.mark.parametrize("kind", KINDS)
def test_the_general_way_finds_the_same(kind, monkeypatch):
    rows = rows_of(kind, 700, 3)
    # All of them, as zeros of either sign are in the middle.
    fast = [stable_top_ids(rows, k) for k in (90, 700)]
    monkeypatch.setattr(compiled, "DEVICES_WITH_KERNELS", set())
    for ids in fast:
        assert torch.equal(stable_top_ids(rows, ids.shape[1]), ids)


def test_top_ids_of_rows_with_nan_are_columns_and_cost_nobody_else_anything():
    rows = rows_of("smooth", 3000, 4)
    rows[0, 7] = torch.nan
    ids = stable_top_ids(rows, 5)
    assert len(set(ids[0].tolist())) == 5 and 0 <= ids.min() and ids.max() < 3000
    assert torch.equal(ids[1], stable(rows)[1][1, :5])


def test_columns_may_be_a_part_of_wider_rows_in_any_order():
    wide = probs_of("ties", 500, 7)
    for rows in (wide[:, :450], wide[:, ::2], wide.T.contiguous().T, wide[:1].expand(3, -1)):
        before = rows.clone()
        assert torch.equal(stable_top_ids(rows, 9), stable(before)[1][:, :9])
        assert torch.equal(rows, before)


def test_on_a_device_without_data():
    value, signed = ranked_l1(torch.empty(3, 40, device="meta"), torch.empty(3, 9, device="meta"))
    assert value.shape == (3, 1) and signed.shape == (3, 40)
    assert stable_top_ids(torch.empty(3, 40, device="meta"), 4).shape == (3, 4)


def test_the_derivative_is_put_where_it_is_wanted():
    student, teacher = probs_of("smooth", 300, 6), probs_of("smooth", 200, 7)
    before = student.clone(), teacher.clone()
    out = torch.empty_like(student)
    assert ranked_l1(student, teacher, out=out)[1] is out
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(5, 5), (7, 3), (3, 7), (0, 4), (4, 0), (0, 0)])
def test_ranked_l1_by_hand(dtype, widths):
    generator = torch.Generator().manual_seed(9)
    student, teacher = (
        torch.rand(6, width, generator=generator, dtype=dtype).sort(descending=True).values
        for width in widths
    )
    # Two entries alike in every row that has them.
    if min(widths) > 1:
        teacher[:, 1] = student[:, 1]
    distance, signed = ranked_l1(student, teacher)
    assert distance.shape == (6, 1) and signed.shape == student.shape
    for row in range(6):
        gaps = np.zeros(max(widths))
        gaps[: widths[0]] += student[row].numpy()
        gaps[: widths[1]] -= np.sort(teacher[row].numpy())[::-1]
        assert distance[row].item() == pytest.approx(np.abs(gaps).sum(), rel=1e-6, abs=0)
        expected = np.sign(gaps[: widths[0]]) * student[row].numpy()
        assert signed[row].tolist() == expected.tolist()
