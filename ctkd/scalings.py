"""The scalings of entropic transport and their derivative, for `ctkd.sinkhorn`.

How it stays fast and finite. One scaling is a matrix-vector product with the kernel
``exp(-cost / regularization)``, which underflows when the regularization is small. The kernel is
therefore held relative to potentials (row and column offsets inside the exponential) and is
computed anew from the current potentials after a number of iterations that depends only on
shape, dtype and whether masses are given (`_block_length`). The first offsets make the largest
entry of every row and of every column 1.

Not checked here: shapes, dtypes, devices and settings; `ctkd.sinkhorn` does that.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Inputs", "Scale", "results_without_entries"]

_MASS_RANGE = 1e6  # the largest ratio of two positive masses that the block length allows for


class Inputs(NamedTuple):
    """What `ctkd.sinkhorn.sinkhorn` was given, with a batch dimension."""

    cost: Tensor
    row_mass: Tensor | None
    column_mass: Tensor | None
    row_mask: Tensor | None
    column_mask: Tensor | None


class _Problem(NamedTuple):
    """A batch of problems in the dtype of the computation, with what is masked taken out.

    Vectors over rows are (B, 1, R), over columns (B, 1, C): BLAS multiplies a row with a matrix
    several times faster than a matrix with a column.

    Attributes:
        cost: (B, R, C), 0 where masked.
        exponent: -cost / regularization, (B, R, C), minus infinity where masked.
        row_masses: 0 where nothing can flow.
        column_masses: Likewise.
        row_target: What a row should hold: its mass even where nothing can flow.
        row_gaps: 1 where nothing can flow, else 0; None if nothing is masked. Added to a sum that
            is 0 there, so that the scaling is 0 / 1.
        column_gaps: Likewise.
        forbidden: True where an entry takes no part, (B, R, C); None if nothing is masked.
    """

    cost: Tensor
    exponent: Tensor
    row_masses: Tensor
    column_masses: Tensor
    row_target: Tensor
    row_gaps: Tensor | None = None
    column_gaps: Tensor | None = None
    forbidden: Tensor | None = None


def _in_dtype_of_computation(cost: Tensor) -> Tensor:
    return cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32)


def results_without_entries(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Results for problems that have no row or no column by their shape."""
    plan = _in_dtype_of_computation(inputs.cost).clone()
    ones = plan.new_ones(plan.shape[0], 1, plan.shape[1])
    target = _target(inputs.row_mass, inputs.row_mask, ones).detach().clamp_min(0.0)
    error = torch.nn.functional.pad(target, (1, 0)).amax((1, 2))
    return plan, plan.sum((1, 2)), error


def _prepare(inputs: Inputs, regularization: float) -> _Problem:
    cost, row_mass, column_mass, row_mask, column_mask = inputs
    cost = _in_dtype_of_computation(cost)
    batch, row_count, column_count = cost.shape
    rows = _target(row_mass, row_mask, cost.new_ones(batch, 1, row_count))
    columns = _target(column_mass, column_mask, cost.new_ones(batch, 1, column_count))
    if all(tensor is None for tensor in inputs[1:]):
        return _Problem(cost, cost.div(-regularization), rows, columns, rows)
    row_open, column_open = rows > 0, columns > 0
    forbidden = ~(row_open.transpose(1, 2) & column_open)
    row_closed = ~(row_open & column_open.any(2, keepdim=True))
    column_closed = ~(column_open & row_open.any(2, keepdim=True))
    cost = cost.masked_fill(forbidden, 0.0)
    return _Problem(
        cost=cost,
        exponent=cost.div(-regularization).masked_fill_(forbidden, -math.inf),
        row_masses=rows.masked_fill(row_closed, 0.0),
        column_masses=columns.masked_fill(column_closed, 0.0),
        row_target=rows.clamp_min(0.0),
        row_gaps=row_closed.to(cost.dtype),
        column_gaps=column_closed.to(cost.dtype),
        forbidden=forbidden,
    )


