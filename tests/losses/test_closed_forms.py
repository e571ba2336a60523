"""Gradients in closed form against autograd of the formulas they were derived from."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ctkd
from ctkd.batch import Batch, Side
from ctkd.divergences import jsd
from ctkd.errors import BatchError
from ctkd.losses.mined import carried_kl, first_sources
from ctkd.losses.shared_kl import columns_outside, shared_log_probs
from ctkd.tokenizers import PlaceholderPair

V, W, N = 13, 10, 6
SHARED = torch.tensor([0, 3, 4, 7, 8, 11]), torch.tensor([5, 0, 9, 2, 1, 7])
MAPPING = torch.tensor([3, 0, 7, 3, 10, 0, 12, 9, 9, 1])
BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
FORMS = [*itertools.product(("renormalize", "class"), BETAS), "dense"]
by_form = pytest.mark.parametrize("form", FORMS, ids=str)


class Vocabularies(PlaceholderPair):
    student_size, teacher_size = V, W

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        return SHARED

    def nearest_student_ids(self) -> Tensor:
        return MAPPING


def logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(N, W, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def make_loss(form: Any, temperature: float) -> torch.nn.Module:
    if form == "dense":
        return ctkd.get_loss("mined", pair=Vocabularies(), form="dense", temperature=temperature)
    rest, direction = form
    return ctkd.get_loss(
        "shared_kl", pair=Vocabularies(), rest=rest, direction=direction, temperature=temperature
    )


def mean_of_formula(form: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if form == "dense":
        return carried_kl(student, teacher, first_sources(MAPPING, V), temperature).mean()
    rest, direction = form
    sides = [
        shared_log_probs(
            rows / temperature,
            ids,
            columns_outside(ids, rows.shape[1]) if rest == "class" else None,
        )
        for rows, ids in zip((student, teacher), SHARED, strict=True)
    ]
    return jsd(*sides, beta=BETAS[direction]).mean()


def batch_of(student: Tensor, teacher: Tensor) -> Batch:
    """One text in which every token is a chunk of its own on both sides."""
    sides = [
        Side(
            logits=rows.unsqueeze(0),
            token_ids=torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device),
            mask=torch.ones(1, len(rows), dtype=torch.bool, device=rows.device),
            chunk_ids=torch.arange(len(rows), device=rows.device).unsqueeze(0),
        )
        for rows in (student, teacher)
    ]
    return Batch(student=sides[0], teacher=sides[1], num_chunks=len(student))


def value_and_gradient(function: Callable[[Tensor], Tensor], student: Tensor) -> list[Tensor]:
    leaf = student.clone().requires_grad_()
    value = function(leaf)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


def both(form: Any, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Any:
    loss = make_loss(form, temperature)
    return (
        value_and_gradient(lambda leaf: loss(batch_of(leaf, teacher)).value, student),
        value_and_gradient(lambda leaf: mean_of_formula(form, leaf, teacher, temperature), student),
    )


@by_form
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_formula(form, temperature):
    actual, expected = both(form, *logits(), temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    assert expected[0] > 0.1


@by_form
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_columns_that_a_model_rules_out(form, temperature):
    student, teacher = logits(1)
    # No teacher token is renamed to student token 2, and 12 takes over what is ruled out here.
    teacher[0, 6] = teacher[2, [6, 0]] = -torch.inf
    student[0, [2, 12]] = student[1, 5] = -torch.inf
    if form != "dense":
        student[3, SHARED[0][:2]] = -torch.inf
        student[4, columns_outside(SHARED[0], V)] = -torch.inf
        teacher[4, columns_outside(SHARED[1], W)] = -torch.inf
        teacher[5, SHARED[1]] = -torch.inf
    actual, expected = both(form, student, teacher, temperature)
    assert all(tensor.isfinite().all() for tensor in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("direction", BETAS)
def test_a_student_that_rules_out_all_shared_tokens(direction):
    student, teacher = logits(2)
    student[3, SHARED[0]] = -torch.inf
    for rest in ("renormalize", "class"):
        actual, expected = both((rest, direction), student, teacher)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_a_student_that_rules_out_what_the_teacher_expects():
    student, teacher = logits(3)
    student[0, 3] = -torch.inf
    with pytest.raises(BatchError, match="the student's logits are minus infinity in column 3 "):
        both("dense", student, teacher)


@by_form
def test_logits_far_from_zero_and_from_each_other(form):
    student, teacher = logits(4)
    student[:3] += 80.0
    teacher[1:4] -= 200.0
    student[4, SHARED[0][0]] += 500.0
    teacher[5, SHARED[1][1]] += 500.0
    student[5, columns_outside(SHARED[0], V)] -= 500.0
    actual, expected = both(form, student, teacher)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    single, _ = both(form, student.float(), teacher.float())
    _, expected = both(form, student.float().double(), teacher.float().double())
    torch.testing.assert_close(single[0].double(), expected[0], rtol=1e-5, atol=0)
    # A log-probability is a difference of logits of up to 600: so much of it is lost by rounding.
    lost = 600 * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(single[1].double(), expected[1], rtol=1e-4, atol=lost)


@by_form
def test_nearly_equal_models_in_single_precision(form):
    student, teacher = logits(5, torch.float32)
    ids = SHARED
    if form == "dense":
        sources = first_sources(MAPPING, V)
        ids = (sources >= 0).nonzero().squeeze(1), sources[sources >= 0]
        student[:, sources < 0] -= 60.0
    student[:, ids[0]] = teacher[:, ids[1]]
    if form != "dense":
        student[:, columns_outside(ids[0], V)] = -30.0
        teacher[:, columns_outside(ids[1], W)] = -30.0
    generator = torch.Generator().manual_seed(0)
    student += 1e-2 * torch.randn(N, V, generator=generator)
    actual, _ = both(form, student, teacher)
    _, expected = both(form, student.double(), teacher.double())
    assert expected[0] < 1e-4
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=1.2e-7)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=0, atol=3e-7)


@by_form
def test_blocks_of_every_size_share_their_buffers(form, monkeypatch):
    student, teacher = logits(6)
    expected, _ = both(form, student, teacher, 2.0)
    for rows in (1, 4):
        monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", str(rows * V))
        actual, _ = both(form, student, teacher, 2.0)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-16)


@by_form
def test_a_second_pass_backward_and_a_pass_forward_alone(form):
    student, teacher = logits(7)
    leaf = student.requires_grad_()
    loss = make_loss(form, 2.0)
    value = loss(batch_of(leaf, teacher)).value
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(second, first, rtol=1e-14, atol=0)
    with torch.no_grad():
        assert loss(batch_of(leaf, teacher)).value == value


@by_form
def test_nothing_waits_for_the_device(form):
    student, teacher = (rows.to("meta") for rows in logits())
    leaf = student.requires_grad_()
    value = make_loss(form, 2.0).to("meta")(batch_of(leaf, teacher)).value
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.shape == () and gradient.shape == student.shape
