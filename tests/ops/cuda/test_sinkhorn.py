"""Kernels of transport and of its costs, run by the interpreter of Triton."""

import pytest
import torch
from torch import Tensor

from ctkd import ops
from ctkd.ops import cost_of
from ctkd.ops.cuda import sinkhorn as kernels
from ctkd.ot.sinkhorn import l1_cost, sinkhorn

# numpy, which runs the kernels, warns of logarithms of 0 and of differences of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

MASSES = ("row_mass", "column_mass")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(*shape, generator=generator, dtype=torch.float64)


def outcome(given: dict, dtype: torch.dtype, with_plan: bool = True, **settings) -> list[Tensor]:
    """Results, and gradients of cost and masses."""
    given = {
        name: one.clone().to(dtype).requires_grad_() if one.is_floating_point() else one
        for name, one in given.items()
    }
    result = sinkhorn(**given, **settings)
    weights = torch.linspace(-1.0, 2.0, len(result.cost)).to(dtype)
    total = (result.cost * weights).sum()
    if with_plan:
        total = total + (result.plan * random(*result.plan.shape, seed=9).to(dtype)).sum()
    leaves = [one for one in given.values() if one.requires_grad]
    gradients = torch.autograd.grad(total, leaves)
    return [result.plan.detach(), result.cost.detach(), result.marginal_error, *gradients]


@pytest.fixture
def by_kernels(monkeypatch):
    """Have kernels serve tensors of a CPU, and count the calls that they get."""
    calls = []

    def asked(_: str, *tensors: Tensor):
        calls.append(tensors)
        return None if tensors[0].dtype == torch.float64 else kernels

    monkeypatch.setattr("ctkd.ot.sinkhorn.kernels_for", asked)
    return calls


def mask(length: int, *lengths: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths).unsqueeze(1)


def problems() -> dict[str, dict]:
    """By name: inputs and settings, and how far a result may be off, in roundings of its size."""
    plain = {"regularization": 0.1, "iterations": 5}
    # The third has no column that is open, the fourth no row.
    ragged = {"row_mask": mask(37, 37, 20, 5, 0), "column_mask": mask(21, 3, 21, 0, 4)}
    masses = {"row_mass": random(4, 37, seed=1) + 0.1, "column_mass": random(4, 21, seed=2) + 0.1}
    masses["row_mass"][0, 3] = masses["column_mass"][1, 0] = 0.0
    line, bunched = random(40, seed=1).sort()[0], random(20, seed=2).sort()[0] ** 4
    return {
        "ragged": {"cost": random(4, 37, 21, scale=2.0), **ragged, **plain},
        "masses": {"cost": random(4, 37, 21), **masses, **ragged, **plain},
        "drift": {"cost": random(1, 3, 70, scale=2.0), **plain, "iterations": 20},
        "narrow": {"cost": (line[:, None] - bunched).abs()[None], **plain, "regularization": 1e-3},
        "one row": {"cost": random(2, 1, 9), **plain},
        "one column": {"cost": random(2, 9, 1), **plain},
        "kernel": {"cost": random(4, 37, 21), **masses, **ragged, **plain, "iterations": 0},
        "once": {"cost": random(1, 6, 5), **plain, "iterations": 1},
    }


@pytest.mark.parametrize("name", problems())
def test_float64_says_the_same(name, by_kernels):
    given = problems()[name]
    settings = {key: given.pop(key) for key in ("regularization", "iterations")}
    expected = outcome(given, torch.float64, **settings)
    found = outcome(given, torch.float32, **settings)
    assert len(by_kernels) == 2
    # An exponent is rounded by its size, and gradients are differences of terms of that size.
    size = max(1.0, given["cost"].max().item() / settings["regularization"] / 20)
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-5 * size * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


def test_a_gradient_of_the_cost_alone(by_kernels):
    given, settings = {"cost": random(2, 7, 6)}, {"regularization": 0.1, "iterations": 3}
    expected = outcome(given, torch.float64, with_plan=False, **settings)
    found = outcome(given, torch.float32, with_plan=False, **settings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -3e38])
