"""A teacher that was asked once: every question is answered from what was kept of its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctkd.errors import BatchError
from ctkd.logits import Logits
from ctkd.powers import Workspace
from ctkd.rows import STANDARD_DEVIATION_EPSILON, add_at_columns_, check_ids, check_k
from ctkd.top_k import TopK

__all__ = ["TopKLogits"]


class TopKLogits(Logits):
    """Logits of which the largest entries of each row are known; a cached teacher's.

    Every question is answered as from one row per temperature: kept entries and the label have the
    probability that they had, all other columns share what is left evenly. `is_stored` tells which
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
        expected["log_normalisers"] = expected["log_rests"] = scaled
        if len(front) != 2 or shapes != expected:
            raise BatchError(
                "kept logits must begin with one (B, S), as ids and values have one K and the "
                f"normalisers 2 and {len(kept.temperatures)} temperatures; got {shapes}"
            )
        if mask is None:
            mask = torch.ones(front, dtype=torch.bool, device=kept.values.device)
        if mask.shape != front or mask.dtype != torch.bool or mask.device != kept.values.device:
            raise BatchError(
                f"mask must be (B, S) bool with the kept logits, {tuple(front)} on "
                f"{kept.values.device}, got {tuple(mask.shape)}, {mask.dtype}, {mask.device}"
            )
        self.kept = kept
        self.mask = mask
        self.shape = (front[0], front[1], kept.vocab_size)
        # A last entry that no column has, so that a search always ends somewhere.
        sentinel = kept.ids.new_full((*front, 1), kept.vocab_size)
        self._sorted_ids, self._order = torch.cat([kept.ids, sentinel], -1).sort(-1)
        is_kept = (kept.ids == kept.label_ids.unsqueeze(-1)).any(-1)
        self._label_is_outside = ~is_kept
        # Columns that are neither kept nor the label.
        self._rest_count = kept.vocab_size - kept.k - self._label_is_outside.to(torch.int64)

    @property
    def dtype(self) -> torch.dtype:
        return self.kept.values.dtype

    def masked(self, mask: Tensor) -> TopKLogits:
        return self if mask is self.mask else TopKLogits(self.kept, mask=mask)

    def is_stored(self, ids: Tensor) -> Tensor:
        """Whether the probability of each entry is known, not a share of the rest.

        Shape:
            ``ids`` as in `log_probs_at`; the answer is (B, S, K) bool.
        """
        ids = self._expanded(ids)
        return self._found(ids)[1] | (ids == self.kept.label_ids.unsqueeze(-1))

    @torch.no_grad()
    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardise: bool = False
    ) -> tuple[Tensor, ...]:
        ids = self._expanded(ids)
        place, is_kept = self._found(ids)
        is_label = ids == self.kept.label_ids.unsqueeze(-1)
        label = self.kept.label_values.unsqueeze(-1)
        values = torch.cat([self.kept.values, label], -1).gather(-1, place)
        values = torch.where(is_kept, values, label)
        answers = []
        for temperature in temperatures:
            divisor, normaliser, share = self._row(temperature, standardise)
            known = values / divisor.unsqueeze(-1) - normaliser.unsqueeze(-1)
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
        if columns.shape != self.shape[2:] or columns.dtype != torch.bool:
            raise BatchError(
                f"columns must be a bool tensor of ({self.shape[2]},), one for each column of the "
                f"logits, got {columns.dtype} of {tuple(columns.shape)}"
            )
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
    def probs_and_tail(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """All probabilities of each row but their columns: known ones, and one that is left often.

        Shape:
            (B, S, K + 1) known probabilities, 0 where the label is among the kept ones; (B, S) the
            probability of every other column; (B, S) int64 how many others there are.

        Args:
            temperature: Divides the logits.
        """
        divisor, normaliser, share = self._row(temperature, False)
        probs = torch.cat([self.kept.values, self.kept.label_values.unsqueeze(-1)], -1)
        probs.div_(divisor.unsqueeze(-1)).sub_(normaliser.unsqueeze(-1)).exp_()
        probs[..., -1].masked_fill_(~self._label_is_outside, 0.0)
        return probs, share.exp(), self._rest_count

    def top_ids(self, k: int) -> Tensor:
        check_k(k, self.shape[2])
        if k > self.kept.k:
            raise BatchError(
                f"the largest {k} entries of each position are needed, but only "
                f"{self.kept.k} are stored; cache the teacher again with --k {k} or more, or use "
                "the live teacher"
            )
        return self.kept.ids[..., :k].masked_fill(~self.mask.unsqueeze(-1), 0)

    @torch.no_grad()
    def column_mass(
        self,
        mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        standardise: bool = False,
        asked_next: Sequence[float] = (),
    ) -> Tensor:
        ids, log_probs, is_known = self._known(temperature, standardise)
        share = self._row(temperature, standardise)[2].exp()
        left_out = ~(self.mask if mask is None else mask & self.mask)
        # Every column gets its share at every position, known columns what they have beyond it.
        beyond = log_probs.exp() - share.unsqueeze(-1)
        beyond = beyond.masked_fill(~is_known | left_out.unsqueeze(-1), 0.0)
        mass = share.masked_fill(left_out, 0.0).sum(1, keepdim=True)
        mass = mass.expand(-1, self.shape[2]).contiguous()
        add_at_columns_(mass, ids, beyond)
        return mass

    @torch.no_grad()
    def column_distance(
        self, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        ids, log_probs, is_known = self._known(temperature, False)
        share = self._row(temperature, False)[2].exp().unsqueeze(-1)
        left_out = ~(self.mask if mask is None else mask & self.mask).unsqueeze(-1)
        targets = targets.to(self.dtype)
        of_shared = (share - targets).abs().masked_fill(left_out, 0.0)
        distance = of_shared.sum(1).unsqueeze(-1).expand(-1, -1, self.shape[2]).contiguous()
        probs = log_probs.exp()
        for column in range(targets.shape[-1]):
            target = targets[..., column : column + 1]
            beyond = (probs - target).abs() - (share - target).abs()
            beyond = beyond.masked_fill(~is_known | left_out, 0.0)
            add_at_columns_(distance[:, column], ids, beyond)
        return distance

    @torch.no_grad()
    def whole_rows(
        self,
        batch_index: Tensor,
        position: Tensor,
        *,
        temperature: float = 1.0,
        spread_tail: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        self._check_whole(spread_tail)
        _, normaliser, share = self._row(temperature, False)
        rest = ((share + normaliser) * temperature)[batch_index, position].unsqueeze(-1)
        rows = (workspace or Workspace()).rows("rows", rest, self.shape[2]).copy_(rest)
        label_ids = self.kept.label_ids[batch_index, position].unsqueeze(-1)
        label_values = self.kept.label_values[batch_index, position].unsqueeze(-1)
        rows.scatter_(1, label_ids, label_values)
        return rows.scatter_(
            1, self.kept.ids[batch_index, position], self.kept.values[batch_index, position]
        )

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
        # Only a CPU tensor can be looked into without making the device wait.
        if ids.device.type == "cpu":
            scored = ids.masked_fill(~self.mask.unsqueeze(-1), 0)
            if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < self.shape[2]:
                raise BatchError(
                    f"ids go from {int(scored.min())} to {int(scored.max())}, but the stored "
                    f"logits have {self.shape[2]} columns; these are another tokenizer's ids"
                )
        return ids

    def _found(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each id is kept, and whether it is."""
        place = torch.searchsorted(self._sorted_ids, ids)
        # An id of V or more would be searched for behind the last entry.
        place = place.clamp_max(self.kept.k)
        return self._order.gather(-1, place), self._sorted_ids.gather(-1, place) == ids

    def _row(self, temperature: float, standardise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Divisor of raw logits, log-normaliser, and log-probability of a column in the rest."""
        if temperature not in self.kept.temperatures:
            held = ", ".join(f"{one:g}" for one in self.kept.temperatures)
            raise BatchError(
                f"the teacher is asked at temperature {temperature:g}, but was stored at {held}; "
                f"cache it again with --temperature {temperature:g}, or use the live teacher"
            )
        index = self.kept.temperatures.index(temperature)
        normaliser = self.kept.log_normalisers[..., int(standardise), index]
        rest = self.kept.log_rests[..., int(standardise), index]
        share = rest - self._rest_count.clamp_min(1).to(self.dtype).log()
        divisor = torch.full_like(normaliser, temperature)
        if standardise:
            divisor = divisor * (self.kept.deviations + STANDARD_DEVIATION_EPSILON)
        return divisor, normaliser, share

    def _known(self, temperature: float, standardise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Kept columns and the label, their log-probabilities, and which are not there twice."""
        divisor, normaliser, _ = self._row(temperature, standardise)
        ids = torch.cat([self.kept.ids, self.kept.label_ids.unsqueeze(-1)], -1)
        values = torch.cat([self.kept.values, self.kept.label_values.unsqueeze(-1)], -1)
        log_probs = values / divisor.unsqueeze(-1) - normaliser.unsqueeze(-1)
        is_known = torch.ones_like(ids, dtype=torch.bool)
        is_known[..., -1] = self._label_is_outside
        return ids, log_probs, is_known
