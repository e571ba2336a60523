"""`multilevelot` and its two halves against frozen numbers, the oracle, and each other."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import ctkd
from baselines import multilevelot as oracle
from ctkd.batch import Batch
from ctkd.losses.multilevelot import (
    absolute_difference,
    sequence_cost,
    teacher_weighted_log_loss,
)
from ctkd.ot.matching import MATCHINGS, ColumnMatch
from tests.golden.golden_values import entries_of, gradient_norm, load, paper_case, unequal_case
from tests.ragged_batches import answer_rows, loss_and_gradient, ragged_inputs, side_of
from tests.rounding import rounding

PAPER = load("multilevelot_paper")["cases"]
UNEQUAL = load("multilevelot_unequal")["cases"]
RANKINGS = {"sum": "mass", "greedy": "greedy"}
PAPER_RUNS = [
    pytest.param(case["case"], RANKINGS[name], values, id=f"{case['case']['seed']}-{name}")
    for case in PAPER
    for name, values in case["values"].items()
    if name in RANKINGS
]
by_matching = pytest.mark.parametrize("matching", MATCHINGS)
by_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
# One term at a time, with weight 1.
NO_TERMS = {"had_weight": 0.0, "sl_weight": 0.0, "sd_weight": 0.0}
TERMS = ("had", "sl", "sd")


def close(actual: object, expected: object, rtol: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def summed(batch: Batch, **settings) -> Tensor:
    """The value times the count: the paper's sum over tokens."""
    output = ctkd.get_loss("multilevelot", **settings)(batch)
    return output.value * output.count


def only(term: str, **settings) -> dict:
    return {**NO_TERMS, f"{term}_weight": 1.0, **settings}


def paper_batch(case: dict, dtype: torch.dtype) -> tuple[Batch, Tensor]:
    student, teacher = paper_case(case)
    leaf = student.to(dtype).requires_grad_()
    return Batch(student=side_of(leaf), teacher=side_of(teacher.to(dtype))), leaf


@by_precision
@pytest.mark.parametrize(("case", "matching", "golden"), PAPER_RUNS)
def test_golden_values_of_the_paper(case, matching, golden, dtype):
    batch, leaf = paper_batch(case, dtype)
    settings = {"k": case["k"], "regularization": case["lam"], "matching": matching}
    value_rtol, gradient_rtol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)

    match = ctkd.get_loss("multilevelot", **settings).match(batch)
    assert match.teacher_ids[0, :8].tolist() == golden["teacher_dims_first8"]
    assert match.student_ids[0, :8].tolist() == golden["student_dims_first8"]

    norms = golden["grad_norm"]
    for term in TERMS:
        value = summed(batch, **only(term, **settings))
        expected = golden["L_SD_by_N"]["20"] if term == "sd" else golden[f"L_{term.upper()}"]
        close(value.item(), expected, value_rtol)
        close(gradient_norm(value, [leaf]), norms["sd20" if term == "sd" else term], gradient_rtol)
    for rounds, expected in golden["L_SD_by_N"].items():
        value = summed(batch, **only("sd", **settings, iterations=int(rounds)))
        close(value.item(), expected, value_rtol)

    value = summed(batch, **settings)
    assert value.dtype == dtype
    close(value.item(), golden["L_HAD+0.1*L_SL+0.1*L_SD(N=20)"], value_rtol)
    close(gradient_norm(value, [leaf]), norms["kd"], gradient_rtol)


@pytest.mark.parametrize(("case", "matching", "golden"), PAPER_RUNS)
def test_golden_costs_of_the_paper(case, matching, golden):
    batch, _ = paper_batch(case, torch.float64)
    match = ctkd.get_loss("multilevelot", k=case["k"], matching=matching).match(batch)
    student = batch.student.logits.log_probs(match.student_ids.unsqueeze(1), temperature=2.0).exp()
    teacher = batch.teacher.logits.log_probs(match.teacher_ids.unsqueeze(1), temperature=2.0).exp()
    cost = sequence_cost(student.detach(), teacher)
    close(cost[0, 0].tolist(), golden["C_first_row"], 1e-9)


