"""Operations on float32 and bfloat16 rows on a CPU, by loops that numba compiles.

Rows are read and written where they lie in memory: no widened copy, no block, a few rows of
scratch for each thread. Importing this package imports numba.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctkd.errors import BatchError
from ctkd.ops.cpu import row_losses, softmax_rows
from ctkd.ops.cpu import top_k as top_k_rows
from ctkd.ops.cpu.arrays import (
    BPMSettings,
    GoldSettings,
    RowArray,
    SharedKLSettings,
    SoftmaxTerms,
    UldSettings,
)
from ctkd.ops.rows import STANDARD_DEVIATION_EPSILON, RowLoss, Rows, RowValues, SoftmaxTerm

__all__ = [
    "DEVICES",
    "DTYPES",
    "OPERATIONS",
    "column_mass",
    "log_normalizers",
    "row_loss",
    "share",
    "softmax_backward",
    "top_k",
]

# More parts than threads, so that one that was held up does not hold up all.
_PARTS_PER_THREAD = 4
# Entries. Fewer are read sooner than a thread is woken.
_LEAST_SHARED = 1 << 15

DEVICES = {"cpu"}
DTYPES = {torch.float32, torch.bfloat16}
# By whether rows are standardized: added to the deviation that they are divided by, or a sign.
_EPSILONS = (-1.0, STANDARD_DEVIATION_EPSILON)
_NOTHING = np.empty(0, np.float32)


def log_normalizers(
    rows: Rows,
    temperatures: Sequence[float],
    *,
    standardize: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    """See `ctkd.ops.reference.log_normalizers`."""
    array, which = _array(rows)
    answers = _statistics(temperatures, len(array.starts), standardize)
    divisors = np.array(temperatures, np.float64)
    bias = _NOTHING if columns is None else _bias(columns)
    settings = rows.width, divisors, _EPSILONS[standardize], bias
    share(which, rows.width, softmax_rows.log_normalizers, array, *settings, *answers)
    return _joined(*answers)


def column_mass(
    rows: Rows,
    sequence: Tensor,
    sequences: int,
    temperatures: Sequence[float],
    *,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `ctkd.ops.reference.column_mass`."""
    array, which = _array(rows)
    answers = _statistics(temperatures, len(array.starts), standardize)
    divisors, epsilon = np.array(temperatures, np.float64), _EPSILONS[standardize]
    bounds = np.searchsorted(sequence.numpy()[which], np.arange(sequences + 1))
    # Where there are fewer sequences than threads, threads share one.
    pieces = max(1, -(-torch.get_num_threads() // max(sequences, 1)))
    mass = np.zeros((pieces, sequences, rows.width), np.float32)
    parts = [
        (part, mass[piece, number])
        for number, (start, stop) in enumerate(pairwise(bounds))
        for piece, part in enumerate(np.array_split(which[start:stop], pieces))
    ]

    def work(numbers: Any) -> None:
        for part, target in map(parts.__getitem__, numbers):
            softmax_rows.column_mass(part, array, rows.width, divisors, epsilon, *answers, target)

    share(np.arange(len(parts)), rows.width * len(which), work)
    total = mass[0] if pieces == 1 else mass.sum(0)
    return torch.from_numpy(total), _joined(*answers)


def top_k(rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """See `ctkd.ops.reference.top_k`."""
    array, which = _array(rows)
    size = len(array.starts), k
    ids, values = np.zeros(size, np.int64), np.zeros(size, np.float32)
    if k:
        share(which, rows.width, top_k_rows.top_k, array, rows.width, ids, values)
    return torch.from_numpy(ids), torch.from_numpy(values)


def softmax_backward(
    rows: Rows,
    terms: Sequence[SoftmaxTerm],
    out: Rows,
    known: Rows | None = None,
    weights: Tensor | None = None,
) -> None:
    """See `ctkd.ops.reference.softmax_backward`."""
    array, which = _array(rows)
    target = _array(out)[0]
    source = target if known is None else _array(known)[0]
    factors = _NOTHING if weights is None else weights.numpy()
    packed = _packed(terms, len(array.starts))
    args = array, packed, source, factors, target, out.width
    share(which, out.width, softmax_rows.softmax_gradients, *args)


def row_loss(
    loss: RowLoss,
    student: Rows,
    teacher: Rows,
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """See `ctkd.ops.reference.row_loss`."""
    array, which = _array(student)
    count = len(array.starts)
    target = RowArray(_NOTHING, array.starts) if out is None else _array(out)[0]
    numbers = np.empty((count, 0), np.float32)
    if per_row is not None:
        dtype = torch.float32 if per_row.is_floating_point() else per_row.dtype
        numbers = per_row.detach().to(dtype).contiguous().numpy()
    number_gradients = np.zeros(numbers.shape if differentiate else (0, 2), np.float32)
    values = np.zeros((count, loss.parts), np.float64)
    kernel, group = _KERNELS[loss.name]
    widths = {"student_columns": student.width, "teacher_columns": teacher.width}
    widths |= {"student_width": student.width, "teacher_width": teacher.width}
    settings = _unboxed(group, {**widths, **loss.settings})
    args = array, _array(teacher)[0], settings, numbers, values, number_gradients, target
    share(which, student.width, kernel, *args)
    if out is not None and out.width > student.width:
        rows = slice(None) if out.index is None else out.index
        out.tensor[rows, student.width : out.width] = 0.0
    return RowValues(
        torch.from_numpy(values).to(torch.float32),
        torch.from_numpy(number_gradients) if differentiate else None,
    )


_KERNELS: dict[str, tuple[Callable[..., None], Any]] = {
    "uld": (row_losses.uld, UldSettings),
    "gold": (row_losses.gold, GoldSettings),
    "shared_kl": (row_losses.shared_kl, SharedKLSettings),
    "bpm": (row_losses.bpm, BPMSettings),
}
OPERATIONS = {
    *("log_normalizers", "column_mass", "top_k", "softmax_backward"),
    *_KERNELS,
}
"""What `ctkd.ops` may send here; row losses by the names of their kernels."""


def _array(rows: Rows) -> tuple[RowArray, npt.NDArray[np.int64]]:
    """Where rows begin in memory, and which of them are rows."""
    tensor = rows.tensor.detach()
    index = np.arange(len(rows)) if rows.index is None else rows.index.numpy()
    starts, remaining = np.full(len(index), tensor.storage_offset(), np.int64), index
    for size, stride in zip(
        reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True
    ):
        starts += remaining % max(size, 1) * stride
        remaining = remaining // max(size, 1)
    which = np.flatnonzero(index >= 0)
    starts[index < 0] = -1
    memory = tensor.untyped_storage().nbytes() // tensor.itemsize
    flat = tensor.as_strided((memory,), (1,), 0)
    if tensor.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return RowArray(flat.numpy(), starts), which


def _statistics(
    temperatures: Sequence[float], count: int, standardize: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Arrays for log-normalizers (T, N), and for standard deviations (N,), or none."""
    size = len(temperatures), count
    return np.zeros(size, np.float32), np.zeros(count * standardize, np.float32)


def _joined(normalizers: npt.NDArray[Any], deviations: npt.NDArray[Any]) -> Tensor:
    if deviations.size:
        repeated = np.broadcast_to(deviations, normalizers.shape)
        normalizers = np.stack([normalizers, repeated], 1)
    return torch.from_numpy(normalizers)


def _bias(columns: Tensor) -> npt.NDArray[np.float32]:
    """0 for columns that count and minus infinity for the others."""
    return np.where(columns.numpy(), np.float32(0.0), np.float32(-np.inf))


def _unboxed(group: Any, settings: Mapping[str, Any]) -> Any:
    """Settings as a kernel takes them: columns as arrays, floats as such.

    No columns are an empty array, and a number of columns is all of them.
    """
    unboxed = {}
    for name in group._fields:
        value = settings[name]
        if value is None or (name.endswith("_columns") and isinstance(value, int)):
            value = np.arange(value or 0, dtype=np.uint32)
        elif isinstance(value, Tensor):
            value = value.numpy().astype(np.uint32)
        unboxed[name] = value
    return group(**unboxed)


def _packed(terms: Sequence[SoftmaxTerm], count: int) -> SoftmaxTerms:
    """Terms of N rows as the kernel takes them.

    A softmax at half the temperature of another is its square but for a factor per row, so the two
    become one term.
    """
    waiting = sorted(terms, key=attrgetter("width", "temperature"))
    parts: list[tuple[float, ...]] = []
    normalizers, factors = np.empty((2, len(terms), count), np.float32)
    squares = np.zeros((len(terms), 0), np.float32)
    biases: list[npt.NDArray[np.float32]] = []
    ids = [torch.empty((count, 0), dtype=torch.int64, device="cpu")]
    weights = [torch.empty((count, 0), device="cpu")]
    bounds, end = [0], 0
    while waiting:
        term = waiting.pop()
        half = waiting.pop() if waiting and _is_square(term, waiting[-1]) else None
        number, normalizer, scale = len(parts), term.log_normalizers, term.temperature
        standardize = normalizer.ndim == 2
        if standardize:
            normalizer, scale = normalizer[0], 1.0
        if half is not None:
            other = half.log_normalizers
            # A row that one term knows nothing of has an infinite normalizer there.
            normalizer = torch.where(normalizer == torch.inf, other / 2.0, normalizer)
            ratio = (2.0 * normalizer - other).exp().masked_fill(other == torch.inf, 0.0)
            squares = squares if squares.shape[1] else np.zeros_like(factors)
            squares[number] = (half.totals * ratio / -half.temperature).numpy()
        for one, divisor in ((term, scale), (half, scale / 2.0)):
            if one is not None:
                _check_columns(one.ids, one.width)
                ids.append(one.ids)
                weights.append(one.weights / divisor)
                end += one.ids.shape[1]
        bounds.append(end)
        normalizers[number] = normalizer.numpy()
        factors[number] = (term.totals / -scale).numpy()
        bias_of = -1 if term.columns is None else len(biases)
        if term.columns is not None:
            biases.append(_bias(term.columns))
        parts.append((term.width, term.temperature, _EPSILONS[standardize], bias_of))
    table = np.array(parts, np.float64).reshape(-1, 4)
    size = len(parts)
    return SoftmaxTerms(
        widths=table[:, 0].astype(np.int64),
        temperatures=table[:, 1].copy(),
        epsilons=table[:, 2].copy(),
        biases=np.stack(biases) if biases else np.empty((0, 0), np.float32),
        bias_of=table[:, 3].astype(np.int64),
        log_normalizers=normalizers[:size],
        factors=factors[:size],
        squares=squares[:size],
        bounds=np.array(bounds, np.int64),
        ids=torch.cat(ids, -1).numpy(),
        weights=torch.cat(weights, -1).to(torch.float32).numpy(),
    )


def _is_square(term: SoftmaxTerm, half: SoftmaxTerm) -> bool:
    """True if the squared probabilities of one are those of the other up to a factor."""
    return (
        not (term.standardize or half.standardize)
        and term.columns is None
        and half.columns is None
        and term.width == half.width
        and term.temperature == 2.0 * half.temperature
    )


def _check_columns(ids: Tensor, width: int) -> None:
    """Refuse what compiled loops, which check nothing, would write elsewhere."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < width:
        raise BatchError(
            f"ids go from {int(ids.min())} to {int(ids.max())}, but the logits have {width} "
            "columns; these are another tokenizer's ids, or they were changed since"
        )


def share(
    which: npt.NDArray[np.int64], columns: int, kernel: Callable[..., object], *args: Any
) -> None:
    """Call a function on parts of an array that together are all of it, at the same time.

    Args:
        which: Numbers of rows.
        columns: Entries that it reads of each.
        kernel: Takes some of them first; others may be worked on meanwhile.
        args: What it takes next.
    """
    if not len(which):
        return
    threads = torch.get_num_threads()
    if threads == 1 or len(which) * columns < _LEAST_SHARED:
        kernel(which, *args)
        return
    count = min(threads * _PARTS_PER_THREAD, len(which))
    # An iterator over a list hands out each element once, whichever threads ask.
    waiting = iter(np.array_split(which, count))
    futures = []
    for _ in range(min(threads, count) - 1):
        pool = _pool(os.getpid(), threads - 1)
        futures.append(pool.submit(_work_off, waiting, kernel, args))
    try:
        _work_off(waiting, kernel, args)
    finally:
        # None may go on writing when this returns.
        wait(futures)
    for future in futures:
        future.result()


def _work_off(waiting: Iterator[Any], kernel: Callable[..., object], args: Sequence[Any]) -> None:
    for part in waiting:
        kernel(part, *args)


@functools.cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    # A process that was forked has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="ctkd")