def test_what_is_masked_may_hold_anything(garbage, by_kernels):
    rows, columns = mask(5, 3, 5), mask(7, 7, 2)
    allowed = rows[:, :, None] & columns[:, None, :]
    settings = {"regularization": 0.1, "iterations": 3, "row_mask": rows, "column_mask": columns}
    clean = random(2, 5, 7).float().masked_fill(~allowed, 0.0)
    results = []
    for cost in (clean, clean.masked_fill(~allowed, garbage)):
        leaf = cost.requires_grad_()
        result = sinkhorn(leaf, **settings)
        upstream = random(2, 5, 7, seed=1).float().masked_fill(~allowed & cost.isnan(), garbage)
        gradient = torch.autograd.grad((result.plan, result.cost), leaf, (upstream, torch.ones(2)))
        results.append((result.plan.detach(), result.cost.detach(), *gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not results[1][2][~allowed].any()


def test_half_precision_is_computed_in_float32(by_kernels):
    cost = random(1, 4, 5).bfloat16().requires_grad_()
    result = sinkhorn(cost, regularization=0.1, iterations=2)
    result.cost.sum().backward()
    assert result.plan.dtype == torch.float32 and cost.grad.dtype == torch.bfloat16
    expected = sinkhorn(cost.detach().double(), regularization=0.1, iterations=2)
    torch.testing.assert_close(result.plan.double(), expected.plan, rtol=1e-5, atol=1e-6)


def test_problems_of_no_batch_and_those_too_large_for_a_program(by_kernels):
    settings = {"regularization": 0.1, "iterations": 2}
    assert sinkhorn(torch.zeros(0, 3, 4), **settings).plan.shape == (0, 3, 4)
    size = kernels.MOST_POSITIONS
    assert kernels.fits(torch.empty(1, size, size, device="meta"))
    assert not kernels.fits(torch.empty(1, 1, size + 1, device="meta"))


# Tiles are 32 by 32, and 16 by the next power of two up to 64.
@pytest.mark.parametrize("shape", [(2, 35, 33, 5), (1, 1, 40, 67), (2, 3, 0, 4)])
def test_costs_and_their_gradients(shape, by_kernels):
    batch, rows, columns, width = shape
    first, second = random(batch, rows, width), random(batch, columns, width, seed=1)
    if columns:
        second[0, 0] = first[0, 0]  # The gradient of a distance of 0 is 0.
    weights = random(batch, columns, rows, seed=2).mT
    answers = []
    for dtype in (torch.float64, torch.float32):
        leaves = first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()
        cost = l1_cost(*leaves)
        answers.append((cost, *torch.autograd.grad((cost * weights.to(dtype)).sum(), leaves)))
    assert len(by_kernels) == 2
    for one, other in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_operators_are_those_that_torch_expects():
    cost, row_mass = random(2, 5, 4).float(), random(2, 5).float() + 0.1
    row_mask = mask(5, 3, 5)
    operators = torch.ops.ctkd
    given = (cost, row_mass, None, row_mask, None, 0.1, 2)
    _, value, _, *potentials = operators.sinkhorn(*given)
    backward = (cost, row_mass, None, *potentials, None, torch.ones_like(value), 0.1)
    points, others = random(2, 3, 6).float(), random(2, 4, 6).float()
    gradient = random(2, 4, 3).float()
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (operators.sinkhorn, given),
        (operators.sinkhorn_backward, backward),
        (operators.l1_cost, (points, others)),
        (operators.l1_cost_backward, (gradient, points, others)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)
        cost_there = cost_of(operator.default, arguments, {})
        assert cost_there.launches == 1 and cost_there.bytes_moved > 0


def test_the_interpreter_serves_only_where_it_is_asked(monkeypatch):
    cost = torch.zeros(1, 2, 3)
    assert ops.kernels_for("sinkhorn", cost) is None
    with ops.use_backend("cuda"):
        assert ops.kernels_for("sinkhorn", cost) is kernels
        assert ops.kernels_for("sinkhorn", cost.double()) is None
        monkeypatch.setattr(ops.cuda, "DEVICES", ops.cuda.DEVICES - {"cpu"})
        assert ops.kernels_for("sinkhorn", cost) is None
