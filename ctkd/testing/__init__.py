"""Checks that every loss must pass, for ctkd's own tests and for authors of plugins.

In a plugin's test file::

    import pytest
    from ctkd.testing import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_loss(check):
        check(MyLoss())  # or MyLoss(pair=make_pair()), if it needs one

A check raises `AssertionError` with a sentence that says what went wrong. The batches hold three
sequences with prompts, answers of different lengths on the two sides, a padded head on the
student's side, and an answer that only the student has.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from ctkd.batch import Batch
from ctkd.errors import BatchError, PluginError
from ctkd.loss import Loss, LossOutput
from ctkd.testing.inputs import (
    STUDENT_HEAD,
    STUDENT_VOCABULARY,
    Inputs,
    make_inputs,
    make_pair,
)
from ctkd.testing.teacher import with_stored_teacher

__all__ = ["CHECKS", "Check", "Inputs", "check_loss", "make_inputs", "make_pair"]

Check = Callable[[Loss], None]
CHECKS: list[Check] = []
_SIDES = ("student", "teacher")
_DIRECTIONS = 8


def check_loss(loss: Loss, *, skip: tuple[str, ...] = ()) -> None:
    """Run every check on a loss, but those named in ``skip``.

    Raises:
        AssertionError: If a check fails.
        ValueError: If ``skip`` names no check.

    Example:
        >>> from ctkd import get_loss
        >>> check_loss(get_loss("uld"))
    """
    names = [check.__name__ for check in CHECKS]
    unknown = set(skip) - set(names)
    if unknown:
        raise ValueError(f"no check is called {sorted(unknown)}; there are {names}")
    for check in CHECKS:
        if check.__name__ not in skip:
            check(loss)


def _check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def _map(inputs: Inputs, function: Callable[[str, Tensor], Tensor]) -> Inputs:
    return {**inputs, **{name: function(name, value) for name, value in _tensors(inputs).items()}}


def _sequence(inputs: Inputs, row: int) -> Inputs:
    return _map(inputs, lambda _, tensor: tensor[row : row + 1])


def _attributes(loss: Loss) -> dict[str, Any]:
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in loss.named_modules()
        for name, value in vars(module).items()
    }


def _run(
    loss: Callable[[Batch], LossOutput],
    inputs: Inputs,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[LossOutput, Tensor]:
    """Value, and gradient with respect to the student's logits, after a change to the batch."""
    logits = inputs["student_logits"].detach().clone().requires_grad_()
    output = loss(change(Batch.from_causal_lm(**{**inputs, "student_logits": logits})))
    assert output.value.requires_grad, "the value cannot be differentiated"
    (gradient,) = torch.autograd.grad(output.value, logits, allow_unused=True)
    assert gradient is not None, "the student's logits got no gradient"
    return output, gradient


