"""Rows in descending order, and signs of ranks carried back to their columns.

On a CPU torch sorts values together with their columns, which takes twenty times as long as
numpy takes to sort values alone. Here only values are sorted. Columns are looked at again once it
is known which signs the ranks have: between two ranks where they change, all columns have one sign,
so a value alone says it, and only the columns next to a change need an order.

Ties go to the lower column, on every device and in every dtype.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctkd.powers import Workspace

__all__ = ["DEVICES_THAT_SORT_VALUES", "Ranked", "rank_rows", "ranked_l1", "top_ids_of_rows"]

# Elsewhere torch sorts fast, and nothing may be read from the device.
DEVICES_THAT_SORT_VALUES = {"cpu"}

_Floats = npt.NDArray[np.floating[Any]]
_Ints = npt.NDArray[np.signedinteger[Any]]

# A float32 is looked up by its upper half, which leaves both zeros and what is next to them in
# one class, the middle one.
_CLASSES = 2**16 - 1
_MIDDLE = _CLASSES // 2
_MIXED = 2

# Where signs change more often than this, sorting all columns is faster than looking them up.
_RANKS_PER_CHANGE = 128


class Ranked(NamedTuple):
    """Rows in descending order.

    Attributes:
        values: (N, V), descending.
        rows: (N, V), as they were.
        columns: (N, V) int64, the column at each rank; None where only values were sorted.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor | None

    def to_columns(self, at_ranks: Tensor, out: Tensor | None = None) -> Tensor:
        """Carry signs from ranks to the columns that hold them, fast where they seldom change.

        Shape:
            (N, V), and so is the answer.

        Args:
            at_ranks: -1, 0 or 1 for every rank of every row, in the dtype of the rows.
            out: Takes the answer.

        Example:
            >>> rows = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
            >>> rank_rows(rows)[0].to_columns(torch.tensor([[1.0, -1.0, -1.0, 0.0]]))
            tensor([[ 0.,  1., -1., -1.]])
        """
        if out is None:
            out = torch.empty_like(at_ranks)
        if self.columns is not None:
            return out.scatter_(1, self.columns, at_ranks)
        arrays = [one.detach().numpy() for one in (self.rows, self.values, at_ranks, out)]
        _run(
            [
                functools.partial(_carry_to_columns, *row_arrays)
                for row_arrays in zip(*arrays, strict=True)
            ]
        )
        return out


def rank_rows(*blocks: Tensor, workspace: Workspace | None = None) -> tuple[Ranked, ...]:
    """Sort the rows of some blocks, all at once.

    Shape:
        Blocks (N, V), each with its own V.

    Args:
        blocks: float32 or float64.
        workspace: Where to put sorted values, as ``"sorted 0"``, ``"sorted 1"`` and so on.

    Example:
        >>> rank_rows(torch.tensor([[1.0, 3.0, 2.0]]))[0].values
        tensor([[3., 2., 1.]])
    """
    if not all(_sorts_values(block) for block in blocks):
        return tuple(
            Ranked(found.values, block, found.indices)
            for block in blocks
            for found in (block.sort(dim=-1, descending=True, stable=True),)
        )
    ranked = tuple(
        Ranked(
            torch.empty_like(block, memory_format=torch.contiguous_format)
            if workspace is None
            else workspace.rows(f"sorted {index}", block, block.shape[1]),
            block,
            None,
        )
        for index, block in enumerate(blocks)
    )
    _run(
        [
            functools.partial(_sort_descending, row, sorted_row)
            for one in ranked
            for row, sorted_row in zip(one.rows.detach().numpy(), one.values.numpy(), strict=True)
        ]
    )
    return ranked


