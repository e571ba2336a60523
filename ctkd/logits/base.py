"""The queries that a loss may make of a model's next-token distributions.

Losses never touch a (B, S, V) tensor themselves: they query a `Logits`, which reads its rows a
block at a time, so that nothing of that size is allocated besides the gradient.

Answers at positions that are not scored are zero and carry no gradient. Ties go to the lower id.
Statistics are float64 for float64 logits and float32 for every other dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ctkd.errors import BatchError
from ctkd.ops import Rows, Which, can_inspect

__all__ = [
    "Logits",
    "check_columns",
    "check_ids",
    "check_k",
    "check_rows",
    "checked_mask",
    "sharded",
]


class Logits(ABC):
    """The next-token distributions of one model at the positions of a `ctkd.Side`.

    Attributes:
        shape: (B, S, V).
        mask: (B, S) bool, True on scored positions.
        dtype: Of answers, float64 or float32.
        inputs: Tensors that answers are read from, which may not be overwritten before the
            backward pass.
    """

    shape: tuple[int, int, int]
    mask: Tensor
    dtype: torch.dtype
    inputs: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @abstractmethod
    def masked(self, mask: Tensor) -> Logits:
        """The same distributions with another mask of scored positions."""

    @abstractmethod
    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardize: bool = False
    ) -> tuple[Tensor, ...]:
        r"""Log-probabilities of chosen entries, at several temperatures in one pass.

        .. math:: \log \mathrm{softmax}(x / \tau)_{id}

        Shape:
            ``ids`` (B, S, K), or (B, 1, K) for one set per sequence. Each answer is (B, S, K),
            in nats, differentiable.

        Args:
            ids: Columns to look up.
            temperatures: Each above 0; one answer for each.
            standardize: First divide each row by its standard deviation over the vocabulary
                (unbiased) plus 1e-4.
        """

    @abstractmethod
    def log_mass(self, columns: Tensor, *, temperature: float = 1.0) -> Tensor:
        r"""Log of the probability that a set of columns holds together.

        .. math:: \log \sum_{c} \mathrm{softmax}(x / \tau)_c

        Shape:
            ``columns`` (V,) bool. The answer is (B, S), in nats, differentiable; -inf
            where no column of the set has any probability.

        Args:
            columns: True on the columns to add up.
            temperature: Divides the logits.
        """

    @abstractmethod
    def top_ids(self, k: int) -> Tensor:
        """Columns of the k largest entries at each position, (B, S, k), largest first.

        Raises:
            BatchError: If a row has fewer than k columns.
        """

    @abstractmethod
    def column_mass(
        self, *, temperature: float = 1.0, standardize: bool = False, prefetch: Sequence[float] = ()
    ) -> Tensor:
        """Probability summed over the scored positions of each sequence, (B, V), no gradient.

        Args:
            temperature: Divides the logits.
            standardize: As in `log_probs_at`.
            prefetch: Temperatures of a `log_probs_at` to come, so that one reading of the rows
                serves both. Changes no answer.
        """

    @abstractmethod
    def column_distance(self, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
        """L1 distance over scored positions of each column's probabilities to each target.

        Shape:
            ``targets`` (B, S, K); the answer is (B, K, V), no gradient.

        Args:
            targets: Values at every position to compare the columns with.
            temperature: Divides the logits.
        """

    @abstractmethod
    def chunks(
        self, index: Tensor, *, temperature: float = 1.0, spread_tail: bool = False
    ) -> Iterable[tuple[Which, Rows]]:
        """Whole rows of raw logits, up to a constant per row, no gradient.

        Args:
            index: (N,) int64, flattened positions b * S + i, scored or not; -1 for none. The
                answers say which of them a chunk holds.
            temperature: Temperature by which the caller divides the rows; they fit no other.
            spread_tail: Where only the largest entries are known, share the remaining probability
                evenly among the others, instead of raising.
        """

    def log_probs(
        self, ids: Tensor, *, temperature: float = 1.0, standardize: bool = False
    ) -> Tensor:
        """Log-probabilities of chosen entries at one temperature; see `log_probs_at`."""
        return self.log_probs_at(ids, (temperature,), standardize=standardize)[0]

    def sorted_probs(self, k: int, *, temperature: float = 1.0) -> Tensor:
        """The k largest probabilities at each position, (B, S, k), descending, differentiable.

        Raises:
            BatchError: If a row has fewer than k columns.
        """
        probs = self.log_probs(self.top_ids(k), temperature=temperature).exp()
        return probs.masked_fill(~self.mask.unsqueeze(-1), 0.0)


def sharded(name: str, way_out: str) -> BatchError:
    """The error for a DTensor, of which a device holds a part: rows are read where they lie."""
    return BatchError(
        f"{name} is a DTensor, of which this device holds a part (FSDP2, tensor parallelism); "
        f"{way_out}"
    )


def check_ids(ids: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse ids that are laid out neither per position nor per sequence."""
    if ids.ndim != 3 or ids.shape[0] != shape[0] or ids.shape[1] not in (1, shape[1]):
        raise BatchError(
            f"ids must be ({shape[0]}, {shape[1]}, K) or ({shape[0]}, 1, K), got {tuple(ids.shape)}"
        )


def check_k(k: int, shape: tuple[int, int, int]) -> None:
    """Refuse to look for more entries than a row has."""
    if not 0 <= k <= shape[2]:
        raise BatchError(
            f"the largest {k} entries of each row are asked for, but rows have {shape[2]} columns; "
            f"ask for min(k, {shape[2]}), at least 0"
        )


def check_columns(columns: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse a set of columns that is not laid out as a row."""
    if columns.shape != shape[2:] or columns.dtype != torch.bool:
        raise BatchError(
            f"columns must be a bool tensor of ({shape[2]},), one for each column of the "
            f"logits, got {columns.dtype} of {tuple(columns.shape)}"
        )


def check_rows(rows: Tensor, mask: Tensor, length: int) -> None:
    """Refuse scored positions whose row is not there, or is that of another one as well."""
    if not can_inspect(rows):
        return
    scored = rows[mask]
    if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < length:
        raise BatchError(
            f"rows must lie between 0 and {length - 1}, the rows of a sequence of logits, got "
            f"{int(scored.min())} to {int(scored.max())}"
        )
    ordered = rows.masked_fill(~mask, -1).sort(-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise BatchError(
            "rows name one row for two scored positions of a sequence; score one of them, or ask "
            "for several ids at one position"
        )


def checked_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """The mask, all True by default; one that does not fit the logits is refused."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.shape != shape:
        raise BatchError(
            f"mask must be (B, S) of the logits, {tuple(shape)}, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise BatchError(f"mask must be a bool tensor, got {mask.dtype}")
    if mask.device != device:
        raise BatchError(
            f"mask is on {mask.device}, the logits on {device}; move both to one device"
        )
    return mask