def _target(mass: Tensor | None, mask: Tensor | None, ones: Tensor) -> Tensor:
    target = ones if mass is None else mass.to(ones.dtype).unsqueeze(1)
    return target if mask is None else target.masked_fill(~mask.unsqueeze(1), 0.0)


def _block_length(cost: Tensor, unit_masses: bool) -> int:
    """Iterations for which one kernel serves.

    With unit masses, scaling rows after columns multiplies a row by no less than 1 / C and no
    more than R: no entry is above 1, and scaling the columns divided none by more than R. Scaling
    columns after rows multiplies a column by no less than 1 / R and no more than C. So n
    iterations move the square of a scaling, and the product of two, by at most max(R, C)^(2n),
    where other masses put their largest ratio beside R and C. Up to ``eps / tiny`` these are
    finite, and kernel entries that underflow matter less than rounding to the sums they miss.
    """
    growth = 2 * math.log(max(*cost.shape[1:], 2))
    if not unit_masses:
        growth += 2 * math.log(_MASS_RANGE)
    limits = torch.finfo(cost.dtype)
    return max(1, int(math.log(limits.eps / limits.tiny) / growth))


def _first_offsets(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets that make the largest exponent of every row and of every column 0."""
    row_offset = _largest(exponent, 2).neg_().transpose(1, 2)
    return row_offset, _largest(exponent + row_offset.transpose(1, 2), 1).neg_()


def _largest(exponent: Tensor, dim: int) -> Tensor:
    largest = exponent.amax(dim, keepdim=True)
    return largest.masked_fill_(largest == -math.inf, 0.0)


def _kernel(exponent: Tensor, row_offset: Tensor, column_offset: Tensor) -> Tensor:
    return (exponent + row_offset.transpose(1, 2)).add_(column_offset).exp_()


def _sums(weights: Tensor, kernel: Tensor, gaps: Tensor | None) -> Tensor:
    if gaps is None:
        return torch.bmm(weights, kernel)
    return torch.baddbmm(gaps, weights, kernel)


def _inverse(mass: Tensor) -> Tensor:
    return mass.reciprocal().masked_fill_(mass == 0, 0.0)


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class _Scalings(NamedTuple):
    """What the forward pass keeps: nothing that has both a row and a column.

    Iterations come in blocks that share one kernel. Within a block an iteration is
    ``u = r / (kernel v)``, then ``v = c / (u kernel)``, and the plan is ``u kernel v``. A block
    starts from ``v = 1``, save the first, whose offsets are not potentials.

    Attributes:
        rows: u of each iteration, (N, B, 1, R).
        columns: v of each iteration, (N, B, 1, C).
        row_offsets: Row offsets in the exponent, of each block, (blocks, B, 1, R).
        column_offsets: Column offsets, (blocks, B, 1, C).
    """

    rows: Tensor
    columns: Tensor
    row_offsets: Tensor
    column_offsets: Tensor

    def kernel(self, problem: _Problem, block: int) -> Tensor:
        return _kernel(problem.exponent, self.row_offsets[block], self.column_offsets[block])

    def first_columns(self, block: int) -> Tensor:
        """The v from which a block starts."""
        offset = self.column_offsets[block]
        return torch.ones_like(offset) if block else offset.neg().exp_()

    def plan(self, kernel: Tensor) -> Tensor:
        """The plan from the last block's kernel."""
        if not len(self.rows):
            return kernel
        return (kernel * self.rows[-1].transpose(1, 2)).mul_(self.columns[-1])


def _scale(problem: _Problem, iterations: int, block_length: int) -> tuple[Tensor, _Scalings]:
    """Run the iterations. Also returns the last block's kernel."""
    row_masses, column_masses = problem.row_masses, problem.column_masses
    blocks = max(1, -(-iterations // block_length))
    kept = _Scalings(
        rows=row_masses.new_empty(iterations, *row_masses.shape),
        columns=row_masses.new_empty(iterations, *column_masses.shape),
        row_offsets=row_masses.new_zeros(blocks, *row_masses.shape),
        column_offsets=row_masses.new_zeros(blocks, *column_masses.shape),
    )
    if iterations:
        kept.row_offsets[0], kept.column_offsets[0] = _first_offsets(problem.exponent)
    each_row, each_column = kept.rows.unbind(), kept.columns.unbind()
    for block in range(blocks):
        start = block * block_length
        if block:
            rows, columns = each_row[start - 1], each_column[start - 1]
            kept.row_offsets[block] = kept.row_offsets[block - 1] + rows.log()
            kept.column_offsets[block] = kept.column_offsets[block - 1] + columns.log()
        kernel = kept.kernel(problem, block)
        transposed = kernel.transpose(1, 2)
        columns = kept.first_columns(block)
        for n in range(start, min(start + block_length, iterations)):
            sums = _sums(columns, transposed, problem.row_gaps)
            rows = torch.div(row_masses, sums, out=each_row[n])
            sums = _sums(rows, kernel, problem.column_gaps)
            columns = torch.div(column_masses, sums, out=each_column[n])
    return kernel, kept


def _through_plan(
    problem: _Problem,
    plan: Tensor,
    plan_grad: Tensor | None,
    value_grad: Tensor | None,
    regularization: float,
    fixed_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry gradients from the plan and its cost to what the plan is made of.

    Where scalings fix the sums of columns, a constant added to a column of the plan's gradient
    changes nothing but the gradient of that column's mass. Taking out the column's mean spares
    later half steps a difference of large numbers.

    Returns:
        Gradients of the exponent (B, R, C), of the logarithm of the last row scaling, and of the
        column masses.
    """
    if plan_grad is None:
        upstream = torch.zeros_like(plan)
    elif problem.forbidden is None:
        upstream = plan_grad.clone()
    else:
        upstream = plan_grad.masked_fill(problem.forbidden, 0.0)
    if value_grad is not None:
        upstream.addcmul_(problem.cost, value_grad.view(-1, 1, 1))
    mean = torch.zeros_like(problem.column_masses)
    if fixed_columns:
        sums = plan.sum(1, keepdim=True).clamp_min_(torch.finfo(plan.dtype).tiny)
        mean = (upstream * plan).sum(1, keepdim=True).div_(sums)
        upstream.sub_(mean)
    flow = upstream.mul_(plan)
    row_grad = flow.sum(2).unsqueeze(1)
    if value_grad is not None:
        # <plan, cost> depends on the cost directly as well; the caller divides by -regularization.
        flow.addcmul_(plan, value_grad.view(-1, 1, 1), value=-regularization)
    return flow, row_grad, mean


def _through_block(
    kernel: Tensor,
    rows: Tensor,
    columns: Tensor,
    first_columns: Tensor,
    inverses: tuple[Tensor, Tensor],
    row_grad: Tensor | None,
    column_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry gradients from the end of a block, with scalings ``rows, columns``, to its start.

    With f_n, g_n the logarithms of u_n, v_n, with P_n the plan after iteration n and Q_n the one
    between its half steps, gradients df, dg pass as

        d exponent -= P_n diag(dg_n / c),    df_n     -= P_n (dg_n / c)
        d exponent -= diag(df_n / r) Q_n,    dg_{n-1} -= Q_n^T (df_n / r)

    As P_n = u_n kernel v_n and Q_n = u_n kernel v_{n-1}, with y_n = v_n dg_n / c and
    x_n = -u_n df_n / r, both have the form of a scaling,

        x_n = (u_n^2 / r) (kernel y_n),      y_{n-1} = (v_{n-1}^2 / c) (x_n kernel)

    and ``d exponent`` is ``-kernel * sum_n (u_n y_n^T - x_n v_{n-1}^T)``: one matrix product.

    Returns:
        That sum (B, R, C), ``column_grad`` at the start of the block, and all x and y.
    """
    row_factors, column_factors = rows.square() * inverses[0], columns.square() * inverses[1]
    from_rows, from_columns = torch.empty_like(rows), torch.empty_like(columns)
    transposed = kernel.transpose(1, 2)
    each_x, each_y = from_rows.unbind(), from_columns.unbind()
    last = len(rows) - 1
    for n in range(last, -1, -1):
        if n == last and row_grad is not None:
            each_y[n].zero_()
            torch.mul(rows[n] * inverses[0], -row_grad, out=each_x[n])
        else:
            factor = column_factors[n] if n < last else columns[n] * inverses[1]
            torch.mul(factor, column_grad, out=each_y[n])
            torch.mul(row_factors[n], torch.bmm(each_y[n], transposed), out=each_x[n])
        column_grad = torch.bmm(each_x[n], kernel)
    columns_before = torch.cat([first_columns.unsqueeze(0), columns[:-1]])
    left = torch.cat([rows, -from_rows]).squeeze(2).permute(1, 2, 0)
    right = torch.cat([from_columns, columns_before]).squeeze(2).transpose(0, 1)
    return torch.bmm(left, right), first_columns * column_grad, from_rows, from_columns


class Scale(torch.autograd.Function):
    """The scalings and their derivative, on (B, R, C)."""

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
        inputs = Inputs(cost, row_mass, column_mass, row_mask, column_mask)
        with _full_precision(cost.device):
            problem = _prepare(inputs, regularization)
            unit_masses = row_mass is None and column_mass is None
            block_length = _block_length(problem.cost, unit_masses)
            kernel, kept = _scale(problem, iterations, block_length)
            plan = kept.plan(kernel)
            value = torch.linalg.vecdot(plan.flatten(1), problem.cost.flatten(1))
            error = (plan.sum(2) - problem.row_target.squeeze(1)).abs_().amax(1)
        ctx.regularization, ctx.block_length = regularization, block_length
        ctx.save_for_backward(*inputs, *kept)
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
        inputs = Inputs(*ctx.saved_tensors[:5])
        kept = _Scalings(*ctx.saved_tensors[5:])
        with _full_precision(kept.rows.device):
            problem = _prepare(inputs, ctx.regularization)
            inverses = _inverse(problem.row_masses), _inverse(problem.column_masses)
            last = len(kept.row_offsets) - 1
            kernel = kept.kernel(problem, last)
            plan = kept.plan(kernel)
            exponent_grad, row_grad, column_mass_grad = _through_plan(
                problem, plan, plan_grad, value_grad, ctx.regularization, len(kept.rows) > 0
            )
            del plan
            column_grad = torch.zeros_like(column_mass_grad)
            row_mass_grad = torch.zeros_like(row_grad)
            for block in range(last if len(kept.rows) else -1, -1, -1):
                if block != last:
                    kernel = kept.kernel(problem, block)
                which = slice(block * ctx.block_length, (block + 1) * ctx.block_length)
                rows, columns = kept.rows[which], kept.columns[which]
                products, column_grad, from_rows, from_columns = _through_block(
                    kernel,
                    rows,
                    columns,
                    kept.first_columns(block),
                    inverses,
                    row_grad if block == last else None,
                    column_grad,
                )
                exponent_grad.addcmul_(kernel, products, value=-1.0)
                if ctx.needs_input_grad[1]:
                    row_mass_grad -= (from_rows * _inverse(rows)).sum(0)
                if ctx.needs_input_grad[2]:
                    column_mass_grad += (from_columns * _inverse(columns)).sum(0)
            exponent_grad.div_(-ctx.regularization)
        return (
            _like(exponent_grad, inputs.cost),
            _like(row_mass_grad.squeeze(1), inputs.row_mass),
            _like(column_mass_grad.squeeze(1), inputs.column_mass),
            *(None,) * 4,
        )


def _like(gradient: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else gradient.to(tensor.dtype)
