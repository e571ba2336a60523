"""MultiLevelOT as released, against numbers that the authors' own file gave."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines import multilevelot_released, sinkhorn
from tests.golden.golden_values import (
    entries_of,
    gradient_norm,
    load,
    released_case,
    released_settings,
)

RELEASED = load("multilevelot_released")
COMPONENTS = RELEASED["components_mlot_v3"]
WEIGHT = 1.5
by_name = pytest.mark.parametrize("case", RELEASED["cases"], ids=lambda case: case["case"]["name"])


def close(actual: object, expected: object, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def softmaxed(seed: int) -> Tensor:
    x = np.random.RandomState(seed).standard_normal((2, 4, 6)) * 2
    return torch.from_numpy(x).softmax(-1)


@by_name
def test_inputs_are_those_of_the_recipe(case: dict) -> None:
    student, student_labels, teacher, teacher_labels = released_case(case["case"])
    check = case["input_check"]
    assert student.flatten()[:3].tolist() == check["S_first3"]
    assert teacher.flatten()[:3].tolist() == check["T_first3"]
    assert student_labels.tolist() == check["student_labels"]
    assert teacher_labels.tolist() == check["teacher_labels"]


@by_name
def test_released_form_against_golden(case: dict) -> None:
    student, student_labels, teacher, teacher_labels = released_case(case["case"])
    before = student.clone(), teacher.clone()
    student.requires_grad_()
    terms = multilevelot_released.terms(
        student, student_labels, teacher, teacher_labels, **released_settings(case["case"])
    )
    expected = case["mlot_v3_f1"]
    close(WEIGHT * terms["value"].item(), expected["distillation"])
    unweighted, norms = expected["terms_unweighted"], expected["grad_norm"]
    for name, key in (("kl", "kl_wo_teacher_student"), ("sd", "sinkhorn_incl_0.001")):
        close(terms[name].item(), unweighted[key])
    close(terms["had"].item(), unweighted["had"])
    for name, key in (("had", "had"), ("kl", "kl"), ("sd", "sinkhorn_incl_0.001")):
        close(gradient_norm(terms[name], [student]), norms[key])
    (gradient,) = torch.autograd.grad(WEIGHT * terms["value"], student)
    close(gradient.norm().item(), norms["distillation"])
    close(*entries_of(gradient, expected["grad_entries_distillation"]))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@by_name
def test_single_precision_against_golden(case: dict) -> None:
    # The file's own bounds between float32 and float64: 6e-6 for values, 1e-5 for gradient norms.
    tensors = released_case(case["case"], torch.float32)
    student = tensors[0].requires_grad_()
    terms = multilevelot_released.terms(*tensors, **released_settings(case["case"]))
    expected = case["mlot_v3_f1_float32"]
    assert terms["value"].dtype == torch.float32
    close(WEIGHT * terms["value"].item(), expected["distillation"], rtol=6e-6)
    close(
        gradient_norm(WEIGHT * terms["value"], [student]),
        expected["grad_norm"]["distillation"],
        rtol=1e-5,
    )


def test_normalize_and_order() -> None:
    logits = torch.from_numpy(np.random.RandomState(201).standard_normal((2, 3, 7)) * 3)
    close(multilevelot_released.normalize(logits), COMPONENTS["normalize"]["out"])
    order = multilevelot_released.order_by_batch_mass(logits.softmax(-1))
    assert order.tolist() == COMPONENTS["improved_sort"]["dims_in_order"]
    close(logits.softmax(-1)[:, :, order], COMPONENTS["improved_sort"]["out"])


def test_kl_without_entropy() -> None:
    first, second = softmaxed(202), softmaxed(203)
    kl = multilevelot_released.kl_without_entropy
    close(kl(first, second), COMPONENTS["KL_wo"]["KL_wo(a,b)"])
    close(kl(second, first), COMPONENTS["KL_wo"]["KL_wo(b,a)"])


def test_sinkhorn() -> None:
    first, second = softmaxed(202), softmaxed(203)
    golden = COMPONENTS["sinkhorn"]
    cost = torch.cdist(first[0], second[0], p=1)
    close(cost, golden["W"])
    rectangle = golden["rectangular_a0_rows0:3_vs_b0"]
    for plan in (
        multilevelot_released.sinkhorn_plan,
        lambda cost, rounds: sinkhorn.plan(cost, 0.1, rounds),
        lambda cost, rounds: sinkhorn.plan_by_loops(cost, 0.1, rounds),
    ):
        close(plan(cost, 10), golden["P_10"])
        close(plan(cost, 20), golden["P_20"])
        close((plan(cost, 10) * cost).sum(), golden["loss_10(released default)"])
        close((plan(cost, 20) * cost).sum(), golden["loss_20"])
        close(plan(cost[:3], 10).sum(1), rectangle["P_10_row_sums"])
        close(plan(cost[:3], 10).sum(0), rectangle["P_10_col_sums"])
        close((plan(cost[:3], 10) * cost[:3]).sum(), rectangle["loss_10"])
    close(multilevelot_released.sinkhorn_sequences(first, second), golden["forward(a,b)"])
    close(multilevelot_released.sinkhorn_sequences(second, first), golden["forward(b,a)"])


def test_ten_rounds_of_sinkhorn() -> None:
    # On 50 columns the second softmax leaves a kernel that converges at once; on two it does not.
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    second = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    high = math.exp(0.5) / (math.exp(0.5) + 1)
    cost = 2 * (2 * high - 1) * (first[0][:, None, 0] - second[0][None, :, 0]).abs()
    expected = {
        rounds: 0.001 * (sinkhorn.plan_by_loops(cost, 0.1, rounds) * cost).sum().item()
        for rounds in (10, 20)
    }
    close(multilevelot_released.sinkhorn_sequences(first, second), expected[10])
    assert abs(expected[20] / expected[10] - 1) > 1e-6


def test_failures_are_kept_as_published() -> None:
    tensors = released_case(RELEASED["cases"][0]["case"])
    ignored = torch.full_like(tensors[1], -100)
    assert multilevelot_released.terms(tensors[0], ignored, *tensors[2:])["value"].isnan()
    longer = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="size of tensor"):
        multilevelot_released.terms(tensors[0][:, :5], tensors[1][:, :5], tensors[2], longer)