def _run_or_fail(loss: Loss, inputs: Inputs, when: str) -> tuple[LossOutput, Tensor]:
    try:
        return _run(loss, inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise AssertionError(f"{when} it stops: {error}") from error


def _equal(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    close = torch.allclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=False
    )
    assert close, f"{what}: {actual} against {expected}"


@_check
def value_is_a_finite_scalar(loss: Loss) -> None:
    """The value is 0-dimensional and finite, in float64 for float64 and in float32 otherwise."""
    for ties in (False, True):
        for dtype, expected in (
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ):
            try:
                output = loss(Batch.from_causal_lm(**make_inputs(dtype=dtype, ties=ties)))
            except PluginError as error:
                raise AssertionError(str(error)) from error
            assert output.count.dtype == torch.int64, f"the count is {output.count.dtype}"
            assert output.value.dtype == expected, f"{dtype} gives {output.value.dtype}"
            assert output.value.isfinite(), f"the value is {output.value}"


@_check
def gradient_reaches_the_student_only(loss: Loss) -> None:
    """Paired student positions get a gradient; padding, prompts and the teacher get none.

    Paired are equal positions or, for a loss on chunks, the first positions of a chunk.
    """
    inputs = make_inputs()
    for name in ("student_logits", "teacher_logits", "teacher_hidden"):
        inputs[name].requires_grad_()
    value = loss(Batch.from_causal_lm(**inputs)).value
    assert value.requires_grad, "the value cannot be differentiated"
    value.backward()  # type: ignore[no-untyped-call]
    assert inputs["teacher_logits"].grad is None, "the teacher's logits got a gradient"
    assert inputs["teacher_hidden"].grad is None, "the teacher's hidden states got a gradient"
    gradient = inputs["student_logits"].grad
    assert gradient is not None, "the student's logits got no gradient"
    assert gradient.isfinite().all(), "the gradient is not finite"
    size = gradient.abs().sum(-1)
    student_scored = (inputs["student_labels"] != -100).roll(-1, 1)
    assert (size[~student_scored] == 0).all(), "positions that are not scored got a gradient"
    answers = (inputs["teacher_labels"] != -100).sum(1, keepdim=True)
    paired = student_scored & (student_scored.cumsum(1) <= answers)
    if "chunks" in loss.needs:
        chunk_ids = inputs["student_chunk_ids"]
        begins = chunk_ids != chunk_ids.roll(1, 1)
        shared = torch.isin(chunk_ids, inputs["teacher_chunk_ids"]) & (answers > 0)
        paired = (begins & shared & (chunk_ids >= 0)).roll(-1, 1)
    assert (size[paired] > 0).all(), "a position that both sides score got no gradient"
    padded = gradient[..., STUDENT_VOCABULARY:]
    assert (padded == 0).all(), "columns past the tokenizer's length got a gradient"


@_check
def gradient_matches_finite_differences(loss: Loss) -> None:
    """The gradient in float64 is that of finite differences, along random directions.

    Each direction moves all entries that are scored: a gradient that is wrong at one is noticed.
    """
    inputs = make_inputs()
    logits = inputs["student_logits"]
    scored = (inputs["student_labels"] != -100).roll(-1, 1).unsqueeze(-1).repeat(1, 1, STUDENT_HEAD)
    scored[..., STUDENT_VOCABULARY:] = False

    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_DIRECTIONS, int(scored.sum()), generator=generator).double()

    def value(steps: Tensor) -> Tensor:
        changed = logits.masked_scatter(scored, logits[scored] + steps @ directions)
        return loss(Batch.from_causal_lm(**{**inputs, "student_logits": changed})).value

    try:
        torch.autograd.gradcheck(value, directions.new_zeros(_DIRECTIONS).requires_grad_())
    except GradcheckError as error:
        raise AssertionError(f"the gradient is not that of finite differences: {error}") from error


@_check
def inputs_are_left_alone(loss: Loss) -> None:
    """Forward and backward change no tensor of the caller."""
    inputs = make_inputs()
    before = _map(inputs, lambda _, tensor: tensor.clone())
    logits = inputs["student_logits"].requires_grad_()
    value = loss(Batch.from_causal_lm(**inputs)).value
    value.backward()  # type: ignore[no-untyped-call]
    for name, tensor in _tensors(before).items():
        assert torch.equal(tensor, inputs[name]), f"{name} was changed"
    assert logits.is_leaf, "the student's logits were replaced"


@_check
def padding_changes_nothing(loss: Loss) -> None:
    """Two more positions of garbage after each text change neither value nor gradient."""
    inputs = make_inputs()

    def pad(name: str, tensor: Tensor) -> Tensor:
        fill = {"labels": -100, "chunk_ids": -1}.get(name.split("_", 1)[1], 30.0)
        padding = torch.full((tensor.shape[0], 2, *tensor.shape[2:]), fill, dtype=tensor.dtype)
        return torch.cat([tensor, padding], dim=1)

    output, gradient = _run(loss, inputs)
    padded_output, padded_gradient = _run(loss, _map(inputs, pad))
    _equal(padded_output.value, output.value, "padding changes the value")
    _equal(padded_gradient[:, :-2], gradient, "padding changes the gradient")


@_check
def a_padded_head_changes_nothing(loss: Loss) -> None:
    """Columns past the tokenizer's length have no influence, whatever they hold."""
    inputs = make_inputs()
    output, gradient = _run(loss, inputs)
    inputs["student_logits"][..., STUDENT_VOCABULARY:] = 50.0
    teacher = inputs["teacher_logits"]
    inputs["teacher_vocab_size"] = teacher.shape[2]
    inputs["teacher_logits"] = torch.nn.functional.pad(teacher, (0, 3), value=50.0)
    other_output, other_gradient = _run(loss, inputs)
    _equal(other_output.value, output.value, "padded columns change the value")
    _equal(other_gradient, gradient, "padded columns change the gradient")


