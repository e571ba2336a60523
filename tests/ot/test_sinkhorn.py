"""Sinkhorn against POT, against a loop in the log domain, and against exact transport."""

import math

import ot
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctkd.errors import BatchError, SettingError
from ctkd.ot.sinkhorn import SinkhornResult, sinkhorn

SHAPES = [(6, 6), (5, 9), (9, 4), (1, 7), (7, 1)]
ITERATIONS = [1, 5, 20]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(*shape, generator=generator, dtype=torch.float64)


def pot_plan(cost: Tensor, regularization: float, iterations: int) -> Tensor:
    """Unit masses on both sides; POT wants masses that sum to 1 and scales columns first."""
    rows, columns = cost.shape
    row_mass, column_mass = cost.new_full((rows,), 1 / rows), cost.new_full((columns,), 1 / columns)
    return columns * pot_plan_with(cost, regularization, iterations, row_mass, column_mass)


def pot_plan_with(
    cost: Tensor, regularization: float, iterations: int, row_mass: Tensor, column_mass: Tensor
) -> Tensor:
    return ot.sinkhorn(
        column_mass, row_mass, cost.T, regularization, numItermax=iterations, stopThr=0, warn=False
    ).T


def log_domain_plan(
    cost: Tensor,
    regularization: float,
    iterations: int,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
) -> Tensor:
    exponent = -cost / regularization
    log_rows = torch.zeros_like(cost[..., 0]) if row_mass is None else row_mass.log()
    log_columns = torch.zeros_like(cost[..., 0, :]) if column_mass is None else column_mass.log()
    rows, columns = torch.zeros_like(log_rows), torch.zeros_like(log_columns)
    for _ in range(iterations):
        rows = log_rows - torch.logsumexp(exponent + columns[..., None, :], -1)
        columns = log_columns - torch.logsumexp(exponent + rows[..., :, None], -2)
    return (exponent + rows[..., :, None] + columns[..., None, :]).exp()


def gradient(plan: Tensor, value: Tensor, cost: Tensor, seed: int = 5) -> Tensor:
    """Of a random linear function of the plan plus a multiple of the transport cost."""
    weights = (random(*plan.shape, seed=seed) - 0.5).to(plan.dtype)
    return torch.autograd.grad((plan * weights).sum() + 0.3 * value.sum(), cost)[0]


def result_and_gradient(cost: Tensor, **settings: object) -> tuple[SinkhornResult, Tensor]:
    leaf = cost.clone().requires_grad_()
    result = sinkhorn(leaf, **settings)  # type: ignore[arg-type]
    return result, gradient(result.plan, result.cost, leaf)


def oracle_and_gradient(plan_of, cost: Tensor) -> tuple[Tensor, Tensor]:
    leaf = cost.clone().requires_grad_()
    plan = plan_of(leaf)
    return plan, gradient(plan, (plan * leaf).sum(), leaf)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_plan_cost_and_gradient_are_those_of_pot(shape, iterations):
    cost = random(*shape, scale=2.0)
    result, grad = result_and_gradient(cost, regularization=0.1, iterations=iterations)
    plan, expected = oracle_and_gradient(lambda c: pot_plan(c, 0.1, iterations), cost)
    torch.testing.assert_close(result.plan, plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.cost, (plan * cost).sum(), rtol=0, atol=1e-9)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(result.plan.sum(0), torch.ones(shape[1]).double())


