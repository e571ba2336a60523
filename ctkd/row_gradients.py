"""One backward pass over rows of logits for everything that was asked of them.

Each question keeps, in its own backward pass, what reached it: a `Request`. The rows themselves
hang on an anchor, which autograd runs once all of its questions have run. It works through the
rows a block at a time and fulfils all requests at once, so that cross-entropy and a loss of many
terms cost one reading of the rows and one gradient of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.compiled import RowArray, has_kernels
from ctkd.compiled_softmax import SoftmaxTerms
from ctkd.row_requests import AddedRequest, Request, SoftmaxRequest
from ctkd.row_sources import Anchored, FillArray, RowSource
from ctkd.rows import skips_padding
from ctkd.softmax_adder import SoftmaxAdder

__all__ = ["anchored", "file_requests"]

# In room of their own while a head's rows are replaced by their gradient.
_ROWS_PER_THREAD = 4


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
    softmaxes = SoftmaxAdder([one for one in requests if isinstance(one, SoftmaxRequest)], rows)
    others = [one for one in requests if isinstance(one, AddedRequest)]
    # The buffered one comes first: it finds its own gradient in place.
    others.sort(key=lambda one: one.buffer is None)
    buffer = others[0].buffer if others else None
    if has_kernels(source.device, source.dtype) and source.carries_arrays and len(others) <= 1:
        terms = SoftmaxTerms([term.compiled() for term in softmaxes.terms], rows.shape[0])
        filler = others[0].filler(rows) if others and buffer is None else None
        if not others or buffer is not None or filler is not None:
            weights = others[0].known_weights(rows) if others else None
            fill_array = _array_filler(terms, source.shape[2], weights, filler)
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


def _array_filler(
    terms: SoftmaxTerms, width: int, weights: Tensor | None, filler: FillArray | None
) -> FillArray:
    """How to put gradients by compiled loops.

    Args:
        terms: Of softmaxes.
        width: All columns of a row.
        weights: What multiplies a known gradient, if there is one: in place, or
        filler: what puts it into rows of their own.
    """
    if filler is None:

        def fill(which: slice, array: RowArray, gradients: RowArray) -> None:
            terms.put_gradients(which, array, gradients, width, gradients, weights)

        return fill

    size = _ROWS_PER_THREAD * torch.get_num_threads(), width
    room = torch.empty(size, dtype=torch.float32, device="cpu")

    def fill_part_by_part(which: slice, array: RowArray, gradients: RowArray) -> None:
        for start in range(which.start, which.stop, room.shape[0]):
            some = slice(start, min(start + room.shape[0], which.stop))
            part = slice(some.start - which.start, some.stop - which.start)
            known = RowArray.of(room[: some.stop - some.start])
            filler(some, array.some(part), known)
            terms.put_gradients(some, array.some(part), gradients.some(part), width, known, weights)

    return fill_part_by_part


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
