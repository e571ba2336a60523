"""One backward pass over rows of logits for everything that was asked of them.

Each question keeps, in its own backward pass, what reached it: a `Request`. The rows themselves
hang on an anchor, which autograd runs once all of its questions have run. It works through the
rows a block at a time and fulfils all requests at once, so that cross-entropy and a loss of many
terms cost one reading of the rows and one gradient of their size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.row_sources import Anchored, RowSource
from ctkd.rows import LOG2_E, skips_padding, tempered, untempered_gradient

__all__ = [
    "AddGradient",
    "Places",
    "Request",
    "Softmax",
    "SoftmaxRequest",
    "anchored",
    "file_requests",
]

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
        missing = (place < 0).view(-1, *[1] * (values.ndim - 1))
        return values[place.clamp_min(0)].masked_fill_(missing, 0)


@dataclass(frozen=True, slots=True)
class Softmax:
    """Which softmax of a row a request is about."""

    temperature: float
    standardise: bool
    vocab_size: int


class Request(ABC):
    """What is to be added to the gradient of some rows.

    Attributes:
        source: Where the rows come from.
        places: Of the view that was asked.
    """

    source: RowSource
    places: Places

    @property
    def buffer(self) -> Tensor | None:
        """The gradient as far as the forward pass knew it, see `RowSource.row_buffer`."""
        return None

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

    def adder(self, rows: Tensor, *, in_buffer: bool) -> AddGradient:
        return _SoftmaxAdder([self], rows)


def anchored(source: RowSource) -> Anchored:
    """What a question on a source takes as its input, and where it leaves its request."""
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in source.inputs)
    if not wanted:
        return Anchored(torch.zeros(()), {}, None)
    state = source.version, tuple(one.requires_grad for one in source.inputs)
    if source.anchored is None or source.anchored.state != state:
        requests: dict[object, list[Request]] = {}
        anchor = _Anchor.apply(requests, *source.inputs)  # type: ignore[no-untyped-call]
        source.anchored = Anchored(anchor, requests, state)
    return source.anchored


def file_requests(
    requests: dict[object, list[Request]], question: object, found: list[Request]
) -> Tensor:
    """Leave a question's requests for the anchor.

    Returns:
        What the question's backward pass returns as the gradient of the anchor.
    """
    # In the order of arrival, so that those of a pass that went wrong come first.
    requests.pop(question, None)
    requests[question] = found
    return torch.ones(())


class _Anchor(torch.autograd.Function):
    """A number that stands for all rows of a source in the graph of autograd.

    Its gradient is the number of questions that ran in this pass. It lies on the CPU, so that it
    can be read without waiting for a device.
    """

    @staticmethod
    def forward(ctx: Any, requests: dict[object, list[Request]], *_: Tensor) -> Tensor:
        # Only requests lead back to the source: a node that held it could never be freed.
        ctx.requests = requests
        return torch.zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, questions: Tensor) -> tuple[Tensor | None, ...]:
        filed = list(ctx.requests.values())
        ctx.requests.clear()
        # Others were left behind by passes that never came here.
        filed = filed[max(len(filed) - int(questions), 0) :]
        requests = [request for some in filed for request in some]
        if not requests:
            return (None,) * len(ctx.needs_input_grad)
        return None, *_carry_back(requests)


def _carry_back(requests: Sequence[Request]) -> tuple[Tensor | None, ...]:
    source = requests[0].source
    rows, is_used = _rows_of(requests)
    softmaxes = _SoftmaxAdder([one for one in requests if isinstance(one, SoftmaxRequest)], rows)
    others = [one for one in requests if not isinstance(one, SoftmaxRequest)]
    # The buffered one comes first: it finds its own gradient in place.
    others.sort(key=lambda one: one.buffer is None)
    buffer = others[0].buffer if others else None
    adders = [
        (one.places.vocab_size, one.adder(rows, in_buffer=one is others[0] and buffer is not None))
        for one in others
    ]

    def fill(which: slice, block: Tensor, gradient: Tensor) -> None:
        # In one order with and without a buffer, so that rounding is the same.
        if adders and buffer is None:
            gradient.zero_()
        for size, add in adders:
            add(which, block[:, :size], gradient[:, :size])
        softmaxes(which, block, gradient, fresh=not adders)
        if not skips_padding(source.device):
            # Garbage behind the mask times a gradient of zero may be nan.
            gradient.masked_fill_(~is_used[which].unsqueeze(-1), 0.0)

    return source.carry_back(rows, fill, buffer)


def _rows_of(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Rows that any request may be about, and which of them really are."""
    source = requests[0].source
    views = {id(request.places.table): request.places for request in requests}
    first, *more = views.values()
    place = first.table
    for view in more:
        place = torch.maximum(place, view.table)
    if skips_padding(source.device):
        rows = (place >= 0).nonzero().squeeze(-1)
    elif more:
        rows = torch.arange(source.num_rows, device=source.device)
    else:
        rows = first.rows
    is_used = place[rows] >= 0
    return rows.masked_fill(~is_used, source.num_rows), is_used


