"""Rows shared out among threads."""

import os
import threading

import numpy as np
import pytest
import torch

from ctkd.ops import Rows, cpu, top_k
from ctkd.ops.cpu import share
from tests.ops.sorted_rows import rows_of, stable
from tests.ops.torch_threads import torch_threads

# Columns of rows of which each is worth a thread.
MANY = 1 << 20


@pytest.mark.parametrize("count, rows", [(1, 0), (3, 1), (1, 7), (3, 2), (3, 1001)])
def test_every_row_is_worked_on_once(count, rows):
    seen, lock = np.zeros(rows, int), threading.Lock()

    def work(some):
        with lock:
            seen[some] += 1

    with torch_threads(count):
        share(np.arange(rows), MANY, work)
    assert (seen == 1).all()


def test_several_threads_work():
    both = threading.Barrier(2, timeout=30)
    # Neither could pass the barrier alone.
    with torch_threads(2):
        share(np.arange(2), MANY, lambda some: both.wait())
    assert not both.broken


def test_a_few_entries_wake_no_thread():
    seen = []
    with torch_threads(2):
        share(np.arange(8), 1, lambda some: seen.append((len(some), threading.get_ident())))
    assert seen == [(8, threading.get_ident())]


@pytest.mark.parametrize("row", [0, 1])
def test_what_a_thread_runs_into_is_raised(row):
    def fails(some):
        if row in some:
            raise ZeroDivisionError

    with torch_threads(2), pytest.raises(ZeroDivisionError):
        share(np.arange(2), MANY, fails)


def test_nothing_works_on_when_an_error_is_raised():
    begun, ended = threading.Event(), []

    def work(some):
        if 0 in some:
            begun.wait(30)
            raise ZeroDivisionError
        begun.set()
        ended.append(some)

    with torch_threads(2), pytest.raises(ZeroDivisionError):
        share(np.arange(2), MANY, work)
    assert len(ended) == 1


def test_a_process_has_threads_of_its_own():
    assert cpu._pool(os.getpid(), 1) is cpu._pool(os.getpid(), 1)
    assert cpu._pool(os.getpid(), 1) is not cpu._pool(-1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_process_shares_rows_too():
    seen = np.zeros(8, int)

    def mark(some):
        seen[some] += 1

    with torch_threads(2):
        share(np.arange(8), MANY, mark)
        process = os.fork()
        if not process:
            # None of the parent's threads would ever work on them.
            share(np.arange(8), MANY, mark)
            os._exit(int(not (seen == 2).all()))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (seen == 1).all()


@pytest.mark.parametrize("count", [2, 9])
def test_they_change_nothing(count):
    rows = rows_of("ties", 3000, 8, count)
    with torch_threads(3):
        ids, _ = top_k(Rows(rows, None, 3000), 40)
    assert torch.equal(ids, stable(rows)[1][:, :40])