@_check
def sequences_average_by_count(loss: Loss) -> None:
    """A batch is the mean of its sequences, each weighted by its count."""
    for ties in (False, True):
        inputs = make_inputs(ties=ties)
        output, gradient = _run(loss, inputs)
        singles = [_run(loss, _sequence(inputs, row)) for row in range(3)]
        counts = torch.stack([single.count for single, _ in singles])
        shares = counts.double() / counts.sum()
        value = (torch.stack([single.value for single, _ in singles]) * shares).sum()
        gradients = torch.cat([part for _, part in singles]) * shares.view(-1, 1, 1)
        _equal(output.value, value, "the batch is not the mean of its sequences")
        _equal(gradient, gradients, "the batch's gradient is not that of its sequences")


@_check
def units_equal_the_count(loss: Loss) -> None:
    """`units` says what ``count`` will be, without looking at logits."""
    inputs = make_inputs()
    count = loss(Batch.from_causal_lm(**inputs)).count
    for side in _SIDES:
        inputs[f"{side}_logits"] = torch.full_like(inputs[f"{side}_logits"], torch.nan)
    units = loss.units(Batch.from_causal_lm(**inputs))
    assert isinstance(units, Tensor), f"units gives {type(units).__name__}, not a tensor"
    assert units.shape == () and units.dtype == torch.int64, f"units are {units}"
    assert units == count, f"units gives {units}, count is {count}"


@_check
def nothing_scored_gives_zero(loss: Loss) -> None:
    """Without scored positions the value is a zero with a zero gradient."""
    inputs = make_inputs()
    for side in _SIDES:
        inputs[f"{side}_labels"] = torch.full_like(inputs[f"{side}_labels"], -100)
    output, gradient = _run(loss, inputs)
    assert output.value.shape == () and output.value == 0, f"the value is {output.value}"
    assert (gradient == 0).all(), "the gradient is not zero"
    assert output.count == loss.units(Batch.from_causal_lm(**inputs)), "count is not units"


@_check
def an_empty_batch_gives_zero(loss: Loss) -> None:
    """Without sequences the value is a zero with a zero gradient, over no unit.

    A side whose texts have no position to score is as one of which no position is scored.
    """
    for dtype in (torch.float64, torch.float32):
        inputs = make_inputs(dtype=dtype)
        # Texts long enough that what loops over positions has something to do.
        nothing = _map(inputs, lambda _, tensor: tensor[:0].repeat(1, 20, *[1] * (tensor.ndim - 2)))
        output, gradient = _run_or_fail(loss, nothing, "without sequences")
        assert output.value.shape == () and output.value == 0, f"the value is {output.value}"
        assert output.count == 0, f"the count is {output.count}"
        assert gradient.shape == nothing["student_logits"].shape, "the gradient has another shape"
        for sides in (("student",), ("teacher",), _SIDES):
            _check_without_positions(loss, inputs, sides)


def _check_without_positions(loss: Loss, inputs: Inputs, sides: tuple[str, ...]) -> None:
    of_sides = [name for name in _tensors(inputs) if name.startswith(sides)]
    cut = _map(inputs, lambda name, tensor: tensor[:, :1] if name in of_sides else tensor)
    unscored = {f"{side}_labels": torch.full_like(inputs[f"{side}_labels"], -100) for side in sides}
    which = " and ".join(sides)
    output, gradient = _run_or_fail(loss, cut, f"without positions of the {which}")
    same, same_gradient = _run(loss, {**inputs, **unscored})
    assert output.count == same.count, f"without positions of the {which}: count {output.count}"
    what = f"without positions of the {which}, against none scored:"
    _equal(output.value, same.value, f"{what} the value", 1e-6)
    same_gradient = same_gradient[:, : gradient.shape[1]]
    _equal(gradient, same_gradient, f"{what} the gradient", 1e-6)


@_check
def k_above_the_vocabulary_is_all_of_it(loss: Loss) -> None:
    """A ``k`` or ``top_k`` above both vocabularies does what one as large as the larger does.

    Says nothing about a loss that has no such setting.
    """
    for name in ("k", "top_k"):
        if not hasattr(loss, name):
            continue
        for dtype in (torch.float64, torch.float32):
            inputs = make_inputs(dtype=dtype)
            enough, more = copy.deepcopy(loss), copy.deepcopy(loss)
            setattr(enough, name, STUDENT_VOCABULARY)
            setattr(more, name, 1000)
            output, gradient = _run_or_fail(enough, inputs, f"with {name}={STUDENT_VOCABULARY}")
            more_output, more_gradient = _run_or_fail(more, inputs, f"with {name}=1000")
            _equal(more_output.value, output.value, f"{name}=1000 changes the value", 1e-6)
            _equal(more_gradient, gradient, f"{name}=1000 changes the gradient", 1e-6)


