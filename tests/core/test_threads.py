"""Rows shared out among threads."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ctkd import threads
from ctkd.sorting import stable_top_ids
from ctkd.threads import over_rows
from tests.sorted_rows import rows_of, stable


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 1001])
def test_every_row_is_worked_on_once(count, rows):
    seen, lock = [0] * rows, threading.Lock()

    def work(some: slice) -> None:
        with lock:
            for row in range(some.start, some.stop):
                seen[row] += 1

    with torch_threads(count):
        over_rows(rows, work)
    assert seen == [1] * rows


def test_several_threads_work():
    both = threading.Barrier(2, timeout=30)
    # Neither could pass the barrier alone.
    with torch_threads(2):
        over_rows(2, lambda some: both.wait())
    assert not both.broken


@pytest.mark.parametrize("row", [0, 1])
def test_what_a_thread_runs_into_is_raised(row):
    def fails(some: slice) -> None:
        if some.start == row:
            raise ZeroDivisionError

    with torch_threads(2), pytest.raises(ZeroDivisionError):
        over_rows(2, fails)


def test_a_process_has_threads_of_its_own():
    assert threads._pool(os.getpid(), 1) is threads._pool(os.getpid(), 1)
    assert threads._pool(os.getpid(), 1) is not threads._pool(-1, 1)


@pytest.mark.parametrize("count", [2, 9])
def test_they_change_nothing(count):
    rows = rows_of("ties", 3000, 8, count)
    with torch_threads(3):
        ids = stable_top_ids(rows, 40)
    assert torch.equal(ids, stable(rows)[1][:, :40])
