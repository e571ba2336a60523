"""Distances between ranks, and largest entries, held against torch's stable sort."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctkd import sorting
from ctkd.powers import Workspace
from ctkd.sorting import ranked_l1, top_ids_of_rows

INFINITY = float("inf")
SPECIAL = [0.0, -0.0, 1e-43, -1e-43, 1e-38, -1e-38, INFINITY, -INFINITY, 1.0, 1.0 + 2**-20]
KINDS = ("smooth", "ties", "bfloat16", "special", "constant", "narrow")


def rows_of(kind: str, width: int, seed: int, count: int = 2) -> Tensor:
    """float32 rows with no, some or nothing but ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3.0 * torch.randn(count, width, generator=generator)
    if kind == "ties":
        return rows.round()
    if kind == "bfloat16":
        return rows.bfloat16().float()
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), rows.shape, generator=generator)]
    if kind == "constant":
        return torch.full_like(rows, -2.5)
    # All in one class, and no two alike.
    return 1.0 + 1e-4 * rows if kind == "narrow" else rows


def probs_of(kind: str, width: int, seed: int, count: int = 2) -> Tensor:
    """float32 rows from 0 to 2 with no, some or nothing but ties."""
    if kind == "special":
        return rows_of(kind, width, seed, count).abs().clamp_max(1.0)
    rows = rows_of(kind, width, seed, count).softmax(-1)
    return rows.bfloat16().float() if kind == "bfloat16" else rows


def by_stable_sort(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and derivative, from sorted float64 rows padded to one width."""
    size = max(student.shape[1], teacher.shape[1])
    (values, columns), (others, _) = (stable(one.double()) for one in (student, teacher))
    padded = [F.pad(one, (0, size - one.shape[1])) for one in (values, others)]
    gap = padded[0] - padded[1]
    signed = gap[:, : values.shape[1]].sign() * values
    return gap.abs().sum(-1, keepdim=True), torch.empty_like(values).scatter_(1, columns, signed)


def check(student: Tensor, teacher: Tensor) -> None:
    value, signed = ranked_l1(student, teacher)
    expected, right = by_stable_sort(student, teacher)
    assert value.shape == (len(student), 1) and signed.dtype == student.dtype
    assert torch.equal(signed.double(), right)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=2e-7)


def stable(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.sort(dim=-1, descending=True, stable=True)


@contextmanager
def mixed_allowed(entries_per_mixed: int) -> Iterator[None]:
    """Whether entries of mixed classes are sorted alone or with all others depends on this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "_ENTRIES_PER_MIXED", entries_per_mixed)
        yield


@settings(max_examples=600, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    other_kind=st.sampled_from([*KINDS, "nearly the same", "the same", "permuted"]),
    widths=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    entries_per_mixed=st.sampled_from([1, 8, 10**9]),
    seed=st.integers(0, 10**6),
)
def test_ranked_l1_is_that_of_a_stable_sort(kind, other_kind, widths, entries_per_mixed, seed):
    student = probs_of(kind, widths[0], seed)
    if other_kind in KINDS:
        teacher = probs_of(other_kind, widths[1], seed + 1)
    else:
        teacher = student[:, torch.randperm(widths[0])] if other_kind == "permuted" else student
        if other_kind == "nearly the same":
            noise = torch.rand(student.shape, generator=torch.Generator().manual_seed(seed))
            teacher = student * (1.0 + 0.1 * (noise - 0.5))
            teacher = F.pad(teacher, (0, widths[1] % 7), value=1e-6)
    with mixed_allowed(entries_per_mixed):
        check(student, teacher)


@pytest.mark.parametrize("kind", ["smooth", "bfloat16"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3])
def test_a_vocabulary(kind, spread):
    student = probs_of(kind, 50_257, 1)
    noise = 1.0 + spread * torch.randn(2, 32_000, generator=torch.Generator().manual_seed(2))
    check(student, (student[:, :32_000] * noise).abs())


def test_all_three_ways_are_taken(monkeypatch):
    """Whole classes alone, some entries sorted, all entries sorted."""
    calls = []
    for name in ("_signs_of_mixed", "_put_signs_by_order"):
        function = getattr(sorting, name)
        monkeypatch.setattr(
            sorting,
            name,
            lambda *args, name=name, function=function: calls.append(name) or function(*args),
        )
    student = torch.cat([torch.linspace(0.1, 0.2, 300), torch.full((20,), 0.01)])[None]
    check(student, student * 0.25)
    assert not calls
    # Most of it above, a few entries around each other.
    check(student, torch.cat([student[:, :-4] * 0.25, student[:, -4:] * 1.001], -1))
    check(torch.tensor([[0.5] * 40 + [0.1, 0.2]]), torch.tensor([[0.4] * 40 + [0.1001, 0.1002]]))
    assert set(calls) == {"_signs_of_mixed"}
    calls.clear()
    check(student, student * 1.0001)
    assert calls == ["_put_signs_by_order"]


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
    for entries_per_mixed in (1, 10**9):
        with mixed_allowed(entries_per_mixed):
            signed = ranked_l1(student, teacher)[1]
            assert torch.equal(signed, torch.tensor([[-0.2, 0.0, 0.0, 0.2]]))


