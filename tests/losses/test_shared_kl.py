"""`shared_kl` against the oracle, by hand, and where it must be zero or finite."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ctkd
from baselines import shared_kl
from ctkd.batch import Batch
from ctkd.errors import BatchError, SettingError
from ctkd.losses.shared_kl import columns_outside, shared_log_probs
from tests.losses.test_gold import PAIRS, SOME, Tokens, V, one_chunk, per_row, same_model
from tests.ragged_batches import answer_rows, loss_and_gradient, ragged_inputs

SETTINGS: list[dict[str, Any]] = [
    {"rest": rest, "direction": direction}
    for rest, direction in itertools.product(
        ("renormalize", "class"), ("forward", "reverse", "jsd")
    )
]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)
IDENTITY = Tokens([*range(8)], [*range(8)], (8, 8))
HALF = Tokens([0, 3, 4], [0, 3, 4], (8, 8))


def oracle(inputs: dict[str, Any], pair: Tokens, **settings: Any) -> tuple[Tensor, int, Tensor]:
    leaf = inputs["student_logits"].detach().clone().requires_grad_()
    inputs = {**inputs, "student_logits": leaf}
    sides = ("student", "teacher")
    value, count = shared_kl.loss(
        *(answer_rows(inputs, side) for side in sides),
        *(per_row(inputs, side, "chunk_ids") for side in sides),
        *(ids.tolist() for ids in pair.ids),
        **settings,
    )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), count, gradient


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


# Any two of rest, direction, temperature and seed meet in all their values.
@pytest.mark.parametrize(
    ("rest", "direction", "temperature", "seed"),
    [
        (("renormalize", "class")[(i + j) % 2], direction, temperature, 1 + ((i + j) % 3 == 0))
        for i, direction in enumerate(("forward", "reverse", "jsd"))
        for j, temperature in enumerate((1.0, 0.5, 3.0))
    ],
)
def test_the_oracle_agrees(rest, direction, temperature, seed):
    inputs = ragged_inputs(seed, ties=seed == 2)
    settings = {"rest": rest, "direction": direction, "temperature": temperature}
    expected, expected_count, expected_gradient = oracle(inputs, SOME, **settings)
    loss = ctkd.get_loss("shared_kl", pair=SOME, **settings)
    value, count, gradient = loss_and_gradient(loss, inputs)
    assert count == expected_count > 4
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


@by_settings
def test_single_precision(settings):
    inputs = ragged_inputs(3, dtype=torch.float32)
    expected, _, expected_gradient = oracle(inputs, SOME, **settings)
    value, _, gradient = loss_and_gradient(
        ctkd.get_loss("shared_kl", pair=SOME, **settings), inputs
    )
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_worked_by_hand():
    # On M = {0, 2} and {1, 0}: s = (0.2, 0.6), rest 0.2; t = (0.4, 0.1), rest 0.5.
    student = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    teacher = torch.tensor([[0.1, 0.4, 0.25, 0.25]], dtype=torch.float64)
    batch = Batch.from_causal_lm(**one_chunk(student, [1], teacher, [0]))
    pair = Tokens([0, 2], [1, 0], sizes=(3, 4))
    log = math.log
    expected = {
        ("renormalize", "forward"): 0.8 * log(0.8 / 0.25) + 0.2 * log(0.2 / 0.75),
        ("renormalize", "reverse"): 0.25 * log(0.25 / 0.8) + 0.75 * log(0.75 / 0.2),
        ("class", "forward"): 0.4 * log(0.4 / 0.2) + 0.1 * log(0.1 / 0.6) + 0.5 * log(0.5 / 0.2),
        ("class", "reverse"): 0.2 * log(0.2 / 0.4) + 0.6 * log(0.6 / 0.1) + 0.2 * log(0.2 / 0.5),
    }
    for (rest, direction), value in expected.items():
        output = ctkd.get_loss("shared_kl", pair=pair, rest=rest, direction=direction)(batch)
        assert output.value.item() == pytest.approx(value, rel=1e-12)
        assert output.count == 1


def test_only_the_first_position_of_a_chunk_counts():
    inputs = ragged_inputs(9)
    loss = ctkd.get_loss("shared_kl", pair=SOME)
    expected = loss_and_gradient(loss, inputs)
    for side in ("student", "teacher"):
        chunk_ids = inputs[f"{side}_chunk_ids"]
        later = ((chunk_ids >= 0) & (chunk_ids == chunk_ids.roll(1, 1))).roll(-1, 1)
        assert later.any()
        inputs[f"{side}_logits"][later] = 7.0
    actual = loss_and_gradient(loss, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@by_settings
@pytest.mark.parametrize("pair", [IDENTITY, HALF], ids=["all", "some"])
def test_a_student_that_is_the_teacher_gives_exactly_zero(settings, pair):
    loss = ctkd.get_loss("shared_kl", pair=pair, **settings)
    for ties, dtype in itertools.product((False, True), (torch.float64, torch.float32)):
        value, _, gradient = loss_and_gradient(loss, same_model(ties, dtype))
        assert value == 0
        atol = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=atol)


@by_settings
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_row_too_late_does_not(settings, side):
    inputs = same_model()
    inputs[f"{side}_logits"] = inputs[f"{side}_logits"].roll(1, 1)
    value, _, _ = loss_and_gradient(ctkd.get_loss("shared_kl", pair=IDENTITY, **settings), inputs)
    assert value > 0.1


def test_renormalizing_leaves_the_mass_on_shared_tokens_free():
    inputs = same_model()
    inputs["teacher_logits"][..., [0, 3, 4]] += 2.0
    for direction in ("forward", "reverse", "jsd"):
        loss = ctkd.get_loss("shared_kl", pair=HALF, direction=direction)
        assert loss_and_gradient(loss, inputs)[0] == pytest.approx(0, abs=1e-14)
        loss = ctkd.get_loss("shared_kl", pair=HALF, direction=direction, rest="class")
        assert loss_and_gradient(loss, inputs)[0] > 0.05


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("name", ["everything", "all of the teacher"])
def test_a_class_for_the_rest_that_one_side_does_not_have(direction, name):
    pair = PAIRS[name]
    inputs = ragged_inputs(4, V=pair.student_size)
    actual, expected = (
        loss_and_gradient(
            ctkd.get_loss("shared_kl", pair=pair, direction=direction, rest=rest), inputs
        )
        for rest in ("class", "renormalize")
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    oracle_value, _, _ = oracle(inputs, pair, direction=direction)
    torch.testing.assert_close(actual[0], oracle_value, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (settings, dtype)
        for settings, dtype in zip(SETTINGS, [torch.float32, torch.bfloat16] * 3, strict=True)
    ],
    ids=str,
)
def test_probabilities_that_underflow(settings, dtype):
    inputs = ragged_inputs(7, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for side in ("student", "teacher"):
        logits = inputs[f"{side}_logits"]
        far = torch.randint(0, 2, logits.shape, generator=generator).to(dtype)
        inputs[f"{side}_logits"] = logits - 240.0 * far
    # In one row of each side the rest has no probability that single precision can hold.
    inputs["student_logits"][0, :, SOME.ids[0]] += 300.0
    inputs["teacher_logits"][1, :, SOME.ids[1]] += 300.0
    loss = ctkd.get_loss("shared_kl", pair=SOME, **settings)
    value, _, gradient = loss_and_gradient(loss, inputs)
    expected, _, expected_gradient = oracle(wide(inputs), SOME, **settings)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=1e-5)


@by_settings
@pytest.mark.parametrize(("shared", "dtype"), [(False, torch.float32), (True, torch.float64)])
def test_columns_that_a_model_rules_out(settings, shared, dtype):
    inputs = ragged_inputs(8, head=0, dtype=dtype)
    student_ids, teacher_ids = torch.tensor([0, 7]), torch.tensor([1])
    if not shared:
        student_ids, teacher_ids = (
            columns_outside(ids, width) for ids, width in zip(SOME.ids, (V, 8), strict=True)
        )
    inputs["student_logits"][..., student_ids] = -torch.inf
    loss = ctkd.get_loss("shared_kl", pair=SOME, **settings)
    for _ in range(2):
        value, _, gradient = loss_and_gradient(loss, inputs)
        assert value.isfinite() and gradient.isfinite().all()
        inputs["teacher_logits"][..., teacher_ids] = -torch.inf


def test_blocks_and_padding_change_nothing(monkeypatch, uninspected):
    inputs = ragged_inputs(6)
    loss = ctkd.get_loss("shared_kl", pair=SOME, rest="class")
    expected = loss_and_gradient(loss, inputs)
    monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", str(2 * V + 3))
    with uninspected():
        actual = loss_and_gradient(loss, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rest": "drop"}, "rest must be one of renormalize, class, got 'drop'"),
        ({"direction": "both"}, "direction must be one of forward, reverse, jsd, got 'both'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=message):
        ctkd.get_loss("shared_kl", pair=SOME, **settings)


@by_settings
def test_without_shared_tokens_there_is_no_such_loss(settings):
    with pytest.raises(SettingError, match="these tokenizers share none; use a loss that needs no"):
        ctkd.get_loss("shared_kl", pair=PAIRS["none"], **settings)


def test_a_pair_or_a_batch_that_does_not_fit():
    loss = ctkd.get_loss("shared_kl", pair=SOME)
    inputs = ragged_inputs(1)
    with pytest.raises(BatchError, match="student's logits have 13 columns.*vocab_size=11"):
        loss(Batch.from_causal_lm(**{**inputs, "student_vocab_size": None}))
    with pytest.raises(BatchError, match="teacher's logits have 9 columns"):
        loss(Batch.from_causal_lm(**ragged_inputs(1, W=9)))
    with pytest.raises(BatchError, match="no chunk_ids"):
        loss(Batch.from_causal_lm(**{**inputs, "teacher_chunk_ids": None}))
    with pytest.raises(SettingError, match="needs to know both tokenizers"):
        ctkd.get_loss("shared_kl")


def test_the_former_spelling_is_taken_and_named():
    with pytest.warns(DeprecationWarning, match="rest='renormalise' is spelled 'renormalize'"):
        loss = ctkd.get_loss("shared_kl", pair=SOME, rest="renormalise")
    assert loss.rest == "renormalize"


def test_shared_log_probs_sum_to_one():
    logits = torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared, others = SOME.ids[0], columns_outside(SOME.ids[0], V)
    for classes, width in (
        (shared_log_probs(logits, shared, others), 5),
        (shared_log_probs(logits, shared, None), 4),
    ):
        assert classes.shape == (4, width)
        torch.testing.assert_close(classes.exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_the_maps_are_not_part_of_the_state():
    loss = ctkd.get_loss("shared_kl", pair=SOME)
    assert not loss.state_dict()
    assert loss.to("meta").teacher_others.device.type == "meta"
    assert "rest='renormalize'" in repr(loss) and "shared=4" in repr(loss)
