"""Entropic optimal transport between two sets of positions, by a fixed number of scalings.

:func:`sinkhorn` is batched, masked, rectangular; :func:`l1_cost` makes costs for it. Neither looks
at a value that is not on a CPU, so they never wait for a device, nor test for convergence.

`ctkd.ot.scalings` scales, or kernels of `ctkd.ops` where they serve a tensor.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.errors import BatchError, SettingError
from ctkd.ops import can_inspect, kernels_for
from ctkd.ot.scalings import Inputs, Scale, results_without_entries

__all__ = ["SinkhornResult", "l1_cost", "sinkhorn"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


@dataclass(frozen=True, slots=True, eq=False)
class SinkhornResult:
    """Result of :func:`sinkhorn`.

    Attributes:
        plan: Transported mass, rows to columns, (B, R, C). Differentiable.
        cost: ``<plan, cost>`` of each problem, (B,). The entropy is not part of it.
            Differentiable.
        marginal_error: The largest absolute difference between a row's sum and its mass, (B,).
            The columns are exact after the last half step, so this measures convergence.
            Carries no gradient.
    """

    plan: Tensor
    cost: Tensor
    marginal_error: Tensor


def sinkhorn(
    cost: Tensor,
    *,
    regularization: float,
    iterations: int,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
) -> SinkhornResult:
    r"""Scale ``exp(-cost / regularization)`` to given row and column sums, ``iterations`` times.

    .. math::
        \hat K^n = \mathrm{diag}(r \oslash K^{n-1} 1)\, K^{n-1}, \qquad
        K^n = \hat K^n\, \mathrm{diag}(c \oslash 1^T \hat K^n), \qquad
        K^0 = e^{-\mathrm{cost} / \mathrm{regularization}}

    with row masses r and column masses c; the plan is K^N. Each iteration scales rows, then
    columns, so the columns are exact at the end. Row and column masses need not have the same
    total: the plan's total is that of the columns. No iteration gives K^0 itself.

    The gradient is that of these N steps, not of their limit. Between forward and backward only
    the two scalings of each iteration are kept, (N, B, R) and (N, B, C), and the inputs. Autocast
    does not lower the precision; PyTorch's global switches for TF32 do.

    Shape:
        cost: (B, R, C) or one problem (R, C). Without B, the results are (R, C), (), ().
        row_mass, row_mask: (B, R) or (R,).
        column_mass, column_mask: (B, C) or (C,).

    Args:
        cost: Cost of moving a unit of mass from a row to a column, finite where not masked.
            float64 is computed in float64, everything else in float32, which is also the dtype
            of the results.
        regularization: Weight of the entropy, in units of cost, above 0.
        iterations: Number of row and column scalings N, 0 or more.
        row_mass: Target sum of each row; 1 where not given. A mass that is not above 0 counts
            as masked and gets no gradient. Any two positive masses, of rows or of columns, may
            differ by a factor of a million; beyond that float32 may underflow.
        column_mass: Target sum of each column, likewise.
        row_mask: True where a row takes part. Other rows are empty, whatever costs they hold.
        column_mask: True where a column takes part, likewise.

    Returns:
        Plan, transport cost and marginal error. A problem without a row or without a column has
        an empty plan, cost 0 and gradient 0; its marginal error is the mass its rows keep.

    Raises:
        SettingError: If ``regularization`` or ``iterations`` is out of range.
        BatchError: If shapes, dtypes or devices disagree.

    Example:
        >>> import math, torch
        >>> cost = torch.tensor([[0.0, math.log(2)], [math.log(2), 0.0]], dtype=torch.float64)
        >>> result = sinkhorn(cost, regularization=1.0, iterations=1)
        >>> result.plan * 3  # rows of exp(-cost) are (1, 1/2) and (1/2, 1)
        tensor([[2., 1.],
                [1., 2.]], dtype=torch.float64)
        >>> round(float(result.cost / math.log(2)), 6)
        0.666667

    References:
        Cuturi, arXiv:1306.0895. MultiLevelOT, arXiv:2412.14528, eqs. 17-19.
    """
    _check_settings(regularization, iterations)
    inputs = Inputs(cost, row_mass, column_mass, row_mask, column_mask)
    _check_tensors(inputs)
    single = cost.dim() == 2
    if single:
        inputs = Inputs(cost[None], *(None if t is None else t[None] for t in inputs[1:]))
    if 0 in cost.shape:
        results = results_without_entries(inputs)
    else:
        kernels: Any = kernels_for("sinkhorn", inputs.cost)
        served = kernels is not None and kernels.fits(inputs.cost)
        scale = kernels.transport if served else Scale.apply
        results = scale(*inputs, float(regularization), iterations)
    plan, value, error = results
    if single:
        plan, value, error = plan[0], value[0], error[0]
    return SinkhornResult(plan=plan, cost=value, marginal_error=error)


def _check_settings(regularization: float, iterations: int) -> None:
    number = isinstance(regularization, (int, float)) and not isinstance(regularization, bool)
    if not number or not 0 < regularization < math.inf:
        raise SettingError(
            f"regularization must be a number above 0, got {regularization!r}; "
            "MultiLevelOT uses 0.1"
        )
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise SettingError(
            f"iterations must be an integer, 0 or more, got {iterations!r}; MultiLevelOT uses 20"
        )


def _check_tensors(inputs: Inputs) -> None:
    cost = inputs.cost
    if cost.dim() not in (2, 3):
        raise BatchError(
            "cost must have shape (rows, columns) or (batch, rows, columns), "
            f"got {tuple(cost.shape)}; reshape it"
        )
    shapes = {"row": cost.shape[:-1], "column": cost.shape[:-2] + cost.shape[-1:]}
    for name, tensor in inputs._asdict().items():
        if tensor is None:
            continue
        shape = shapes.get(name.split("_")[0], cost.shape)
        if tensor.shape != shape:
            raise BatchError(
                f"{name} must have shape {tuple(shape)} for a cost of shape "
                f"{tuple(cost.shape)}, got {tuple(tensor.shape)}; expand or reshape it"
            )
        dtypes = (torch.bool,) if name.endswith("mask") else _DTYPES
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise BatchError(f"{name} must have dtype {wanted}, got {tensor.dtype}; convert it")
        if tensor.device != cost.device:
            raise BatchError(
                f"{name} must be on the device of cost, {cost.device}, got {tensor.device}; move it"
            )


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
            _points_gradient(gradient, rows, columns) if ctx.needs_input_grad[0] else None,
            _points_gradient(gradient.mT, columns, rows) if ctx.needs_input_grad[1] else None,
        )


def _points_gradient(gradient: Tensor, points: Tensor, others: Tensor) -> Tensor:
    """Gradient of points (B, N, K) from that of their distances to others, (B, N, M)."""
    answer = torch.empty_like(points)
    each = zip(points.unbind(-1), others.unbind(-1), answer.unbind(-1), strict=True)
    for ours, theirs, out in each:
        signs = (ours.unsqueeze(2) - theirs.unsqueeze(1)).sign_()
        torch.sum(signs.mul_(gradient), 2, out=out)
    return answer
