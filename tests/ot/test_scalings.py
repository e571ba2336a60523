"""How long one kernel serves, and that nothing depends on it but the time."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ctkd.ot import scalings
from ctkd.ot.sinkhorn import sinkhorn


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def plan_and_gradient(cost: Tensor, **settings) -> tuple[Tensor, Tensor]:
    cost = cost.detach().requires_grad_()
    result = sinkhorn(cost, **settings)
    (result.cost.sum() + result.plan.square().sum()).backward()
    return result.plan.detach(), cost.grad


class CountedKernels(TorchDispatchMode):
    """Counts exponentials of the size of a cost."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.exp_.default and out.numel() == self.size
        return out


def kernels(cost: Tensor, **settings) -> int:
    with CountedKernels(cost.numel()) as counted:
        sinkhorn(cost, **settings)
    return counted.count


def renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where no value is read."""
    monkeypatch.setattr(scalings, "_may_go_on", lambda *_: False)


def test_one_kernel_serves_where_scalings_have_come_to_rest(monkeypatch):
    cost, settings = random(2, 128, 128), {"regularization": 0.1, "iterations": 40}
    assert kernels(cost, **settings) == 1
    renewed(monkeypatch)
    assert kernels(cost, **settings) == 6


def test_a_kernel_is_renewed_where_scalings_move_far():
    # Unlike totals: every iteration multiplies the columns by 64 once more.
    assert kernels(random(2, 2, 128), regularization=0.1, iterations=40) == 6
    # Potentials that travel further than float32 reaches.
    line = random(1, 64).sort()[0]
    cost = (line.mT - line.square()).abs()[None]
    assert kernels(cost, regularization=1e-3, iterations=40) > 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 128, 128), (2, 96, 64), (1, 16, 16)])
def test_a_kept_kernel_and_renewed_ones_agree(monkeypatch, shape, masked):
    settings = {"regularization": 0.1, "iterations": 20}
    if masked:
        settings["row_mask"] = torch.arange(shape[1]).expand(shape[:2]) < shape[1] - 3
    cost = random(*shape, scale=2.0)
    kept = plan_and_gradient(cost, **settings)
    exact = plan_and_gradient(cost.double(), **settings)
    renewed(monkeypatch)
    for one, other, expected in zip(kept, plan_and_gradient(cost, **settings), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-6)


def test_how_far_scalings_will_move_is_foretold():
    # The smallest room with which the kernel is kept must hold all scalings to come.
    cost = random(1, 20, 35, scale=2.0)
    problem = scalings.prepare(scalings.Inputs(cost, None, None, None, None), 0.1)
    for room in range(1, 60):
        _, found = scalings._scale(problem, 12, 3, float(room))
        if len(found.row_offsets) == 1:
            break
    furthest = max(found.rows.log().abs().max(), found.columns.log().abs().max())
    assert 2 < room < 59
    assert furthest <= room


def test_costs_that_are_no_numbers_give_no_exception():
    plan, _ = plan_and_gradient(random(1, 128, 128) / 0.0, regularization=0.1, iterations=20)
    assert plan.isnan().any()


def test_a_masked_entry_of_the_plan_may_have_any_gradient():
    cost, mask = random(2, 5, 6).requires_grad_(), torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    plan = sinkhorn(cost, regularization=0.1, iterations=3, column_mask=mask).plan
    plan.square().sum().backward(retain_graph=True)
    expected, cost.grad = cost.grad, None
    given = (2 * plan.detach()).masked_fill(~mask[:, None], float("nan"))
    plan.backward(given)
    torch.testing.assert_close(cost.grad, expected, rtol=0, atol=0)


def test_the_gradient_that_comes_in_is_left_alone():
    cost = random(2, 5, 6).requires_grad_()
    given = random(2, 5, 6, scale=3.0)
    before = given.clone()
    sinkhorn(cost, regularization=0.1, iterations=3).plan.backward(given)
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_tensors_without_values_pass_on_a_cpu_too():
    with FakeTensorMode():
        cost = torch.empty(2, 128, 128, requires_grad=True)
        result = sinkhorn(cost, regularization=0.1, iterations=20)
        result.cost.sum().backward()
    assert result.plan.shape == cost.grad.shape == (2, 128, 128)
