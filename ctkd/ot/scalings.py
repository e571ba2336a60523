"""The scalings of entropic transport and their derivative, for `ctkd.ot.sinkhorn`.

How it stays fast and finite. One scaling is a matrix-vector product with the kernel
``exp(-cost / regularization)``, which underflows when the regularization is small. The kernel is
therefore held relative to potentials (row and column offsets inside the exponential) and is
computed anew from the current potentials after a number of iterations that depends only on
shape, dtype and whether masses are given (`_block_length`). On a CPU, where it costs little to
look, the kernel is kept to the end once the scalings have come close to rest (`_may_go_on`). The
first offsets make the largest entry of every row and of every column 1.

Not checked here: shapes, dtypes, devices and settings; `ctkd.ot.sinkhorn` does that.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops import can_inspect, full_precision, statistics_dtype

__all__ = ["Inputs", "Problem", "Scale", "prepare", "results_without_entries"]

_MASS_RANGE = 1e6  # the largest ratio of two positive masses that the block length allows for


class Inputs(NamedTuple):
    """Arguments of `ctkd.ot.sinkhorn.sinkhorn`, with a batch dimension."""

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
        scale: -1 / regularization, the factor from costs to exponents.
        row_masses: 0 where nothing can flow.
        column_masses: Likewise.
        row_target: Target sum of a row: its mass even where nothing can flow.
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


def results_without_entries(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Results for problems that have no row or no column by their shape."""
    plan = inputs.cost.to(statistics_dtype(inputs.cost.dtype)).clone()
    ones = plan.new_ones(plan.shape[0], 1, plan.shape[1])
    target = _target(inputs.row_mass, inputs.row_mask, ones).detach().clamp_min(0.0)
    error = torch.nn.functional.pad(target, (1, 0)).amax((1, 2))
    return plan, plan.sum((1, 2)), error


def prepare(inputs: Inputs, regularization: float) -> Problem:
    """Bring inputs into the dtype of the computation, and take out what is masked."""
    cost, row_mass, column_mass, row_mask, column_mask = inputs
    cost = cost.to(statistics_dtype(cost.dtype))
    batch, row_count, column_count = cost.shape
    rows = _target(row_mass, row_mask, cost.new_ones(batch, 1, row_count))
    columns = _target(column_mass, column_mask, cost.new_ones(batch, 1, column_count))
    if row_mass is None and column_mass is None and row_mask is None and column_mask is None:
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


def _block_length(cost: Tensor, unit_masses: bool) -> tuple[int, float]:
    """Iterations for which one kernel serves, and how far logarithms of scalings may go.

    With unit masses, scaling rows after columns multiplies a row by no less than 1 / C and no
    more than R: no entry is above 1, and scaling the columns divided none by more than R. Scaling
    columns after rows multiplies a column by no less than 1 / R and no more than C. So n
    iterations move the square of a scaling, and the product of two, by at most max(R, C)^(2n),
    where other masses put their largest ratio beside R and C. Up to ``eps / tiny`` these are
    finite, and kernel entries that underflow matter less than rounding to the sums they miss.
    """
    limits = torch.finfo(cost.dtype)
    headroom = math.log(limits.eps / limits.tiny) / 2
    masses = 0.0 if unit_masses else math.log(_MASS_RANGE)
    length = int(headroom / (math.log(max(*cost.shape[1:], 2)) + masses))
    return max(1, length), headroom - masses


