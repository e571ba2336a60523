"""Gradients of softmaxes of rows: all that was asked about some rows, a block at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctkd.compiled_softmax import SoftmaxTerm
from ctkd.powers import Workspace
from ctkd.row_requests import Softmax, SoftmaxRequest
from ctkd.rows import LOG2_E, tempered, untempered_gradient

__all__ = ["SoftmaxAdder"]


class SoftmaxAdder:
    """Fulfils all requests about softmaxes of some rows."""

    def __init__(self, requests: Sequence[SoftmaxRequest], rows: Tensor) -> None:
        groups: dict[Softmax, list[SoftmaxRequest]] = {}
        for request in requests:
            groups.setdefault(request.softmax, []).append(request)
        # Falling temperatures, so that one half as large comes next.
        order = sorted(groups, key=lambda one: (one.standardise, -one.vocab_size, -one.temperature))
        self.terms: list[_Term] = []
        while order:
            softmax = order.pop(0)
            of_first = _Asked.of(groups[softmax], rows)
            if softmax.standardise:
                self.terms.append(_StandardisedTerm(of_first))
            elif order and _is_square_root(softmax, order[0]):
                self.terms.append(_PlainTerm(of_first, _Asked.of(groups[order.pop(0)], rows)))
            else:
                self.terms.append(_PlainTerm(of_first))
        self.workspace = Workspace()

    def __call__(
        self, which: slice, block: Tensor, gradient: Tensor, *, fresh: bool = False
    ) -> None:
        """Add to a gradient, or put into a ``fresh`` one, which holds garbage."""
        if fresh and not self.terms:
            gradient.zero_()
        for term in self.terms:
            width = term.width
            if fresh:
                gradient[:, width:] = 0.0
            target = gradient[:, :width]
            out = target if fresh else self.workspace.rows("probs", target, width)
            term.put_probs(which, block[:, :width], out, self.workspace)
            if not fresh:
                target += out
            term.scatter_(which, target)
            fresh = False


def _is_square_root(softmax: Softmax, other: Softmax) -> bool:
    """Whether probabilities of one, squared, are those of the other but for a factor."""
    return (
        not softmax.standardise
        and not other.standardise
        and softmax.vocab_size == other.vocab_size
        and softmax.temperature == 2.0 * other.temperature
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """All requests about one softmax, in the order of the rows of a pass.

    Args:
        softmax: Which one.
        log_normaliser: (R, 1), nan for rows that only others asked about.
        total: (R, 1).
        ids: (R, K).
        weights: (R, K).
    """

    softmax: Softmax
    log_normaliser: Tensor
    total: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, requests: Sequence[SoftmaxRequest], rows: Tensor) -> _Asked:
        totals = [request.places.at(rows, request.total) for request in requests]
        return cls(
            requests[0].softmax,
            requests[0].log_normalisers[rows].unsqueeze(-1),
            torch.stack(totals).sum(0).unsqueeze(-1),
            _joined([request.places.at(rows, request.ids) for request in requests]),
            _joined([request.places.at(rows, request.weights) for request in requests]),
        )


class _Term(ABC):
    """Part of a gradient: what is computed for all rows of a pass is computed once."""

    width: int
    ids: Tensor
    weights: Tensor

    @abstractmethod
    def put_probs(self, which: slice, block: Tensor, out: Tensor, workspace: Workspace) -> None:
        """Put ``-total * probs / temperature`` of a block into a place."""

    @abstractmethod
    def compiled(self) -> SoftmaxTerm:
        """The same for compiled loops."""

    def scatter_(self, which: slice, gradient: Tensor) -> None:
        """Add what the chosen entries weigh."""
        if self.ids.shape[1]:
            gradient.scatter_add_(1, self.ids[which], self.weights[which])


class _PlainTerm(_Term):
    """A softmax, and perhaps the one at half its temperature, which needs no exponential."""

    def __init__(self, asked: _Asked, half: _Asked | None = None) -> None:
        temperature, normaliser = asked.softmax.temperature, asked.log_normaliser
        self.width = asked.softmax.vocab_size
        self.factor = asked.total / -temperature
        self.ids, self.weights = asked.ids, asked.weights / temperature
        self.factor_of_half: Tensor | None = None
        if half is not None:
            other, half_temperature = half.log_normaliser, half.softmax.temperature
            normaliser = torch.where(normaliser.isnan(), other / 2.0, normaliser)
            # Rows that others asked about have no normaliser here, and weigh nothing.
            known = normaliser.masked_fill(normaliser.isnan(), torch.inf)
            ratio = (2.0 * known - other).exp_().masked_fill_(other.isnan(), 0.0)
            self.factor_of_half = half.total * ratio / -half_temperature
            self.ids = torch.cat([self.ids, half.ids], -1)
            self.weights = torch.cat([self.weights, half.weights / half_temperature], -1)
        self.shift = normaliser.masked_fill(normaliser.isnan(), torch.inf) * -LOG2_E
        self.temperature = temperature
        self.scale = LOG2_E / temperature

    def compiled(self) -> SoftmaxTerm:
        return SoftmaxTerm(
            self.width,
            self.temperature,
            False,
            self.shift,
            self.factor,
            self.factor_of_half,
            self.ids,
            self.weights,
        )

    def put_probs(self, which: slice, block: Tensor, out: Tensor, workspace: Workspace) -> None:
        torch.add(self.shift[which], block, alpha=self.scale, out=out).exp2_()
        if self.factor_of_half is None:
            out.mul_(self.factor[which])
            return
        spare = workspace.rows("spare", out, out.shape[1])
        torch.mul(out, self.factor_of_half[which], out=spare)
        out.mul_(spare.add_(self.factor[which]))


class _StandardisedTerm(_Term):
    """A softmax of logits that are divided by their own deviation first."""

    def __init__(self, asked: _Asked) -> None:
        normaliser = asked.log_normaliser
        self.asked = asked
        self.width = asked.softmax.vocab_size
        self.normaliser = normaliser.masked_fill(normaliser.isnan(), torch.inf)
        # They are part of what is carried back through the deviation.
        self.ids, self.weights = asked.ids[:, :0], asked.weights[:, :0]

    def compiled(self) -> SoftmaxTerm:
        return SoftmaxTerm(
            self.width,
            self.asked.softmax.temperature,
            True,
            self.normaliser * -LOG2_E,
            self.asked.total.neg(),
            None,
            self.asked.ids,
            self.asked.weights,
        )

    def put_probs(self, which: slice, block: Tensor, out: Tensor, workspace: Workspace) -> None:
        temperature, asked = self.asked.softmax.temperature, self.asked
        scaled = tempered(block, temperature, True)
        probs = scaled.sub_(self.normaliser[which]).exp_().mul_(-asked.total[which])
        probs.scatter_add_(1, asked.ids[which], asked.weights[which])
        out.copy_(untempered_gradient(block, probs, temperature, True))


def _joined(columns: Sequence[Tensor]) -> Tensor:
    """Tensors side by side, a single one as it is."""
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), -1)
