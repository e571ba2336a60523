"""Entropic transport and L1 costs in a launch each way: operators of torch, in Triton.

The operators are there whether triton is or not: on the meta device they have shapes and costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.cuda.operators import kernel_cost, kernels, nbytes, operator, power_of_two

__all__ = ["fits", "l1_cost", "transport"]

MOST_POSITIONS = 512
"""Rows and columns of the largest problem that one program solves."""

# Entries of a tile. A thread of the largest program has 16 of them, or 8 where rows do not begin at
# multiples of 64 bytes: one that loads entries singly needs more registers.
_TILE = 8192
_COST_TILE = 32
_POINTS, _MOST_ENTRIES = 16, 64


def fits(cost: Tensor) -> bool:
    """True if `transport` serves problems of this size, (B, R, C)."""
    return max(cost.shape[1:]) <= MOST_POSITIONS


def transport(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    regularization: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan (B, R, C), its cost (B,) and the row error (B,), as `ctkd.ot.sinkhorn` defines them."""
    row_mass, column_mass = (
        None if mass is None else mass.to(torch.float32) for mass in (row_mass, column_mass)
    )
    results: tuple[Tensor, Tensor, Tensor] = _Transport.apply(
        cost.to(torch.float32),
        row_mass,
        column_mass,
        row_mask,
        column_mask,
        regularization,
        iterations,
    )
    return results


def l1_cost(first: Tensor, second: Tensor) -> Tensor:
    """L1 distance of each of (B, R, K) to each of (B, C, K), (B, R, C), differentiable."""
    cost: Tensor = _L1Cost.apply(first.to(torch.float32), second.to(torch.float32))
    return cost


class _Transport(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        row_mass: Tensor | None,
        column_mass: Tensor | None,
        row_mask: Tensor | None,
        column_mask: Tensor | None,
        regularization: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, value, error, rows, columns = torch.ops.ctkd.sinkhorn(
            cost, row_mass, column_mass, row_mask, column_mask, regularization, iterations
        )
        ctx.regularization = regularization
        ctx.save_for_backward(cost, row_mass, column_mass, rows, columns)
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)
        return plan, value, error

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, plan_grad: Tensor | None, value_grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if plan_grad is None and value_grad is None:
            return (None,) * 7
        # Once: a checkpoint hands each saved tensor out a single time.
        cost, row_mass, column_mass, rows, columns = ctx.saved_tensors
        cost_grad, row_mass_grad, column_mass_grad = torch.ops.ctkd.sinkhorn_backward(
            cost, row_mass, column_mass, rows, columns, plan_grad, value_grad, ctx.regularization
        )
        return (
            cost_grad,
            None if row_mass is None else row_mass_grad,
            None if column_mass is None else column_mass_grad,
            *(None,) * 4,
        )


class _L1Cost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        cost: Tensor = torch.ops.ctkd.l1_cost(first, second)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        first, second = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of = torch.ops.ctkd.l1_cost_backward
        return (
            of(gradient.transpose(1, 2), first, second) if needed[0] else None,
            of(gradient, second, first) if needed[1] else None,
        )


