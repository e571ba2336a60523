"""Arithmetic on blocks of rows of logits, for `ctkd.logits` and `ctkd.row_pairs`.

A block is (N, V), in the dtype of statistics. A trailing underscore writes to an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctkd.errors import BatchError

__all__ = [
    "add_rows_",
    "block_rows",
    "check_ids",
    "skips_padding",
    "softmax",
    "stable_top_ids",
    "statistics_dtype",
    "tempered",
    "untempered_gradient",
]

# Blocks stay in a CPU's cache; on a GPU they are large enough to fill it.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 25

# Only here may the number of scored rows be looked at: elsewhere that would wait for the device.
DEVICES_THAT_SKIP_PADDING = {"cpu"}

STANDARD_DEVIATION_EPSILON = 1e-4


def skips_padding(device: torch.device) -> bool:
    """Whether positions that are not scored may be left out, which looks at the mask."""
    return device.type in DEVICES_THAT_SKIP_PADDING


def stable_top_ids(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of each row, largest first, ties to the lower index.

    Shape:
        ``values`` (N, V); the answer is (N, k) int64.

    Example:
        >>> stable_top_ids(torch.tensor([[1.0, 3.0, 3.0]]), 2)
        tensor([[1, 2]])
    """
    if values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (values.float() + 0.0).view(torch.int32)
    # Read as integers, negative floats run backwards: flip all but their sign.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    width = values.shape[-1]
    tie_break = torch.arange(width - 1, -1, -1, device=values.device)
    return ((ordered << 32) | tie_break).topk(k, dim=-1).indices


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of so many columns to work on at a time."""
    elements = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ELSEWHERE)
    return max(1, elements // max(vocabulary, 1))


def add_rows_(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to the indexed row of the sums, in one order for all columns: ties stay ties."""
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        # On CUDA index_add_ is atomic, so in no order; this sorts first.
        sums.index_put_((index,), rows, accumulate=True)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-normaliser of each row, without touching the input."""
    largest = logits.amax(-1, keepdim=True)
    probs = (logits - largest).exp_()
    total = probs.sum(-1, keepdim=True)
    return probs.div_(total), (largest + total.log()).squeeze(-1)


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


def check_ids(ids: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse ids that are laid out neither per position nor per sequence."""
    if ids.ndim != 3 or ids.shape[0] != shape[0] or ids.shape[1] not in (1, shape[1]):
        raise BatchError(
            f"ids must be ({shape[0]}, {shape[1]}, K) or ({shape[0]}, 1, K), got {tuple(ids.shape)}"
        )
