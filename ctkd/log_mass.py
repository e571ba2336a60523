"""How much probability a set of columns holds, on logits that exist as a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.errors import BatchError
from ctkd.rows import tempered, untempered_gradient

if TYPE_CHECKING:
    from ctkd.logits import DenseLogits

__all__ = ["log_mass"]


def log_mass(logits: DenseLogits, columns: Tensor, temperature: float) -> Tensor:
    """Answer `ctkd.logits.Logits.log_mass` for logits that exist as a tensor."""
    if columns.shape != logits.shape[2:] or columns.dtype != torch.bool:
        raise BatchError(
            f"columns must be a bool tensor of ({logits.shape[2]},), one for each column of the "
            f"logits, got {columns.dtype} of {tuple(columns.shape)}"
        )
    answer: Tensor = _LogMass.apply(  # type: ignore[no-untyped-call]
        logits, columns, temperature, logits.tensor
    )
    return answer


class _LogMass(torch.autograd.Function):
    """Log-mass of some columns; the backward pass recomputes the softmax block by block."""

    @staticmethod
    def forward(
        ctx: Any, logits: DenseLogits, columns: Tensor, temperature: float, tensor: Tensor
    ) -> Tensor:
        normaliser = logits._log_normaliser(temperature, False)
        partial = tensor.new_zeros(logits.shape[:2], dtype=logits.dtype)
        for batch_index, position, block in logits._blocks():
            row = tempered(block, temperature, False).masked_fill(~columns, -torch.inf)
            partial[batch_index, position] = row.logsumexp(-1)
        ctx.save_for_backward(tensor, columns, normaliser, partial)
        ctx.logits = logits
        ctx.temperature = temperature
        return (partial - normaliser).masked_fill_(~logits.mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        tensor, columns, normaliser, partial = ctx.saved_tensors
        logits: DenseLogits = ctx.logits
        gradient = torch.zeros_like(tensor)
        for batch_index, position, block in logits._blocks():
            where = batch_index, position
            row = tempered(block, ctx.temperature, False)
            within = (row - partial[where].unsqueeze(-1)).masked_fill_(~columns, -torch.inf)
            change = within.exp_() - (row - normaliser[where].unsqueeze(-1)).exp_()
            change *= incoming[where].unsqueeze(-1)
            change = untempered_gradient(block, change, ctx.temperature, False)
            logits._write(gradient, batch_index, position, change)
        return None, None, None, gradient
