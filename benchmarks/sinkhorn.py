"""Time of batched entropic transport, forward and backward into the cost, beside POT and others.

All solve the same problems by the same steps: costs uniform in [0, 1], where nothing underflows,
unit masses, rows scaled first and columns last. POT scales its second side first and keeps its
marginals as fractions of 1, so its loop gets transposed problems, which is also the layout it is
faster in, and its plan is scaled back. Before anything is timed, values and gradients of all are
compared with a float64 solution by POT's solver in the log domain.

Run with `python -m benchmarks.sinkhorn`.
"""

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import ot
import torch
from ot.batch import solve_batch
from tabulate import tabulate
from torch import Tensor

from baselines import sinkhorn as oracle
from benchmarks.measuring import append_row, draw_bars, environment, time_in_turn
from benchmarks.options import note_option, results_option, threads_option
from ctkd.ot.sinkhorn import sinkhorn

OURS, POT = "ctkd", "POT, one by one"
SHAPES = ((8, 128, 128), (8, 64, 96), (4, 512, 512), (1, 16, 16))
BAR_SHAPE, BAR_ITERATIONS, BAR = SHAPES[0], 20, 5.0
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative to the largest value or gradient
MOST_ENTRIES = 2**22  # of all costs; the slowest solver keeps 80 tensors of this size

Solver = Callable[[Tensor], Tensor]  # costs (B, R, C) to transport costs (B,)


class ShapeType(click.ParamType):
    """Problems, rows and columns, such as 8x128x128."""

    name = "BxRxC"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Split it into its three numbers."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", value)
        shape = tuple(int(number) for number in found.groups()) if found else ()
        if not 1 <= math.prod(shape or (0,)) <= MOST_ENTRIES:
            self.fail(
                "a shape is problems x rows x columns, such as 8x128x128, with 1 to "
                f"{MOST_ENTRIES} entries, got {value!r}",
                param,
                ctx,
            )
        return shape


def solvers(regularization: float, iterations: int) -> dict[str, Solver]:
    """By name, ours first."""

    def ours(cost: Tensor) -> Tensor:
        return sinkhorn(cost, regularization=regularization, iterations=iterations).cost

    def ours_masked(cost: Tensor) -> Tensor:
        everything = torch.ones(cost.shape[:2], dtype=torch.bool, device=cost.device)
        return sinkhorn(
            cost, regularization=regularization, iterations=iterations, row_mask=everything
        ).cost

    def pot(cost: Tensor) -> Tensor:
        _, rows, columns = cost.shape
        row_mass, column_mass = cost.new_full((rows,), 1 / rows), cost.new_full((columns,), 1.0)
        column_mass = column_mass / columns
        values = []
        for one in cost:
            plan = ot.sinkhorn(
                column_mass,
                row_mass,
                one.T,
                regularization,
                method="sinkhorn",
                numItermax=iterations,
                stopThr=0,
                warn=False,
            )
            values.append(columns * (plan * one.T).sum())
        return torch.stack(values)

    def pot_batch(method: str) -> Solver:
        def solve(cost: Tensor) -> Tensor:
            found = solve_batch(
                cost,
                reg=regularization,
                max_iter=iterations,
                tol=0.0,
                method=method,
                grad="autodiff",
            )
            return cost.shape[2] * found.value_linear

        return solve

    def published(cost: Tensor) -> Tensor:
        kernel = (-cost / regularization).exp()
        for _ in range(iterations):
            kernel = kernel / kernel.sum(2, keepdim=True)
            kernel = kernel / kernel.sum(1, keepdim=True)
        return (kernel * cost).sum((1, 2))

    def multiplied(cost: Tensor) -> Tensor:
        kernel = (-cost / regularization).exp()
        columns = torch.ones_like(kernel[:, :1])
        for _ in range(iterations):
            rows = (columns @ kernel.mT).reciprocal()
            columns = (rows @ kernel).reciprocal()
        return (rows.mT * kernel * columns * cost).sum((1, 2))

    return {
        OURS: ours,
        f"{OURS}, masked": ours_masked,
        POT: pot,
        "POT, batched": pot_batch("sinkhorn"),
        "POT, batched, in logarithms": pot_batch("log_sinkhorn"),
        "products and autograd": multiplied,
        "whole kernel scaled, as published": published,
    }