@_check
def masked_columns_are_taken_or_refused(loss: Loss) -> None:
    """Logits of minus infinity give a finite value and gradient, or a `BatchError`.

    They may be whole columns or single entries, of one side or of both. The error names a side and
    a column of it that holds minus infinity: "student" or "teacher", "column" and the number.
    """
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for row, sides in enumerate((("student",), ("teacher",), _SIDES)):
        for number, columns in enumerate(([0], [2], [4], [1, 3], [4, 5, 6], None)):
            # Every pair of a dtype with sides or with columns comes up.
            dtype = dtypes[(row + number) % len(dtypes)]
            _check_masked(loss, make_inputs(dtype=dtype), sides, columns)


def _check_masked(
    loss: Loss, inputs: Inputs, sides: tuple[str, ...], columns: list[int] | None
) -> None:
    what = f"with {columns or 'single entries'} of the {' and '.join(sides)} at minus infinity"
    for side in sides:
        logits = inputs[f"{side}_logits"]
        if columns is None:
            # One column is left to every row.
            logits[..., 1:][logits[..., 1:] < -1.0] = -torch.inf
        else:
            logits[..., [one for one in columns if one < logits.shape[2]]] = -torch.inf
    try:
        output, gradient = _run(loss, inputs)
    except BatchError as error:
        named = re.findall(r"(student|teacher)'s.*?column (\d+)", str(error))
        for side, column in named:
            is_masked = inputs[f"{side}_logits"][..., int(column)] == -torch.inf
            assert side in sides and is_masked.any(), f"{what} the error is: {error}"
        assert named, f"{what} the error names no side and column: {error}"
        return
    assert output.value.isfinite(), f"{what} the value is {output.value}"
    assert gradient.isfinite().all(), f"{what} the gradient is not finite"


@_check
def half_precision_agrees(loss: Loss) -> None:
    """bfloat16 logits give what the same numbers give in float64."""
    inputs = make_inputs(dtype=torch.bfloat16)
    wide = _map(inputs, lambda _, tensor: tensor.double() if tensor.is_floating_point() else tensor)
    output, gradient = _run(loss, inputs)
    wide_output, wide_gradient = _run(loss, wide)
    assert gradient.dtype == torch.bfloat16, f"the gradient is {gradient.dtype}"
    _equal(output.value, wide_output.value, "bfloat16 and float64 differ in value", 2e-6)
    _equal(gradient, wide_gradient, "bfloat16 and float64 differ in gradient", 1e-2)


@_check
def parts_sum_to_the_value(loss: Loss) -> None:
    """The logged parts are detached and add up to the value."""
    output, _ = _run(loss, make_inputs())
    assert output.parts, "there are no parts"
    for name, part in output.parts.items():
        assert not part.requires_grad, f"part {name!r} is not detached"
    total = torch.stack(list(output.parts.values())).sum()
    _equal(total, output.value, "the parts do not sum to the value")


@_check
def a_second_call_gives_the_same(loss: Loss) -> None:
    """Nothing is left behind by a call: not in the loss, the batch, or torch's random state."""
    inputs = make_inputs(ties=True)
    batch = Batch.from_causal_lm(**inputs)
    random_state = torch.get_rng_state()
    attributes, state = _attributes(loss), copy.deepcopy(loss.state_dict())
    first = loss(batch)
    written = [
        name
        for name, value in {**attributes, **_attributes(loss)}.items()
        if attributes.get(name) is not value
    ]
    assert not written, f"forward wrote to {written}"
    for name, value in loss.state_dict().items():
        same = not isinstance(value, Tensor) or torch.equal(value, state[name])
        assert same, f"forward changed {name}"
    assert torch.equal(random_state, torch.get_rng_state()), "random numbers were drawn"
    loss(Batch.from_causal_lm(**make_inputs(seed=1)))
    for second in (loss(batch), loss(Batch.from_causal_lm(**inputs))):
        assert torch.equal(first.value, second.value), f"{first.value}, then {second.value}"


