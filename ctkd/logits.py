"""What a loss may ask of a model's next-token distribution.

Losses never touch a (B, S, V) tensor themselves. They ask a `Logits` a few questions, and it
reads its rows a block at a time, so that nothing of that size is allocated besides the gradient.

Answers at positions that are not scored are zero and carry no gradient. Ties go to the lower id.
Statistics are float64 for float64 logits and float32 for every other dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.errors import BatchError
from ctkd.log_mass import log_mass
from ctkd.rows import (
    add_rows_,
    block_rows,
    check_ids,
    skips_padding,
    softmax,
    stable_top_ids,
    statistics_dtype,
    tempered,
    untempered_gradient,
)

__all__ = ["DenseLogits", "Logits"]


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
        """Columns of the k largest entries at each position, (B, S, k), largest first."""

    @abstractmethod
    def column_mass(
        self, mask: Tensor | None = None, *, temperature: float = 1.0, standardise: bool = False
    ) -> Tensor:
        """Probability summed over the scored positions of each sequence, (B, V), no gradient.

        Args:
            mask: (B, S) bool, positions to sum over; default all scored ones.
            temperature: Divides the logits.
            standardise: As in `log_probs_at`.
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
    ) -> Tensor:
        """Raw logits of chosen positions, up to a constant per row, (N, V), no gradient.

        Args:
            batch_index: (N,) int64, sequences.
            position: (N,) int64, positions in them.
            temperature: What the caller will divide them by; others may be answered wrongly.
            spread_tail: Where only the largest entries are known, share what is left evenly among
                the others, instead of refusing.
        """

    def log_probs(
        self, ids: Tensor, *, temperature: float = 1.0, standardise: bool = False
    ) -> Tensor:
        """Log-probabilities of chosen entries at one temperature; see `log_probs_at`."""
        return self.log_probs_at(ids, (temperature,), standardise=standardise)[0]

    def sorted_probs(self, k: int, *, temperature: float = 1.0) -> Tensor:
        """The k largest probabilities at each position, (B, S, k), descending, differentiable."""
        probs = self.log_probs(self.top_ids(k), temperature=temperature).exp()
        return probs.masked_fill(~self.mask.unsqueeze(-1), 0.0)


