"""The distance between ranked rows without sorting, held against torch's stable sort."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctkd.sorting import ranked_l1
from tests.sorted_rows import KINDS, probs_of

pytest.importorskip("numba", exc_type=ImportError)
put_rank_signs = importlib.import_module("ctkd.kernels.ranks").put_rank_signs


def by_counting(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """What `ranked_l1` returns, row by row."""
    values, signed = [], torch.empty_like(student)
    for row, other, out in zip(student, teacher, signed, strict=True):
        columns, other_columns = (np.arange(len(one), dtype=np.uint32) for one in (row, other))
        one = np.float32(1.0)
        values.append(
            put_rank_signs(
                row.contiguous().numpy(),
                columns,
                one,
                other.contiguous().numpy(),
                other_columns,
                one,
                np.float32(0.0),
                0,
                one,
                out.numpy(),
            )
        )
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1), signed


def check(student: Tensor, teacher: Tensor) -> None:
    value, signed = by_counting(student, teacher)
    expected, right = ranked_l1(student.double(), teacher.double())
    assert torch.equal(signed.double(), right)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-7)


@settings(max_examples=600, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    other_kind=st.sampled_from([*KINDS, "nearly the same", "the same", "permuted"]),
    widths=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    seed=st.integers(0, 10**6),
)
def test_it_is_that_of_a_stable_sort(kind, other_kind, widths, seed):
    student = probs_of(kind, widths[0], seed)
    if other_kind in KINDS:
        teacher = probs_of(other_kind, widths[1], seed + 1)
    else:
        teacher = student[:, torch.randperm(widths[0])] if other_kind == "permuted" else student
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


def test_few_many_and_no_entries_in_classes_of_both_signs():
    student = torch.cat([torch.linspace(0.1, 0.2, 300), torch.full((20,), 0.01)])[None]
    check(student, student * 0.25)
    check(student, torch.cat([student[:, :-4] * 0.25, student[:, -4:] * 1.001], -1))
    check(torch.tensor([[0.5] * 40 + [0.1, 0.2]]), torch.tensor([[0.4] * 40 + [0.1001, 0.1002]]))
    check(student, student * 1.0001)
    # More of one class than are sorted by insertion, of one value and of many.
    check(torch.full((1, 500), 0.25), torch.full((1, 400), 0.25))
    class_of_many = 1.0 + 2e-6 * torch.arange(900)
    check(class_of_many[None, ::2], class_of_many[None, 1::2].flip(-1))


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


def test_the_tie_rule_is_what_is_tested():
    # Of entries of one value that straddle a change of sign, the lower columns stand first.
    student, teacher = torch.tensor([[0.2, 0.1, 0.2, 0.2]]), torch.tensor([[0.1, 0.3, 0.2, 0.1]])
    signed = by_counting(student, teacher)[1]
    assert torch.equal(signed, torch.tensor([[-0.2, 0.0, 0.0, 0.2]]))


def test_some_columns_with_factors_and_a_weight():
    student, teacher = probs_of("smooth", 90, 3), probs_of("ties", 70, 4)
    columns, others = np.arange(5, 90, 2, dtype=np.uint32), np.arange(0, 70, 3, dtype=np.uint32)
    out = torch.full((90,), 7.0)
    value = put_rank_signs(
        student[0].numpy(),
        columns,
        np.float32(0.5),
        teacher[0].numpy(),
        others,
        np.float32(0.25),
        np.float32(0.0),
        0,
        np.float32(3.0),
        out.numpy(),
    )
    expected, right = ranked_l1(student[:1, 5::2] * 0.5, teacher[:1, ::3] * 0.25)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(out[5::2], right[0] * 3.0)
    untouched = torch.ones(90, dtype=torch.bool)
    untouched[5::2] = False
    assert (out[untouched] == 7.0).all()


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    widths=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    tail_count=st.sampled_from([0, 1, 2, 40, 500]),
    tail=st.sampled_from([0.0, 1e-6, 0.003, 0.25, "one of the teacher's", "one of the student's"]),
    seed=st.integers(0, 10**6),
)
def test_a_tail_counts_as_so_many_entries(kind, widths, tail_count, tail, seed):
    student, teacher = (
        probs_of(kind, widths[0], seed)[:1],
        probs_of("ties", widths[1], seed + 1)[:1],
    )
    if isinstance(tail, str):
        row = teacher if "teacher" in tail else student
        tail = float(row[0, seed % row.shape[1]]) if row.numel() else 0.0
    out = torch.empty_like(student)
    distance = put_rank_signs(
        student[0].numpy(),
        np.arange(widths[0], dtype=np.uint32),
        np.float32(1.0),
        teacher[0].numpy(),
        np.arange(widths[1], dtype=np.uint32),
        np.float32(1.0),
        np.float32(tail),
        tail_count,
        np.float32(1.0),
        out[0].numpy(),
    )
    whole = torch.cat([teacher, torch.full((1, tail_count), tail)], -1)
    expected, right = ranked_l1(student.double(), whole.double())
    assert torch.equal(out.double(), right)
    assert distance == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), -0.5, 2.0, float("inf")])
def test_what_is_no_probability_is_nan_and_costs_nobody_else_anything(side, value):
    probs = {"student": probs_of("smooth", 3000, 4), "teacher": probs_of("smooth", 2000, 5)}
    expected, right = ranked_l1(**{f"{name}_probs": one for name, one in probs.items()})
    probs[side][0, 7] = value
    distance, signed = by_counting(**probs)
    assert distance[0].isnan() and signed[0].isnan().all()
    assert torch.equal(signed[1], right[1])
    torch.testing.assert_close(distance[1], expected[1], rtol=1e-6, atol=0)
