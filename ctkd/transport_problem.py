"""Batches of transport problems as `ctkd.scalings` wants them: one dtype, masks worked in.

Not checked here: shapes, dtypes, devices and settings; `ctkd.sinkhorn` does that.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Inputs", "Problem", "prepare", "results_without_entries"]


class Inputs(NamedTuple):
    """What `ctkd.sinkhorn.sinkhorn` was given, with a batch dimension."""

    cost: Tensor
    row_mass: Tensor | None
    column_mass: Tensor | None
    row_mask: Tensor | None
    column_mask: Tensor | None


class Problem(NamedTuple):
    """A batch of problems in the dtype of the computation, with what is masked taken out.

    Vectors over rows are (B, 1, R), over columns (B, 1, C): BLAS multiplies a row with a matrix
    several times faster than a matrix with a column.

    Attributes:
        cost: (B, R, C), 0 where masked.
        scale: What makes an exponent of a cost, -1 / regularization.
        row_masses: 0 where nothing can flow.
        column_masses: Likewise.
        row_target: What a row should hold: its mass even where nothing can flow.
        row_gaps: 1 where nothing can flow, else 0; None if nothing is masked. Added to a sum that
            is 0 there, so that the scaling is 0 / 1.
        column_gaps: Likewise.
    """

    cost: Tensor
    scale: float
    row_masses: Tensor
    column_masses: Tensor
    row_target: Tensor
    row_gaps: Tensor | None = None
    column_gaps: Tensor | None = None

    def exponent(self) -> Tensor:
        """Of the kernel, before any offset; minus infinity where masked."""
        exponent = self.cost * self.scale
        if self.row_gaps is not None and self.column_gaps is not None:
            # The logarithms are 0 and minus infinity.
            exponent.add_((1.0 - self.row_gaps).log_().transpose(1, 2))
            exponent.add_((1.0 - self.column_gaps).log_())
        return exponent

    def without_masked(self, entries: Tensor) -> Tensor:
        """A copy of entries (B, R, C), 0 where masked, whatever they hold there."""
        if self.row_gaps is None or self.column_gaps is None:
            return entries.clone()
        # An AND of bits, which takes no NaN along, is several times faster than to fill by a mask.
        integer = torch.int64 if entries.dtype == torch.float64 else torch.int32
        open_rows = self.row_gaps.to(integer).sub_(1).transpose(1, 2)
        bits = entries.view(integer) & open_rows
        return bits.bitwise_and_(self.column_gaps.to(integer).sub_(1)).view(entries.dtype)


def _in_dtype_of_computation(cost: Tensor) -> Tensor:
    return cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32)


def results_without_entries(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Results for problems that have no row or no column by their shape."""
    plan = _in_dtype_of_computation(inputs.cost).clone()
    ones = plan.new_ones(plan.shape[0], 1, plan.shape[1])
    target = _target(inputs.row_mass, inputs.row_mask, ones).detach().clamp_min(0.0)
    error = torch.nn.functional.pad(target, (1, 0)).amax((1, 2))
    return plan, plan.sum((1, 2)), error


def prepare(inputs: Inputs, regularization: float) -> Problem:
    """Bring inputs into the dtype of the computation, and take out what is masked."""
    cost, row_mass, column_mass, row_mask, column_mask = inputs
    cost = _in_dtype_of_computation(cost)
    batch, row_count, column_count = cost.shape
    rows = _target(row_mass, row_mask, cost.new_ones(batch, 1, row_count))
    columns = _target(column_mass, column_mask, cost.new_ones(batch, 1, column_count))
    if all(tensor is None for tensor in inputs[1:]):
        return Problem(cost, -1.0 / regularization, rows, columns, rows)
    row_open, column_open = rows > 0, columns > 0
    row_closed = ~(row_open & column_open.any(2, keepdim=True))
    column_closed = ~(column_open & row_open.any(2, keepdim=True))
    problem = Problem(
        cost=cost,
        scale=-1.0 / regularization,
        row_masses=rows.masked_fill(row_closed, 0.0),
        column_masses=columns.masked_fill(column_closed, 0.0),
        row_target=rows.clamp_min(0.0),
        row_gaps=row_closed.to(cost.dtype),
        column_gaps=column_closed.to(cost.dtype),
    )
    return problem._replace(cost=problem.without_masked(cost))


def _target(mass: Tensor | None, mask: Tensor | None, ones: Tensor) -> Tensor:
    target = ones if mass is None else mass.to(ones.dtype).unsqueeze(1)
    return target if mask is None else target.masked_fill(~mask.unsqueeze(1), 0.0)
