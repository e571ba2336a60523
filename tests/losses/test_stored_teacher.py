"""Every loss with a teacher of whom only the largest logits are stored."""

import functools
import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ctkd
from ctkd.batch import Batch
from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, TopKLogits
from ctkd.loss import LossOutput
from ctkd.testing import make_inputs, make_pair
from ctkd.testing.teacher import with_stored_teacher
from tests.ragged_batches import ragged_inputs
from tests.spread_rows import spread_rows

V, W = 11, 8
# (loss, settings, what it says that it needs)
FORMS = [
    ("alm", {}, "observed"),
    ("alm", {"temperature": 1.0}, "observed"),
    ("alm", {"debias": True}, "rows"),
    ("bpm", {}, "rows"),
    ("bpm", {"conditional": False, "rest": "renormalize"}, "rows"),
    ("gold", {}, "rows"),
    ("gold", {"merging": "observed"}, "rows"),
    ("gold", {"merging": "bayesian", "teacher_temperature": 0.5}, "rows"),
    ("mined", {}, "top_k"),
    ("mined", {"k": 3, "temperature": 2.0}, "top_k"),
    ("mined", {"k": 3, "alignment": "dtw"}, "top_k"),
    ("mined", {"form": "dense"}, "rows"),
    ("mined", {"form": "dense", "alignment": "dtw", "temperature": 2.0}, "rows"),
    ("multilevelot", {}, "top_k"),
    ("multilevelot", {"k": 3}, "top_k"),
    ("multilevelot", {"k": 3, "matching": "greedy"}, "top_k"),
    ("multilevelot", {"k": 3, "matching": "assignment"}, "top_k"),
    ("multilevelot", {"k": 3, "matching": "assignment_topk"}, "top_k"),
    ("multilevelot", {"k": 3, "pairing": "chunk"}, "top_k"),
    ("multilevelot_released", {}, "top_k"),
    ("multilevelot_released", {"teacher_temperature": 2.0}, "top_k"),
    ("multilevelot_sequence", {"k": 3}, "top_k"),
    ("multilevelot_token", {"k": 3}, "top_k"),
    ("shared_kl", {}, "rows"),
    ("shared_kl", {"rest": "class", "temperature": 2.0}, "rows"),
    ("uld", {}, "top_k"),
    ("uld", {"teacher_temperature": 0.5}, "top_k"),
    ("uld", {"top_k": 3}, "top_k"),
    ("uld", {"top_k": 3, "pairing": "chunk"}, "top_k"),
    ("uld", {"pairing": "chunk"}, "top_k"),
]
TEMPERATURES = (1.0, 2.0, 0.5)


def forms(*needs: str):
    """A test of each loss, in all forms with these needs one after the other."""
    chosen = [form for form in FORMS if form[2] in needs]

    def decorate(test):
        def run(name):
            for loss, settings, _ in chosen:
                if loss == name:
                    test(name, settings)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("name", sorted({name for name, *_ in chosen}))(run)

    return decorate


def build(name: str, settings: dict, sizes: tuple[int, int] = (V, W)) -> ctkd.Loss:
    return ctkd.get_loss(name, pair=make_pair(*sizes), **settings)


def ragged_batch(seed: int, dtype: torch.dtype = torch.float64, **changes) -> tuple[Batch, Tensor]:
    """A batch and the student's leaf."""
    inputs = ragged_inputs(seed, V=V, W=W, dtype=dtype, **changes)
    leaf = inputs["student_logits"].requires_grad_()
    return Batch.from_causal_lm(**inputs), leaf


def with_spread_rows(batch: Batch, k: int, temperature: float) -> Batch:
    """The batch with a dense teacher whose rows are spread at one temperature."""
    teacher = batch.teacher
    live = teacher.logits.tensor.gather(
        1, teacher.logits.rows.unsqueeze(-1).expand(-1, -1, teacher.logits.shape[2])
    )
    log_probs, _ = spread_rows(live, teacher.mask, teacher.token_ids, k, temperature)
    logits = DenseLogits(temperature * log_probs, mask=teacher.mask)
    return replace(batch, teacher=replace(teacher, logits=logits))


def value_and_gradient(loss: ctkd.Loss, batch: Batch, leaf: Tensor) -> tuple[LossOutput, Tensor]:
    output = loss(batch)
    (gradient,) = torch.autograd.grad(output.value, leaf)
    return output, gradient


def agree(loss: ctkd.Loss, batch: Batch, other: Batch, leaf: Tensor, tolerance: float) -> None:
    expected, expected_gradient = value_and_gradient(loss, batch, leaf)
    output, gradient = value_and_gradient(loss, other, leaf)
    assert expected_gradient.abs().max() > 0
    assert output.count == expected.count
    for actual, wanted in (
        (output.value, expected.value),
        (gradient, expected_gradient),
        *((output.parts[part], expected.parts[part]) for part in expected.parts),
    ):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def test_every_registered_loss_is_here():
    assert {name for name, _, _ in FORMS} == set(ctkd.list_losses())


