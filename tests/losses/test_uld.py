"""`uld` against the authors' file, the oracle, and what its docstring claims."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ctkd
from baselines import uld
from ctkd import DenseLogits, TopK, TopKLogits, ops
from ctkd.batch import Batch, Side
from ctkd.divergences import sorted_l1
from tests.golden.golden_values import entries_of, gradient_norm, load, paper_case, released_case
from tests.ragged_batches import (
    answer_rows,
    chunk_starts,
    loss_and_gradient,
    ragged_inputs,
    side_of,
)
from tests.rounding import rounding

CASES = load("multilevelot_released")["cases"]
PAPER = load("multilevelot_paper")["cases"]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"]["name"])
SETTINGS = [
    {},
    {"student_temperature": 2.0, "teacher_temperature": 0.5},
    {"top_k": 3},
    {"top_k": 9},
    {"top_k": 3, "student_temperature": 0.7, "teacher_temperature": 1.5},
]


def close(actual: object, expected: object, rtol: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def without_last_label(labels: Tensor, skip: bool) -> Tensor:
    """The published skip flags: the last answer token of each row is not distilled."""
    labels = labels.clone()
    for row in labels if skip else []:
        row[(row != -100).nonzero()[-1]] = -100
    return labels


def average_of_rows(case: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As published: value * count / min(S, T) of each row alone, averaged; and the student leaf."""
    settings = case["case"]
    student, student_labels, teacher, teacher_labels = released_case(settings, dtype)
    student_labels = without_last_label(student_labels, settings["skip_student_eos"])
    teacher_labels = without_last_label(teacher_labels, settings["skip_teacher_eos"])
    loss = ctkd.get_loss(
        "uld",
        student_temperature=float(settings["student_temperature"]),
        teacher_temperature=float(settings["teacher_temperature"]),
    )
    leaf = student.requires_grad_()
    rows = []
    for b in range(len(leaf)):
        batch = Batch.from_causal_lm(
            student_logits=leaf[b : b + 1],
            student_labels=student_labels[b : b + 1],
            teacher_logits=teacher[b : b + 1],
            teacher_labels=teacher_labels[b : b + 1],
        )
        output = loss(batch)
        paired = min(batch.student.mask.sum(), batch.teacher.mask.sum())
        rows.append(output.value * output.count / paired)
    return torch.stack(rows).mean(), leaf


@by_case
def test_golden_values_in_double_precision(case):
    value, leaf = average_of_rows(case, torch.float64)
    golden, weight = case["uld"], case["case"]["kd_weight"]
    close(value.item(), golden["uld_unweighted"], 1e-9)
    close(weight * value.item(), golden["distillation"], 1e-9)
    close(weight * gradient_norm(value, [leaf]), golden["grad_norm"]["distillation"], 1e-9)
    (gradient,) = torch.autograd.grad(weight * value, leaf)
    actual, expected = entries_of(gradient, golden["grad_entries_distillation"])
    close(actual, expected, 1e-9)


