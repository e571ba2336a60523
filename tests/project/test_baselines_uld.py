"""Universal Logit Distillation: the oracle, and the loss as published, against golden numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines import uld
from tests.golden.golden_values import (
    entries_of,
    gradient_norm,
    load,
    paper_case,
    released_case,
    released_settings,
)

PAPER = load("multilevelot_paper")["cases"]
RELEASED = load("multilevelot_released")
WEIGHT = 1.5
by_name = pytest.mark.parametrize("case", RELEASED["cases"], ids=lambda case: case["case"]["name"])


def close(actual: object, expected: object, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def rows_of(*probs: list[float]) -> Tensor:
    """Logits whose softmax at temperature 1 is the given probabilities."""
    return torch.tensor(probs, dtype=torch.float64).log()


@pytest.mark.parametrize("case", PAPER, ids=["six_tokens", "one_token"])
def test_uld_against_golden(case: dict) -> None:
    student, teacher = paper_case(case["case"])
    value, count = uld.loss([student], [teacher])
    close(value.item() * count, case["values"]["L_ULD_sum_over_tokens"])


def test_sorting_is_the_least_cost_matching() -> None:
    student = [normal(30, 3, 12).requires_grad_(), normal(31, 2, 12).requires_grad_()]
    teacher = [normal(32, 2, 9), normal(33, 4, 9)]
    settings = {"student_temperature": 1.5, "teacher_temperature": 0.7}
    values = [
        function(student, teacher, **settings)[0] for function in (uld.loss, uld.loss_by_transport)
    ]
    close(values[0].item(), values[1].item(), rtol=1e-12)
    gradients = [torch.cat(torch.autograd.grad(value, student)) for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


def test_uld_worked_by_hand() -> None:
    student, teacher = rows_of([0.2, 0.5, 0.3], [0.8, 0.1, 0.1]), rows_of([0.4, 0.6])
    # Sorted: 0.5 0.3 0.2 against 0.6 0.4 0; two student tokens, one of the teacher.
    value, count = uld.loss([student], [teacher])
    assert count == 2
    close(value.item(), (0.1 + 0.1 + 0.2) / 2)
    close(uld.loss([student], [teacher], top_k=1)[0].item(), 0.1 / 2)
    close(uld.loss([student], [teacher], top_k=2)[0].item(), 0.2 / 2)
    close(uld.loss([student], [teacher], top_k=3)[0].item(), 0.4 / 2)


@by_name
def test_published_uld_against_golden(case: dict) -> None:
    student, student_labels, teacher, teacher_labels = released_case(case["case"])
    before = student.clone(), teacher.clone()
    student.requires_grad_()
    value = uld.as_published(
        student, student_labels, teacher, teacher_labels, **released_settings(case["case"])
    )
    expected = case["uld"]
    close(value.item(), expected["uld_unweighted"])
    (gradient,) = torch.autograd.grad(WEIGHT * value, student)
    close(gradient.norm().item(), expected["grad_norm"]["distillation"])
    close(*entries_of(gradient, expected["grad_entries_distillation"]))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@by_name
def test_single_precision_against_golden(case: dict) -> None:
    # The file's own bounds between float32 and float64: 6e-6 for values, 1e-5 for gradient norms.
    tensors = released_case(case["case"], torch.float32)
    student = tensors[0].requires_grad_()
    value = WEIGHT * uld.as_published(*tensors, **released_settings(case["case"]))
    assert value.dtype == torch.float32
    expected = case["uld_float32"]
    close(value.item(), expected["distillation"], rtol=6e-6)
    close(gradient_norm(value, [student]), expected["grad_norm"]["distillation"], rtol=1e-5)


@by_name
def test_published_uld_is_the_oracle_averaged_otherwise(case: dict) -> None:
    tensors, settings = released_case(case["case"]), released_settings(case["case"])
    starts, sizes = zip(
        uld.answer_spans(tensors[1], skip_eos=settings["skip_student_eos"]),
        uld.answer_spans(tensors[3], skip_eos=settings["skip_teacher_eos"]),
        strict=True,
    )
    means = []
    for b in range(len(tensors[0])):
        rows = [
            [logits[b, start[b] : start[b] + size[b]]]
            for logits, start, size in zip(tensors[::2], starts, sizes, strict=True)
        ]
        value, count = uld.loss(*rows)
        means.append(value.item() * count / min(sizes[0][b], sizes[1][b]))
    close(uld.as_published(*tensors, **settings).item(), np.mean(means), rtol=1e-12)


def test_answer_spans() -> None:
    golden = RELEASED["components_mlot_v3"]["get_start_and_size_answers"]
    for labels, start, size in zip(golden["labels"], golden["start"], golden["size"], strict=True):
        assert uld.answer_spans(torch.tensor([labels])) == ([start], [size])
        skipped = uld.answer_spans(torch.tensor([labels]), skip_eos=True)
        assert skipped == ([start], [size - 1])


def test_an_answer_of_no_rows_is_nan_as_published() -> None:
    tensors = released_case(RELEASED["cases"][0]["case"])
    ignored = torch.full_like(tensors[1], -100)
    assert uld.as_published(tensors[0], ignored, *tensors[2:]).isnan()