def test_what_each_loss_needs():
    for name, settings, needs in FORMS:
        assert build(name, settings).teacher_needs == needs, (name, settings)
        if not settings:
            assert ctkd.describe(name).teacher_needs == needs, name


@pytest.mark.parametrize("name", ctkd.list_losses())
def test_each_docstring_says_what_is_needed_and_lost(name):
    doc = inspect.getdoc(ctkd.get_loss_class(name))
    section = doc.split("Stored teacher:\n")[1].split("\n\n")[0]
    words = {"rows": "whole rows", "top_k": "largest entries", "observed": "observed tokens"}
    assert f"{words[ctkd.describe(name).teacher_needs]}" in section
    needs_of_forms = {needs for loss, _, needs in FORMS if loss == name}
    assert ("whole rows" in section) == ("rows" in needs_of_forms)


@forms("rows", "top_k", "observed")
def test_everything_stored_is_the_live_teacher(name, settings):
    loss = build(name, settings)
    for seed, dtype, tolerance in ((0, torch.float64, 1e-10), (1, torch.float32, 1e-6)):
        batch, leaf = ragged_batch(seed, dtype)
        stored = with_stored_teacher(batch, W, loss.teacher_temperatures)
        agree(loss, batch, stored, leaf, tolerance)


ONE_TEMPERATURE = [
    ("alm", {}, 1.0),
    ("mined", {"k": 3}, 1.0),
    ("mined", {"k": 3, "temperature": 2.0}, 2.0),
    ("uld", {}, 1.0),
    ("uld", {"pairing": "chunk"}, 1.0),
    ("uld", {"teacher_temperature": 0.5, "student_temperature": 2.0}, 0.5),
    ("uld", {"teacher_temperature": 2.0, "top_k": 3}, 2.0),
    ("multilevelot_token", {"k": 4}, 1.0),
    ("multilevelot_token", {"k": 4, "temperature": 2.0, "sl_temperature": 2.0}, 2.0),
    ("multilevelot_sequence", {"k": 4, "sd_temperature": 1.0}, 1.0),
    *[
        ("multilevelot", {"k": 4, "sd_temperature": 1.0, "matching": matching}, 1.0)
        for matching in ("mass", "greedy", "assignment", "assignment_topk")
    ],
]


def least_stored(name: str, settings: dict) -> int:
    """Entries that must be stored for a loss to run, and for an assignment to be unique."""
    matching = {"assignment": W - 1, "assignment_topk": 3}.get(settings.get("matching"), 0)
    return max(matching, 3 if name == "mined" or "top_k" in settings else 0)


