"""What a loss may ask of a model's next-token distribution.

Losses never touch a (B, S, V) tensor themselves. They ask a `Logits` a few questions, and it
reads its rows a block at a time, so that nothing of that size is allocated besides the gradient.

Answers at positions that are not scored are zero and carry no gradient. Ties go to the lower id.
Statistics are float64 for float64 logits and float32 for every other dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ctkd.powers import Workspace

__all__ = ["Logits"]


class Logits(ABC):
    """The next-token distributions of one model at the positions of a `ctkd.Side`.

    Attributes:
        shape: (B, S, V).
        mask: (B, S) bool, True on scored positions.
    """

    shape: tuple[int, int, int]
    mask: Tensor

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of answers: float64 or float32."""

    @abstractmethod
    def masked(self, mask: Tensor) -> Logits:
        """Return the same distributions with another mask of scored positions."""

    @abstractmethod
    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardise: bool = False
    ) -> tuple[Tensor, ...]:
        r"""Log-probabilities of chosen entries, at several temperatures in one pass.

        .. math:: \log \mathrm{softmax}(x / \tau)_{id}

        Shape:
            ``ids`` (B, S, K), or (B, 1, K) for one set per sequence. Each answer is (B, S, K),
            in nats, differentiable.

        Args:
            ids: Columns to look up.
            temperatures: Each above 0; one answer for each.
            standardise: First divide each row by its standard deviation over the vocabulary
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
            BatchError: If k is above V.
        """

    @abstractmethod
    def column_mass(
        self,
        mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        standardise: bool = False,
        asked_next: Sequence[float] = (),
    ) -> Tensor:
        """Probability summed over the scored positions of each sequence, (B, V), no gradient.

        Args:
            mask: (B, S) bool, positions to sum over; default all scored ones.
            temperature: Divides the logits.
            standardise: As in `log_probs_at`.
            asked_next: Temperatures at which `log_probs_at` will be asked afterwards, so that one
                reading of the rows serves both. Changes no answer.
        """

    @abstractmethod
    def column_distance(
        self, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """L1 distance over positions of each column's probabilities to each target.

        Shape:
            ``targets`` (B, S, K); the answer is (B, K, V), no gradient.

        Args:
            targets: Values at every position to compare the columns with.
            mask: (B, S) bool, positions to sum over; default all scored ones.
            temperature: Divides the logits.
        """

    @abstractmethod
    def whole_rows(
        self,
        batch_index: Tensor,
        position: Tensor,
        *,
        temperature: float = 1.0,
        spread_tail: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Raw logits of chosen positions, up to a constant per row, (N, V), no gradient.

        Args:
            batch_index: (N,) int64, sequences.
            position: (N,) int64, positions in them.
            temperature: What the caller will divide them by; others may be answered wrongly.
            spread_tail: Where only the largest entries are known, share what is left evenly among
                the others, instead of refusing.
            workspace: Where the rows may be put; they may be gone when more is put there.
        """

    def log_probs(
        self, ids: Tensor, *, temperature: float = 1.0, standardise: bool = False
    ) -> Tensor:
        """Log-probabilities of chosen entries at one temperature; see `log_probs_at`."""
        return self.log_probs_at(ids, (temperature,), standardise=standardise)[0]

    def sorted_probs(self, k: int, *, temperature: float = 1.0) -> Tensor:
        """The k largest probabilities at each position, (B, S, k), descending, differentiable.

        Raises:
            BatchError: If k is above V.
        """
        probs = self.log_probs(self.top_ids(k), temperature=temperature).exp()
        return probs.masked_fill(~self.mask.unsqueeze(-1), 0.0)