@_check
def a_checkpoint_changes_nothing(loss: Loss) -> None:
    """In `torch.utils.checkpoint`, which runs the loss again for the gradient, all is the same."""
    for dtype in (torch.float64, torch.float32):
        inputs = make_inputs(dtype=dtype)
        output, gradient = _run(loss, inputs)
        logits = inputs["student_logits"].requires_grad_()
        for made in (None, Batch.from_causal_lm(**inputs)):
            try:
                value = checkpoint(_value, loss, inputs, made, use_reentrant=False)
                (again,) = torch.autograd.grad(value, logits)
            except RuntimeError as error:
                raise AssertionError(f"it does not run in a checkpoint: {error}") from error
            assert torch.equal(value, output.value), f"a checkpoint gives {value}"
            _equal(again, gradient, "a checkpoint changes the gradient")


@_check
def compiling_changes_nothing(loss: Loss) -> None:
    """`torch.compile` runs the loss, with the same value and gradient."""
    inputs = make_inputs(dtype=torch.float32)
    output, gradient = _run(loss, inputs)
    # What was compiled before would count towards the limit of compilations.
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():
            # The compiler looks for gradients of tensors that have none.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            compiled = torch.compile(loss, backend="aot_eager")
            compiled_output, compiled_gradient = _run(compiled, inputs)
    # A compiler has exceptions of its own for what it cannot follow.
    except Exception as error:
        raise AssertionError(f"it cannot be compiled: {error}") from error
    finally:
        torch.compiler.reset()
    _equal(compiled_output.value, output.value, "compiling changes the value", 1e-6)
    _equal(compiled_gradient, gradient, "compiling changes the gradient", 1e-5)


def _value(loss: Loss, inputs: Inputs, batch: Batch | None) -> Tensor:
    return loss(batch or Batch.from_causal_lm(**inputs)).value


@_check
def state_dict_round_trip(loss: Loss) -> None:
    """Loading its own state leaves a loss as it was."""
    inputs = make_inputs()
    before, _ = _run(loss, inputs)
    loss.load_state_dict(copy.deepcopy(loss.state_dict()))
    after, _ = _run(loss, inputs)
    assert torch.equal(before.value, after.value), "the value changed"


@_check
def runs_on_the_meta_device(loss: Loss) -> None:
    """Shapes depend on no data, and no tensor is made on another device than the batch's."""
    inputs = make_inputs(dtype=torch.float32, device="meta")
    try:
        output, gradient = _run(copy.deepcopy(loss).to("meta"), inputs)
    except RuntimeError as error:
        raise AssertionError(f"it does not run without numbers: {error}") from error
    for tensor in (output.value, output.count, gradient, *output.parts.values()):
        assert tensor.device.type == "meta", f"a result lies on {tensor.device}"
    assert gradient.shape == inputs["student_logits"].shape, "the gradient has another shape"


@_check
def a_stored_teacher_serves(loss: Loss) -> None:
    """A teacher of whom everything is stored is as good as the live one, in value and gradient.

    For a loss whose `teacher_needs` is "observed", nothing but the observed tokens is stored. One
    that needs "top_k" also runs with as few entries as it asks for by rank.
    """
    inputs = make_inputs()

    def run(k: int) -> tuple[LossOutput, Tensor]:
        try:
            return _run(
                loss, inputs, lambda batch: with_stored_teacher(batch, k, loss.teacher_temperatures)
            )
        except (BatchError, AttributeError) as error:
            raise AssertionError(
                f"teacher_needs is {loss.teacher_needs!r}, but with {k} entries of each of the "
                f"teacher's rows stored at {loss.teacher_temperatures} it stops: {error}"
            ) from error

    output, gradient = _run(loss, inputs)
    width = inputs["teacher_logits"].shape[2]
    stored_output, stored_gradient = run(0 if loss.teacher_needs == "observed" else width)
    _equal(stored_output.value, output.value, "a stored teacher changes the value")
    _equal(stored_gradient, gradient, "a stored teacher changes the gradient")
    if loss.teacher_needs == "top_k":
        few_output, few_gradient = run(min(max(loss.teacher_entries, 1), width))
        assert few_output.value.isfinite(), f"with few entries the value is {few_output.value}"
        assert few_gradient.isfinite().all(), "with few entries the gradient is not finite"
