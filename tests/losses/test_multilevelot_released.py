"""`multilevelot_released` against numbers of the authors' file, and where it departs from it."""

import numpy as np
import pytest
import torch
from torch import Tensor

import ctkd
from baselines import multilevelot_released as oracle
from baselines.uld import answer_probs_, answer_spans
from ctkd.batch import Batch
from ctkd.loss import LossOutput, average
from tests.golden.golden_values import entries_of, gradient_norm, load, released_case
from tests.ragged_batches import ragged_inputs
from tests.rounding import rounding

CASES = load("multilevelot_released")["cases"]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"]["name"])
# The weights of the three terms in the file.
WEIGHTS = {"had": 1.0, "kl": 0.1, "sd": 0.1}
GOLDEN_TERMS = {"had": "had", "kl": "kl_wo_teacher_student", "sd": "sinkhorn_incl_0.001"}
GOLDEN_NORMS = {"had": "had", "kl": "kl", "sd": "sinkhorn_incl_0.001"}
SETTINGS = [{}, {"student_temperature": 2.0, "teacher_temperature": 0.5}]


def close(actual: object, expected: object, rtol: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def without_last_label(labels: Tensor, skip: bool) -> Tensor:
    """The published skip flags: the last answer token of each row is not distilled."""
    labels = labels.clone()
    for row in labels if skip else []:
        row[(row != -100).nonzero()[-1]] = -100
    return labels


def run(case: dict, dtype: torch.dtype) -> tuple[LossOutput, Tensor]:
    student, student_labels, teacher, teacher_labels = released_case(case, dtype)
    leaf = student.requires_grad_()
    batch = Batch.from_causal_lm(
        student_logits=leaf,
        student_labels=without_last_label(student_labels, case["skip_student_eos"]),
        teacher_logits=teacher,
        teacher_labels=without_last_label(teacher_labels, case["skip_teacher_eos"]),
    )
    loss = ctkd.get_loss(
        "multilevelot_released",
        student_temperature=float(case["student_temperature"]),
        teacher_temperature=float(case["teacher_temperature"]),
    )
    return loss(batch), leaf


def term_norms(case: dict, dtype: torch.dtype, monkeypatch) -> dict[str, float]:
    """Gradient norm of each term, divided by its weight: the others are taken out of the sum."""
    norms = {}
    for name, weight in WEIGHTS.items():

        def only(parts, count, name=name):
            return average({name: parts[name]}, count)

        with monkeypatch.context() as patch:
            patch.setattr("ctkd.losses.multilevelot_released.average", only)
            output, leaf = run(case, dtype)
        norms[name] = gradient_norm(output.value, [leaf]) / weight
    return norms


@by_case
def test_golden_values_in_double_precision(case):
    golden, weight = case["mlot_v3_f1"], case["case"]["kd_weight"]
    output, leaf = run(case["case"], torch.float64)
    assert output.value.dtype == torch.float64
    close(weight * output.value.item(), golden["distillation"], 1e-9)
    for name, golden_name in GOLDEN_TERMS.items():
        part = output.parts[name].item() / WEIGHTS[name]
        close(part, golden["terms_unweighted"][golden_name], 1e-9)
    value = weight * output.value
    close(gradient_norm(value, [leaf]), golden["grad_norm"]["distillation"], 1e-9)
    (gradient,) = torch.autograd.grad(value, leaf)
    actual, expected = entries_of(gradient, golden["grad_entries_distillation"])
    close(actual, expected, 1e-9)


@by_case
def test_golden_values_in_single_precision(case):
    golden, weight = case["mlot_v3_f1_float32"], case["case"]["kd_weight"]
    output, leaf = run(case["case"], torch.float32)
    assert output.value.dtype == torch.float32
    # What was recorded has been rounded as well.
    sides = ("student", "teacher")
    rtol = 2 * rounding(torch.float32, max(case["case"][side]["vocab"] for side in sides))
    close(weight * output.value.item(), golden["distillation"], rtol)
    for name, golden_name in GOLDEN_TERMS.items():
        part = output.parts[name].item() / WEIGHTS[name]
        close(part, golden["terms_unweighted"][golden_name], rtol)
    value = weight * output.value
    close(gradient_norm(value, [leaf]), golden["grad_norm"]["distillation"], 1e-4)
    (gradient,) = torch.autograd.grad(value, leaf)
    actual, expected = entries_of(gradient, case["mlot_v3_f1"]["grad_entries_distillation"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=0)


@by_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_gradient_norms_of_the_terms(case, dtype, monkeypatch):
    golden = case["mlot_v3_f1" if dtype == torch.float64 else "mlot_v3_f1_float32"]["grad_norm"]
    for name, norm in term_norms(case["case"], dtype, monkeypatch).items():
        close(norm, golden[GOLDEN_NORMS[name]], 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"V": 60, "W": 70, "head": 0},
        {"V": 11, "W": 8, "head": 0},
        {"V": 8, "W": 55, "head": 0, "teacher_lengths": (6, 2, 1)},
        # With two columns the costs are far enough apart for the number of rounds to show.
        {"V": 2, "W": 2, "head": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_as_published_version_agrees(settings, shape, seed):
    inputs = ragged_inputs(seed, **{"teacher_lengths": (4, 5, 2), **shape}, chunks=False)
    del inputs["student_vocab_size"]
    leaf = inputs["student_logits"].requires_grad_()
    expected = oracle.terms(**inputs, **settings)
    output = ctkd.get_loss("multilevelot_released", **settings)(Batch.from_causal_lm(**inputs))
    assert output.count == 3
    torch.testing.assert_close(output.value, expected["value"], rtol=1e-12, atol=0)
    for name, weight in WEIGHTS.items():
        part = output.parts[name] / weight
        torch.testing.assert_close(part, expected[name].detach(), rtol=1e-10, atol=0)
    gradient, expected_gradient = (
        torch.autograd.grad(value, leaf)[0] for value in (output.value, expected["value"])
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


def single(inputs: dict, row: int) -> dict:
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def test_a_sample_depends_on_its_batch_as_in_the_file():
    inputs = ragged_inputs(3, V=60, W=70, teacher_lengths=(4, 5, 2), chunks=False)
    loss = ctkd.get_loss("multilevelot_released")
    value = loss(Batch.from_causal_lm(**inputs)).value
    alone = [loss(Batch.from_causal_lm(**single(inputs, row))).value for row in range(3)]
    assert abs(value - torch.stack(alone).mean()) > 1e-3


def had_without_the_last_sequence(inputs: dict) -> float:
    """The file's first term with 0 for the third sequence, whose mean over no tokens is nan."""
    kept, lengths = [], []
    for side in ("student", "teacher"):
        starts, sizes = answer_spans(inputs[f"{side}_labels"])
        logits = oracle.normalize(inputs[f"{side}_logits"])
        probs = answer_probs_(logits, starts, sizes, 1.0)
        kept.append(probs[:, :, oracle.order_by_batch_mass(probs)[: oracle.KEPT_COLUMNS]])
        lengths.append(sizes)
    total = 0.0
    for b in (0, 1):
        n = min(lengths[0][b], lengths[1][b])
        total += (kept[0][b, :n] - kept[1][b, :n]).abs().sum(-1).mean().item()
    return total / 3


@pytest.mark.parametrize("empty", ["student", "teacher"])
def test_an_empty_answer_adds_0_where_the_file_gives_nan(empty):
    inputs = ragged_inputs(4, V=60, W=70, head=0, teacher_lengths=(4, 5, 2), chunks=False)
    inputs[f"{empty}_labels"][2] = -100
    del inputs["student_vocab_size"]
    expected = oracle.terms(**inputs)
    assert expected["had"].isnan()
    logits = inputs["student_logits"].clone().requires_grad_()
    batch = Batch.from_causal_lm(**{**inputs, "student_logits": logits})
    output = ctkd.get_loss("multilevelot_released")(batch)
    output.value.backward()
    assert logits.grad.isfinite().all()
    close(output.parts["had"].item(), had_without_the_last_sequence(inputs), 1e-12)
    for name in ("kl", "sd"):
        torch.testing.assert_close(output.parts[name] / WEIGHTS[name], expected[name])


def test_a_teacher_longer_than_the_students_rows_works_where_the_file_stops():
    inputs = ragged_inputs(
        5, head=0, student_lengths=(2, 1, 1), teacher_lengths=(9, 8, 9), chunks=False
    )
    del inputs["student_vocab_size"]
    assert inputs["student_labels"].shape[1] < 8
    with pytest.raises(RuntimeError):
        oracle.terms(**inputs)
    output = ctkd.get_loss("multilevelot_released")(Batch.from_causal_lm(**inputs))
    extra = torch.zeros(3, 6, inputs["student_logits"].shape[-1], dtype=torch.float64)
    longer = {
        **inputs,
        "student_logits": torch.cat([inputs["student_logits"], extra], 1),
        "student_labels": torch.nn.functional.pad(inputs["student_labels"], (0, 6), value=-100),
    }
    expected = oracle.terms(**longer)["value"]
    torch.testing.assert_close(output.value, expected, rtol=1e-12, atol=0)


def test_equal_sides_leave_the_floor_of_the_log_term():
    # The documented oddity: 50 kept columns give about 0.1 log 50 at equality.
    inputs = ragged_inputs(6, V=80, W=80, head=0, teacher_lengths=(6, 3, 4), chunks=False)
    inputs["teacher_logits"] = inputs["student_logits"]
    inputs["teacher_labels"] = inputs["student_labels"]
    output = ctkd.get_loss("multilevelot_released")(Batch.from_causal_lm(**inputs))
    assert output.parts["had"] == 0
    assert output.parts["kl"].item() == pytest.approx(0.1 * np.log(50), rel=1e-3)
