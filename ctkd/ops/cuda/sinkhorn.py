"""Entropic transport and L1 costs in a launch each way: operators of torch, in Triton.

The operators are there whether triton is or not: on the meta device they have shapes and costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops.costs import Cost
from ctkd.ops.cuda.operators import kernel_cost, kernels, nbytes, operator, power_of_two

__all__ = [
    "DistanceGradient",
    "Marginal",
    "Points",
    "Upstream",
    "fits",
    "l1_cost",
    "transport",
]

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
        plan, value, error, rows, columns = _sinkhorn(
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
        cost_grad, row_mass_grad, column_mass_grad = _sinkhorn_backward(
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
        cost: Tensor = _l1_cost(first, second)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        first, second = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of = _l1_cost_backward
        return (
            of(gradient.transpose(1, 2), first, second) if needed[0] else None,
            of(gradient, second, first) if needed[1] else None,
        )


class Marginal(NamedTuple):
    """Rows or columns of a problem, as kernels are given them.

    Attributes:
        mass: (B, size) target sums, or None for 1.
        mask: (B, size) uint8, those that take part, or None for all.
        size: How many there are.
        potentials: (B, N + 1, size) of every iteration.
        gradient: (B, size) where that of the masses goes, in a backward pass.
    """

    mass: Tensor | None
    mask: Tensor | None
    size: int
    potentials: Tensor
    gradient: Tensor | None = None


class Upstream(NamedTuple):
    """Gradients of the plan (B, R, C) and of its cost (B,), as kernels are given them.

    Attributes:
        plan: None where there is none.
        value: Likewise.
        stride: Of ``value``.
    """

    plan: Tensor | None
    value: Tensor | None
    stride: int


class DistanceGradient(NamedTuple):
    """Gradient of distances, and its strides: by the batch, other points and the points."""

    tensor: Tensor
    outer: int
    from_other: int
    from_point: int


class Points(NamedTuple):
    """Points (B, size, K)."""

    tensor: Tensor
    size: int


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    """As kernels read it; None is nothing."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@dataclass(frozen=True)
class _Sinkhorn:
    """Plan, its cost, the row error, and potentials (B, N + 1, R) and (B, N + 1, C)."""

    cost_matrix: Tensor
    row_mass: Tensor | None
    column_mass: Tensor | None
    row_mask: Tensor | None
    column_mask: Tensor | None
    regularization: float
    iterations: int

    def answers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        make, (batch, rows, columns) = self.cost_matrix.new_empty, self.cost_matrix.shape
        return (
            make(batch, rows, columns),
            make(batch),
            make(batch),
            make(batch, self.iterations + 1, rows),
            make(batch, self.iterations + 1, columns),
        )

    def start(self, answers: tuple[Tensor, ...]) -> None:
        *results, row_potentials, column_potentials = answers
        batch, rows, columns = self.cost_matrix.shape
        row_mass, column_mass, row_mask, column_mask = map(
            _contiguous, (self.row_mass, self.column_mass, self.row_mask, self.column_mask)
        )
        kernels("sinkhorn_kernels").sinkhorn[(batch,)](
            self.cost_matrix.contiguous(),
            Marginal(row_mass, row_mask, rows, row_potentials),
            Marginal(column_mass, column_mask, columns, column_potentials),
            tuple(results),
            self.iterations,
            -1.0 / self.regularization,
            ROWS=power_of_two(rows),
            **_program(columns),
        )

    def cost(self) -> Cost:
        # Every iteration reads the cost again, from the second cache as long as it holds the batch.
        batch, rows, columns = self.cost_matrix.shape
        given = self.row_mass, self.column_mass, self.row_mask, self.column_mask
        vectors = 4 * batch * ((self.iterations + 2) * (rows + columns) + 2)
        moved = (self.iterations + 2) * nbytes(self.cost_matrix) + nbytes(*given) + vectors
        return kernel_cost(moved, self.cost_matrix, *given)