class DenseLogits(Logits):
    """Logits that exist as a tensor.

    Args:
        tensor: (B, L, V') raw logits, any floating dtype.
        mask: (B, S) bool, scored positions; default all of them.
        rows: (B, S) int64, the row of ``tensor`` that holds each position; default its own index.
        vocab_size: Columns to keep, V; default all of them.

    Raises:
        BatchError: If the shapes do not fit, the dtype is not floating, or ``vocab_size`` exceeds
            the columns there are.

    Example:
        >>> logits = DenseLogits(torch.tensor([[[0.0, 0.0, 9.0]]]), vocab_size=2)
        >>> logits.log_probs(torch.tensor([[[1]]])).exp()
        tensor([[[0.5000]]])
    """

    def __init__(
        self,
        tensor: Tensor,
        *,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if tensor.ndim != 3:
            raise BatchError(f"logits must be (B, S, V), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise BatchError(f"logits must be floating point, got {tensor.dtype}")
        width = tensor.shape[-1]
        if vocab_size is not None and not 1 <= vocab_size <= width:
            raise BatchError(
                f"the tokenizer has {vocab_size} tokens, but the logits only {width} columns; "
                "these logits belong to another tokenizer"
            )
        expected = tensor.shape[:2] if rows is None else rows.shape
        if mask is None:
            mask = torch.ones(expected, dtype=torch.bool, device=tensor.device)
        if mask.shape != expected:
            raise BatchError(
                f"mask must be (B, S) of the logits, {tuple(expected)}, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            raise BatchError(f"mask must be a bool tensor, got {mask.dtype}")
        if mask.device != tensor.device:
            raise BatchError(
                f"mask is on {mask.device}, the logits on {tensor.device}; move both to one device"
            )
        self.tensor = tensor
        self.mask = mask
        self.rows = rows
        self.shape = (mask.shape[0], mask.shape[1], vocab_size or width)
        self._log_normalisers: dict[tuple[float, bool, int], Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.tensor.dtype)

    def masked(self, mask: Tensor) -> DenseLogits:
        if mask is self.mask:
            return self
        return DenseLogits(self.tensor, mask=mask, rows=self.rows, vocab_size=self.shape[2])

    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardise: bool = False
    ) -> tuple[Tensor, ...]:
        check_ids(ids, self.shape)
        answers = _LogProbs.apply(  # type: ignore[no-untyped-call]
            self, ids, tuple(temperatures), standardise, self.tensor
        )
        return tuple(answers)

    def log_mass(self, columns: Tensor, *, temperature: float = 1.0) -> Tensor:
        return log_mass(self, columns, temperature)

    @torch.no_grad()
    def top_ids(self, k: int) -> Tensor:
        result = self.mask.new_zeros((*self.shape[:2], k), dtype=torch.int64)
        for batch_index, position, block in self._blocks():
            result[batch_index, position] = stable_top_ids(block, k)
        return result.masked_fill_(~self.mask.unsqueeze(-1), 0)

    @torch.no_grad()
    def column_mass(
        self, mask: Tensor | None = None, *, temperature: float = 1.0, standardise: bool = False
    ) -> Tensor:
        batch_size, _, vocabulary = self.shape
        mass = self.tensor.new_zeros((batch_size, vocabulary), dtype=self.dtype)
        selected = self.mask if mask is None else mask & self.mask
        key, log_normaliser = self._memo(temperature, standardise)
        for batch_index, position, block in self._blocks():
            probs, block_normaliser = softmax(tempered(block, temperature, standardise))
            log_normaliser[batch_index, position] = block_normaliser
            probs.masked_fill_(~selected[batch_index, position].unsqueeze(-1), 0.0)
            add_rows_(mass, batch_index, probs)
        self._remember(key, log_normaliser)
        return mass

    @torch.no_grad()
    def column_distance(
        self, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        batch_size, _, vocabulary = self.shape
        kept = targets.shape[-1]
        distance = self.tensor.new_zeros((batch_size, kept, vocabulary), dtype=self.dtype)
        selected = self.mask if mask is None else mask & self.mask
        for batch_index, position, block in self._blocks():
            probs, _ = softmax(tempered(block, temperature, False))
            left_out = ~selected[batch_index, position].unsqueeze(-1)
            target = targets[batch_index, position].to(self.dtype)
            for column in range(kept):
                gap = (probs - target[:, column : column + 1]).abs_()
                gap.masked_fill_(left_out, 0.0)
                add_rows_(distance[:, column], batch_index, gap)
        return distance

    @torch.no_grad()
    def whole_rows(
        self,
        batch_index: Tensor,
        position: Tensor,
        *,
        temperature: float = 1.0,
        spread_tail: bool = False,
    ) -> Tensor:
        return self._read(batch_index, position)

    def _memo(
        self, temperature: float, standardise: bool
    ) -> tuple[tuple[float, bool, int], Tensor]:
        version = 0 if self.tensor.is_inference() else self.tensor._version
        key = (temperature, standardise, version)
        empty = self.tensor.new_zeros(self.shape[:2], dtype=self.dtype)
        return key, empty

    def _remember(self, key: tuple[float, bool, int], log_normaliser: Tensor) -> None:
        # An inference tensor does not count its changes, so what is stored could be out of date.
        if not self.tensor.is_inference():
            self._log_normalisers[key] = log_normaliser

    def _log_normaliser(self, temperature: float, standardise: bool) -> Tensor:
        """Log of the softmax denominator at each position, (B, S), computed once."""
        key, log_normaliser = self._memo(temperature, standardise)
        if key in self._log_normalisers:
            return self._log_normalisers[key]
        for batch_index, position, block in self._blocks():
            row = tempered(block, temperature, standardise)
            log_normaliser[batch_index, position] = row.logsumexp(-1)
        self._remember(key, log_normaliser)
        return log_normaliser

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (sequence indices, positions, their rows in the statistics dtype)."""
        for batch_index, position in self._split(*self._visited()):
            yield batch_index, position, self._read(batch_index, position)

    def _visited(self) -> tuple[Tensor, Tensor]:
        """Positions worth reading, flattened: the scored ones where that costs no waiting."""
        if skips_padding(self.device):
            batch_index, position = self.mask.nonzero(as_tuple=True)
            return batch_index, position
        batch_size, positions, _ = self.shape
        flat = torch.arange(batch_size * positions, device=self.device)
        return flat // max(positions, 1), flat % max(positions, 1)

    def _split(self, *indices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        size = block_rows(self.shape[2], self.device)
        for start in range(0, indices[0].shape[0], size):
            yield tuple(index[start : start + size] for index in indices)

    def _source_rows(self, batch_index: Tensor, position: Tensor) -> Tensor:
        return position if self.rows is None else self.rows[batch_index, position]

    def _read(self, batch_index: Tensor, position: Tensor) -> Tensor:
        row = self._source_rows(batch_index, position)
        vocabulary = self.shape[2]
        if self.tensor.is_contiguous():
            flat = self.tensor.view(-1, self.tensor.shape[-1])
            block = flat.index_select(0, batch_index * self.tensor.shape[1] + row)[:, :vocabulary]
        else:
            block = self.tensor[batch_index, row, :vocabulary]
        return block.to(self.dtype)

    def _write(self, target: Tensor, batch_index: Tensor, position: Tensor, rows: Tensor) -> None:
        row = self._source_rows(batch_index, position)
        if not skips_padding(self.device):
            # Garbage behind the mask times a gradient of zero may be nan.
            rows = rows.masked_fill(~self.mask[batch_index, position].unsqueeze(-1), 0.0)
        target[batch_index, row, : self.shape[2]] = rows.to(target.dtype)


class _LogProbs(torch.autograd.Function):
    """Chosen log-probabilities; the backward pass recomputes the softmax block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: DenseLogits,
        ids: Tensor,
        temperatures: tuple[float, ...],
        standardise: bool,
        tensor: Tensor,
    ) -> tuple[Tensor, ...]:
        normalisers = [logits._log_normaliser(t, standardise) for t in temperatures]
        ids = ids.expand(-1, logits.shape[1], -1)
        answers = [tensor.new_zeros(ids.shape, dtype=logits.dtype) for _ in temperatures]
        for batch_index, position, block in logits._blocks():
            chosen_ids = ids[batch_index, position]
            for temperature, normaliser, answer in zip(
                temperatures, normalisers, answers, strict=True
            ):
                row = tempered(block, temperature, standardise).gather(1, chosen_ids)
                answer[batch_index, position] = row - normaliser[batch_index, position].unsqueeze(
                    -1
                )
        padding = ~logits.mask.unsqueeze(-1)
        answers = [answer.masked_fill_(padding, 0.0) for answer in answers]
        ctx.save_for_backward(tensor, ids, *normalisers)
        ctx.logits = logits
        ctx.temperatures = temperatures
        ctx.standardise = standardise
        return tuple(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensor, ids, *normalisers = ctx.saved_tensors
        logits: DenseLogits = ctx.logits
        gradient = torch.zeros_like(tensor)
        for batch_index, position, block in logits._blocks():
            chosen_ids = ids[batch_index, position]
            result = torch.zeros_like(block)
            for temperature, normaliser, incoming in zip(
                ctx.temperatures, normalisers, gradients, strict=True
            ):
                chosen = incoming[batch_index, position]
                row = tempered(block, temperature, ctx.standardise)
                probs = (row - normaliser[batch_index, position].unsqueeze(-1)).exp_()
                probs.mul_(-chosen.sum(-1, keepdim=True)).scatter_add_(1, chosen_ids, chosen)
                result += untempered_gradient(block, probs, temperature, ctx.standardise)
            logits._write(gradient, batch_index, position, result)
        return None, None, None, None, gradient
