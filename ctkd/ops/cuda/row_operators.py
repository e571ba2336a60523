"""Operators of torch that start the kernels of this package, with what they make and cost.

They are registered whether triton is there or not: tensors without values are given what an
operator would make. It is chosen elsewhere what goes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.cuda.operators import kernels, operator, place_of, power_of_two, row_bytes

__all__ = [
    "chosen_entries",
    "clear_rows",
    "mass_of_columns",
    "pack_scored",
    "row_gradients",
    "row_statistics",
    "row_top",
]

# Lanes of a tile that are read at once, and warps of a program.
_LANES = 1024
_WARPS = 4
# A program that turns gradients through a deviation holds more than four warps have registers for.
_MOST_WARPS = 8


def _operator(
    cost: Callable[..., Cost], answers: Callable[..., Any], *, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Register an operator with its cost and the tensors it makes, and stand in its place."""

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        operator(name, answers, mutates=mutates)(function)
        DECLARED[name] = cost
        return getattr(torch.ops.ctkd, name)

    return register


def _nothing(*_: Any) -> None:
    """What an operator makes that only writes."""


def _count(tensor: Tensor, index: Tensor | None) -> int:
    return tensor.shape[0] if index is None else index.shape[0]


def _row_stride(tensor: Tensor) -> int | None:
    """Entries from each row to the next, if all are as far apart."""
    if (
        tensor.ndim == 3
        and tensor.shape[0] > 1
        and tensor.stride(0) != (tensor.shape[1] * tensor.stride(1))
    ):
        return None
    return tensor.stride(-2)


def _statistics_cost(
    tensor: Tensor,
    index: Tensor | None,
    width: int,
    temperatures: Sequence[float],
    standardize: bool,
    columns: Tensor | None,
    deviations: bool,
) -> Cost:
    rows = _count(tensor, index)
    moments = standardize or deviations
    reads = moments + bool(temperatures)
    written = 4 * rows * (len(temperatures) + deviations)
    return Cost(1, reads * row_bytes(tensor, index, width) + written, 0)


def _statistics(
    tensor: Tensor, index: Tensor | None, width: int, temperatures: Sequence[float], *rest: Any
) -> tuple[Tensor, Tensor]:
    count = _count(tensor, index)
    deviations = rest[-1]
    return (
        tensor.new_empty((len(temperatures), count), dtype=torch.float32),
        tensor.new_empty(count if deviations else 0, dtype=torch.float32),
    )


@_operator(_statistics_cost, _statistics)
def row_statistics(
    tensor: Tensor,
    index: Tensor | None,
    width: int,
    temperatures: Sequence[float],
    standardize: bool,
    columns: Tensor | None,
    deviations: bool,
) -> tuple[Tensor, Tensor]:
    """Log-normalizers (T, N) and, if wanted, standard deviations (N,)."""
    count = _count(tensor, index)
    normalizers, answers = _statistics(tensor, index, width, temperatures, deviations)
    if count:
        place = place_of(tensor, index)
        kernels("row_kernels").statistics[(count,)](
            *place,
            tensor if columns is None else columns,
            normalizers,
            answers,
            tuple(1.0 / one for one in temperatures),
            count,
            width,
            INDEXED=index is not None,
            ALIGNED=place.is_aligned,
            T=len(temperatures),
            STANDARDIZE=standardize,
            MASKED=columns is not None,
            DEVIATIONS=deviations,
            R=2 if standardize or deviations else 4,
            C=_LANES,
            num_warps=_WARPS,
        )
    return normalizers, answers