def test_the_paper_assignment_meets_padding():
    batch, _ = paper_batch(PAPER[0]["case"], torch.float64)
    match = ctkd.get_loss("multilevelot", matching="assignment").match(batch)
    assert "padding column" in PAPER[0]["values"]["assignment"]["note"]
    assert not match.matched.all()


def test_golden_values_of_the_paper_assignment(monkeypatch):
    """One token: several pairings cost the least. The terms are compared on the golden one."""
    case, golden = PAPER[1]["case"], PAPER[1]["values"]["assignment"]
    batch, leaf = paper_batch(case, torch.float64)
    settings = {"k": case["k"], "regularization": case["lam"], "matching": "assignment"}
    match = ctkd.get_loss("multilevelot", **settings).match(batch)
    # The last two of the ten are not in the file; only this order gives its log term.
    columns = golden["student_dims_first8"] + [15, 69]
    assert match.matched.all()
    assert match.teacher_ids[0, :8].tolist() == golden["teacher_dims_first8"]
    assert sorted(match.student_ids[0].tolist()) == sorted(columns)
    value = summed(batch, **only("had", **settings))
    close(value.item(), golden["L_HAD"], 1e-9)
    close(gradient_norm(value, [leaf]), golden["grad_norm"]["had"], 1e-9)

    pairing = ColumnMatch(torch.tensor([columns]), match.teacher_ids, match.matched)
    monkeypatch.setattr(
        "ctkd.losses.multilevelot.match_by_assignment", lambda *_, **settings: pairing
    )
    for term, expected in (("sl", golden["L_SL"]), ("sd", golden["L_SD_by_N"]["20"])):
        value = summed(batch, **only(term, **settings))
        close(value.item(), expected, 1e-9)
        norm = golden["grad_norm"]["sd20" if term == "sd" else term]
        close(gradient_norm(value, [leaf]), norm, 1e-9)
    value = summed(batch, **settings)
    close(value.item(), golden["L_HAD+0.1*L_SL+0.1*L_SD(N=20)"], 1e-9)
    close(gradient_norm(value, [leaf]), golden["grad_norm"]["kd"], 1e-9)


@by_precision
@by_matching
@pytest.mark.parametrize("case", UNEQUAL, ids=lambda case: case["case"]["name"])
def test_golden_values_of_unequal_lengths(case, matching, dtype):
    golden, case = case["values"][matching], case["case"]
    value_rtol, gradient_rtol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)
    student, teacher = unequal_case(case)
    leaves = [rows.to(dtype).requires_grad_() for rows in student]
    batch = Batch(student=side_of(*leaves), teacher=side_of(*(rows.to(dtype) for rows in teacher)))
    settings = {"k": case["k"], "matching": matching, "candidates": case["candidates"]}

    match = ctkd.get_loss("multilevelot", **settings).match(batch)
    assert match.teacher_ids.tolist() == golden["teacher_columns"]
    columns = [
        [j if known else None for j, known in zip(*row, strict=True)]
        for row in zip(match.student_ids.tolist(), match.matched.tolist(), strict=True)
    ]
    assert columns == golden["student_columns"]
    for term in TERMS:
        value = summed(batch, **only(term, **settings))
        close(value.item(), golden["terms"][term], value_rtol)
        close(gradient_norm(value, leaves), golden["grad_norm"][term], gradient_rtol)
    output = ctkd.get_loss("multilevelot", **settings)(batch)
    assert output.count == golden["count"]
    close(output.value.item(), golden["loss"], value_rtol)
    value = output.value * output.count
    close(value.item(), golden["terms"]["kd"], value_rtol)
    close(gradient_norm(value, leaves), golden["grad_norm"]["kd"], gradient_rtol)
    longest = max(map(len, leaves))
    gradient = torch.stack(
        [
            torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows)))
            for rows in torch.autograd.grad(value, leaves)
        ]
    )
    actual, expected = entries_of(gradient, golden["grad_entries_kd"])
    close(actual, expected, gradient_rtol)


