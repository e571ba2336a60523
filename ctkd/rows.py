"""Arithmetic on blocks of rows of logits, for `ctkd.logits` and `ctkd.row_pairs`.

A block is (N, V), in the dtype of statistics. A trailing underscore writes to an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ctkd.block_sizes import block_elements, least_rows
from ctkd.errors import BatchError
from ctkd.powers import Workspace

__all__ = [
    "add_at_columns_",
    "add_rows_",
    "block_rows",
    "check_ids",
    "check_k",
    "head_block_rows",
    "log_normalisers",
    "place_of_rows",
    "skips_padding",
    "softmax_statistics",
    "statistics_dtype",
    "tempered",
    "untempered_gradient",
]

# Logits to work on at a time by type of device, where it is not `block_elements`.
BLOCK_ELEMENTS: dict[str, int] = {}

# What a head computes at a time: enough rows for its product to be worthwhile.
HEAD_BLOCK_ELEMENTS = {"cpu": 1 << 24}

# Only here may the number of scored rows be looked at: elsewhere that would wait for the device.
DEVICES_THAT_SKIP_PADDING = {"cpu"}

STANDARD_DEVIATION_EPSILON = 1e-4

LOG2_E = 1.0 / math.log(2.0)


def skips_padding(device: torch.device) -> bool:
    """Whether positions that are not scored may be left out, which looks at the mask."""
    return device.type in DEVICES_THAT_SKIP_PADDING


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of so many columns to work on at a time."""
    if device.type in BLOCK_ELEMENTS:
        return max(1, BLOCK_ELEMENTS[device.type] // max(vocabulary, 1))
    return max(least_rows(device), block_elements(device) // max(vocabulary, 1))


def head_block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of so many columns that a head computes at a time."""
    elements = HEAD_BLOCK_ELEMENTS.get(device.type) or block_elements(device)
    return max(1, elements // max(vocabulary, 1))


def place_of_rows(rows: Tensor) -> slice | Tensor:
    """Rows to index with: as a slice where they follow each other and may be looked at."""
    if not skips_padding(rows.device) or not rows.shape[0]:
        return rows
    found = rows.tolist()
    run = range(found[0], found[0] + len(found))
    return slice(run.start, run.stop) if found == list(run) else rows


def add_rows_(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to the indexed row of the sums, in one order for all columns: ties stay ties."""
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        # On CUDA index_add_ is atomic, so in no order; this sorts first.
        sums.index_put_((index,), rows, accumulate=True)


def add_at_columns_(sums: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add (B, S, K) values to columns of (B, V) sums, always in one order: ties stay ties."""
    ids, values = ids.flatten(1), values.flatten(1)
    if sums.device.type == "cpu":
        sums.scatter_add_(1, ids, values)
    else:
        # On CUDA scatter_add_ is atomic, so in no order; this sorts first.
        batch_index = torch.arange(sums.shape[0], device=sums.device).unsqueeze(1).expand_as(ids)
        sums.index_put_((batch_index, ids), values, accumulate=True)


def softmax_statistics(
    block: Tensor, temperatures: Sequence[float], standardise: bool, workspace: Workspace
) -> tuple[list[Tensor], Tensor]:
    """Log-normalisers (n,) at all temperatures, and probabilities (n, V) at the first.

    The probabilities lie in the workspace, as ``"weights"``.
    """
    first, *others = temperatures
    found, weights = _exponentials(block, [*others, first], standardise, workspace)
    total, normaliser = found.pop()
    return [normaliser, *(one for _, one in found)], weights.div_(total)


def log_normalisers(
    block: Tensor, temperatures: Sequence[float], standardise: bool, workspace: Workspace
) -> list[Tensor]:
    """Log of the softmax denominator of each row, (n,) at each temperature."""
    # Falling, so that one half as large comes next.
    order = sorted(temperatures, reverse=True)
    found, _ = _exponentials(block, order, standardise, workspace)
    answers = {one: normaliser for one, (_, normaliser) in zip(order, found, strict=True)}
    return [answers[one] for one in temperatures]


def _exponentials(
    block: Tensor, temperatures: Sequence[float], standardise: bool, workspace: Workspace
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Sums (n, 1) and log-normalisers (n,) one by one, and what was summed up last, (n, V)."""
    row = tempered(block, 1.0, True) if standardise else block
    largest = row.amax(-1, keepdim=True)
    found, weights, before = [], workspace.rows("weights", row, row.shape[1]), 0.0
    for temperature in temperatures:
        if before == 2.0 * temperature:
            weights.square_()
        else:
            # exp2 takes half the time of exp.
            factor = LOG2_E / temperature
            torch.add(largest * -factor, row, alpha=factor, out=weights).exp2_()
        total = weights.sum(-1, keepdim=True)
        found.append((total, (largest / temperature + total.log()).squeeze(-1)))
        before = temperature
    return found, weights


def tempered(block: Tensor, temperature: float, standardise: bool) -> Tensor:
    """Logits divided by the temperature, and before that by their own deviation if asked."""
    if standardise:
        deviation = block.std(-1, keepdim=True)
        return block / ((deviation + STANDARD_DEVIATION_EPSILON) * temperature)
    return block if temperature == 1.0 else block / temperature


def untempered_gradient(
    block: Tensor, gradient: Tensor, temperature: float, standardise: bool
) -> Tensor:
    """Carry a gradient from the scaled logits back to the raw ones."""
    if not standardise:
        return gradient if temperature == 1.0 else gradient.div_(temperature)
    deviation, mean = torch.std_mean(block, -1, keepdim=True)
    divisor = deviation + STANDARD_DEVIATION_EPSILON
    spread = (block - mean) / (deviation * (block.shape[-1] - 1))
    # A constant row has no direction in which its deviation grows.
    spread = spread.masked_fill(deviation == 0, 0.0)
    along = (gradient * block).sum(-1, keepdim=True) / divisor.square()
    return (gradient / divisor - spread * along).div_(temperature)


def check_k(k: int, width: int) -> None:
    """Refuse to look for more entries of a row than it has."""
    if not 0 <= k <= width:
        raise BatchError(
            f"the largest {k} entries of each row are asked for, but rows have {width} columns; "
            f"ask for min(k, {width}), at least 0"
        )


def check_ids(ids: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse ids that are laid out neither per position nor per sequence."""
    if ids.ndim != 3 or ids.shape[0] != shape[0] or ids.shape[1] not in (1, shape[1]):
        raise BatchError(
            f"ids must be ({shape[0]}, {shape[1]}, K) or ({shape[0]}, 1, K), got {tuple(ids.shape)}"
        )