def _mass_cost(
    tensor: Tensor,
    index: Tensor | None,
    width: int,
    sequence: Tensor,
    sequences: int,
    normalizers: Tensor,
    deviations: Tensor | None,
    temperature: float,
) -> Cost:
    tiles = -(-width // _LANES)
    per_row = 4 * (4 if deviations is None else 5) * tiles * _count(tensor, index)
    return Cost(1, row_bytes(tensor, index, width) + per_row + 4 * sequences * width, 0)


def _mass(
    tensor: Tensor, index: Tensor | None, width: int, sequence: Tensor, sequences: int, *_: Any
) -> Tensor:
    return tensor.new_empty((sequences, width), dtype=torch.float32)


@_operator(_mass_cost, _mass)
def mass_of_columns(
    tensor: Tensor,
    index: Tensor | None,
    width: int,
    sequence: Tensor,
    sequences: int,
    normalizers: Tensor,
    deviations: Tensor | None,
    temperature: float,
) -> Tensor:
    """Probabilities summed over the rows of each sequence, (B, V)."""
    mass = _mass(tensor, index, width, sequence, sequences)
    if sequences:
        place = place_of(tensor, index)
        kernels("row_kernels").mass_of_columns[(-(-width // _LANES), sequences)](
            *place,
            sequence,
            normalizers,
            normalizers if deviations is None else deviations,
            mass,
            1.0 / temperature,
            _count(tensor, index),
            width,
            INDEXED=index is not None,
            ALIGNED=place.is_aligned,
            STANDARDIZE=deviations is not None,
            C=_LANES,
            num_warps=_WARPS,
        )
    return mass


def _top_cost(tensor: Tensor, index: Tensor | None, width: int, k: int) -> Cost:
    rows = _count(tensor, index)
    cleared = 0 if index is None else 2
    written = rows * (1 + (cleared > 0)) * 12 * k
    return Cost(1 + cleared, row_bytes(tensor, index, width) + written, 0)


def _top(tensor: Tensor, index: Tensor | None, width: int, k: int) -> tuple[Tensor, Tensor]:
    count = _count(tensor, index)
    # Where there is no row, zeros are expected.
    make = tensor.new_empty if index is None else tensor.new_zeros
    return make((count, k), dtype=torch.int64), make((count, k), dtype=torch.float32)


@_operator(_top_cost, _top)
def row_top(tensor: Tensor, index: Tensor | None, width: int, k: int) -> tuple[Tensor, Tensor]:
    """Columns and values of the largest entries, (N, k)."""
    count = _count(tensor, index)
    ids, values = _top(tensor, index, width, k)
    if count and k:
        place = place_of(tensor, index)
        size = power_of_two(max(k, 2))
        kernels("row_kernels").largest[(count,)](
            *place,
            ids,
            values,
            width,
            k,
            INDEXED=index is not None,
            ALIGNED=place.is_aligned,
            K=size,
            C=max(_LANES, size),
            num_warps=_WARPS,
        )
    return ids, values


def _gradients_cost(
    tensor: Tensor,
    index: Tensor | None,
    out: Tensor,
    out_index: Tensor | None,
    out_width: int,
    known: Tensor | None,
    known_index: Tensor | None,
    known_width: int,
    known_weights: Tensor | None,
    temperatures: Sequence[float],
    standardize: Sequence[bool],
    widths: Sequence[int],
    columns: Sequence[Tensor],
    masked: Sequence[bool],
    normalizers: Sequence[Tensor],
    totals: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Cost:
    moved = row_bytes(tensor, index, out_width) + row_bytes(out, out_index, out_width)
    # For the moments, and for what changes along the row.
    moved += 2 * any(standardize) * row_bytes(tensor, index, out_width)
    if known is not None:
        moved += row_bytes(known, known_index, known_width)
    # Ids and weights are read to find equal ids, and once more where one is written.
    moved += 2 * sum(one.nbytes for one in (*ids, *weights)) + sum(map(_nbytes, columns))
    return Cost(1, moved + sum(one.nbytes for one in (*normalizers, *totals)), 0)


def _nbytes(tensor: Tensor) -> int:
    return tensor.nbytes


@_operator(_gradients_cost, _nothing, mutates=("out",))
def row_gradients(
    tensor: Tensor,
    index: Tensor | None,
    out: Tensor,
    out_index: Tensor | None,
    out_width: int,
    known: Tensor | None,
    known_index: Tensor | None,
    known_width: int,
    known_weights: Tensor | None,
    temperatures: Sequence[float],
    standardize: Sequence[bool],
    widths: Sequence[int],
    columns: Sequence[Tensor],
    masked: Sequence[bool],
    normalizers: Sequence[Tensor],
    totals: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> None:
    """Write the gradient of rows, see `ctkd.ops.reference.softmax_backward`."""
    count = _count(tensor, index)
    if not count:
        return
    place = place_of(tensor, index)
    out_place = place_of(out, out_index)
    known_place = out_place if known is None else place_of(known, known_index)
    aligned = place.is_aligned and out_place.is_aligned and known_place.is_aligned
    # Rows of one number begin equally far behind an aligned entry in both tensors.
    stride = _row_stride(tensor)
    same = (
        stride is not None and stride == _row_stride(out) and (index is None) == (out_index is None)
    )
    of_masks = iter(columns)
    sizes = [one.shape[1] for one in ids]
    wide = [width for width, one in zip(widths, standardize, strict=True) if one]
    kernels("row_kernels").gradient_rows[(count,)](
        *place,
        *out_place,
        *known_place,
        tensor if known_weights is None else known_weights,
        tuple(normalizers),
        tuple(totals),
        tuple(1.0 / one for one in temperatures),
        tuple(widths),
        tuple(next(of_masks) if one else tensor for one in masked),
        tuple(ids),
        tuple(weights),
        tuple(sizes),
        wide[0] if wide else 0,
        out_width,
        known_width,
        INDEXED=index is not None,
        OUT_INDEXED=out_index is not None,
        KNOWN_INDEXED=known_index is not None,
        ALIGNED=aligned,
        CONGRUENT=aligned or same,
        KNOWN=known is not None,
        T=len(temperatures),
        SIZES=tuple(power_of_two(one) if one else 0 for one in sizes),
        STANDARDIZE=tuple(map(bool, standardize)),
        ANY_STANDARDIZED=any(standardize),
        MASKED=tuple(map(bool, masked)),
        C=2 * _LANES,
        num_warps=_MOST_WARPS if any(standardize) else _WARPS,
    )


def _clear_cost(tensor: Tensor, index: Tensor) -> Cost:
    # A row is written here or where its gradient is, whatever the index holds.
    rest = max(tensor.shape[0] - index.shape[0], 0)
    return Cost(3, 2 * tensor.shape[0] + index.nbytes + rest * tensor[0].nbytes, tensor.shape[0])


@_operator(_clear_cost, _nothing, mutates=("tensor",))
def clear_rows(tensor: Tensor, index: Tensor) -> None:
    """Write zeros to the rows of a tensor that an index does not name; -1 is the last one."""
    rows, width = tensor.shape
    named = torch.zeros(rows, dtype=torch.uint8, device=tensor.device)
    named[index] = 1
    size = 4 * _LANES
    kernels("row_kernels").clear_rows[(-(-width // size), rows)](
        tensor, named, tensor.stride(0), width, C=size, num_warps=_WARPS
    )


def _chosen_cost(
    tensor: Tensor,
    index: Tensor,
    ids: Tensor,
    positions: int,
    normalizers: Tensor,
    temperatures: Sequence[float],
    deviations: Tensor | None,
) -> Cost:
    entries = index.shape[0] * ids.shape[2]
    answers = 4 * len(temperatures) * entries
    moved = index.nbytes + ids.nbytes + normalizers.nbytes + entries * tensor.element_size()
    return Cost(1, moved + answers + (0 if deviations is None else deviations.nbytes), 0)


def _chosen(
    tensor: Tensor,
    index: Tensor,
    ids: Tensor,
    positions: int,
    normalizers: Tensor,
    temperatures: Sequence[float],
    deviations: Tensor | None,
) -> list[Tensor]:
    size = ids.shape[0], positions, ids.shape[2]
    return [tensor.new_empty(size, dtype=torch.float32) for _ in temperatures]


@_operator(_chosen_cost, _chosen)
def chosen_entries(
    tensor: Tensor,
    index: Tensor,
    ids: Tensor,
    positions: int,
    normalizers: Tensor,
    temperatures: Sequence[float],
    deviations: Tensor | None,
) -> list[Tensor]:
    """Log-probabilities (B, S, K) of ids (B, S or 1, K), 0 where there is no row."""
    count, k = index.shape[0], ids.shape[2]
    answers = _chosen(tensor, index, ids, positions, normalizers, temperatures, deviations)
    if answers[0].numel():
        place = place_of(tensor, index)
        kernels("row_kernels").chosen_entries[(-(-count * k // _LANES),)](
            *place,
            ids.contiguous(),
            normalizers,
            normalizers if deviations is None else deviations,
            tuple(1.0 / one for one in temperatures),
            tuple(answers),
            count,
            positions,
            k,
            ids.shape[1] * k,
            0 if ids.shape[1] == 1 else k,
            T=len(temperatures),
            STANDARDIZE=deviations is not None,
            C=_LANES,
            num_warps=_WARPS,
        )
    return answers


def _pack_cost(
    targets: Tensor, chunk_ids: Tensor | None, size: int, length: int, ignored: int
) -> Cost:
    read = 2 * targets.nbytes + (0 if chunk_ids is None else chunk_ids.nbytes)
    return Cost(1, read + targets.shape[0] * size * (33 + 8 * (chunk_ids is not None)), 0)


def _packed(
    targets: Tensor, chunk_ids: Tensor | None, size: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = targets.shape[0], size
    return (
        targets.new_empty(shape),
        targets.new_empty(shape, dtype=torch.bool),
        targets.new_empty(shape),
        targets.new_empty(shape if chunk_ids is not None else (0, 0)),
        targets.new_empty(targets.shape[0] * size),
        targets.new_empty(targets.shape[0] * size),
    )


@_operator(_pack_cost, _packed)
def pack_scored(
    targets: Tensor, chunk_ids: Tensor | None, size: int, length: int, ignored: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, mask, ids, chunk numbers and flattened rows of scored positions, each (B, S)."""
    answers = _packed(targets, chunk_ids, size)
    rows, mask, ids, chunks, index, all_rows = answers
    if rows.numel():
        other = targets if chunk_ids is None else chunk_ids
        kernels("row_kernels").pack_scored[(targets.shape[0],)](
            targets, other, rows, mask, ids, chunks, index, all_rows,
            *targets.stride(), *other.stride(), targets.shape[1], size, length, ignored,
            CHUNKS=chunk_ids is not None, C=_LANES, num_warps=_WARPS,
        )  # fmt: skip
    return answers
