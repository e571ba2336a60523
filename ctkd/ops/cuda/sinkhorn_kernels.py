# mypy: ignore-errors
"""Kernels of entropic transport and of its costs, for `ctkd.ops.cuda.sinkhorn`.

Transport is computed in the log domain: rows and columns have potentials f and g, and the plan is
``exp(exponent + f + g)``. The exponent is ``-cost / regularization`` less the
largest entry of its row, then less that of its column, so that small potentials go with entries
that matter. These largest entries are the potentials before the first iteration. What takes no part
has minus infinity for a potential.

One program has one problem. An iteration reads the cost once: the rows of a tile get their
potential, and what they send to each column is added up in the same pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["l1_cost", "l1_cost_backward", "sinkhorn", "sinkhorn_backward"]


@triton.jit
def _masses(side, at, inside):
    """Target sums: 1 where no mass is given, 0 where masked or where a mass is not above 0."""
    values = tl.where(inside, 1.0, 0.0)
    if side.mass is not None:
        values = tl.load(side.mass + at, mask=inside, other=0.0).to(tl.float32)
    if side.mask is not None:
        is_open = tl.load(side.mask + at, mask=inside, other=0).to(tl.int32) != 0
        values = tl.where(is_open, values, 0.0)
    return tl.where(values > 0.0, values, 0.0)


@triton.jit
def _logs(masses, flowing):
    """Logarithms of masses, minus infinity where nothing can flow: ``flowing`` is 0 if nowhere."""
    return tl.where(tl.minimum(masses, flowing) > 0.0, tl.log(masses), float("-inf"))


@triton.jit
def _finite(values):
    """The values, 0 instead of minus infinity."""
    return tl.where(values == float("-inf"), 0.0, values)


@triton.jit
def _centered(potentials):
    """Potentials less the largest of them: without it they drift where totals differ."""
    return potentials - _finite(tl.max(potentials, 0))


@triton.jit
def _opened(values, rows, columns):
    """Entries of a tile, 0 where a potential is minus infinity, whatever stands there."""
    in_rows = (rows > float("-inf"))[:, None]
    return tl.where(in_rows & (columns > float("-inf"))[None, :], values, 0.0)


@triton.jit
def _exponents(prices, first_f, first_g, scale):
    """Exponents of a tile from its costs, 0 where nothing can flow."""
    return _opened(prices * scale - first_f[:, None] - first_g[None, :], first_f, first_g)


@triton.jit
def sinkhorn(
    cost, row_side, column_side, answers, iterations, scale,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Potentials of every iteration (B, N + 1, R or C), the plan, its cost and the row error.

    Args:
        cost: (B, R, C).
        row_side: A `ctkd.ops.cuda.sinkhorn.Marginal`.
        column_side: A `ctkd.ops.cuda.sinkhorn.Marginal`.
        answers: Where the plan (B, R, C), its cost (B,) and the row error (B,) go.
        iterations: N.
        scale: -1 / regularization.
        ROWS: R, rounded up.
        TILE: Rows at a time, and C, rounded up.
    """
    HEIGHT: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    plan, value, error = answers
    row_count, column_count = row_side.size, column_side.size
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * row_count * column_count
    plan += problem * row_count * column_count
    row_potentials = row_side.potentials + problem * row_count * (iterations + 1)
    column_potentials = column_side.potentials + problem * column_count * (iterations + 1)

    columns = tl.arange(0, COLUMNS)
    in_columns = columns < column_count
    column_at = problem * column_count + columns
    masses = _masses(column_side, column_at, in_columns)
    all_rows = tl.arange(0, ROWS)
    in_rows = all_rows < row_count
    row_at = problem * row_count + all_rows
    targets = _masses(row_side, row_at, in_rows)
    flowing = tl.minimum(tl.max(masses, 0), tl.max(targets, 0))
    log_masses = _logs(masses, flowing)
    rows_in_tile = tl.arange(0, HEIGHT)

    first_g = tl.where(log_masses > float("-inf"), 0.0, float("-inf"))
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for start in range(0, row_count, HEIGHT):
        rows = start + rows_in_tile
        inside = rows < row_count
        at = problem * row_count + rows
        target = _masses(row_side, at, inside)
        f = _logs(target, flowing)
        first_f = tl.where(f > float("-inf"), 0.0, float("-inf"))
        if iterations > 0:
            places = rows[:, None] * column_count + columns[None, :]
            here = inside[:, None] & in_columns[None, :]
            prices = tl.load(cost + places, mask=here, other=0.0).to(tl.float32)
            exponent = _exponents(prices, first_f, first_g, scale)
            first_f += _finite(tl.max(exponent + first_g[None, :], 1))
            exponent = _exponents(prices, first_f, first_g, scale)
            closed = tl.where(first_f > float("-inf"), 0.0, float("-inf"))
            largest = tl.maximum(largest, tl.max(exponent + closed[:, None], 0))
        tl.store(row_potentials + rows, first_f, mask=inside)
    first_g += _finite(largest)
    tl.store(column_potentials + columns, first_g, mask=in_columns)

    # Other threads have written what these read.
    tl.debug_barrier()
    g = first_g
    for iteration in range(1, iterations + 1):
        g = _centered(g)
        largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, row_count, HEIGHT):
            rows = start + rows_in_tile
            inside = rows < row_count
            at = problem * row_count + rows
            target = _masses(row_side, at, inside)
            f = _logs(target, flowing)
            first_f = tl.load(row_potentials + rows, mask=inside, other=float("-inf"))
            places = rows[:, None] * column_count + columns[None, :]
            here = inside[:, None] & in_columns[None, :]
            prices = tl.load(cost + places, mask=here, other=0.0).to(tl.float32)
            exponent = _exponents(prices, first_f, first_g, scale)
            sent = exponent + g[None, :]
            top = _finite(tl.max(sent, 1))
            sums = tl.sum(tl.exp(sent - top[:, None]), 1)
            f = tl.where(f > float("-inf"), f - top - tl.log(sums), float("-inf"))
            tl.store(row_potentials + iteration * row_count + rows, f, mask=inside)
            sent = exponent + f[:, None]
            larger = tl.maximum(largest, tl.max(sent, 0))
            top = _finite(larger)
            total = total * tl.exp(largest - top) + tl.sum(tl.exp(sent - top[None, :]), 0)
            largest = larger
        g = tl.where(g > float("-inf"), log_masses - largest - tl.log(total), float("-inf"))
        tl.store(column_potentials + iteration * column_count + columns, g, mask=in_columns)

    tl.debug_barrier()
    spent = tl.zeros((), tl.float32)
    missed = tl.zeros((), tl.float32)
    for start in range(0, row_count, HEIGHT):
        rows = start + rows_in_tile
        inside = rows < row_count
        first_f = tl.load(row_potentials + rows, mask=inside, other=float("-inf"))
        at = iterations * row_count + rows
        f = tl.load(row_potentials + at, mask=inside, other=float("-inf"))
        places = rows[:, None] * column_count + columns[None, :]
        here = inside[:, None] & in_columns[None, :]
        prices = tl.load(cost + places, mask=here, other=0.0).to(tl.float32)
        exponent = _exponents(prices, first_f, first_g, scale)
        flow = tl.exp(exponent + f[:, None] + g[None, :])
        tl.store(plan + places, flow, mask=here)
        spent += tl.sum(tl.sum(flow * _opened(prices, f, g), 1), 0)
        at = problem * row_count + rows
        target = _masses(row_side, at, inside)
        missed = tl.maximum(missed, tl.max(tl.abs(tl.sum(flow, 1) - target), 0))
    tl.store(value + problem, spent)
    tl.store(error + problem, missed)