@pytest.mark.parametrize(("name", "settings", "temperature"), ONE_TEMPERATURE, ids=str)
def test_less_stored_is_a_dense_teacher_with_spread_rows(name, settings, temperature):
    loss = build(name, settings)
    for k in (0, 1, 3, W - 1):
        if k >= least_stored(name, settings):
            batch, leaf = ragged_batch(k // 2 % 2)
            stored = with_stored_teacher(batch, k, [temperature])
            agree(loss, with_spread_rows(batch, k, temperature), stored, leaf, 1e-10)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_less_stored_in_single_precision(k, temperature):
    batch, leaf = ragged_batch(2, torch.float32)
    agree(
        build("uld", {"teacher_temperature": temperature}),
        with_spread_rows(batch, k, temperature),
        with_stored_teacher(batch, k, [temperature]),
        leaf,
        1e-6,
    )


def test_another_temperature_has_other_spread_rows():
    batch, _ = ragged_batch(0)
    loss = build("uld", {"teacher_temperature": 2.0})
    stored = loss(with_stored_teacher(batch, 2, [2.0])).value
    assert (stored - loss(with_spread_rows(batch, 2, 1.0)).value).abs() > 1e-3


@forms("rows")
def test_losses_on_whole_rows_refuse_less(name, settings):
    batch, _ = ragged_batch(0)
    for k in (0, W - 1):
        message = (
            f"whole rows of the teacher's logits are needed, but only {k} of 8 entries of each are "
            "stored; use the live teacher, or cache it again with --k 8"
        )
        with pytest.raises(BatchError, match=message):
            build(name, settings)(with_stored_teacher(batch, k, TEMPERATURES))


@pytest.mark.parametrize(
    ("name", "settings", "needed"),
    [("uld", {"top_k": 3}, 3), ("uld", {"top_k": 20}, W), ("mined", {"k": 3}, 3), ("mined", {}, W)],
)
def test_losses_on_the_largest_refuse_fewer_and_lose_nothing_with_enough(name, settings, needed):
    batch, leaf = ragged_batch(0)
    loss = build(name, settings)
    message = f"the largest {needed} entries .*, but only {needed - 1} are stored; cache .* --k"
    with pytest.raises(BatchError, match=message):
        loss(with_stored_teacher(batch, needed - 1))
    agree(loss, batch, with_stored_teacher(batch, needed), leaf, 1e-12)


@forms("observed")
def test_observed_tokens_are_enough(name, settings):
    loss = build(name, settings)
    for dtype in (torch.float64, torch.float32):
        batch, leaf = ragged_batch(0, dtype)
        expected, expected_gradient = value_and_gradient(loss, batch, leaf)
        output, gradient = value_and_gradient(loss, with_stored_teacher(batch, 0, [1.0]), leaf)
        assert torch.equal(output.value, expected.value)
        assert torch.equal(gradient, expected_gradient)


EVERYTHING = torch.arange(W).expand(1, 1, W)


@functools.cache
def one_pair_of_positions(seed, temperature):
    """A batch, `uld` with its live teacher, and what that teacher says."""
    batch, _ = ragged_batch(seed, student_lengths=(1,), teacher_lengths=(1,))
    value = build("uld", {"teacher_temperature": temperature})(batch).value.detach()
    live = batch.teacher.logits.log_probs(EVERYTHING, temperature=temperature).exp()[0, 0]
    return batch, value, live


@pytest.mark.parametrize(("k", "temperature"), [(k, 1.0 + k % 2) for k in range(W + 1)])
def test_uld_is_off_by_at_most_twice_what_is_outside(k, temperature):
    loss = build("uld", {"teacher_temperature": temperature})
    largest = 0.0
    for seed in range(40):
        batch, value, live = one_pair_of_positions(seed, temperature)
        stored = with_stored_teacher(batch, k, [temperature])
        error = (loss(stored).value - value).abs().item()
        assert isinstance(stored.teacher.logits, TopKLogits)
        outside = float(live[~stored.teacher.logits.is_stored(EVERYTHING)[0, 0]].sum())
        assert outside <= 1 - float(live.topk(k).values.sum()) + 1e-12
        assert error <= 2 * outside + 1e-12
        largest = max(largest, error)
    # With one column outside, or none, nothing is spread.
    assert (largest > 1e-3) == (k < W - 1)


def test_the_error_falls_with_k():
    batch, _ = ragged_batch(3)
    for name in ("uld", "multilevelot", "multilevelot_released"):
        loss = build(name, {})
        live = loss(batch).value
        errors = [(loss(with_stored_teacher(batch, k)).value - live).abs().item() for k in (1, 7)]
        assert errors[1] < errors[0] / 2 and errors[0] > 0, (name, errors)


@forms("rows", "top_k", "observed")
def test_on_the_meta_device(name, settings):
    if str(settings.get("matching")).startswith("assignment"):
        return  # scipy needs numbers
    if settings.get("alignment") == "dtw":
        settings = {**settings, "alignment": "chunk"}
    inputs = make_inputs(dtype=torch.float32, device="meta")
    leaf = inputs["student_logits"].requires_grad_()
    loss = build(name, settings, (7, 5)).to("meta")
    for k in (0, 3, 5):
        batch = with_stored_teacher(Batch.from_causal_lm(**inputs), k, TEMPERATURES)
        if k < min(loss.teacher_entries, 5) or (loss.teacher_needs == "rows" and k < 5):
            with pytest.raises(BatchError, match="are stored; "):
                loss(batch)
            continue
        output, gradient = value_and_gradient(loss, batch, leaf)
        assert output.value.is_meta and output.count.is_meta and gradient.shape == leaf.shape


def test_what_is_asked_of_a_teacher_is_declared():
    declared = {
        ("alm", ()): ((1.0,), 0),
        ("mined", (("k", 3), ("temperature", 2.0))): ((2.0,), 3),
        ("uld", (("teacher_temperature", 0.5), ("top_k", 3))): ((0.5,), 3),
        ("multilevelot", (("temperature", 1.5), ("sl_temperature", 0.5))): ((1.5, 0.5, 2.0), 0),
        ("multilevelot_token", (("temperature", 1.5),)): ((1.0, 1.5), 0),
        ("multilevelot_sequence", ()): ((1.0, 2.0), 0),
        ("shared_kl", (("temperature", 2.0),)): ((2.0,), 0),
        ("bpm", (("temperature", 2.0),)): ((2.0,), 0),
        ("gold", (("teacher_temperature", 0.5),)): ((0.5,), 0),
    }
    for (name, settings), (temperatures, entries) in declared.items():
        loss = build(name, dict(settings))
        assert set(loss.teacher_temperatures) == set(temperatures), name
        assert loss.teacher_entries == entries, name


@forms("rows", "top_k", "observed")
def test_nothing_scored_gives_zero(name, settings):
    batch, leaf = ragged_batch(0, student_lengths=(0, 2, 0), teacher_lengths=(0, 0, 3))
    output, gradient = value_and_gradient(
        build(name, settings), with_stored_teacher(batch, W, TEMPERATURES), leaf
    )
    expected = build(name, settings)(batch)
    assert output.value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(output.value, expected.value)
