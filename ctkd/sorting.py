r"""What asks for rows in descending order: the distance between ranks, and the largest entries.

On a CPU torch sorts values together with their columns, which takes twenty times as long as
numpy takes to sort values alone, and even that is more than is needed. The distance between ranked
rows is that between the counts of entries above each threshold,

.. math:: \sum_k |s_{(k)} - t_{(k)}| = \int |N_s(x) - N_t(x)| \, dx,

and an entry is added or subtracted by the sign of that difference where it stands. Counting entries
by classes of nearby values says the sign for whole classes, except for the few in which it changes;
only their entries are sorted.

Ties go to the lower column, on every device and in every dtype.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ctkd.powers import Workspace

__all__ = ["DEVICES_THAT_SORT_VALUES", "ranked_l1", "top_ids_of_rows"]

# Elsewhere torch sorts fast, and nothing may be read from the device.
DEVICES_THAT_SORT_VALUES = {"cpu"}

_Floats = npt.NDArray[np.floating[Any]]
_Ints = npt.NDArray[np.signedinteger[Any]]
_Answer = TypeVar("_Answer")
_Tasks = Sequence[Callable[[], _Answer]]

# A float32 is classed by its upper bits: sign, exponent and six of the mantissa.
_DROPPED_BITS = 17
# From 0 up to, but without, 2.
_CLASSES = 0x40000000 >> _DROPPED_BITS

# Where more entries than one in so many are in classes of both signs, all are sorted.
_ENTRIES_PER_MIXED = 8


def ranked_l1(
    student_probs: Tensor,
    teacher_probs: Tensor,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Distance between the sorted rows of two blocks, and its derivative.

    .. math:: \sum_k |s_{(k)} - t_{(k)}|, \quad s_{(1)} \ge s_{(2)} \ge \dots

    The narrower side is padded with zeros. The rows need not sum to 1, and may be empty.

    Shape:
        (N, V) and (N, W) give (N, 1) float64, and the derivative with respect to log s, (N, V):
        each entry times the sign of the difference at its rank, 0 where there is none.

    Args:
        student_probs: At least 0, in any order. A row with nan gives nan.
        teacher_probs: At least 0, in any order.
        workspace: Where the teacher's signs are put, as ``"teacher signs"``.
        out: Takes the derivative.

    Example:
        >>> ranked_l1(torch.tensor([[0.1, 0.3]]), torch.tensor([[0.1, 0.2, 0.1]]))
        (tensor([[0.2000]], dtype=torch.float64), tensor([[0.0000, 0.3000]]))
    """
    if out is None:
        out = torch.empty_like(student_probs, memory_format=torch.contiguous_format)
    if not (_is_classed(student_probs) and _is_classed(teacher_probs)):
        return _ranked_l1_by_sorting(student_probs, teacher_probs, out), out
    workspace = workspace or Workspace()
    of_teacher = workspace.rows("teacher signs", teacher_probs, teacher_probs.shape[1])
    arrays = [one.detach().numpy() for one in (student_probs, teacher_probs, out, of_teacher)]
    rows = zip(*arrays, strict=True)
    if len(out) < torch.get_num_threads():
        rests = [_put_signs(_run, *row_arrays) for row_arrays in rows]
    else:
        rests = _run([functools.partial(_put_signs, _in_turn, *row_arrays) for row_arrays in rows])
    values = torch.tensor(rests, dtype=torch.float64).unsqueeze(-1)
    for signs, probs in ((of_teacher, teacher_probs), (out, student_probs)):
        values += signs.mul_(probs).sum(-1, keepdim=True, dtype=torch.float64)
    return values, out


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


def _is_classed(block: Tensor) -> bool:
    return (
        block.device.type in DEVICES_THAT_SORT_VALUES
        and block.dtype == torch.float32
        and block.stride(-1) == 1
    )


def _ranked_l1_by_sorting(student_probs: Tensor, teacher_probs: Tensor, out: Tensor) -> Tensor:
    student, teacher = (
        one.sort(dim=-1, descending=True, stable=True) for one in (student_probs, teacher_probs)
    )
    width, other_width = student_probs.shape[1], teacher_probs.shape[1]
    gap = F.pad(student.values, (0, max(other_width - width, 0)))
    gap[:, :other_width] -= teacher.values
    out.scatter_(1, student.indices, gap[:, :width].sign().mul_(student.values))
    return gap.abs_().sum(-1, keepdim=True, dtype=torch.float64)


@functools.cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    # A process that was forked has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="ctkd-sorting")


def _in_turn(tasks: _Tasks[_Answer]) -> list[_Answer]:
    return [task() for task in tasks]