@triton.jit
def _upstream(plan_grad, value_grad, places, here, prices, f, g):
    """Gradient of a tile of the plan, in which that of its cost is contained."""
    gradient = _opened(prices, f, g) * value_grad
    if plan_grad is not None:
        given = tl.load(plan_grad + places, mask=here, other=0.0).to(tl.float32)
        gradient += _opened(given, f, g)
    return gradient


@triton.jit
def sinkhorn_backward(
    cost, row_side, column_side, upstream, cost_grad, iterations, scale, TILE: tl.constexpr
):
    """Gradients of the cost and of the masses, from those of the plan and of its cost.

    With P and Q the plans after an iteration and between its half steps, and with y and x the
    gradients of the logarithms of column and row scalings, divided by the masses,

        d exponent -= P diag(y),    d log rows -= P y
        d exponent -= diag(x) Q,    d log columns of the iteration before = -(x Q)

    The last iteration comes first; it fixes the sums of columns, so the mean over each of them is
    taken out of what comes in.

    Args:
        cost: As of `sinkhorn`.
        row_side: With masses that are not masked.
        column_side: Likewise.
        upstream: A `ctkd.ops.cuda.sinkhorn.Upstream`.
        cost_grad: (B, R, C) what is written.
        iterations: As of `sinkhorn`.
        scale: As of `sinkhorn`.
        TILE: As of `sinkhorn`.
    """
    HEIGHT: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    row_count, column_count = row_side.size, column_side.size
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * row_count * column_count
    cost_grad += problem * row_count * column_count
    plan_grad = upstream.plan
    if plan_grad is not None:
        plan_grad += problem * row_count * column_count
    row_potentials = row_side.potentials + problem * row_count * (iterations + 1)
    column_potentials = column_side.potentials + problem * column_count * (iterations + 1)
    row_mass_grad = row_side.gradient + problem * row_count
    column_mass_grad = column_side.gradient + problem * column_count
    of_value = tl.zeros((), tl.float32)
    if upstream.value is not None:
        of_value = tl.load(upstream.value + problem * upstream.stride).to(tl.float32)

    columns = tl.arange(0, COLUMNS)
    in_columns = columns < column_count
    first_g = tl.load(column_potentials + columns, mask=in_columns, other=float("-inf"))
    column_at = iterations * column_count + columns
    g = tl.load(column_potentials + column_at, mask=in_columns, other=float("-inf"))
    masses = _masses(column_side, problem * column_count + columns, in_columns)
    rows_in_tile = tl.arange(0, HEIGHT)

    mean = tl.zeros((COLUMNS,), tl.float32)
    if iterations > 0:
        sums = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, row_count, HEIGHT):
            rows = start + rows_in_tile
            inside = rows < row_count
            first_f = tl.load(row_potentials + rows, mask=inside, other=float("-inf"))
            at = iterations * row_count + rows
            f = tl.load(row_potentials + at, mask=inside, other=float("-inf"))
            places = rows[:, None] * column_count + columns[None, :]
            here = inside[:, None] & in_columns[None, :]
            prices = tl.load(cost + places, mask=here, other=0.0).to(tl.float32)
            exponent = _exponents(prices, first_f, first_g, scale)
            flow = tl.exp(exponent + f[:, None] + g[None, :])
            given = _upstream(plan_grad, of_value, places, here, prices, f, g)
            mean += tl.sum(given * flow, 0)
            sums += tl.sum(flow, 0)
        mean = tl.where(sums > 0.0, mean / sums, 0.0)

    before = g
    if iterations > 0:
        last = column_potentials + column_at - column_count
        before = _centered(tl.load(last, mask=in_columns, other=float("-inf")))
    of_columns = tl.zeros((COLUMNS,), tl.float32)
    of_column_mass = mean
    for start in range(0, row_count, HEIGHT):
        rows = start + rows_in_tile
        inside = rows < row_count
        first_f = tl.load(row_potentials + rows, mask=inside, other=float("-inf"))
        at = iterations * row_count + rows
        f = tl.load(row_potentials + at, mask=inside, other=float("-inf"))
        places = rows[:, None] * column_count + columns[None, :]
        here = inside[:, None] & in_columns[None, :]
        prices = tl.load(cost + places, mask=here, other=0.0).to(tl.float32)
        exponent = _exponents(prices, first_f, first_g, scale)
        flow = tl.exp(exponent + f[:, None] + g[None, :])
        given = _upstream(plan_grad, of_value, places, here, prices, f, g)
        change = flow * (given - mean[None, :])
        gradient = flow * of_value + change * scale
        x = tl.zeros((HEIGHT,), tl.float32)
        if iterations > 0:
            target = _masses(row_side, problem * row_count + rows, inside)
            x = tl.where(f > float("-inf"), tl.sum(change, 1) / target, 0.0)
            sent = tl.exp(exponent + f[:, None] + before[None, :]) * x[:, None]
            of_columns -= tl.sum(sent, 0)
            gradient -= sent * scale
        tl.store(row_mass_grad + rows, x, mask=inside)
        tl.store(cost_grad + places, gradient, mask=here)

    for behind in range(1, iterations):
        iteration = iterations - behind
        # Other threads have written what these read.
        tl.debug_barrier()
        place = column_potentials + iteration * column_count + columns
        g = tl.load(place, mask=in_columns, other=float("-inf"))
        before = tl.load(place - column_count, mask=in_columns, other=float("-inf"))
        before = _centered(before)
        y = tl.where(g > float("-inf"), of_columns / masses, 0.0)
        of_column_mass += y
        of_columns = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, row_count, HEIGHT):
            rows = start + rows_in_tile
            inside = rows < row_count
            first_f = tl.load(row_potentials + rows, mask=inside, other=float("-inf"))
            at = iteration * row_count + rows
            f = tl.load(row_potentials + at, mask=inside, other=float("-inf"))
            target = _masses(row_side, problem * row_count + rows, inside)
            places = rows[:, None] * column_count + columns[None, :]
            here = inside[:, None] & in_columns[None, :]
            prices = tl.load(cost + places, mask=here, other=0.0).to(tl.float32)
            exponent = _exponents(prices, first_f, first_g, scale) + f[:, None]
            change = tl.exp(exponent + g[None, :]) * y[None, :]
            x = tl.where(f > float("-inf"), -tl.sum(change, 1) / target, 0.0)
            sent = tl.exp(exponent + before[None, :]) * x[:, None]
            of_columns -= tl.sum(sent, 0)
            known = tl.load(row_mass_grad + rows, mask=inside, other=0.0)
            tl.store(row_mass_grad + rows, known + x, mask=inside)
            gradient = tl.load(cost_grad + places, mask=here, other=0.0)
            gradient -= (change + sent) * scale
            tl.store(cost_grad + places, gradient, mask=here)
    tl.store(column_mass_grad + columns, of_column_mass, mask=in_columns)


