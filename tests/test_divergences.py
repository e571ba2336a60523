"""Divergences against their formulas, at their limits, and where numbers run out."""

import math

import pytest
import torch
from torch import Tensor

from ctkd.divergences import jsd, kl, reverse_kl

BETAS = [0.01, 0.3, 0.5, 0.9]
FUNCTIONS = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    **{f"jsd {beta}": lambda s, t, beta=beta: jsd(s, t, beta=beta) for beta in [0, *BETAS, 1]},
}


def of_all_functions(test):
    """One test of all functions."""

    def run(dtype):
        for function in FUNCTIONS.values():
            test(function, dtype)

    run.__name__ = test.__name__
    return run


by_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def rows(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher


def formula(name: str, log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    s, t = log_s.exp(), log_t.exp()
    if name == "reverse_kl":
        s, t = t, s
    if name.endswith("kl"):
        return (t * (t / s).log() - t + s).sum(-1)
    m = beta * t + (1 - beta) * s
    return (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("name", "beta"), [("kl", 0.0), ("reverse_kl", 1.0), *[("jsd", beta) for beta in BETAS]]
)
def test_the_formulas(normalized, name, beta):
    leaves = rows(2, 3, 7)
    if normalized:
        leaves = tuple(leaf.log_softmax(-1) for leaf in leaves)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = formula(name, *leaves, beta)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    functions = [lambda s, t: jsd(s, t, beta=beta)]
    if name.endswith("kl"):
        functions.append({"kl": kl, "reverse_kl": reverse_kl}[name])
    for function in functions:
        actual = function(*leaves)
        assert actual.shape == (2, 3)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
        gradients = torch.autograd.grad((actual * weights).sum(), leaves)
        torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-12)


@by_function
def test_gradients_are_those_of_finite_differences(function):
    student, teacher = rows(3, 5)
    torch.autograd.gradcheck(function, (student.requires_grad_(), teacher.requires_grad_()))
    # The gradient of one side alone.
    torch.autograd.gradcheck(lambda s: function(s, teacher.detach()), student)
    torch.autograd.gradcheck(lambda t: function(student.detach(), t), teacher)


@by_function
def test_inputs_are_left_alone(function):
    student, teacher = rows(3, 5)
    copies = student.clone(), teacher.clone()
    function(student, teacher)
    torch.testing.assert_close((student, teacher), copies, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@of_all_functions
def test_zero_where_both_are_equal_and_above_zero_elsewhere(function, dtype):
    student, teacher = (side.to(dtype) for side in rows(50, 9))
    assert (function(student, student) == 0).all()
    assert (function(student, teacher) > 0).all()
    leaf = student.clone().requires_grad_()
    function(leaf, student).sum().backward()
    assert (leaf.grad == 0).all()
    # Also where only the sums differ.
    assert (function(student, student + 0.1) > 0).all()


@by_function
def test_close_rows_in_single_precision(function):
    student = rows(20, 1000, scale=1.0)[0].log_softmax(-1)
    teacher = (student + 1e-2 * rows(20, 1000, seed=1)[0]).log_softmax(-1)
    # The same numbers in both precisions, so that only the function's own rounding counts.
    student, teacher = student.float(), teacher.float()
    expected = function(student.double(), teacher.double())
    actual = function(student, teacher).double()
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@of_all_functions
def test_minus_infinity_and_underflow_are_finite(function, dtype):
    values = [0.0, -1.0, -50.0, -200.0, -1000.0, -1e30, -torch.inf]
    student = torch.tensor(values, dtype=dtype).repeat_interleave(len(values)).requires_grad_()
    teacher = torch.tensor(values, dtype=dtype).repeat(len(values)).requires_grad_()
    entries = function(student.unsqueeze(-1), teacher.unsqueeze(-1))
    assert entries.isfinite().all() and (entries >= 0).all()
    for gradient in torch.autograd.grad(entries.sum(), (student, teacher)):
        assert gradient.isfinite().all()
    both_ruled_out = (student < -1e4) & (teacher < -1e4)
    assert both_ruled_out.any() and (entries[both_ruled_out] == 0).all()


def test_known_values():
    certain, other = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    even = torch.tensor([[0.5, 0.5]]).log()
    assert jsd(certain, other).item() == pytest.approx(math.log(2), rel=1e-6)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert jsd(certain, other, beta=0.25).item() == pytest.approx(entropy, rel=1e-6)
    assert kl(even, certain).item() == pytest.approx(math.log(2), rel=1e-6)
    assert reverse_kl(certain, even).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl(certain, even).item() > 1e3
    # Parts of distributions: t = 0.5, s = 0.2.
    part = kl(torch.tensor([[0.2]]).log(), torch.tensor([[0.5]]).log()).item()
    assert part == pytest.approx(0.5 * math.log(2.5) - 0.3, rel=1e-6)


def test_the_limits_of_beta():
    student, teacher = rows(4, 6)
    for small in (1e-4, 1e-5):
        low, high = jsd(student, teacher, beta=small), jsd(student, teacher, beta=1 - small)
        tolerance = 200 * small
        torch.testing.assert_close(low / small, kl(student, teacher), rtol=tolerance, atol=0)
        torch.testing.assert_close(
            high / small, reverse_kl(student, teacher), rtol=tolerance, atol=0
        )


def test_jsd_is_symmetric_when_the_sides_and_beta_are_exchanged():
    student, teacher = rows(4, 6)
    torch.testing.assert_close(
        jsd(student, teacher, beta=0.2), jsd(teacher, student, beta=0.8), rtol=1e-12, atol=0
    )


@by_function
def test_no_columns_and_no_rows(function):
    for shape in ((3, 0), (0, 4)):
        student = torch.zeros(shape, requires_grad=True)
        result = function(student, torch.zeros(shape))
        assert result.shape == shape[:1] and (result == 0).all()
        result.sum().backward()
        assert student.grad.shape == shape
