"""Costs of moving mass from one position to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops import can_inspect, kernels_for

__all__ = ["l1_cost"]


def l1_cost(rows: Tensor, columns: Tensor) -> Tensor:
    """L1 distance of every row to every column.

    Shape:
        (B, R, K) and (B, C, K) give (B, R, C). Nothing larger is held, nor in the backward pass.

    Example:
        >>> l1_cost(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 1.0], [0.5, 0.5]]]))
        tensor([[[0.7500, 0.0000]]])
    """
    kernels = kernels_for("sinkhorn", rows, columns)
    if kernels is not None:
        cost: Tensor = kernels.l1_cost(rows, columns)
        return cost
    if can_inspect(rows):
        return torch.cdist(rows, columns, p=1.0)
    cost = _L1Cost.apply(rows, columns)  # type: ignore[no-untyped-call]
    return cost


class _L1Cost(torch.autograd.Function):
    """`torch.cdist`, whose own backward pass holds (B, R, C, K) on devices other than a CPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return torch.cdist(rows, columns, p=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, columns = ctx.saved_tensors
        return (
            _gradient(gradient, rows, columns) if ctx.needs_input_grad[0] else None,
            _gradient(gradient.mT, columns, rows) if ctx.needs_input_grad[1] else None,
        )


def _gradient(gradient: Tensor, points: Tensor, others: Tensor) -> Tensor:
    """Gradient of points (B, N, K) from that of their distances to others, (B, N, M)."""
    answer = torch.empty_like(points)
    each = zip(points.unbind(-1), others.unbind(-1), answer.unbind(-1), strict=True)
    for ours, theirs, out in each:
        signs = (ours.unsqueeze(2) - theirs.unsqueeze(1)).sign_()
        torch.sum(signs.mul_(gradient), 2, out=out)
    return answer