SETTINGS = [
    {},
    {"k": 3},
    {"k": 5, "temperature": 1.7, "sl_temperature": 0.6, "sd_temperature": 1.0},
    {"k": 4, "regularization": 0.02, "iterations": 7, "sd_weight": 1.5},
    {"k": 4, "had_weight": 0.0, "sl_weight": 2.0, "sd_weight": 0.0},
]


# With ties the best assignment is not unique.
@pytest.mark.parametrize(
    ("matching", "ties"),
    [*((matching, False) for matching in MATCHINGS), ("mass", True), ("greedy", True)],
)
def test_the_oracle_agrees(matching, ties):
    for i, settings in enumerate(SETTINGS):
        widths = {"V": 11, "W": 8} if i % 2 else {"V": 7, "W": 12}
        agrees(settings, matching, ties, widths)


def agrees(settings, matching, ties, widths):
    # Many tokens where the best assignment must be unique; an empty answer in either case.
    lengths = {"student_lengths": (13, 9, 4), "teacher_lengths": (11, 14, 0)}
    inputs = ragged_inputs(1, ties=ties, **widths, **lengths)
    leaf = inputs["student_logits"].requires_grad_()
    settings = {**settings, "matching": matching, "candidates": 6}
    expected, expected_count = oracle.loss(
        answer_rows(inputs, "student"), answer_rows(inputs, "teacher"), **settings
    )
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    loss = ctkd.get_loss("multilevelot", **settings)
    value, count, gradient = loss_and_gradient(loss, inputs)
    assert count == expected_count == 26
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(
    ("matching", "seed", "ties"),
    [
        (matching, seed, (i + seed) % 2 == 1)
        for i, matching in enumerate(("mass", "greedy"))
        for seed in range(4)
    ],
)
def test_the_oracle_agrees_on_short_answers(matching, seed, ties):
    inputs = ragged_inputs(seed, ties=ties)
    settings = {"k": 5, "matching": matching}
    leaf = inputs["student_logits"].requires_grad_()
    rows = answer_rows(inputs, "student"), answer_rows(inputs, "teacher")
    expected = oracle.terms(*rows, **settings)
    output = ctkd.get_loss("multilevelot", **settings)(Batch.from_causal_lm(**inputs))
    for term, weight in (("had", 1.0), ("sl", 0.1), ("sd", 0.1)):
        part = output.parts[term] * output.count / weight
        torch.testing.assert_close(part, expected[term].detach(), rtol=1e-10, atol=0)
    value = expected["had"] + 0.1 * expected["sl"] + 0.1 * expected["sd"]
    gradient, expected_gradient = (
        torch.autograd.grad(total, leaf)[0] for total in (output.value * output.count, value)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-13)


@by_matching
def test_the_whole_is_the_sum_of_its_halves(matching):
    for settings in SETTINGS:
        is_the_sum_of_its_halves(matching, settings)


def is_the_sum_of_its_halves(matching, settings):
    inputs = ragged_inputs(2)
    settings = {**settings, "matching": matching, "candidates": 6}
    halves, parts = [], {}
    for name, weights in (
        ("multilevelot_token", ("had_weight", "sl_weight")),
        ("multilevelot_sequence", ("sd_weight",)),
    ):
        known = ctkd.describe(name).settings
        own = {setting: value for setting, value in settings.items() if setting in known}
        if any(own.get(weight, known[weight]) for weight in weights):
            loss = ctkd.get_loss(name, **own)
            halves.append(loss_and_gradient(loss, inputs))
            parts |= loss(Batch.from_causal_lm(**inputs)).parts
    loss = ctkd.get_loss("multilevelot", **settings)
    value, count, gradient = loss_and_gradient(loss, inputs)
    # Three terms in two orders, each from a softmax over 9 or 11 columns.
    rtol = rounding(torch.float64, 3 * 11)
    torch.testing.assert_close(sum(half[0] for half in halves), value, rtol=rtol, atol=0)
    torch.testing.assert_close(sum(half[2] for half in halves), gradient, rtol=1e-13, atol=1e-17)
    assert all(half[1] == count for half in halves)
    whole = loss(Batch.from_causal_lm(**inputs)).parts
    # One exponential serves temperatures 1 and 2, so that asking for both may round otherwise.
    assert {name: part.item() for name, part in whole.items()} == pytest.approx(
        {name: part.item() for name, part in parts.items()}, rel=rtol
    )