@pytest.mark.parametrize(("shape", "iterations"), [*zip(SHAPES, [1, 5, 20, 1, 20], strict=True)])
def test_masses_are_those_of_pot_with_their_gradients(shape, iterations):
    cost = random(*shape).requires_grad_()
    row_mass = (random(shape[0], seed=1) + 0.1).requires_grad_()
    column_mass = (random(shape[1], seed=2) + 0.1).requires_grad_()
    leaves = (cost, row_mass, column_mass)
    masses = {"row_mass": row_mass, "column_mass": column_mass}
    result = sinkhorn(cost, regularization=0.1, iterations=iterations, **masses)
    plan = pot_plan_with(cost, 0.1, iterations, row_mass, column_mass)
    torch.testing.assert_close(result.plan, plan, rtol=0, atol=1e-9)
    weights = random(*shape, seed=3)
    actual = torch.autograd.grad((result.plan * weights).sum() + result.cost, leaves)
    expected = torch.autograd.grad((plan * (weights + cost)).sum(), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("iterations", [0, 1, 3, 25])
def test_gradcheck(iterations):
    cost = random(2, 3, 4).requires_grad_()
    row_mass = (random(2, 3, seed=1) + 0.2).requires_grad_()
    column_mass = (random(2, 4, seed=2) + 0.2).requires_grad_()
    row_mask = torch.tensor([[True, True, True], [True, False, True]])

    def masked(cost: Tensor, row_mass: Tensor, column_mass: Tensor) -> tuple[Tensor, Tensor]:
        result = sinkhorn(
            cost,
            regularization=0.2,
            iterations=iterations,
            row_mass=row_mass,
            column_mass=column_mass,
            row_mask=row_mask,
        )
        return result.plan, result.cost

    assert torch.autograd.gradcheck(masked, (cost, row_mass, column_mass))

    def unmasked(cost: Tensor) -> tuple[Tensor, Tensor]:
        result = sinkhorn(cost, regularization=0.2, iterations=iterations)
        return result.plan, result.cost

    assert torch.autograd.gradcheck(unmasked, (cost,))


def test_one_iteration_by_hand():
    cost = torch.tensor([[0.0, math.log(2)], [0.0, 0.0]], dtype=torch.float64)
    result = sinkhorn(cost, regularization=1.0, iterations=1)
    # K = (1, 1/2), (1, 1); rows: (2/3, 1/3), (1/2, 1/2); columns are divided by 7/6 and 5/6.
    plan = torch.tensor([[4 / 7, 2 / 5], [3 / 7, 3 / 5]], dtype=torch.float64)
    torch.testing.assert_close(result.plan, plan)
    assert float(result.cost) == pytest.approx(0.4 * math.log(2))
    assert float(result.marginal_error) == pytest.approx(1 / 35)
    assert not result.marginal_error.requires_grad


def test_no_iteration_is_the_kernel():
    cost = random(2, 3, 4)
    result, grad = result_and_gradient(cost, regularization=0.5, iterations=0)
    _, expected = oracle_and_gradient(lambda c: (-c / 0.5).exp(), cost)
    torch.testing.assert_close(result.plan, (-cost / 0.5).exp())
    torch.testing.assert_close(grad, expected)


def test_small_regularization_approaches_exact_transport():
    size = 12
    cost = random(size, size)
    mass = torch.full((size,), 1 / size, dtype=torch.float64)
    exact = size * float(ot.emd2(mass, mass, cost))
    gaps = []
    for regularization in (5e-2, 5e-3):
        result = sinkhorn(cost, regularization=regularization, iterations=5000)
        assert float(result.marginal_error) < 1e-3
        # Moving what the rows miss costs at most this, as no cost is above 1. The entropy of a
        # plan with unit columns lies between 0 and that of the constant plan.
        slack = size * float(result.marginal_error)
        gaps.append(float(result.cost) - exact)
        assert -slack <= gaps[-1] <= regularization * size * math.log(size) + slack
    assert gaps[1] < 0.1 * gaps[0]


RAGGED = [(5, 7), (3, 2), (1, 7), (5, 1), (4, 0), (0, 3), (0, 0)]


def ragged_batch(garbage: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = torch.tensor(RAGGED).T
    row_mask = torch.arange(5) < rows[:, None]
    column_mask = torch.arange(7) < columns[:, None]
    allowed = row_mask[:, :, None] & column_mask[:, None, :]
    return random(len(RAGGED), 5, 7).masked_fill(~allowed, garbage), row_mask, column_mask


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300, -1e300])
@pytest.mark.parametrize("with_masses", [False, True])
def test_a_ragged_batch_is_the_loop_over_its_problems(garbage, with_masses):
    cost, row_mask, column_mask = ragged_batch(garbage)
    weights = random(*cost.shape, seed=3).masked_fill(cost.isnan(), math.nan)
    masses = {
        "row_mass": (random(len(RAGGED), 5, seed=1) + 0.5).masked_fill(~row_mask, garbage),
        "column_mass": (random(len(RAGGED), 7, seed=2) + 0.5).masked_fill(~column_mask, garbage),
    }
    leaves = [cost, *masses.values()] if with_masses else [cost]
    for leaf in leaves:
        leaf.requires_grad_()
    settings = {"regularization": 0.1, "iterations": 20}
    given = masses if with_masses else {}
    batch = sinkhorn(cost, row_mask=row_mask, column_mask=column_mask, **settings, **given)
    upstream = (weights, torch.full_like(batch.cost, 0.3))
    grads = torch.autograd.grad((batch.plan, batch.cost), leaves, upstream)
    for index, (rows, columns) in enumerate(RAGGED):
        part = (index, slice(rows), slice(columns))
        ends = (part, part[:2], part[::2])
        singles = [
            leaf.detach()[end].requires_grad_() for leaf, end in zip(leaves, ends, strict=False)
        ]
        given = dict(zip(masses, singles[1:], strict=False))
        alone = sinkhorn(singles[0], **settings, **given)
        torch.testing.assert_close(batch.plan[part], alone.plan)
        torch.testing.assert_close(batch.cost[index], alone.cost)
        torch.testing.assert_close(batch.marginal_error[index], alone.marginal_error)
        total = (alone.plan * weights[part]).sum() + 0.3 * alone.cost
        expected = torch.autograd.grad(total, singles, materialize_grads=True)
        for grad, end, single in zip(grads, ends, expected, strict=False):
            torch.testing.assert_close(grad[end], single)
            outside = grad[index].clone()
            outside[end[1:]] = 0.0
            assert not outside.any()
        assert batch.plan[index].count_nonzero() == rows * columns


