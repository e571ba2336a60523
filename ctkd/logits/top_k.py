"""Logits of which only the largest entries are kept: a cached teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from ctkd import ops
from ctkd.errors import BatchError, SettingError
from ctkd.logits.base import Logits, check_columns, check_ids, check_k, checked_mask
from ctkd.logits.rows import RowLogits
from ctkd.ops import Rows, Which
from ctkd.settings import check_positive

__all__ = ["TopK", "TopKLogits"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopK:
    """Rows of logits reduced to the K largest entries, the label, and the mass of the rest.

    Shape:
        The dimensions in front are those of the rows, (B, S) or (N,). ``ids`` (..., K) int64 and
        ``values`` (..., K), largest first; ``label_ids`` (...) int64, ``label_values`` (...),
        ``deviations`` (...); ``log_normalizers`` and ``log_rests`` (..., 2, M) for M temperatures,
        first of the plain and then of the standardized row.

    Args:
        ids: Columns of the largest logits.
        values: Those logits, raw.
        label_ids: The token that was observed.
        label_values: Its logit, also where it is not among the largest.
        deviations: Standard deviation of the row over the vocabulary, unbiased.
        log_normalizers: Log of the softmax denominator at each temperature.
        log_rests: Log of the probability of all columns that are neither kept nor the label.
        temperatures: For which of them normalizers are kept.
        vocab_size: Columns of the rows, V.
    """

    ids: Tensor
    values: Tensor
    label_ids: Tensor
    label_values: Tensor
    deviations: Tensor
    log_normalizers: Tensor
    log_rests: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int

    @property
    def k(self) -> int:
        """Entries kept of each row."""
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
            log_normalizers=zeros(*front, 2, len(temperatures)),
            log_rests=zeros(*front, 2, len(temperatures)),
            temperatures=tuple(float(temperature) for temperature in temperatures),
            vocab_size=vocabulary,
        )
        for position, block in logits.blocks():
            where = (position // front[1], position % front[1])
            rows = Rows(block, None, vocabulary)
            ids, values = ops.top_k(rows, k)
            label = kept.label_ids[where].unsqueeze(-1)
            kept.ids[where], kept.values[where] = ids, values
            kept.label_values[where] = block.gather(1, label).squeeze(-1)
            rest = block.scatter(1, ids, -torch.inf).scatter_(1, label, -torch.inf)
            for scale, standardize in enumerate((False, True)):
                normalizers = ops.log_normalizers(rows, kept.temperatures, standardize=standardize)
                if standardize:
                    normalizers, deviation = normalizers[:, 0], normalizers[0, 1]
                    kept.deviations[where] = deviation
                    rest /= (deviation + ops.STANDARD_DEVIATION_EPSILON).unsqueeze(-1)
                kept.log_normalizers[(*where, scale)] = normalizers.t()
                for index, temperature in enumerate(kept.temperatures):
                    log_rest = (rest / temperature).logsumexp(-1) - normalizers[index]
                    kept.log_rests[(*where, scale, index)] = log_rest
        for tensor in kept.tensors().values():
            # Rows that are not scored were read as well where values may not be inspected.
            left_out = ~logits.mask.view(*front, *[1] * (tensor.ndim - 2))
            tensor.masked_fill_(left_out, 0)
        return kept


class TopKLogits(Logits):
    """Logits of which the largest entries of each row are known; a cached teacher's.

    Every query is answered as from one row per temperature: kept entries and the label have the
    probability that they had, all other columns share the rest evenly. `is_stored` tells which
    columns are known and which are such a share. At most twice the shared mass of a row is moved,
    in L1. Nothing is differentiable.

    Args:
        kept: With (B, S) in front.
        mask: (B, S) bool, scored positions; default all of them.

    Raises:
        BatchError: If the shapes do not fit.

    Example:
        >>> from ctkd import DenseLogits
        >>> dense = DenseLogits(torch.tensor([[[0.5, 0.1, 0.4, 0.0]]]).log())
        >>> logits = TopKLogits(TopK.of(dense, torch.tensor([[0]]), 1, [1.0]))
        >>> everything = torch.arange(4).view(1, 1, 4)
        >>> logits.log_probs(everything).exp()
        tensor([[[0.5000, 0.1667, 0.1667, 0.1667]]])
        >>> logits.is_stored(everything)
        tensor([[[ True, False, False, False]]])
    """

    def __init__(self, kept: TopK, *, mask: Tensor | None = None) -> None:
        front = kept.label_ids.shape
        shapes = {name: tuple(one.shape) for name, one in kept.tensors().items()}
        scaled = (*front, 2, len(kept.temperatures))
        expected = {name: tuple(front) for name in shapes}
        expected["ids"] = expected["values"] = (*front, kept.k)
        expected["log_normalizers"] = expected["log_rests"] = scaled
        if len(front) != 2 or shapes != expected:
            raise BatchError(
                "kept logits must begin with one (B, S), as ids and values have one K and the "
                f"normalizers 2 and {len(kept.temperatures)} temperatures; got {shapes}"
            )
        mask = checked_mask(mask, front, kept.values.device)
        self.kept = kept
        self.dtype = kept.values.dtype
        self.mask = mask
        self.shape = (front[0], front[1], kept.vocab_size)
        self.inputs = tuple(kept.tensors().values())
        # A last entry that no column has, so that a search always ends somewhere.
        sentinel = kept.ids.new_full((*front, 1), kept.vocab_size)
        self._sorted_ids, self._order = torch.cat([kept.ids, sentinel], -1).sort(-1)
        is_kept = (kept.ids == kept.label_ids.unsqueeze(-1)).any(-1)
        self._label_is_outside = ~is_kept
        # Columns that are neither kept nor the label.
        self._rest_count = kept.vocab_size - kept.k - self._label_is_outside.to(torch.int64)

    def masked(self, mask: Tensor) -> TopKLogits:
        return self if mask is self.mask else TopKLogits(self.kept, mask=mask)

    def is_stored(self, ids: Tensor) -> Tensor:
        """True where the probability of an entry is known and no share of the rest.

        Shape:
            ``ids`` as in `log_probs_at`; the answer is (B, S, K) bool.
        """
        ids = self._expanded(ids)
        return self._slots(ids)[1] | (ids == self.kept.label_ids.unsqueeze(-1))

    @torch.no_grad()
    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardize: bool = False
    ) -> tuple[Tensor, ...]:
        ids = self._expanded(ids)
        slot, is_kept = self._slots(ids)
        is_label = ids == self.kept.label_ids.unsqueeze(-1)
        label = self.kept.label_values.unsqueeze(-1)
        values = torch.cat([self.kept.values, label], -1).gather(-1, slot)
        values = torch.where(is_kept, values, label)
        answers = []
        for temperature in temperatures:
            divisor, normalizer, share = self._row(temperature, standardize)
            known = values / divisor.unsqueeze(-1) - normalizer.unsqueeze(-1)
            answer = torch.where(is_kept | is_label, known, share.unsqueeze(-1))
            answers.append(answer.masked_fill(~self.mask.unsqueeze(-1), 0.0))
        return tuple(answers)

    @torch.no_grad()
    def log_mass(
        self, columns: Tensor, *, temperature: float = 1.0, spread_tail: bool = False
    ) -> Tensor:
        """Answer as `Logits.log_mass` does, at k < V only where the tail may be spread.

        Args:
            columns: True on the columns to add up.
            temperature: Divides the logits.
            spread_tail: Count each column that is not stored with its share of the rest, instead
                of refusing.

        Raises:
            BatchError: If the columns do not fit, or too little is stored.
        """
        check_columns(columns, self.shape)
        self._check_whole(spread_tail)
        ids, log_probs, is_known = self._known(temperature, False)
        _, _, share = self._row(temperature, False)
        inside = columns[ids] & is_known
        shared = (columns.sum() - inside.sum(-1)).to(self.dtype)
        parts = torch.cat(
            [log_probs.masked_fill(~inside, -torch.inf), (share + shared.log()).unsqueeze(-1)], -1
        )
        return parts.logsumexp(-1).masked_fill(~self.mask, 0.0)

    @torch.no_grad()
    def probs_and_tail(self, temperature: float) -> tuple[Tensor, Tensor]:
        """All probabilities of each row, without their columns.

        Shape:
            (B, S, K + 1) known probabilities, 0 where the label is among the kept ones; (B, S, 2)
            the probability of each other column, and how many others there are.

        Args:
            temperature: Divides the logits.
        """
        divisor, normalizer, share = self._row(temperature, False)
        probs = torch.cat([self.kept.values, self.kept.label_values.unsqueeze(-1)], -1)
        probs.div_(divisor.unsqueeze(-1)).sub_(normalizer.unsqueeze(-1)).exp_()
        probs[..., -1].masked_fill_(~self._label_is_outside, 0.0)
        return probs, torch.stack([share.exp(), self._rest_count.to(share.dtype)], -1)

    def top_ids(self, k: int) -> Tensor:
        check_k(k, self.shape)
        if k > self.kept.k:
            raise BatchError(
                f"the largest {k} entries of each position are needed, but only "
                f"{self.kept.k} are stored; cache the teacher again with --k {k} or more, or use "
                "the live teacher"
            )
        return self.kept.ids[..., :k].masked_fill(~self.mask.unsqueeze(-1), 0)

    @torch.no_grad()
    def column_mass(
        self, *, temperature: float = 1.0, standardize: bool = False, prefetch: Sequence[float] = ()
    ) -> Tensor:
        ids, log_probs, is_known = self._known(temperature, standardize)
        share = self._row(temperature, standardize)[2].exp()
        left_out = ~self.mask
        # Every column gets its share at every position, known columns what they have beyond it.
        beyond = log_probs.exp() - share.unsqueeze(-1)
        beyond = beyond.masked_fill(~is_known | left_out.unsqueeze(-1), 0.0)
        mass = share.masked_fill(left_out, 0.0).sum(1, keepdim=True)
        mass = mass.expand(-1, self.shape[2]).contiguous()
        _add_at_columns_(mass, ids, beyond)
        return mass

    @torch.no_grad()
    def column_distance(self, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
        ids, log_probs, is_known = self._known(temperature, False)
        share = self._row(temperature, False)[2].exp().unsqueeze(-1)
        left_out = ~self.mask.unsqueeze(-1)
        targets = targets.to(self.dtype)
        of_shared = (share - targets).abs().masked_fill(left_out, 0.0)
        distance = of_shared.sum(1).unsqueeze(-1).expand(-1, -1, self.shape[2]).contiguous()
        probs = log_probs.exp()
        for column in range(targets.shape[-1]):
            target = targets[..., column : column + 1]
            beyond = (probs - target).abs() - (share - target).abs()
            beyond = beyond.masked_fill(~is_known | left_out, 0.0)
            _add_at_columns_(distance[:, column], ids, beyond)
        return distance

    @torch.no_grad()
    def chunks(
        self, index: Tensor, *, temperature: float = 1.0, spread_tail: bool = False
    ) -> Iterator[tuple[Which, Rows]]:
        self._check_whole(spread_tail)
        _, normalizer, share = self._row(temperature, False)
        rest = ((share + normalizer) * temperature).flatten()
        label_ids, label_values = self.kept.label_ids.flatten(), self.kept.label_values.flatten()
        ids, values = self.kept.ids.flatten(0, 1), self.kept.values.flatten(0, 1)
        size = ops.block_rows(self.shape[2], self.device)
        for start in range(0, index.shape[0] if rest.shape[0] else 0, size):
            which = slice(start, min(start + size, index.shape[0]))
            some = index[which].clamp_min(0)
            rows = rest[some].unsqueeze(-1).repeat(1, self.shape[2])
            rows.scatter_(1, label_ids[some].unsqueeze(-1), label_values[some].unsqueeze(-1))
            yield which, Rows(rows.scatter_(1, ids[some], values[some]), None, self.shape[2])

    def _check_whole(self, spread_tail: bool) -> None:
        if self.kept.k < self.shape[2] and not spread_tail:
            raise BatchError(
                f"whole rows of the teacher's logits are needed, but only {self.kept.k} of "
                f"{self.shape[2]} entries of each are stored; use the live teacher, or cache it "
                f"again with --k {self.shape[2]}"
            )

    def _expanded(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.shape)
        ids = ids.expand(-1, self.shape[1], -1).contiguous()
        if ops.can_inspect(ids):
            scored = ids.masked_fill(~self.mask.unsqueeze(-1), 0)
            if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < self.shape[2]:
                raise BatchError(
                    f"ids go from {int(scored.min())} to {int(scored.max())}, but the stored "
                    f"logits have {self.shape[2]} columns; these are another tokenizer's ids"
                )
        return ids

    def _slots(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each id is kept, and whether it is."""
        slot = torch.searchsorted(self._sorted_ids, ids)
        # An id of V or more would be searched for behind the last entry.
        slot = slot.clamp_max(self.kept.k)
        return self._order.gather(-1, slot), self._sorted_ids.gather(-1, slot) == ids

    def _row(self, temperature: float, standardize: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Divisor of raw logits, log-normalizer, and log-probability of a column in the rest."""
        if temperature not in self.kept.temperatures:
            kept = ", ".join(f"{one:g}" for one in self.kept.temperatures)
            raise BatchError(
                f"the teacher is queried at temperature {temperature:g}, but was stored at {kept}; "
                f"cache it again with --temperature {temperature:g}, or use the live teacher"
            )
        index = self.kept.temperatures.index(temperature)
        normalizer = self.kept.log_normalizers[..., int(standardize), index]
        rest = self.kept.log_rests[..., int(standardize), index]
        share = rest - self._rest_count.clamp_min(1).to(self.dtype).log()
        divisor = torch.full_like(normalizer, temperature)
        if standardize:
            divisor = divisor * (self.kept.deviations + ops.STANDARD_DEVIATION_EPSILON)
        return divisor, normalizer, share

    def _known(self, temperature: float, standardize: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Kept columns and the label, their log-probabilities, and which are not there twice."""
        divisor, normalizer, _ = self._row(temperature, standardize)
        ids = torch.cat([self.kept.ids, self.kept.label_ids.unsqueeze(-1)], -1)
        values = torch.cat([self.kept.values, self.kept.label_values.unsqueeze(-1)], -1)
        log_probs = values / divisor.unsqueeze(-1) - normalizer.unsqueeze(-1)
        is_known = torch.ones_like(ids, dtype=torch.bool)
        is_known[..., -1] = self._label_is_outside
        return ids, log_probs, is_known


def _add_at_columns_(sums: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add (B, S, K) values to columns of (B, V) sums, always in one order: ties stay ties."""
    ids, values = ids.flatten(1), values.flatten(1)
    if ops.can_inspect(sums):
        sums.scatter_add_(1, ids, values)
    else:
        # On CUDA scatter_add_ is atomic, so in no order; this sorts first.
        sequence = torch.arange(sums.shape[0], device=sums.device).unsqueeze(1).expand_as(ids)
        sums.index_put_((sequence, ids), values, accumulate=True)
