"""How much probability a set of columns holds, on rows of raw logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.errors import BatchError
from ctkd.powers import Workspace
from ctkd.row_gradients import anchored, file_requests
from ctkd.row_logits import RowLogits
from ctkd.row_requests import AddedRequest, AddGradient, Places, Softmax, SoftmaxRequest
from ctkd.row_sources import RowSource
from ctkd.rows import skips_padding, softmax_statistics, tempered

__all__ = ["log_mass"]

_SMALL = 1e-20
# exp of it is finite in float32, and no part of a row exceeds the logarithm of its sum.
_NEVER_INSIDE = 80.0


def log_mass(logits: RowLogits, columns: Tensor, temperature: float) -> Tensor:
    """Answer `ctkd.logits.Logits.log_mass` for rows of raw logits."""
    if columns.shape != logits.shape[2:] or columns.dtype != torch.bool:
        raise BatchError(
            f"columns must be a bool tensor of ({logits.shape[2]},), one for each column of the "
            f"logits, got {columns.dtype} of {tuple(columns.shape)}"
        )
    anchor, requests, _ = anchored(logits.source)
    answer: Tensor = _LogMass.apply(  # type: ignore[no-untyped-call]
        logits, columns, temperature, requests, anchor
    )
    return answer


@dataclass(frozen=True, slots=True, eq=False)
class _PartRequest(AddedRequest):
    """Gradient of ``w log sum_c exp(x_c / t)`` over some columns c.

    Args:
        source: Where the rows come from.
        places: Of the view that was asked.
        columns: (V,) bool.
        temperature: t.
        partial: (N,) that logarithm at every position.
        weights: (N,).
    """

    source: RowSource
    places: Places
    columns: Tensor
    temperature: float
    partial: Tensor
    weights: Tensor

    def adder(self, rows: Tensor, *, in_buffer: bool) -> AddGradient:
        partial = self.places.at(rows, self.partial).unsqueeze(-1)
        weights = self.places.at(rows, self.weights / self.temperature).unsqueeze(-1)
        inside, workspace = self.columns.to(self.source.dtype), Workspace()

        def add(which: slice, block: Tensor, gradient: Tensor) -> None:
            within = workspace.rows("within", block, block.shape[1])
            torch.add(-partial[which], block, alpha=1.0 / self.temperature, out=within)
            # Columns outside may exceed those inside by any amount; they are multiplied by 0.
            within.clamp_(max=_NEVER_INSIDE).exp_().mul_(weights[which])
            gradient.addcmul_(within, inside)

        return add


def _log_mass_(probs: Tensor, inside: Tensor, block: Tensor, temperature: float) -> Tensor:
    # No matrix product: autocast would lower its precision.
    mass = probs.mul_(inside).sum(-1)
    if skips_padding(mass.device) and not bool((mass < _SMALL).any()):
        return mass.log()
    # Probabilities so small that their sum has lost digits.
    row = tempered(block, temperature, False).masked_fill(inside == 0, -torch.inf)
    return row.logsumexp(-1) - tempered(block, temperature, False).logsumexp(-1)


class _LogMass(torch.autograd.Function):
    """Log-mass of some columns."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: RowLogits,
        columns: Tensor,
        temperature: float,
        requests: dict[Any, Any],
        _: Tensor,
    ) -> Tensor:
        key = Softmax(temperature, False, logits.shape[2])
        table = logits.tables([key])[0][0]
        partial = torch.zeros(logits.mask.numel(), dtype=logits.dtype, device=logits.device)
        inside, workspace = columns.to(logits.dtype), Workspace()
        for position, block in logits.blocks():
            (found,), probs = softmax_statistics(block, [temperature], False, workspace)
            logits.note(table, position, found)
            # What is noted may be of another rounding; it is subtracted again.
            noted = table[logits.flat_rows[position]]
            partial[position] = _log_mass_(probs, inside, block, temperature) + noted
        logits.filled_in([key])
        # Kept only so that PyTorch sees it if one of them is overwritten.
        ctx.save_for_backward(*logits.source.inputs)
        ctx.logits, ctx.columns, ctx.temperature = logits, columns, temperature
        ctx.question = object()
        ctx.normaliser, ctx.partial, ctx.requests = table, partial, requests
        answer = (partial - table[logits.flat_rows]).view(logits.mask.shape)
        return answer.masked_fill_(~logits.mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        logits: RowLogits = ctx.logits
        weights = incoming.masked_fill(~logits.mask, 0.0).flatten()
        softmax = Softmax(ctx.temperature, False, logits.shape[2])
        none = weights.unsqueeze(-1)[:, :0]
        part = _PartRequest(
            logits.source, logits.places, ctx.columns, ctx.temperature, ctx.partial, weights
        )
        whole = SoftmaxRequest(
            logits.source,
            logits.places,
            softmax,
            ctx.normaliser,
            weights,
            none.to(torch.int64),
            none,
        )
        anchor_gradient = file_requests(ctx.requests, ctx.question, [part, whole])
        return None, None, None, None, anchor_gradient