def test_rows_that_are_no_probabilities():
    """Two and more is beyond the classes."""
    student, teacher = (1e3 * probs_of("smooth", width, 3) for width in (90, 70))
    value, signed = ranked_l1(student, teacher)
    expected, right = by_stable_sort(student, teacher)
    assert torch.equal(signed.double(), right)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


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
    assert torch.equal(top_ids_of_rows(rows, k), stable(rows)[1][:, :k])


@pytest.mark.parametrize("kind", KINDS)
def test_top_ids_of_a_vocabulary(kind):
    rows = rows_of(kind, 50_257, 3)
    for k in (0, 1, 50, 256, 5000, 50_257):
        assert torch.equal(top_ids_of_rows(rows, k), stable(rows)[1][:, :k])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_with_nan_cost_nobody_else_anything(side):
    probs = {"student": probs_of("smooth", 3000, 4), "teacher": probs_of("smooth", 2000, 5)}
    expected, right = by_stable_sort(**probs)
    probs[side][0] = torch.nan
    value, signed = ranked_l1(probs["student"], probs["teacher"])
    assert value[0].isnan() and signed[0].isnan().all()
    assert torch.equal(signed[1].double(), right[1])
    torch.testing.assert_close(value[1].double(), expected[1])
    rows = rows_of("smooth", 3000, 4)
    rows[0, 7] = torch.nan
    ids = top_ids_of_rows(rows, 5)
    assert len(set(ids[0].tolist())) == 5 and 0 <= ids.min() and ids.max() < 3000
    assert torch.equal(ids[1], stable(rows)[1][1, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_function_chooses_and_the_choice_changes_nothing(dtype, monkeypatch):
    student, teacher = (probs_of("ties", width, 5).to(dtype) for width in (400, 700))
    fast = ranked_l1(student, teacher)
    by_torch = []
    function = sorting._ranked_l1_by_sorting
    monkeypatch.setattr(
        sorting, "_ranked_l1_by_sorting", lambda *args: by_torch.append(0) or function(*args)
    )
    ranked_l1(student, teacher)
    assert bool(by_torch) == (dtype == torch.float64)
    monkeypatch.setattr(sorting, "DEVICES_THAT_SORT_VALUES", set())
    slow = ranked_l1(student, teacher)
    torch.testing.assert_close(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])


def test_on_a_device_without_data():
    value, signed = ranked_l1(torch.empty(3, 40, device="meta"), torch.empty(3, 9, device="meta"))
    assert value.shape == (3, 1) and signed.shape == (3, 40)


def test_inputs_stay_and_rooms_are_used_again():
    student, teacher = probs_of("smooth", 300, 6), probs_of("smooth", 200, 7)
    before, workspace = (student.clone(), teacher.clone()), Workspace()
    out = torch.empty_like(student)
    _, signed = ranked_l1(student, teacher, workspace, out=out)
    assert signed is out
    place = workspace.rows("teacher signs", teacher, 200).data_ptr()
    ranked_l1(student[:1], teacher[:1], workspace)
    assert workspace.rows("teacher signs", teacher, 200).data_ptr() == place
    top_ids_of_rows(student, 9)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_columns_may_be_a_part_of_wider_rows():
    wide, other = probs_of("ties", 500, 7), probs_of("smooth", 900, 8)
    check(wide[:, :450], other[:, ::2])
    check(other[:, ::2], wide[:, :450])
    assert torch.equal(top_ids_of_rows(wide[:, :450], 9), stable(wide[:, :450])[1][:, :9])


@pytest.mark.parametrize("count", [2, 9])
def test_threads_change_nothing(count):
    """They share the rows, or the two sides of each where there are few."""
    student, teacher = (probs_of("ties", width, 8, count) for width in (3000, 2000))
    expected = ranked_l1(student, teacher)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found, ids = ranked_l1(student, teacher), top_ids_of_rows(student, 40)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(ids, stable(student)[1][:, :40])


def test_what_a_thread_runs_into_is_raised():
    def fails() -> None:
        raise ZeroDivisionError

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            sorting._run([lambda: None, fails])
    finally:
        torch.set_num_threads(threads)


def test_a_process_has_threads_of_its_own():
    assert sorting._pool(os.getpid(), 1) is sorting._pool(os.getpid(), 1)
    assert sorting._pool(os.getpid(), 1) is not sorting._pool(-1, 1)


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