@by_case
def test_golden_values_in_single_precision(case):
    value, leaf = average_of_rows(case, torch.float32)
    golden, weight = case["uld_float32"], case["case"]["kd_weight"]
    assert value.dtype == torch.float32
    close(weight * value.item(), golden["distillation"], 1e-5)
    close(weight * gradient_norm(value, [leaf]), golden["grad_norm"]["distillation"], 1e-4)
    (gradient,) = torch.autograd.grad(weight * value, leaf)
    actual, expected = entries_of(gradient, case["uld"]["grad_entries_distillation"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", PAPER, ids=lambda case: str(case["case"]["seed"]))
def test_the_sum_over_tokens_of_the_papers_reference(case):
    student, teacher = paper_case(case["case"])
    output = ctkd.get_loss("uld")(Batch(student=side_of(student), teacher=side_of(teacher)))
    close((output.value * output.count).item(), case["values"]["L_ULD_sum_over_tokens"], 1e-9)


WIDTHS = {"V": 11, "W": 8}, {"V": 7, "W": 12, "head": 0}


# Any two of settings, ties and widths meet in all their values.
@pytest.mark.parametrize(
    ("settings", "ties", "widths", "seed"),
    [
        (settings, ties, WIDTHS[(i + ties) % 2], 1 + i % 2)
        for i, settings in enumerate(SETTINGS)
        for ties in (False, True)
    ],
    ids=str,
)
def test_the_oracle_agrees(settings, ties, widths, seed):
    inputs = ragged_inputs(seed, ties=ties, **widths)
    leaf = inputs["student_logits"].requires_grad_()
    expected, expected_count = uld.loss(
        answer_rows(inputs, "student"), answer_rows(inputs, "teacher"), **settings
    )
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    value, count, gradient = loss_and_gradient(ctkd.get_loss("uld", **settings), inputs)
    assert count == expected_count == 13
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-15)


def test_sorting_is_the_least_cost_matching():
    inputs = ragged_inputs(3)
    expected, _ = uld.loss_by_transport(
        answer_rows(inputs, "student"), answer_rows(inputs, "teacher")
    )
    value, _, _ = loss_and_gradient(ctkd.get_loss("uld"), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("top_k", "ties"), [(11, True), (12, False), (1000, True)])
def test_top_k_of_the_whole_vocabulary_is_the_full_form(top_k, ties):
    inputs = ragged_inputs(4, ties=ties)
    full = loss_and_gradient(ctkd.get_loss("uld"), inputs)
    top = loss_and_gradient(ctkd.get_loss("uld", top_k=top_k), inputs)
    torch.testing.assert_close(top, full, rtol=1e-12, atol=1e-15)


def left_out(student: Tensor, teacher: Tensor, k: int) -> tuple[float, float]:
    """What top_k leaves out at the one position of two rows of probabilities, and the bound."""
    batch = Batch(student=side_of(student.log()[None]), teacher=side_of(teacher.log()[None]))
    full, top = (ctkd.get_loss("uld", top_k=top_k)(batch).value for top_k in (None, k))
    beyond = sum(1 - probs.sort(descending=True).values[:k].sum() for probs in (student, teacher))
    return (full - top).item(), beyond.item()


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_what_top_k_leaves_out_is_bounded(k):
    generator = torch.Generator().manual_seed(k)
    for scale in (0.3, 1.0, 3.0):
        student, teacher = (
            (scale * torch.randn(width, generator=generator, dtype=torch.float64)).softmax(-1)
            for width in (40, 30)
        )
        rest, bound = left_out(student, teacher, k)
        assert 0 <= rest <= bound + 1e-12


def test_the_bound_is_reached():
    # Everything the student holds beyond its top 2 has nothing to be compared with.
    student = torch.tensor([0.3, 0.3, *[0.4 / 8] * 8], dtype=torch.float64)
    teacher = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    rest, bound = left_out(student, teacher, 2)
    assert bound == pytest.approx(0.4, rel=1e-12)
    assert rest == pytest.approx(bound, rel=1e-12)
    rest, bound = left_out(teacher, student, 2)
    assert rest == pytest.approx(bound, rel=1e-12)


def test_worked_by_hand():
    # 2 |0.5 - 0.75| on the first position; the student's second has no partner and is counted.
    student = torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.75, 0.25]], dtype=torch.float64)
    batch = Batch(student=side_of(student.log()), teacher=side_of(teacher.log()))
    output = ctkd.get_loss("uld")(batch)
    rel = rounding(torch.float64, 3)
    assert output.value.item() == pytest.approx(0.25, rel=rel)
    assert output.count.item() == 2
    assert sorted_l1(student[:1], teacher).item() == pytest.approx(0.5, rel=rel)


def test_equal_distributions_in_any_order_are_no_distance_apart():
    inputs = ragged_inputs(5, V=8, W=8, head=0, teacher_lengths=(6, 3, 4))
    inputs["teacher_logits"] = inputs["student_logits"].flip(-1)
    for key in ("labels", "chunk_ids"):
        inputs[f"teacher_{key}"] = inputs[f"student_{key}"]
    for settings in ({}, {"top_k": 3}):
        value, _, _ = loss_and_gradient(ctkd.get_loss("uld", **settings), inputs)
        # A difference of two probabilities has the rounding of both; all of them add up to 2.
        assert value.item() == pytest.approx(0, abs=2 * rounding(torch.float64, 8))


def test_blocks_change_nothing(monkeypatch):
    inputs = ragged_inputs(6)
    expected = loss_and_gradient(ctkd.get_loss("uld"), inputs)
    monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", "1")
    torch.testing.assert_close(
        loss_and_gradient(ctkd.get_loss("uld"), inputs), expected, rtol=1e-13, atol=1e-16
    )


