"""What is kept of rows of logits: the largest, and what the others add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from ctkd.compiled_softmax import log_normalisers_of
from ctkd.errors import BatchError, SettingError
from ctkd.loss import check_positive
from ctkd.row_logits import RowLogits
from ctkd.rows import tempered
from ctkd.sorting import stable_top_ids

__all__ = ["TopK"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopK:
    """What is kept of rows of logits: the K largest, the label, and the mass of all the rest.

    Shape:
        The dimensions in front are those of the rows, (B, S) or (N,). ``ids`` (..., K) int64 and
        ``values`` (..., K), largest first; ``label_ids`` (...) int64, ``label_values`` (...),
        ``deviations`` (...); ``log_normalisers`` and ``log_rests`` (..., 2, M) for M temperatures,
        first of the plain and then of the standardised row.

    Args:
        ids: Columns of the largest logits.
        values: Those logits, raw.
        label_ids: The token that was observed.
        label_values: Its logit, also where it is not among the largest.
        deviations: Standard deviation of the row over the vocabulary, unbiased.
        log_normalisers: Log of the softmax denominator at each temperature.
        log_rests: Log of the probability of all columns that are neither kept nor the label.
        temperatures: For which of them normalisers are kept.
        vocab_size: Columns of the rows, V.
    """

    ids: Tensor
    values: Tensor
    label_ids: Tensor
    label_values: Tensor
    deviations: Tensor
    log_normalisers: Tensor
    log_rests: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int

    @property
    def k(self) -> int:
        """How many entries of each row are kept."""
        return self.ids.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        named = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> TopK:
        """The same temperatures and vocabulary with other rows."""
        return TopK(**tensors, temperatures=self.temperatures, vocab_size=self.vocab_size)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        logits: RowLogits,
        label_ids: Tensor,
        k: int,
        temperatures: Sequence[float] = (1.0, 2.0),
    ) -> TopK:
        """Keep the k largest entries of each scored row; rows that are not scored become zeros.

        Shape:
            ``logits`` of (B, S, V), ``label_ids`` (B, S) int64.

        Args:
            logits: The teacher's.
            label_ids: The token that each position predicts.
            k: Entries to keep, from 0 to V.
            temperatures: Those that losses will ask for, each above 0.

        Raises:
            SettingError: If k or a temperature is out of range, or there is no temperature.
            BatchError: If the labels do not fit the logits.

        Example:
            >>> from ctkd import DenseLogits
            >>> logits = DenseLogits(torch.tensor([[[0.5, 0.25, 0.25]]]).log())
            >>> kept = TopK.of(logits, torch.tensor([[1]]), 1, [1.0])
            >>> kept.ids, kept.label_values.exp(), kept.log_rests[..., 0, 0].exp()
            (tensor([[[0]]]), tensor([[0.2500]]), tensor([[0.2500]]))
        """
        vocabulary = logits.shape[2]
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= vocabulary:
            raise SettingError(
                f"k, the entries kept per position, must be a whole number from 0 to the "
                f"{vocabulary} columns of the logits, got {k!r}"
            )
        if not temperatures:
            raise SettingError("at least one temperature must be stored, such as 1.0; got none")
        for temperature in temperatures:
            check_positive("a temperature to store", temperature)
        front = logits.shape[:2]
        if label_ids.shape != front or label_ids.dtype != torch.int64:
            raise BatchError(
                f"label_ids must be (B, S) int64 with the (B, S) of the logits, {tuple(front)}, "
                f"got {tuple(label_ids.shape)}, {label_ids.dtype}"
            )
        zeros = partial(torch.zeros, dtype=logits.dtype, device=logits.device)
        kept = cls(
            ids=label_ids.new_zeros((*front, k)),
            values=zeros(*front, k),
            label_ids=label_ids.masked_fill(~logits.mask, 0),
            label_values=zeros(*front),
            deviations=zeros(*front),
            log_normalisers=zeros(*front, 2, len(temperatures)),
            log_rests=zeros(*front, 2, len(temperatures)),
            temperatures=tuple(float(temperature) for temperature in temperatures),
            vocab_size=vocabulary,
        )
        for position, block in logits.blocks():
            place = (position // front[1], position % front[1])
            ids = stable_top_ids(block, k)
            label = kept.label_ids[place].unsqueeze(-1)
            kept.ids[place] = ids
            kept.values[place] = block.gather(1, ids)
            kept.label_values[place] = block.gather(1, label).squeeze(-1)
            kept.deviations[place] = block.std(-1)
            for scale, standardise in enumerate((False, True)):
                row = tempered(block, 1.0, standardise)
                rest = row.scatter(1, ids, -torch.inf).scatter_(1, label, -torch.inf)
                for index, temperature in enumerate(kept.temperatures):
                    # One by one, as a live teacher is asked: in ties rounding would decide.
                    normaliser = log_normalisers_of(block, temperature, standardise)
                    where = (*place, scale, index)
                    kept.log_normalisers[where] = normaliser
                    kept.log_rests[where] = (rest / temperature).logsumexp(-1) - normaliser
        return kept
