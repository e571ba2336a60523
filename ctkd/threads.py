"""Work on rows shared out among as many threads as torch uses.

It is for loops that let go of the interpreter's lock, as those in `ctkd.kernels` do.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

__all__ = ["over_rows"]

# More parts than threads, so that one that was held up does not hold up all.
_PARTS_PER_THREAD = 4


def over_rows(count: int, task: Callable[[slice], object]) -> None:
    """Call a task on slices that together are all rows.

    Args:
        count: How many rows there are.
        task: Works on some of them; the others may be worked on at the same time.

    Example:
        >>> seen = [0] * 10
        >>> def mark(some):
        ...     for row in range(10)[some]:
        ...         seen[row] += 1
        >>> over_rows(10, mark)
        >>> seen
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    threads = torch.get_num_threads()
    size = max(-(-count // (threads * _PARTS_PER_THREAD if threads > 1 else 1)), 1)
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    if threads == 1 or len(parts) <= 1:
        for part in parts:
            task(part)
        return
    waiting = iter(parts)
    # An iterator over a list hands out each element once, whichever threads ask.
    started = [
        _pool(os.getpid(), threads - 1).submit(_work_off, waiting, task)
        for _ in range(min(threads, len(parts)) - 1)
    ]
    try:
        _work_off(waiting, task)
    finally:
        # None may go on writing when this returns.
        wait(started)
    for one in started:
        one.result()


def _work_off(waiting: Iterator[slice], task: Callable[[slice], object]) -> None:
    for part in waiting:
        task(part)


@functools.cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    # A process that was forked has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="ctkd")