@pytest.mark.parametrize(
    ("seed", "settings"),
    [(0, {}), (1, {"top_k": 3}), (2, {"student_temperature": 2.0}), (3, {})],
)
def test_pairing_chunks_compares_rows_that_have_read_the_same_bytes(seed, settings):
    inputs = ragged_inputs(seed)
    starts = chunk_starts(inputs)
    inputs["student_logits"].requires_grad_()
    student, teacher = (
        [rows[index] for rows, index in zip(answer_rows(inputs, side), starts[side], strict=True)]
        for side in ("student", "teacher")
    )
    mean, count = uld.loss(student, teacher, **settings)
    tokens = int((inputs["student_labels"] != -100).sum())
    assert 0 < count < tokens
    expected = mean * count / tokens
    (expected_gradient,) = torch.autograd.grad(expected, inputs["student_logits"])
    loss = ctkd.get_loss("uld", pairing="chunk", **settings)
    value, scored, gradient = loss_and_gradient(loss, inputs)
    assert scored == tokens
    close(value, expected.detach(), 1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert value != loss_and_gradient(ctkd.get_loss("uld", **settings), inputs)[0]


def wide_inputs(rounding: float | None, dtype: torch.dtype = torch.float32) -> dict:
    """Rows wide enough that signs are looked up by value, with columns that are ruled out."""
    inputs = ragged_inputs(7, V=6000, W=5000, head=0, dtype=dtype)
    for side, ruled_out in (("student", slice(3, 40)), ("teacher", slice(0, 9))):
        logits = inputs[f"{side}_logits"]
        if rounding is not None:
            logits = (logits / rounding).round() * rounding
        logits[..., ruled_out] = -torch.inf
        inputs[f"{side}_logits"] = logits
    return inputs


@pytest.mark.parametrize("rounding", [None, 0.01, 1.0])
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_the_closed_form_is_what_autograd_finds(rounding, settings):
    inputs = wide_inputs(rounding)
    leaf = inputs["student_logits"].requires_grad_()
    student, teacher = (
        [rows.double() for rows in answer_rows(inputs, side)] for side in ("student", "teacher")
    )
    expected = torch.zeros((), dtype=torch.float64)
    for rows, others in zip(student, teacher, strict=True):
        size = min(len(rows), len(others))
        expected += sorted_l1(
            (rows[:size] / settings.get("student_temperature", 1.0)).softmax(-1),
            (others[:size] / settings.get("teacher_temperature", 1.0)).softmax(-1),
        ).sum()
    (expected_gradient,) = torch.autograd.grad(expected / 13, leaf)
    value, count, gradient = loss_and_gradient(ctkd.get_loss("uld", **settings), inputs)
    assert count == 13 and value.dtype == torch.float32
    close(value, (expected / 13).detach(), 1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rounding", [None, 0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_say_the_same(rounding, dtype):
    inputs = wide_inputs(rounding, dtype)
    for settings in SETTINGS[:2]:
        loss = ctkd.get_loss("uld", **settings)
        fast = loss_and_gradient(loss, inputs)
        with ops.use_backend("reference"):
            slow = loss_and_gradient(loss, inputs)
        # Two probabilities that add up to no more than 2 in a row, and 7 of 13 positions are pairs.
        torch.testing.assert_close(fast[:2], slow[:2], rtol=0, atol=8 * torch.finfo().eps)
        # The same signs; a difference of two numbers has the rounding of both.
        # An exponent of up to 16, which a temperature has doubled, is rounded as well.
        rounding = 32 * torch.finfo().eps if dtype == torch.float32 else 2**-8
        largest = float(slow[2].abs().max())
        torch.testing.assert_close(fast[2], slow[2], rtol=rounding, atol=rounding * largest)


def test_a_student_that_is_the_teacher_in_any_order_gets_no_gradient():
    # Whole exponents of 2: powers and their sums are exact, whatever order they are added in.
    temperature = 1.0 / math.log(2.0)
    inputs = ragged_inputs(8, V=3000, W=3000, head=0, dtype=torch.float32)
    inputs["student_logits"] = inputs["student_logits"].round().clamp(-5.0, 5.0)
    inputs["teacher_logits"] = inputs["student_logits"].flip(-1)
    for key in ("labels", "chunk_ids"):
        inputs[f"teacher_{key}"] = inputs[f"student_{key}"]
    loss = ctkd.get_loss("uld", student_temperature=temperature, teacher_temperature=temperature)
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert value == 0 and not gradient.any()


def test_a_stored_teacher_without_any_position():
    labels = torch.zeros(1, 0, dtype=torch.int64)
    kept = TopK.of(DenseLogits(torch.zeros(1, 0, 8)), labels, 3, [1.0])
    teacher = Side(
        logits=TopKLogits(kept), token_ids=labels, mask=labels.bool(), chunk_ids=labels.clone()
    )
    logits = torch.randn(1, 4, 6).requires_grad_()
    ids = torch.arange(4).unsqueeze(0)
    student = Side.from_encoder_decoder(logits, ids, chunk_ids=ids)
    value = ctkd.get_loss("uld", pairing="chunk")(Batch(student=student, teacher=teacher)).value
    value.backward()
    assert value == 0 and not logits.grad.any()