def _run(tasks: _Tasks[_Answer]) -> list[_Answer]:
    """Run tasks over as many threads as torch uses; numpy holds no lock in long loops."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return _in_turn(tasks)
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    started = [pool.submit(task) for task in tasks[1:]]
    first = tasks[0]()
    return [first, *(one.result() for one in started)]


def _put_signs(
    run: Callable[[_Tasks[Any]], list[Any]],
    row: _Floats,
    other: _Floats,
    signs: _Floats,
    other_signs: _Floats,
) -> float:
    """Put the sign of the difference at each entry's rank, its own value minus the other's.

    Args:
        run: How to run tasks, one for each side.
        row: One side's values.
        other: The other side's.
        signs: Takes the signs of the one side.
        other_signs: Takes those of the other; 0 for entries that are part of the answer.

    Returns:
        Sum of signs times entries, over those of the other side that have none in their place.
    """
    (classes, counts), (other_classes, other_counts) = run(
        [functools.partial(_classes_and_counts, one) for one in (row, other)]
    )
    if max(counts.size, other_counts.size) > _CLASSES:
        return _put_signs_by_order(row, other, signs, other_signs)
    # How many more entries there are above each class.
    above = row.size - other.size - np.cumsum(counts - other_counts)
    is_larger, is_smaller = above >= other_counts, above + counts <= 0
    table = np.subtract(is_larger, is_smaller, dtype=np.float32)
    run(
        [
            functools.partial(one.take, those, out=place, mode="clip")
            for one, those, place in (
                (table, classes, signs),
                (np.negative(table), other_classes, other_signs),
            )
        ]
    )
    rest = 0.0
    is_mixed = ~(is_larger | is_smaller)
    if is_mixed.any():
        columns = np.flatnonzero(signs == 0)
        if columns.size * _ENTRIES_PER_MIXED > row.size:
            return _put_signs_by_order(row, other, signs, other_signs)
        columns = columns[_descending_order(row[columns])]
        values, others = row[columns], _descending(other[other_signs == 0])
        # The same of entries that are in no mixed class.
        ahead = np.cumsum(np.where(is_mixed, 0, counts - other_counts))
        ahead = ahead[-1] - ahead
        signs[columns] = _signs_of_mixed(values, others, ahead)
        rest = float((_signs_of_mixed(others, values, -ahead) * others).sum(dtype=np.float64))
    return rest


def _classes_and_counts(values: _Floats) -> tuple[_Ints, _Ints]:
    """The class of each value, and how many there are of each class.

    Classes rise with the values; what is not in [0, 2) is beyond the last one.
    """
    classes = _classes(values)
    return classes, np.bincount(classes, minlength=_CLASSES)


def _classes(values: _Floats) -> _Ints:
    return np.right_shift(values.view(np.uint32), _DROPPED_BITS, dtype=np.intp)


def _signs_of_mixed(values: _Floats, others: _Floats, ahead: _Ints) -> _Floats:
    """Signs of values minus what the other side has at their ranks.

    Args:
        values: All entries in mixed classes, descending.
        others: The same of the other side.
        ahead: For each class, how many more entries in no mixed class stand above it than the
            other side has there.
    """
    # The tail of a stored teacher's row is thousands of equal values.
    firsts = np.flatnonzero(np.diff(values, prepend=np.inf))
    counts, rising = np.diff(firsts, append=values.size), others[::-1]
    at_least, more = (
        others.size - np.searchsorted(rising, values[firsts], side=side)
        for side in ("left", "right")
    )
    ahead = ahead[_classes(values[firsts])]
    # Of ranks among the values alone.
    larger_from, smaller_until = np.repeat([at_least - ahead, more - ahead], counts, axis=1)
    ranks = np.arange(values.size)
    signs: _Floats = np.subtract(larger_from <= ranks, smaller_until > ranks, dtype=np.float32)
    return signs


def _put_signs_by_order(
    row: _Floats, other: _Floats, signs: _Floats, other_signs: _Floats
) -> float:
    """Do what `_put_signs` does by sorting everything."""
    order, others = _descending_order(row), _descending(other)
    gap = np.zeros(max(row.size, other.size), dtype=row.dtype)
    with np.errstate(invalid="ignore"):
        gap[: row.size] = row[order]
        gap[: other.size] -= others
    # Nothing is known of a row without a total, on either side.
    found = np.full_like(gap, np.nan) if np.isnan(gap).any() else np.sign(gap)
    signs[order] = found[: row.size]
    other_signs.fill(0.0)
    return -float((found[: other.size] * others).sum(dtype=np.float64))


def _descending(values: _Floats) -> _Floats:
    found = np.negative(values)
    found.sort()
    np.negative(found, out=found)
    return found


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
