"""Costs between positions: their gradient, and what is held and started for it."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctkd import ops
from ctkd.ot.sinkhorn import l1_cost, sinkhorn


class Operators(TorchDispatchMode):
    """Counts operators by name, and entries of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def leaves(*, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 6, 9, generator=generator, dtype=dtype)
    columns = torch.rand(2, 7, 9, generator=generator, dtype=dtype)
    columns[0, 1] = rows[0, 2]  # The gradient of a distance of 0 is 0.
    return rows.to(device).requires_grad_(), columns.to(device).requires_grad_()


def test_a_device_has_the_gradient_of_a_cpu_and_nothing_larger_than_the_cost(monkeypatch):
    weights = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(1)).double()
    answers = []
    for inspected in (True, False):
        monkeypatch.setattr("ctkd.ot.sinkhorn.can_inspect", lambda _, answer=inspected: answer)
        rows, columns = leaves()
        with Operators() as seen:
            cost = l1_cost(rows, columns)
            answers.append((cost, *torch.autograd.grad((cost * weights).sum(), (rows, columns))))
        assert ("aten::_cdist_backward" in seen.calls) == inspected
        # Points are larger than costs here: 2 * 7 * 9.
        assert seen.largest == columns.numel()
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [512, 513])
def test_kernels_solve_what_fits_a_program_in_a_launch_each_way(size):
    cost = torch.empty(2, 3, size, device="meta", requires_grad=True)
    with Operators() as seen:
        sinkhorn(cost, regularization=0.1, iterations=20).cost.sum().backward()
    started = {name: n for name, n in seen.calls.items() if name.startswith("ctkd::")}
    if size == 512:
        assert started == {"ctkd::sinkhorn": 1, "ctkd::sinkhorn_backward": 1}
        assert seen.calls.total() < 20
    else:
        assert started == {} and seen.calls.total() > 100


def test_kernels_measure_costs_in_a_launch_each_way():
    rows, columns = leaves(device="meta", dtype=torch.float32)
    with Operators() as seen:
        l1_cost(rows.detach(), columns).sum().backward()
    started = {name: n for name, n in seen.calls.items() if name.startswith("ctkd::")}
    assert started == {"ctkd::l1_cost": 1, "ctkd::l1_cost_backward": 1}


def test_torch_serves_what_kernels_do_not():
    float64 = torch.empty(1, 2, 3, device="meta", dtype=torch.float64)
    assert ops.kernels_for("sinkhorn", float64) is None
    assert ops.kernels_for("sinkhorn", torch.zeros(1, 2, 3)) is None
    single = torch.empty(1, 2, 3, device="meta")
    assert ops.kernels_for("sinkhorn", single, float64) is None
    with ops.use_backend("reference"):
        assert ops.kernels_for("sinkhorn", single) is None
    assert ops.kernels_for("sinkhorn", single) is not None