@triton.jit
def l1_cost(
    first,
    second,
    cost,
    row_count,
    column_count,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """L1 distance of each of (B, R, K) to each of (B, C, K), (B, R, C)."""
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < row_count, columns < column_count
    first += (problem * row_count + rows) * width
    second += (problem * column_count + columns) * width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for entry in range(0, width):
        ours = tl.load(first + entry, mask=in_rows, other=0.0).to(tl.float32)
        theirs = tl.load(second + entry, mask=in_columns, other=0.0).to(tl.float32)
        total += tl.abs(ours[:, None] - theirs[None, :])
    places = (problem * row_count + rows[:, None]) * column_count + columns[None, :]
    tl.store(cost + places, total, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def l1_cost_backward(cost_grad, points, others, gradient, width, TILE: tl.constexpr):
    """Gradient of points (B, N, K) from that of their distances to others (B, M, K).

    Args:
        cost_grad: A `ctkd.ops.cuda.sinkhorn.DistanceGradient`.
        points: `ctkd.ops.cuda.sinkhorn.Points`.
        others: `ctkd.ops.cuda.sinkhorn.Points`.
        gradient: What is written.
        width: K.
        TILE: Points and entries of them at a time.
    """
    POINTS: tl.constexpr = TILE[0]
    ENTRIES: tl.constexpr = TILE[1]
    point_count = points.size
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    entries = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    in_rows, in_width = rows < point_count, entries < width
    here = in_rows[:, None] & in_width[None, :]
    places = (problem * point_count + rows[:, None]) * width + entries[None, :]
    point = tl.load(points.tensor + places, mask=here, other=0.0).to(tl.float32)
    first = others.tensor + problem * others.size * width
    from_points = cost_grad.tensor + problem * cost_grad.outer + rows * cost_grad.from_point
    total = tl.zeros((POINTS, ENTRIES), tl.float32)
    for number in range(0, others.size):
        other = tl.load(first + number * width + entries, mask=in_width, other=0.0).to(tl.float32)
        weight = from_points + number * cost_grad.from_other
        weight = tl.load(weight, mask=in_rows, other=0.0).to(tl.float32)
        gap = point - other[None, :]
        total += tl.where(gap > 0.0, weight[:, None], 0.0)
        total -= tl.where(gap < 0.0, weight[:, None], 0.0)
    tl.store(gradient + places, total, mask=here)
