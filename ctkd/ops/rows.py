"""Arguments and results of operations: rows of a tensor, gradient terms, functions of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ctkd.ops import choice
from ctkd.ops.blocks import block_rows

__all__ = [
    "Packed",
    "RowLoss",
    "RowValues",
    "Rows",
    "SoftmaxTerm",
    "Which",
    "can_inspect",
    "is_whole",
    "statistics_dtype",
]

STANDARD_DEVIATION_EPSILON = 1e-4
"""Added to the deviation that a row is divided by."""

Which: TypeAlias = slice | Tensor
"""A selection of N rows: a slice, or their numbers (n,) int64."""


def is_whole(which: Which) -> bool:
    """True if all rows are selected as they are."""
    return isinstance(which, slice) and which == slice(None)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics of rows of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def can_inspect(tensor: Tensor) -> bool:
    """True if values may be read: elsewhere that would wait for a device, or break a graph."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return choice.chosen != "cuda"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N rows of V columns, which lie anywhere in a tensor.

    A tensor that is written to by index has one row more than can be named: it takes what is
    written for -1.

    Args:
        tensor: (R, V') or (B, L, V'), of which row b * L + i is ``tensor[b, i]``; any strides.
        index: (N,) int64, -1 for no row; None for all R rows of a (R, V') tensor.
        width: V, the columns that count; they come first.
    """

    tensor: Tensor
    index: Tensor | None
    width: int

    def __len__(self) -> int:
        return self.tensor.shape[0] if self.index is None else self.index.shape[0]

    def __getitem__(self, which: Which) -> Rows:
        """A selection of the rows."""
        if self.index is not None:
            return Rows(self.tensor, self.index[which], self.width)
        if isinstance(which, slice):
            return Rows(self.tensor[which], None, self.width)
        return Rows(self.tensor, which, self.width)

    def zeros(self, *size: int) -> Tensor:
        """Zeros on the device of the rows, in the dtype of statistics."""
        dtype = statistics_dtype(self.tensor.dtype)
        return torch.zeros(size, dtype=dtype, device=self.tensor.device)

    def read(self, which: Which = slice(None)) -> Tensor:
        """Selected rows in the dtype of statistics, (n, V), not to be written to."""
        tensor, index = self.tensor, self.index
        if index is None:
            block = tensor[which]
        elif tensor.shape[:-1].numel() == 0:
            block = tensor.new_zeros(index[which].shape[0], tensor.shape[-1])
        elif tensor.ndim == 2:
            block = tensor[index[which].clamp_min(0)]
        else:
            index, length = index[which].clamp_min(0), tensor.shape[1]
            block = tensor[index // length, index % length]
        return block[:, : self.width].to(statistics_dtype(tensor.dtype))

    def write(self, which: Which, block: Tensor) -> None:
        """Replace selected rows of a (R, V') tensor by a block (n, V), rounded to its dtype."""
        target = which if self.index is None else self.index[which]
        self.tensor[target, : self.width] = block.to(self.tensor.dtype)

    def blocks(self, columns: int = 0) -> Iterator[tuple[Which, Tensor]]:
        """Selections of rows and the rows themselves (n, V), not to be written to, by blocks.

        Entries of -1 are left out where that does not wait for a device, else undefined.

        Args:
            columns: The widest row that is worked on beside these, for the size of a block.
        """
        numbers: Tensor | None = None
        count = self.tensor.shape[0]
        if self.index is not None:
            count = self.index.shape[0]
            if can_inspect(self.index) and bool((self.index < 0).any()):
                numbers = (self.index >= 0).nonzero().squeeze(-1)
                count = numbers.shape[0]
        size = block_rows(max(self.width, columns), self.tensor.device)
        for start in range(0, count, size):
            which: Which = slice(start, min(start + size, count))
            if numbers is not None:
                which = numbers[which]
            yield which, self.read(which)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftmaxTerm:
    r"""A part of the gradient of N rows x.

    .. math:: \frac{\partial}{\partial x} \left( \sum_k w_k \frac{x_{id_k}}{\tau} - c \log Z
        \right), \quad Z = \sum_v e^{x_v / \tau}

    Args:
        temperature: tau.
        width: Columns that count.
        columns: (V,) bool, those that Z sums over; None for all.
        log_normalizers: (N,) log Z; (E, N) of rows that are divided by their deviation first, as
            `log_normalizers` gave them.
        totals: (N,) c.
        ids: (N, K) int64.
        weights: (N, K) w.
    """

    temperature: float
    width: int
    columns: Tensor | None
    log_normalizers: Tensor
    totals: Tensor
    ids: Tensor
    weights: Tensor

    @property
    def standardize(self) -> bool:
        return self.log_normalizers.ndim == 2


@dataclass(frozen=True, slots=True, eq=False)
class RowLoss:
    """A function of whole rows of both sides.

    Args:
        name: Of the kernel that computes the same, where a backend has one.
        function: Takes raw logits (n, V) and (n, W), and (n, E) where there are numbers per row;
            returns (n,) or (n, P). Differentiable with respect to the first and the third.
        parts: P, the parts of each value.
        settings: Settings of the kernel.
    """

    name: str
    function: Callable[..., Tensor]
    parts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


class Packed(NamedTuple):
    """Scored positions of sequences, first in each and in their order, (B, S).

    Attributes:
        rows: Where each lies in its sequence.
        mask: True where one is scored; the others come behind.
        ids: Their targets, 0 where not scored.
        chunk_ids: Their chunks, -1 where not scored.
        scored_rows: Rows of the flattened logits, (B * S,), -1 where not scored.
        all_rows: The same of all positions.
    """

    rows: Tensor
    mask: Tensor
    ids: Tensor
    chunk_ids: Tensor | None
    scored_rows: Tensor
    all_rows: Tensor


class RowValues(NamedTuple):
    """Values of N rows.

    Attributes:
        values: (N, P), 0 where a side has no row.
        per_row_gradient: (N, E) gradient of their sum, where it was requested.
    """

    values: Tensor
    per_row_gradient: Tensor | None
