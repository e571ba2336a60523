"""Sorting without columns, held against torch's stable sort with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctkd import sorting
from ctkd.powers import Workspace
from ctkd.sorting import rank_rows, ranked_l1, top_ids_of_rows

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


def signs_of(width: int, changes: int, seed: int, count: int = 2) -> Tensor:
    """Signs of ranks that change at most so often."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.empty(count, width)
    for row in signs:
        cuts = torch.randint(width + 1, (changes,), generator=generator).sort().values.tolist()
        for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
            row[start:stop] = float(torch.randint(-1, 2, (), generator=generator))
    return signs


def stable(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.sort(dim=-1, descending=True, stable=True)


@contextmanager
def changes_allowed(ranks_per_change: int) -> Iterator[None]:
    """Which of the two ways from ranks to columns a row takes depends on this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "_RANKS_PER_CHANGE", ranks_per_change)
        yield


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 600),
    changes=st.integers(0, 40),
    ranks_per_change=st.sampled_from([1, 4, 10**9]),
    seed=st.integers(0, 10**6),
)
def test_signs_find_the_columns_of_a_stable_sort(kind, width, changes, ranks_per_change, seed):
    rows = rows_of(kind, width, seed)
    signs = signs_of(width, changes, seed)
    values, columns = stable(rows)
    with changes_allowed(ranks_per_change):
        (ranked,) = rank_rows(rows)
        assert ranked.columns is None
        assert torch.equal(ranked.values, values)
        found = ranked.to_columns(signs)
    assert torch.equal(found, torch.empty_like(signs).scatter_(1, columns, signs))


@pytest.mark.parametrize("kind", ["smooth", "bfloat16"])
@pytest.mark.parametrize("changes", [0, 1, 30, 5000])
def test_a_vocabulary(kind, changes):
    rows = rows_of(kind, 50_257, 1)
    signs = signs_of(50_257, changes, 2)
    expected = torch.empty_like(signs).scatter_(1, stable(rows)[1], signs)
    assert torch.equal(rank_rows(rows)[0].to_columns(signs), expected)


def test_the_tie_rule_is_what_is_tested():
    # Columns of one value that straddle a change: the lower ones hold the ranks before it.
    rows = torch.tensor([[2.0, 1.0, -0.0, 0.0, -0.0, 0.0, -1.0]])
    signs = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]])
    for ranks_per_change in (1, 10**9):
        with changes_allowed(ranks_per_change):
            assert rank_rows(rows)[0].to_columns(signs).tolist() == signs.tolist()
    signs = signs.flip(-1)
    for ranks_per_change in (1, 10**9):
        with changes_allowed(ranks_per_change):
            assert rank_rows(rows)[0].to_columns(signs).tolist() == signs.tolist()


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


def test_rows_with_nan_cost_nobody_else_anything():
    rows = rows_of("smooth", 3000, 4)
    rows[0, 7] = torch.nan
    signs = signs_of(3000, 3, 4)
    (ranked,) = rank_rows(rows)
    found, ids = ranked.to_columns(signs), top_ids_of_rows(rows, 5)
    assert found[0].isnan().all()
    expected = torch.empty(3000).scatter_(0, stable(rows)[1][1], signs[1])
    assert torch.equal(found[1], expected)
    assert len(set(ids[0].tolist())) == 5 and 0 <= ids.min() and ids.max() < 3000
    assert torch.equal(ids[1], stable(rows)[1][1, :5])
    signs[1] = torch.nan
    assert ranked.to_columns(signs).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_function_chooses_and_the_choice_changes_nothing(dtype, monkeypatch):
    rows, others = (rows_of("ties", width, 5).to(dtype) for width in (400, 700))
    signs = signs_of(400, 4, 5).to(dtype)
    fast = rank_rows(rows, others)
    assert (fast[0].columns is None) == (dtype == torch.float32)
    monkeypatch.setattr(sorting, "DEVICES_THAT_SORT_VALUES", set())
    slow = rank_rows(rows, others)
    assert all(one.columns is not None for one in slow)
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one.values, other.values)
    assert torch.equal(fast[0].to_columns(signs), slow[0].to_columns(signs))


def test_on_a_device_without_data():
    rows = torch.empty(3, 40, device="meta")
    (ranked,) = rank_rows(rows, workspace=Workspace())
    assert ranked.to_columns(rows).shape == (3, 40)


def test_inputs_stay_and_rooms_are_used_again():
    rows, workspace = rows_of("smooth", 300, 6), Workspace()
    before = rows.clone()
    (ranked,) = rank_rows(rows, workspace=workspace)
    out = torch.empty_like(rows)
    assert ranked.to_columns(signs_of(300, 3, 6), out=out) is out
    top_ids_of_rows(rows, 9)
    assert torch.equal(rows, before)
    (again,) = rank_rows(rows[:1] + 1.0, workspace=workspace)
    assert again.values.data_ptr() == ranked.values.data_ptr()


def test_columns_may_be_a_part_of_wider_rows():
    wide = rows_of("ties", 500, 7)
    rows, signs = wide[:, :450], signs_of(450, 3, 7)
    assert torch.equal(rank_rows(rows)[0].values, stable(rows)[0])
    expected = torch.empty_like(signs).scatter_(1, stable(rows)[1], signs)
    assert torch.equal(rank_rows(rows)[0].to_columns(signs), expected)
    assert torch.equal(top_ids_of_rows(rows, 9), stable(rows)[1][:, :9])


def test_threads_change_nothing():
    rows, signs = rows_of("ties", 3000, 8, count=9), signs_of(3000, 3, 8, count=9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (ranked,) = rank_rows(rows)
        found, ids = ranked.to_columns(signs), top_ids_of_rows(rows, 40)
    finally:
        torch.set_num_threads(threads)
    values, columns = stable(rows)
    assert torch.equal(ranked.values, values)
    assert torch.equal(found, torch.empty_like(signs).scatter_(1, columns, signs))
    assert torch.equal(ids, columns[:, :40])


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
def test_ranked_l1(dtype, widths):
    generator = torch.Generator().manual_seed(9)
    student, teacher = (
        torch.rand(6, width, generator=generator, dtype=dtype).sort(descending=True).values
        for width in widths
    )
    # Two entries alike in every row that has them.
    if min(widths) > 1:
        teacher[:, 1] = student[:, 1]
    distance, signs = ranked_l1(student, teacher)
    assert distance.shape == (6, 1) and signs.shape == student.shape
    for row in range(6):
        gaps = np.zeros(max(widths))
        gaps[: widths[0]] += student[row].numpy()
        gaps[: widths[1]] -= teacher[row].numpy()
        assert distance[row].item() == pytest.approx(np.abs(gaps).sum(), rel=1e-6, abs=0)
        assert signs[row].tolist() == np.sign(gaps[: widths[0]]).tolist()
