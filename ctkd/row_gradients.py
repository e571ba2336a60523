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

from ctkd.compiled import RowArray, has_kernels
from ctkd.compiled_softmax import SoftmaxTerm, SoftmaxTerms
from ctkd.powers import Workspace
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
        if skips_padding(rows.device) and _are_all(place, values.shape[0]):
            return values
        missing = (place < 0).view(-1, *[1] * (values.ndim - 1))
        return values[place.clamp_min(0)].masked_fill_(missing, 0)


def _are_all(place: Tensor, count: int) -> bool:
    """Whether these are 0, 1 and so on up to a count."""
    return place.shape[0] == count and torch.equal(place, torch.arange(count))


def _joined(columns: Sequence[Tensor]) -> Tensor:
    """Tensors side by side, a single one as it is."""
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), -1)


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

    def buffer_weights(self, rows: Tensor) -> Tensor:
        """What multiplies the buffer, (R,) in the order of some rows."""
        raise NotImplementedError(f"{type(self).__name__} has no buffer")

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
    is_compiled = has_kernels(source.device, source.dtype) and source.carries_arrays
    if is_compiled and (not others or buffer is not None) and len(others) <= 1:
        terms = SoftmaxTerms([term.compiled() for term in softmaxes.terms], rows.shape[0])
        weights = others[0].buffer_weights(rows) if others else None

        def fill_array(which: slice, array: RowArray, gradients: RowArray) -> None:
            terms.put_gradients(which, array, gradients, source.shape[2], weights)

        return source.carry_back_arrays(rows, fill_array, buffer)
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
