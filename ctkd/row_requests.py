"""What a question asks of the gradient of some rows, to be fulfilled by `ctkd.row_gradients`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ctkd.row_sources import FillArray, RowSource
from ctkd.rows import skips_padding

__all__ = ["AddGradient", "AddedRequest", "Places", "Request", "Softmax", "SoftmaxRequest"]

AddGradient = Callable[[slice, Tensor, Tensor], None]
"""Which rows (n of them), their raw logits (n, V), and the gradient (n, V) to add to."""


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Which position of a view stands in which row of the source.

    Args:
        rows: (N,) row of each position; B * L where a position is not scored.
        table: (B * L + 1,) position of each row, -1 where none.
        vocab_size: Columns that the view knows.
    """

    rows: Tensor
    table: Tensor
    vocab_size: int

    @classmethod
    def of(cls, rows: Tensor, scored: Tensor, num_rows: int, vocab_size: int) -> Places:
        """Make the table from the rows (N,) of all positions and which of them are scored."""
        rows = rows.masked_fill(~scored, num_rows)
        table = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=rows.device)
        table = table.scatter(0, rows, torch.arange(rows.shape[0], device=rows.device))
        table[num_rows] = -1
        return cls(rows, table, vocab_size)

    def at(self, rows: Tensor, values: Tensor) -> Tensor:
        """Put values of positions (N, ...) in the order of some rows, 0 where there is none."""
        if not values.shape[0]:
            return values.new_zeros((rows.shape[0], *values.shape[1:]))
        place = self.table[rows]
        if skips_padding(rows.device) and _are_all(place, values.shape[0]):
            return values
        missing = (place < 0).view(-1, *[1] * (values.ndim - 1))
        return values[place.clamp_min(0)].masked_fill_(missing, 0)


def _are_all(place: Tensor, count: int) -> bool:
    """Whether these are 0, 1 and so on up to a count."""
    return place.shape[0] == count and torch.equal(place, torch.arange(count, device=place.device))


@dataclass(frozen=True, slots=True)
class Softmax:
    """Which softmax of a row a request is about."""

    temperature: float
    standardise: bool
    vocab_size: int


class Request:
    """What is to be added to the gradient of some rows.

    Attributes:
        source: Where the rows come from.
        places: Of the view that was asked.
    """

    source: RowSource
    places: Places


class AddedRequest(Request, ABC):
    """A request that says itself what is added."""

    @property
    def buffer(self) -> Tensor | None:
        """The gradient as far as the forward pass knew it, see `RowSource.row_buffer`."""
        return None

    def filler(self, rows: Tensor) -> FillArray | None:
        """How compiled loops put this for some rows, before it is weighted; None if they cannot."""
        return None

    def known_weights(self, rows: Tensor) -> Tensor:
        """What multiplies the buffer, or what the filler puts, (R,) in the order of some rows."""
        raise NotImplementedError(f"{type(self).__name__} has neither a buffer nor a filler")

    @abstractmethod
    def adder(self, rows: Tensor, *, in_buffer: bool) -> AddGradient:
        """How to add this to blocks of these rows.

        Args:
            rows: (N,) all rows of a pass.
            in_buffer: What is added to is this request's own buffer, which it finishes.
        """


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxRequest(Request):
    r"""Gradient of ``sum_k w_k x_k / t - c log Z`` with respect to the raw logits of each row.

    x is standardised first where the softmax is.

    Args:
        source: Where the rows come from.
        places: Of the view that was asked.
        softmax: Which one.
        log_normalisers: (B * L + 1,) log Z of every row.
        total: (N,) c of every position.
        ids: (N, K).
        weights: (N, K).
    """

    source: RowSource
    places: Places
    softmax: Softmax
    log_normalisers: Tensor
    total: Tensor
    ids: Tensor
    weights: Tensor