def test_parts_are_named_after_the_terms_and_a_weight_of_0_leaves_one_out():
    batch = Batch.from_causal_lm(**ragged_inputs(3))
    for wanted in itertools.product((0.0, 0.7), repeat=3):
        weights = {f"{term}_weight": weight for term, weight in zip(TERMS, wanted, strict=True)}
        if not any(wanted):
            with pytest.raises(ctkd.CtkdError, match="at least one of had_weight, sl_weight, sd"):
                ctkd.get_loss("multilevelot", **weights)
            continue
        parts = ctkd.get_loss("multilevelot", **weights)(batch).parts
        assert list(parts) == [term for term, weight in zip(TERMS, wanted, strict=True) if weight]


@by_matching
def test_equal_sides(matching):
    inputs = ragged_inputs(4, V=9, student_lengths=(12, 11, 13))
    rows = answer_rows(inputs, "student")
    batch = Batch(student=side_of(*rows), teacher=side_of(*rows))
    parts = ctkd.get_loss("multilevelot", k=4, matching=matching)(batch).parts
    # A difference of two probabilities has the rounding of both; all of them add up to 2.
    assert parts["had"] <= 2 * rounding(torch.float64, 9)
    assert parts["sl"] > 0.01 and parts["sd"] > 0.001


def test_the_transport_moves_the_mass_of_the_student():
    """Rectangular: all costs equal to c give c times the student's tokens."""
    student = torch.tensor([[0.75, 0.25]] * 5, dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75]] * 3, dtype=torch.float64).log()
    batch = Batch(student=side_of(student), teacher=side_of(teacher))
    settings = {"sd_weight": 1.0, "sd_temperature": 1.0, "k": 1}
    output = ctkd.get_loss("multilevelot_sequence", **settings)(batch)
    assert output.value.item() == pytest.approx(0.0, abs=rounding(torch.float64, 15))
    output = ctkd.get_loss("multilevelot_sequence", **settings, matching="greedy")(batch)
    assert output.value.item() == pytest.approx(0.0, abs=rounding(torch.float64, 15))
    settings = {**settings, "k": 2, "matching": "mass"}
    flat = torch.tensor([[0.5, 0.5]] * 5, dtype=torch.float64).log()
    batch = Batch(student=side_of(flat), teacher=side_of(teacher))
    output = ctkd.get_loss("multilevelot_sequence", **settings)(batch)
    assert output.count == 5
    assert output.value.item() == pytest.approx(0.5, rel=1e-12)


def test_the_terms_worked_by_hand():
    student, teacher = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.25, 0.5]])
    assert absolute_difference(student, teacher).tolist() == [0.5]
    log_loss = teacher_weighted_log_loss(torch.tensor([[-1.0, -2.0]]), teacher)
    assert log_loss.tolist() == [1.25]
    assert sequence_cost(student[None], teacher[None]).tolist() == [[[0.5]]]


def test_0_log_0_is_0_and_only_that():
    log_probs = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    value = teacher_weighted_log_loss(log_probs, torch.tensor([0.0, 0.5]))
    value.backward()
    assert value.item() == 0.5 and log_probs.grad.tolist() == [0.0, -0.5]
    assert teacher_weighted_log_loss(log_probs, torch.tensor([0.1, 0.5])).item() == torch.inf


@pytest.mark.parametrize("name", ["multilevelot", "multilevelot_token", "multilevelot_sequence"])
def test_settings_out_of_range_are_refused(name):
    known = ctkd.describe(name).settings
    for setting, value in {
        "had_weight": -1.0,
        "sl_weight": float("nan"),
        "sd_weight": float("inf"),
        "k": 0,
        "temperature": 0.0,
        "sl_temperature": -1.0,
        "sd_temperature": 0.0,
        "regularization": 0.0,
        "iterations": 0,
        "matching": "nearest",
        "candidates": 0,
        "max_columns": 1.5,
    }.items():
        if setting in known:
            with pytest.raises(ctkd.CtkdError, match=f"^{setting} must be"):
                ctkd.get_loss(name, **{setting: value})
