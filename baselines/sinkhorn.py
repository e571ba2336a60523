"""Optimal transport between two short lists of points: a wrapper around POT, and the same by loops.

Nothing here is batched or masked.
"""

import ot
import torch
from torch import Tensor


def _masses(
    cost: Tensor, iterations: int, row_mass: Tensor | None, column_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    rows, columns = cost.shape
    return (
        cost.new_ones(rows) if row_mass is None else row_mass.to(cost),
        cost.new_ones(columns) if column_mass is None else column_mass.to(cost),
    )


def plan(
    cost: Tensor,
    regularization: float,
    iterations: int,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
) -> Tensor:
    """Transport plan after a number of Sinkhorn rounds, each rows first and columns last.

    The kernel is exp(-cost / regularization). The columns are exact after the last round, so the
    total mass of the result is that of the columns. POT scales the side of its second marginal
    first and that of its first one last, hence the transposed call. One factor on all row masses
    cancels in the column step, so both masses are normalized for POT and the plan is scaled back.

    A column of zero mass still takes part in the first row step. Drop points that are not there.

    Args:
        cost: (rows, columns), differentiable; gradients flow through every round.
        regularization: strength of the entropy term, positive.
        iterations: rounds of one row step and one column step, at least 1.
        row_mass: (rows,), ones if not given.
        column_mass: (columns,), ones if not given.
    """
    rows, columns = _masses(cost, iterations, row_mass, column_mass)
    total = columns.sum()
    transposed: Tensor = ot.sinkhorn(
        columns / total,
        rows / rows.sum(),
        cost.T,
        regularization,
        method="sinkhorn_log",
        numItermax=iterations,
        stopThr=0.0,
        warn=False,
    )
    return total * transposed.T


def plan_by_loops(
    cost: Tensor,
    regularization: float,
    iterations: int,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
) -> Tensor:
    """The plan of :func:`plan`, one cell at a time, in the linear domain.

    Equations (18) and (19) of arXiv 2412.14528 with masses. Cells underflow to zero where
    cost / regularization exceeds about 700. Masses must be positive.
    """
    rows, columns = _masses(cost, iterations, row_mass, column_mass)
    height, width = cost.shape
    kernel = [
        [torch.exp(-cost[i, j] / regularization) for j in range(width)] for i in range(height)
    ]
    for _ in range(iterations):
        for i in range(height):
            row_sum = sum(kernel[i][j] for j in range(width))
            for j in range(width):
                kernel[i][j] = kernel[i][j] / row_sum * rows[i]
        for j in range(width):
            column_sum = sum(kernel[i][j] for i in range(height))
            for i in range(height):
                kernel[i][j] = kernel[i][j] / column_sum * columns[j]
    return torch.stack([torch.stack(row) for row in kernel])


def emd(cost: Tensor, row_mass: Tensor, column_mass: Tensor) -> Tensor:
    """Least cost of moving ``row_mass`` onto ``column_mass``, exact; both sum to the same mass."""
    value: Tensor = ot.emd2(row_mass, column_mass, cost)
    return value