class _SoftmaxAdder:
    """Fulfils all requests about softmaxes of some rows."""

    def __init__(self, requests: Sequence[SoftmaxRequest], rows: Tensor) -> None:
        groups: dict[Softmax, list[SoftmaxRequest]] = {}
        for request in requests:
            groups.setdefault(request.softmax, []).append(request)
        # Falling temperatures, so that one half as large comes next.
        self.terms = [
            _SoftmaxTerm(softmax, groups[softmax], rows)
            for softmax in sorted(
                groups, key=lambda one: (one.standardise, -one.vocab_size, -one.temperature)
            )
        ]

    def __call__(
        self, which: slice, block: Tensor, gradient: Tensor, *, fresh: bool = False
    ) -> None:
        """Add to a gradient, or put into a ``fresh`` one, which holds garbage."""
        if fresh and not self.terms:
            gradient.zero_()
        index = 0
        while index < len(self.terms):
            term = self.terms[index]
            after = self.terms[index + 1] if index + 1 < len(self.terms) else None
            if after is not None and not term.is_square_root_of(after):
                after = None
            if fresh:
                gradient[:, term.width :] = 0.0
            target = gradient[:, : term.width]
            out = target if fresh else torch.empty_like(target)
            term.put_probs(which, block[:, : term.width], out, squared=after)
            if not fresh:
                target += out
            for one in (term,) if after is None else (term, after):
                one.scatter_(which, target)
            fresh = False
            index += 1 if after is None else 2


class _SoftmaxTerm:
    """All requests about one softmax, in the order of the rows of a pass."""

    def __init__(self, softmax: Softmax, requests: list[SoftmaxRequest], rows: Tensor) -> None:
        self.softmax = softmax
        self.width = softmax.vocab_size
        self.log_normaliser = requests[0].log_normalisers[rows].unsqueeze(-1)
        totals = [request.places.at(rows, request.total) for request in requests]
        self.total = torch.stack(totals).sum(0).unsqueeze(-1)
        self.chosen = [
            (request.places.at(rows, request.ids), request.places.at(rows, request.weights))
            for request in requests
            if request.ids.shape[1]
        ]

    def is_square_root_of(self, other: _SoftmaxTerm) -> bool:
        """Whether probabilities here, squared, are those of the other but for a factor."""
        return (
            not self.softmax.standardise
            and not other.softmax.standardise
            and self.width == other.width
            and self.softmax.temperature == 2.0 * other.softmax.temperature
        )

    def put_probs(
        self, which: slice, block: Tensor, out: Tensor, *, squared: _SoftmaxTerm | None
    ) -> None:
        """Put ``-total * probs / temperature`` into a place, of two softmaxes if they share it."""
        temperature = self.softmax.temperature
        normaliser, total = self.log_normaliser[which], self.total[which]
        if self.softmax.standardise:
            scaled = tempered(block, temperature, True)
            normaliser = normaliser.masked_fill(normaliser.isnan(), torch.inf)
            probs = scaled.sub_(normaliser).exp_().mul_(-total)
            for ids, weights in self.chosen:
                probs.scatter_add_(1, ids[which], weights[which])
            out.copy_(untempered_gradient(block, probs, temperature, True))
            return
        # Rows that others asked about have no normaliser here, and weigh nothing.
        missing = normaliser.isnan()
        if squared is None:
            normaliser = normaliser.masked_fill(missing, torch.inf)
            torch.add(normaliser * -LOG2_E, block, alpha=LOG2_E / temperature, out=out)
            out.exp2_().mul_(total / -temperature)
            return
        other = squared.log_normaliser[which]
        normaliser = torch.where(missing, other / 2.0, normaliser)
        normaliser = normaliser.masked_fill(normaliser.isnan(), torch.inf)
        ratio = (2.0 * normaliser - other).exp_().masked_fill_(other.isnan(), 0.0)
        torch.add(normaliser * -LOG2_E, block, alpha=LOG2_E / temperature, out=out).exp2_()
        weight = out * (squared.total[which] * ratio / -squared.softmax.temperature)
        out.mul_(weight.add_(total / -temperature))

    def scatter_(self, which: slice, gradient: Tensor) -> None:
        """Add what the chosen entries weigh."""
        if self.softmax.standardise:
            return
        for ids, weights in self.chosen:
            gradient.scatter_add_(1, ids[which], weights[which] / self.softmax.temperature)