def test_a_problem_without_columns_moves_nothing():
    cost, row_mask, column_mask = ragged_batch(math.nan)
    result = sinkhorn(
        cost, regularization=0.1, iterations=20, row_mask=row_mask, column_mask=column_mask
    )
    assert result.plan[4:].count_nonzero() == 0
    assert result.cost[4:].tolist() == [0.0, 0.0, 0.0]
    assert result.marginal_error[4:].tolist() == [1.0, 0.0, 0.0]


def test_a_mass_of_zero_is_a_mask():
    cost, mass = random(1, 4, 5), torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    settings = {"regularization": 0.1, "iterations": 7}
    by_mass, mass_grad = result_and_gradient(cost, row_mass=mass, **settings)
    by_mask, mask_grad = result_and_gradient(cost, row_mask=mass > 0, **settings)
    torch.testing.assert_close(by_mass.plan, by_mask.plan)
    torch.testing.assert_close(mass_grad, mask_grad)
    assert by_mass.plan[0, 1].count_nonzero() == 0


def hard_costs() -> dict[str, Tensor]:
    line, bunched = random(40, seed=1).sort()[0] * 2, random(70, seed=2).sort()[0] ** 4 * 2
    chain = torch.full((40, 40), 2.0, dtype=torch.float64)
    chain.diagonal().zero_()
    chain.diagonal(-1).fill_(-0.03)  # potentials drift along the chain for hundreds of iterations
    contested = torch.full((40, 40), 2.0, dtype=torch.float64)
    contested[:, 0] = torch.linspace(0, 1, 40)
    return {
        "uniform": random(30, 45, scale=2.0),
        "line": (line[:, None] - bunched).abs(),
        "chain": chain,
        "contested": contested,
        "one row": random(1, 1000, scale=2.0),
        "two rows": random(2, 500, scale=2.0),
        "one column": random(1000, 1, scale=2.0),
    }


# Any two of dtype, cost, iterations and masses meet in all their values.
@pytest.mark.parametrize(
    ("dtype", "name", "iterations", "masses"),
    [
        ((torch.float32, torch.float64)[(i + j) % 2], name, iterations, (i + (j == 2)) % 2 == 1)
        for i, name in enumerate(hard_costs())
        for j, iterations in enumerate((1, 20, 200))
    ],
)
def test_stable_at_small_regularization(dtype, name, iterations, masses):
    regularization = 1e-3
    cost = hard_costs()[name].to(dtype)
    given = {}
    if masses:
        given["row_mass"] = (10 ** random(cost.shape[0], seed=3, scale=-6.0)).to(dtype)
        given["column_mass"] = (10 ** random(cost.shape[1], seed=4, scale=-6.0)).to(dtype)
    result, grad = result_and_gradient(
        cost, regularization=regularization, iterations=iterations, **given
    )
    wide = {key: value.double() for key, value in given.items()}
    plan, expected = oracle_and_gradient(
        lambda c: log_domain_plan(c, regularization, iterations, **wide), cost.double()
    )
    # An exponent of 2 / 1e-3 is rounded by 2000 eps, and so is every sum that a step takes.
    tolerance = 8 * torch.finfo(dtype).eps * 2 / regularization
    assert (result.plan - plan).abs().max() < tolerance
    # Gradients are differences of terms of size 1 / regularization, which a float64 oracle rounds.
    largest = max(1.0, float(expected.abs().max()))
    scale = 1 / regularization if dtype == torch.float64 else largest
    assert (grad - expected).abs().max() < tolerance * scale