def value_and_gradient(solve: Solver, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Transport costs, and the gradient of their sum."""
    cost = cost.detach().requires_grad_()
    values = solve(cost)
    return values.detach(), torch.autograd.grad(values.sum(), cost)[0]


def check(
    functions: dict[str, Solver], cost: Tensor, regularization: float, iterations: int
) -> dict[str, tuple[float, float]]:
    """Largest errors of value and gradient of each solver, relative to the largest of either.

    Raises:
        ClickException: If one does not solve the problem.
    """

    def exact(problems: Tensor) -> Tensor:
        plans = [oracle.plan(one, regularization, iterations) for one in problems]
        return torch.stack([(p * one).sum() for p, one in zip(plans, problems, strict=True)])

    expected = value_and_gradient(exact, cost.double())
    errors = {}
    for name, solve in functions.items():
        found = value_and_gradient(solve, cost)
        value_error, gradient_error = (
            float((one.double() - other).abs().max() / other.abs().max())
            for one, other in zip(found, expected, strict=True)
        )
        # Not a number is not within a tolerance either.
        if not (value_error <= VALUE_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE):
            raise click.ClickException(
                f"{name} is off by {value_error:.1e} in value and {gradient_error:.1e} in "
                f"gradient, where {VALUE_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e} are "
                "allowed, so its time means nothing; was the regularization too small for it?"
            )
        errors[name] = value_error, gradient_error
    return errors


def measure(
    shape: tuple[int, ...], regularization: float, iterations: int, repeats: int
) -> dict[str, Any]:
    """Check and time all solvers on problems of one shape."""
    cost = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    functions = solvers(regularization, iterations)
    errors = check(functions, cost, regularization, iterations)

    def timed(solve: Solver) -> Callable[[], object]:
        return lambda: value_and_gradient(solve, cost)

    name = "x".join(map(str, shape))
    seconds = time_in_turn(
        {label: timed(solve) for label, solve in functions.items()}, repeats, label=name
    )
    medians = {label: statistics.median(all_) for label, all_ in seconds.items()}
    return {
        "shape": name,
        "seconds": {label: round(median, 6) for label, median in medians.items()},
        "fastest": {label: round(min(all_), 6) for label, all_ in seconds.items()},
        "pot_over_it": {label: round(medians[POT] / one, 3) for label, one in medians.items()},
        "errors": {label: [float(f"{e:.2g}") for e in both] for label, both in errors.items()},
    }


def table(case: dict[str, Any]) -> str:
    """One row per solver."""
    rows = [
        [
            name,
            f"{1000 * case['seconds'][name]:.2f}",
            f"{1000 * case['fastest'][name]:.2f}",
            f"{ratio:.2f}",
            *(f"{error:.0e}" for error in case["errors"][name]),
        ]
        for name, ratio in case["pot_over_it"].items()
    ]
    return tabulate(
        rows,
        headers=[case["shape"], "ms", "least", "POT / it", "error of value", "of gradient"],
        colalign=("left", *("right",) * 5),
        disable_numparse=True,
    )


@click.command()
@click.option("--shape", "shapes", multiple=True, type=ShapeType(), help="[four of them]")
@click.option(
    "--iterations", default=BAR_ITERATIONS, show_default=True, type=click.IntRange(1, 1000)
)
@click.option(
    "--regularization",
    default=0.1,
    show_default=True,
    type=click.FloatRange(1e-4, 1e4),
    help="Below 0.02 the others underflow.",
)
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(min=1))
@threads_option
@note_option
@results_option
def main(
    shapes: tuple[tuple[int, ...], ...],
    iterations: int,
    regularization: float,
    repeats: int,
    note: str,
    results: Path,
) -> None:
    """Print the time of transport, forward and backward, beside POT's loop and others."""
    result = {**environment("pot"), "note": note, "dtype": "float32", "iterations": iterations}
    cases = []
    for shape in shapes or SHAPES:
        case = measure(shape, regularization, iterations, repeats)
        click.echo(f"\n{table(case)}\n")
        if shape == BAR_SHAPE and iterations == BAR_ITERATIONS:
            ratio = case["pot_over_it"][OURS]
            holds = "holds" if ratio >= BAR else "does NOT hold"
            click.echo(f"at least {BAR:g} times faster than {POT}: {ratio:.2f}, {holds}\n")
        cases.append(case)
    append_row(
        results / "sinkhorn.jsonl",
        {**result, "regularization": regularization, "repeats": repeats, "cases": cases},
    )
    draw_bars(
        results / "sinkhorn.png",
        {
            f"{case['shape']}, {iterations} iterations, float32": {
                name: 1000 * seconds for name, seconds in case["seconds"].items()
            }
            for case in cases
        },
        across="milliseconds, forward and backward",
    )


if __name__ == "__main__":
    main()