def _first_kernel(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel whose rows and columns all have 1 as their largest entry, and its offsets."""
    exponent = problem.exponent()
    row_offset = _largest(exponent, 2).neg_().transpose(1, 2)
    column_offset = _largest(exponent.add_(row_offset.transpose(1, 2)), 1).neg_()
    return exponent.add_(column_offset).exp_(), row_offset, column_offset


def _largest(exponent: Tensor, dim: int) -> Tensor:
    largest = exponent.amax(dim, keepdim=True)
    return largest.masked_fill_(largest == -math.inf, 0.0)


def _kernel(problem: Problem, row_offset: Tensor, column_offset: Tensor) -> Tensor:
    return problem.exponent().add_(row_offset.transpose(1, 2)).add_(column_offset).exp_()


def _inverse(mass: Tensor) -> Tensor:
    return mass.reciprocal().masked_fill_(mass == 0, 0.0)


class _Scalings(NamedTuple):
    """State kept for the backward pass: nothing that has both a row and a column.

    Iterations come in blocks that share one kernel; the last may be longer than the others.
    Within a block an iteration is ``u = r / (kernel v)``, then ``v = c / (u kernel)``, and the
    plan is ``u kernel v``. A block starts from ``v = 1``, save the first, whose offsets are not
    potentials.

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

    def kernel(self, problem: Problem, block: int) -> Tensor:
        return _kernel(problem, self.row_offsets[block], self.column_offsets[block])

    def first_columns(self, block: int) -> Tensor:
        """The v from which a block starts."""
        offset = self.column_offsets[block]
        return torch.ones_like(offset) if block else offset.neg().exp_()

    def plan(self, kernel: Tensor) -> Tensor:
        """The plan from the last block's kernel."""
        if not len(self.rows):
            return kernel
        return (kernel * self.rows[-1].transpose(1, 2)).mul_(self.columns[-1])


def _scale(
    problem: Problem, iterations: int, block_length: int, headroom: float
) -> tuple[Tensor, _Scalings]:
    """Run the iterations, in blocks or as `_may_go_on` allows. Also returns the last kernel."""
    row_masses, column_masses = problem.row_masses, problem.column_masses
    every_row = row_masses.new_empty(iterations, *row_masses.shape)
    every_column = row_masses.new_empty(iterations, *column_masses.shape)
    if iterations:
        kernel, row_offset, column_offset = _first_kernel(problem)
    else:
        row_offset, column_offset = torch.zeros_like(row_masses), torch.zeros_like(column_masses)
        kernel = _kernel(problem, row_offset, column_offset)
    row_offsets, column_offsets = [row_offset], [column_offset]
    rows, columns = row_masses, column_offset.neg().exp_()
    zero = row_masses.new_zeros(())
    row_gaps = zero if problem.row_gaps is None else problem.row_gaps
    column_gaps = zero if problem.column_gaps is None else problem.column_gaps
    before, end = columns, block_length
    for n, (next_rows, next_columns) in enumerate(
        zip(every_row.unbind(), every_column.unbind(), strict=True)
    ):
        if n == end and _may_go_on(problem, rows, columns, before, iterations - n, headroom):
            end = iterations
        elif n == end:
            end += block_length
            row_offset, column_offset = row_offset + rows.log(), column_offset + columns.log()
            row_offsets.append(row_offset)
            column_offsets.append(column_offset)
            kernel = _kernel(problem, row_offset, column_offset)
            columns = torch.ones_like(columns)
        sums = torch.baddbmm(row_gaps, columns, kernel.transpose(1, 2))
        rows = torch.div(row_masses, sums, out=next_rows)
        sums = torch.baddbmm(column_gaps, rows, kernel)
        before, columns = columns, torch.div(column_masses, sums, out=next_columns)
    offsets = torch.stack(row_offsets), torch.stack(column_offsets)
    return kernel, _Scalings(every_row, every_column, *offsets)


def _may_go_on(
    problem: Problem,
    rows: Tensor,
    columns: Tensor,
    before: Tensor,
    iterations: int,
    headroom: float,
) -> bool:
    """True if the kernel serves so many more iterations; False where reading a value is costly.

    An iteration takes v to ``c / (kernel^T (r / (kernel v)))``. That is monotone and homogeneous:
    if the last one multiplied every entry of v by at most m, none to come does so by more. The
    same holds from below, and for u.
    """
    # Tensors of another class, such as those that trace a graph, may hold no values.
    if not can_inspect(rows) or type(rows) is not Tensor:
        return False
    if problem.row_gaps is not None and problem.column_gaps is not None:
        rows, gaps = rows + problem.row_gaps, problem.column_gaps
        columns, before = columns + gaps, before + gaps
    step, *moved = (float(t.log().abs_().max()) for t in (columns / before, rows, columns))
    return all(move + iterations * step <= headroom for move in moved)  # False for NaN


def _through_plan(
    problem: Problem,
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
    upstream = torch.zeros_like(plan) if plan_grad is None else problem.without_masked(plan_grad)
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
    torch.mul(columns[-1], inverses[1], out=column_factors[-1])
    each = [t.unbind()[::-1] for t in (row_factors, column_factors, from_rows, from_columns)]
    for row_factor, column_factor, x, y in zip(*each, strict=True):
        if row_grad is not None:
            y.zero_()
            torch.mul(rows[-1] * inverses[0], -row_grad, out=x)
            row_grad = None
        else:
            torch.mul(column_factor, column_grad, out=y)
            torch.mul(row_factor, torch.bmm(y, transposed), out=x)
        column_grad = torch.bmm(x, kernel)
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
        with full_precision(cost.device):
            problem = prepare(inputs, regularization)
            unit_masses = row_mass is None and column_mass is None
            block_length, headroom = _block_length(problem.cost, unit_masses)
            kernel, kept = _scale(problem, iterations, block_length, headroom)
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
        # Once: a checkpoint hands each saved tensor out a single time.
        saved = ctx.saved_tensors
        inputs, kept = Inputs(*saved[:5]), _Scalings(*saved[5:])
        with full_precision(kept.rows.device):
            problem = prepare(inputs, ctx.regularization)
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
                start = block * ctx.block_length
                which = slice(start, start + ctx.block_length if block < last else None)
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
        row_mass_grad, column_mass_grad = row_mass_grad.squeeze(1), column_mass_grad.squeeze(1)
        return (
            exponent_grad.to(inputs.cost.dtype),
            None if inputs.row_mass is None else row_mass_grad.to(inputs.row_mass.dtype),
            None if inputs.column_mass is None else column_mass_grad.to(inputs.column_mass.dtype),
            *(None,) * 4,
        )