def ranked_l1(
    student_probs: Tensor,
    teacher_probs: Tensor,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Distance between rows that each stand in descending order, and its derivative.

    .. math:: \sum_k |s_{(k)} - t_{(k)}|, \quad s_{(1)} \ge s_{(2)} \ge \dots

    The narrower side is padded with zeros. The rows need not sum to 1, and may be empty.

    Shape:
        (N, V) and (N, W) give (N, 1), and the derivative with respect to the first: the sign of
        every difference, (N, V), 0 where there is none.

    Args:
        student_probs: In descending order.
        teacher_probs: In descending order.
        workspace: Where to put the signs and what leads to them, as ``"gap"`` and ``"spare"``.

    Example:
        >>> ranked_l1(torch.tensor([[0.3, 0.1]]), torch.tensor([[0.2, 0.1, 0.1]]))
        (tensor([[0.2000]]), tensor([[1., 0.]]))
    """
    if workspace is None:
        workspace = Workspace()
    width, other_width = student_probs.shape[1], teacher_probs.shape[1]
    gap = workspace.rows("gap", student_probs, max(width, other_width))
    shared = min(width, other_width)
    torch.sub(student_probs[:, :shared], teacher_probs[:, :shared], out=gap[:, :shared])
    if width > shared:
        gap[:, shared:] = student_probs[:, shared:]
    elif other_width > shared:
        torch.neg(teacher_probs[:, shared:], out=gap[:, shared:])
    spare = torch.abs(gap, out=workspace.rows("spare", gap, gap.shape[1]))
    return spare.sum(-1, keepdim=True), gap[:, :width].sign_()


def top_ids_of_rows(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row on a CPU, largest first.

    Shape:
        ``values`` (N, V), any floating dtype; the answer is (N, k) int64.

    Example:
        >>> top_ids_of_rows(torch.tensor([[1.0, 3.0, 3.0]]), 2)
        tensor([[1, 2]])
    """
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    ids = torch.empty((values.shape[0], k), dtype=torch.int64)
    _run(
        [
            functools.partial(_put_top_ids, row, row_ids)
            for row, row_ids in zip(values.detach().numpy(), ids.numpy(), strict=True)
        ]
    )
    return ids


def _sorts_values(block: Tensor) -> bool:
    return block.device.type in DEVICES_THAT_SORT_VALUES and block.dtype == torch.float32


@functools.cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    # A process that was forked has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="ctkd-sorting")


def _run(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks over as many threads as torch uses; numpy holds no lock while it sorts."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        for task in tasks:
            task()
        return
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    started = [pool.submit(task) for task in tasks[1:]]
    tasks[0]()
    for one in started:
        one.result()


def _sort_descending(row: _Floats, out: _Floats) -> None:
    np.negative(row, out=out)
    out.sort()
    np.negative(out, out=out)


def _classes(values: _Floats) -> _Ints:
    """The class of each value by its upper half, 0 for the largest values."""
    upper = values.view(np.int32) >> 16
    return _MIDDLE - np.where(upper < 0, (upper ^ 0x7FFF) + 1, upper)


def _carry_to_columns(row: _Floats, ranked: _Floats, at_ranks: _Floats, out: _Floats) -> None:
    """`Ranked.to_columns` for a row of float32.

    A class of values that are next to each other goes by one sign, unless signs change within it.
    The columns of such mixed classes are sorted: they take up whole ranges of ranks.
    """
    if not row.size:
        return
    # Nothing is known of a row without a total, on either side.
    if np.isnan(ranked[-1]) or np.isnan(at_ranks[0]):
        out.fill(np.nan)
        return
    changes = np.flatnonzero(at_ranks[1:] != at_ranks[:-1])
    if changes.size > row.size // _RANKS_PER_CHANGE:
        out[_descending_order(row)] = at_ranks
        return
    last, first = _classes(ranked[changes]), _classes(ranked[changes + 1])
    signs = at_ranks[np.append(changes, -1)].astype(np.int8)
    of_classes = np.repeat(signs, np.diff(first, prepend=0, append=_CLASSES))
    is_mixed = last == first
    of_classes[first[is_mixed]] = _MIXED
    # By upper halves read as unsigned integers: from 0 upwards, then from -0 downwards.
    table = np.concatenate([of_classes[_MIDDLE::-1], of_classes[_MIDDLE:]])
    found = table.take(np.right_shift(row.view(np.uint32), 16, dtype=np.intp), mode="clip")
    out[:] = found
    if is_mixed.any():
        columns = np.flatnonzero(found == _MIXED)
        columns = columns[_descending_order(row[columns])]
        out[columns] = at_ranks[_ranks_of_whole_classes(row[columns], ranked)]


def _ranks_of_whole_classes(values: _Floats, ranked: _Floats) -> _Ints:
    """Ranks of values that are all those of their classes, in descending order."""
    firsts = np.flatnonzero(np.diff(_classes(values), prepend=-1))
    larger = ranked.size - np.searchsorted(ranked[::-1], values[firsts], side="right")
    counts = np.diff(firsts, append=values.size)
    return np.arange(values.size) + np.repeat(larger - firsts, counts)


def _descending_order(values: _Floats) -> _Ints:
    """Stable, as numpy finds it fast: one sort of 64-bit integers that end in the index."""
    bits = (values + 0.0).view(np.int32)
    # Read as integers, negative floats run backwards: flip all but their sign.
    packed = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).astype(np.int64) << 32
    packed |= np.arange(values.size)
    packed.sort()
    packed &= 0xFFFFFFFF
    return packed


def _put_top_ids(row: _Floats, ids: _Ints) -> None:
    k = ids.size
    if not k:
        return
    columns = np.flatnonzero(row >= _bound_of_top(row, k))
    if columns.size < k:
        columns = np.arange(row.size)
    ids[:] = columns[np.argsort(-row[columns], kind="stable")[:k]]


def _bound_of_top(row: _Floats, k: int) -> np.floating[Any]:
    """At most the k-th largest entry, and seldom much less."""
    groups = max(4 * k, 512)
    if row.size >= 4 * groups:
        # Of k groups with the largest maxima, each has an entry that is no less than this.
        row = row[: row.size // groups * groups].reshape(-1, groups).max(0)
    bound: np.floating[Any] = np.partition(row, row.size - k)[row.size - k]
    return bound