@pytest.mark.parametrize("shape", [(8, 1, 50), (8, 30, 30), (2, 128, 90)])
def test_float32_agrees_with_float64(shape):
    cost = random(*shape, scale=2.0).float()
    settings = {"regularization": 0.1, "iterations": 20}
    narrow, narrow_grad = result_and_gradient(cost, **settings)
    wide, wide_grad = result_and_gradient(cost.double(), **settings)
    assert narrow.plan.dtype == narrow.cost.dtype == torch.float32
    torch.testing.assert_close(narrow.plan.double(), wide.plan, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(narrow.cost.double(), wide.cost, rtol=1e-5, atol=0)
    torch.testing.assert_close(narrow_grad.double(), wide_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    cost = random(2, 9, 11, scale=2.0).to(dtype)
    settings = {"regularization": 0.1, "iterations": 20}
    expected, expected_grad = result_and_gradient(cost.float(), **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result, grad = result_and_gradient(cost, **settings)
        in_float32, _ = result_and_gradient(cost.float(), **settings)
    assert result.plan.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(result.plan, expected.plan, rtol=0, atol=0)
    torch.testing.assert_close(in_float32.plan, expected.plan, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_where_no_value_can_be_read(dtype):
    cost = torch.empty(2, 3, 4, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    result = sinkhorn(cost, regularization=0.1, iterations=20, row_mask=mask)
    (result.plan.sum() + result.cost.sum()).backward()
    assert result.plan.shape == cost.grad.shape == (2, 3, 4)
    assert result.cost.shape == result.marginal_error.shape == (2,)


def saved_bytes(cost: Tensor, iterations: int) -> int:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sinkhorn(cost.requires_grad_(), regularization=0.1, iterations=iterations)
    return sum(sizes)


def test_an_iteration_saves_its_scalings_only():
    cost = random(2, 30, 40)
    scalings = 2 * (30 + 40) * 8
    assert saved_bytes(cost, 50) - saved_bytes(cost, 10) == 40 * scalings
    # One kernel serves all 10 iterations here, so there is one pair of offsets.
    assert saved_bytes(cost, 10) == cost.nbytes + 11 * scalings


def test_no_tensor_grows_with_iterations_times_rows_times_columns():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    cost = random(2, 60, 70).requires_grad_()
    with Largest() as largest:
        sinkhorn(cost, regularization=0.1, iterations=25).plan.square().sum().backward()
    assert largest.numel == 2 * 60 * 70


def test_leaves_its_inputs_alone_and_accepts_any_layout():
    cost, settings = random(2, 5, 4).transpose(1, 2), {"regularization": 0.1, "iterations": 20}
    before = cost.clone()
    result, grad = result_and_gradient(cost, **settings)
    other, other_grad = result_and_gradient(cost.contiguous(), **settings)
    torch.testing.assert_close(cost, before, rtol=0, atol=0)
    torch.testing.assert_close(result.plan, other.plan)
    torch.testing.assert_close(grad, other_grad)
    assert not sinkhorn(cost, **settings).plan.requires_grad


def test_only_first_derivatives():
    cost = random(3, 3).requires_grad_()
    plan = sinkhorn(cost, regularization=0.1, iterations=2).plan
    (grad,) = torch.autograd.grad(plan.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_shapes(shape):
    result, grad = result_and_gradient(torch.zeros(shape), regularization=0.1, iterations=3)
    assert result.plan.shape == grad.shape == shape
    assert result.cost.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"regularization": 0}, SettingError, "regularization must be a number above 0, got 0"),
        ({"regularization": math.inf}, SettingError, "above 0, got inf"),
        ({"regularization": "0.1"}, SettingError, "above 0, got '0.1'"),
        ({"iterations": -1}, SettingError, "iterations must be an integer, 0 or more, got -1"),
        ({"iterations": 2.0}, SettingError, "0 or more, got 2.0"),
        ({"iterations": True}, SettingError, "0 or more, got True"),
        ({"cost": torch.zeros(3)}, BatchError, r"cost must have shape .*, got \(3,\)"),
        ({"cost": torch.zeros(2, 3, 4).long()}, BatchError, "cost must have dtype .*int64"),
        ({"row_mass": torch.ones(3)}, BatchError, r"row_mass must have shape \(2, 3\)"),
        ({"column_mass": torch.ones(2, 3)}, BatchError, r"column_mass must have shape \(2, 4\)"),
        ({"row_mask": torch.ones(2, 3)}, BatchError, "row_mask must have dtype torch.bool"),
        ({"column_mask": torch.ones(2, 4).int()}, BatchError, "column_mask must have dtype"),
        ({"row_mass": torch.ones(2, 3, device="meta")}, BatchError, "device of cost, cpu"),
    ],
)
def test_wrong_settings_and_tensors_are_named(change, error, message):
    arguments = {"cost": torch.zeros(2, 3, 4), "regularization": 0.1, "iterations": 20}
    arguments.update(change)
    with pytest.raises(error, match=message) as caught:
        sinkhorn(arguments.pop("cost"), **arguments)
    assert "\n" not in str(caught.value)