@dataclass(frozen=True)
class _SinkhornBackward:
    """Gradients of the cost, of the row masses and of the column masses."""

    cost_matrix: Tensor
    row_mass: Tensor | None
    column_mass: Tensor | None
    row_potentials: Tensor
    column_potentials: Tensor
    plan_grad: Tensor | None
    value_grad: Tensor | None
    regularization: float

    @property
    def iterations(self) -> int:
        return self.row_potentials.shape[1] - 1

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        make, (batch, rows, columns) = self.cost_matrix.new_empty, self.cost_matrix.shape
        return make(batch, rows, columns), make(batch, rows), make(batch, columns)

    def start(self, answers: tuple[Tensor, Tensor, Tensor]) -> None:
        cost_grad, row_grad, column_grad = answers
        batch, rows, columns = self.cost_matrix.shape
        row_mass, column_mass, plan = map(
            _contiguous, (self.row_mass, self.column_mass, self.plan_grad)
        )
        stride = 0 if self.value_grad is None else self.value_grad.stride(0)
        kernels("sinkhorn_kernels").sinkhorn_backward[(batch,)](
            self.cost_matrix.contiguous(),
            Marginal(row_mass, None, rows, self.row_potentials, row_grad),
            Marginal(column_mass, None, columns, self.column_potentials, column_grad),
            Upstream(plan, self.value_grad, stride),
            cost_grad,
            self.iterations,
            -1.0 / self.regularization,
            **_program(columns),
        )

    def cost(self) -> Cost:
        # Every iteration but the last reads the cost, and reads and writes its gradient.
        passes = 3 * max(self.iterations - 1, 0) + 2 + (self.iterations > 0)
        vectors = 4 * nbytes(self.row_potentials, self.column_potentials)
        moved = passes * nbytes(self.cost_matrix) + 2 * nbytes(self.plan_grad) + vectors
        moved += nbytes(self.value_grad)
        return kernel_cost(moved, self.cost_matrix, self.row_mass, self.column_mass, self.plan_grad)


@dataclass(frozen=True)
class _L1:
    """L1 distance of each of (B, R, K) to each of (B, C, K), (B, R, C)."""

    first: Tensor
    second: Tensor

    @property
    def tiles(self) -> tuple[int, int]:
        """Along rows and columns."""
        rows, columns = self.first.shape[1], self.second.shape[1]
        return math.ceil(rows / _COST_TILE), math.ceil(columns / _COST_TILE)

    def answers(self) -> Tensor:
        return self.first.new_empty(*self.first.shape[:2], self.second.shape[1])

    def start(self, answers: Tensor) -> None:
        if answers.numel():
            kernels("sinkhorn_kernels").l1_cost[(len(answers), *self.tiles)](
                self.first.contiguous(),
                self.second.contiguous(),
                answers,
                *answers.shape[1:],
                self.first.shape[2],
                ROWS=_COST_TILE,
                COLUMNS=_COST_TILE,
                num_warps=4,
            )

    def cost(self) -> Cost:
        # A tile reads its rows and columns once.
        batch, rows, width = self.first.shape
        columns = self.second.shape[1]
        entries = rows * columns + width * (self.tiles[1] * rows + self.tiles[0] * columns)
        return kernel_cost(4 * batch * entries, self.first, self.second)


@dataclass(frozen=True)
class _L1Backward:
    """Gradient of points (B, N, K) from that of their distances to others, (B, M, N)."""

    gradient: Tensor
    points: Tensor
    others: Tensor

    def answers(self) -> Tensor:
        return self.points.new_empty(self.points.shape)

    def start(self, answers: Tensor) -> None:
        batch, count, width = self.points.shape
        tile = _POINTS, min(power_of_two(width), _MOST_ENTRIES)
        tiles = math.ceil(count / tile[0]), math.ceil(width / tile[1])
        if answers.numel():
            kernels("sinkhorn_kernels").l1_cost_backward[(batch, *tiles)](
                DistanceGradient(self.gradient, *self.gradient.stride()),
                Points(self.points.contiguous(), count),
                Points(self.others.contiguous(), self.others.shape[1]),
                answers,
                width,
                TILE=tile,
                num_warps=4,
            )

    def cost(self) -> Cost:
        tiles = math.ceil(self.points.shape[1] / _POINTS)
        of_gradient = math.ceil(self.points.shape[2] / _MOST_ENTRIES) * nbytes(self.gradient)
        moved = 2 * nbytes(self.points) + tiles * nbytes(self.others) + of_gradient
        return kernel_cost(moved, self.points, self.others)


_sinkhorn = operator("sinkhorn", _Sinkhorn)
_sinkhorn_backward = operator("sinkhorn_backward", _SinkhornBackward)
_l1_cost = operator("l1_cost", _L1)
_l1_cost_backward = operator("l1_cost_backward", _L1Backward)


def _program(columns: int) -> dict[str, Any]:
    """The shape of a program whose tiles are as wide as the problem."""
    width = max(power_of_two(columns), 16)
    warps = min(max(width // 16, 4), 16)
    tile = min(_TILE // width, 32)
    if columns % 16:
        tile = min(tile, _TILE // width // 2)
    # ptxas spills some registers to have more programs on a multiprocessor, which then has one.
    most = 255 if warps < 16 else None
    return {"TILE": (tile, width), "num_warps": warps, "maxnreg": most}