def _sinkhorn_answers(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    regularization: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows, columns = cost.shape
    return (
        cost.new_empty(cost.shape),
        cost.new_empty(batch),
        cost.new_empty(batch),
        cost.new_empty(batch, iterations + 1, rows),
        cost.new_empty(batch, iterations + 1, columns),
    )


@operator("sinkhorn", _sinkhorn_answers)
def _sinkhorn(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    regularization: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plan, its cost, the row error, and potentials (B, N + 1, R) and (B, N + 1, C)."""
    answers = _sinkhorn_answers(
        cost, row_mass, column_mass, row_mask, column_mask, regularization, iterations
    )
    batch, rows, columns = cost.shape
    given = [
        cost if one is None else one.contiguous()
        for one in (cost, row_mass, column_mass, row_mask, column_mask)
    ]
    kernels("sinkhorn_kernels").sinkhorn[(batch,)](
        *(one.view(torch.uint8) if one.dtype == torch.bool else one for one in given),
        *answers,
        rows,
        columns,
        iterations,
        -1.0 / regularization,
        WITH_ROW_MASS=row_mass is not None,
        WITH_COLUMN_MASS=column_mass is not None,
        WITH_ROW_MASK=row_mask is not None,
        WITH_COLUMN_MASK=column_mask is not None,
        ROWS=power_of_two(rows),
        **_program(columns),
    )
    return answers


def _sinkhorn_gradients(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_potentials: Tensor,
    column_potentials: Tensor,
    plan_grad: Tensor | None,
    value_grad: Tensor | None,
    regularization: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, columns = cost.shape
    return (
        cost.new_empty(cost.shape),
        cost.new_empty(batch, rows),
        cost.new_empty(batch, columns),
    )


@operator("sinkhorn_backward", _sinkhorn_gradients)
def _sinkhorn_backward(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_potentials: Tensor,
    column_potentials: Tensor,
    plan_grad: Tensor | None,
    value_grad: Tensor | None,
    regularization: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the cost, of the row masses and of the column masses."""
    answers = _sinkhorn_gradients(
        cost,
        row_mass,
        column_mass,
        row_potentials,
        column_potentials,
        plan_grad,
        value_grad,
        regularization,
    )
    batch, rows, columns = cost.shape
    cost = cost.contiguous()
    kernels("sinkhorn_kernels").sinkhorn_backward[(batch,)](
        cost,
        *(cost if one is None else one.contiguous() for one in (row_mass, column_mass)),
        row_potentials,
        column_potentials,
        cost if plan_grad is None else plan_grad.contiguous(),
        cost if value_grad is None else value_grad,
        0 if value_grad is None else value_grad.stride(0),
        *answers,
        rows,
        columns,
        row_potentials.shape[1] - 1,
        -1.0 / regularization,
        WITH_ROW_MASS=row_mass is not None,
        WITH_COLUMN_MASS=column_mass is not None,
        WITH_PLAN=plan_grad is not None,
        WITH_VALUE=value_grad is not None,
        **_program(columns),
    )
    return answers


def _l1_cost_answer(first: Tensor, second: Tensor) -> Tensor:
    return first.new_empty(*first.shape[:2], second.shape[1])


@operator("l1_cost", _l1_cost_answer)
def _l1_cost(first: Tensor, second: Tensor) -> Tensor:
    """L1 distance of each of (B, R, K) to each of (B, C, K), (B, R, C)."""
    cost = _l1_cost_answer(first, second)
    batch, rows, columns = cost.shape
    tiles = math.ceil(rows / _COST_TILE), math.ceil(columns / _COST_TILE)
    if cost.numel():
        kernels("sinkhorn_kernels").l1_cost[(batch, *tiles)](
            first.contiguous(),
            second.contiguous(),
            cost,
            rows,
            columns,
            first.shape[2],
            ROWS=_COST_TILE,
            COLUMNS=_COST_TILE,
            num_warps=4,
        )
    return cost


def _l1_cost_gradient(gradient: Tensor, points: Tensor, others: Tensor) -> Tensor:
    return points.new_empty(points.shape)


@operator("l1_cost_backward", _l1_cost_gradient)
def _l1_cost_backward(gradient: Tensor, points: Tensor, others: Tensor) -> Tensor:
    """Gradient of points (B, N, K) from that of their distances to others, (B, M, N)."""
    answer = _l1_cost_gradient(gradient, points, others)
    batch, count, width = points.shape
    entries = min(power_of_two(width), _MOST_ENTRIES)
    tiles = math.ceil(count / _POINTS), math.ceil(width / entries)
    if answer.numel():
        kernels("sinkhorn_kernels").l1_cost_backward[(batch, *tiles)](
            gradient,
            *gradient.stride(),
            points.contiguous(),
            others.contiguous(),
            answer,
            count,
            others.shape[1],
            width,
            POINTS=_POINTS,
            ENTRIES=entries,
            num_warps=4,
        )
    return answer


def _program(columns: int) -> dict[str, int | None]:
    """The shape of a program whose tiles are as wide as the problem."""
    width = max(power_of_two(columns), 16)
    warps = min(max(width // 16, 4), 16)
    tile = min(_TILE // width, 32)
    if columns % 16:
        tile = min(tile, _TILE // width // 2)
    # ptxas spills some registers to have more programs on a multiprocessor, which then has one.
    most = 255 if warps < 16 else None
    return {"COLUMNS": width, "TILE": tile, "num_warps": warps, "maxnreg": most}


def _cost_of_sinkhorn(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    regularization: float,
    iterations: int,
) -> Cost:
    # Every iteration reads the cost again, from the second cache as long as it holds the batch.
    batch, rows, columns = cost.shape
    given = row_mass, column_mass, row_mask, column_mask
    vectors = 4 * batch * ((iterations + 2) * (rows + columns) + 2)
    moved = (iterations + 2) * nbytes(cost) + nbytes(*given) + vectors
    return kernel_cost(moved, cost, *given)


def _cost_of_sinkhorn_backward(
    cost: Tensor,
    row_mass: Tensor | None,
    column_mass: Tensor | None,
    row_potentials: Tensor,
    column_potentials: Tensor,
    plan_grad: Tensor | None,
    value_grad: Tensor | None,
    regularization: float,
) -> Cost:
    # Every iteration but the last reads the cost, and reads and writes its gradient.
    iterations = row_potentials.shape[1] - 1
    passes = 3 * max(iterations - 1, 0) + 2 + (iterations > 0)
    vectors = 4 * nbytes(row_potentials, column_potentials)
    moved = passes * nbytes(cost) + 2 * nbytes(plan_grad) + nbytes(value_grad) + vectors
    return kernel_cost(moved, cost, row_mass, column_mass, plan_grad)


def _cost_of_l1_cost(first: Tensor, second: Tensor) -> Cost:
    # A tile reads its rows and columns once.
    batch, rows, width = first.shape
    columns = second.shape[1]
    tiles = math.ceil(rows / _COST_TILE), math.ceil(columns / _COST_TILE)
    entries = rows * columns + width * (tiles[1] * rows + tiles[0] * columns)
    return kernel_cost(4 * batch * entries, first, second)


def _cost_of_l1_cost_backward(gradient: Tensor, points: Tensor, others: Tensor) -> Cost:
    tiles = math.ceil(points.shape[1] / _POINTS)
    of_gradient = math.ceil(points.shape[2] / _MOST_ENTRIES) * nbytes(gradient)
    moved = 2 * nbytes(points) + tiles * nbytes(others) + of_gradient
    return kernel_cost(moved, points, others)


DECLARED.update(
    sinkhorn=_cost_of_sinkhorn,
    sinkhorn_backward=_cost_of_sinkhorn_backward,
    l1_cost=_cost_of_l1_cost,
    l1_cost_backward=_cost_of_l1_cost_backward,
)
