"""The published losses, called as a benchmark calls them, give what the package's losses give."""

import sys

import pytest
import torch

import ctkd
from baselines import as_published, trl_uld
from tests.ragged_batches import ragged_inputs

LENGTH = 6
ORDER = ("student_logits", "student_labels", "teacher_logits", "teacher_labels")
OURS = {
    "multilevelot, as published": "multilevelot_released",
    "uld, as published": "uld",
    "uld, TRL": "uld",
}
by_name = pytest.mark.parametrize("name", list(as_published.PUBLISHED))


def inputs_of(*, in_front: int) -> dict[str, torch.Tensor]:
    """Answers of one length on either side, with so many ignored labels in front of them."""
    generator = torch.Generator().manual_seed(7)
    inputs = {}
    for side, columns in (("student", 31), ("teacher", 19)):
        shape = (3, in_front + LENGTH)
        logits = 3.0 * torch.randn(*shape, columns, generator=generator, dtype=torch.float64)
        labels = torch.randint(columns, shape, generator=generator)
        labels[:, :in_front] = -100
        inputs[f"{side}_logits"], inputs[f"{side}_labels"] = logits, labels
    inputs["student_logits"].requires_grad_()
    return inputs


def published(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if "TRL" in name:
        pytest.importorskip("trl", reason="an optional package")
    return as_published.PUBLISHED[name](*(inputs[key] for key in ORDER))


def check_equal(inputs: dict, value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradient, wanted = (
        torch.autograd.grad(one, inputs["student_logits"])[0] for one in (value, expected)
    )
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-13)
    assert wanted.abs().sum() > 0


@by_name
def test_the_shifted_rows_are_those_of_a_causal_model(name):
    inputs = inputs_of(in_front=2)
    batch = ctkd.Batch.from_causal_lm(**inputs)
    check_equal(inputs, published(name, inputs), ctkd.get_loss(OURS[name])(batch).value)


@by_name
def test_labels_that_begin_at_once_have_rows_of_their_own(name):
    inputs = inputs_of(in_front=0)
    sides = [
        ctkd.Side.from_encoder_decoder(inputs[f"{side}_logits"], inputs[f"{side}_labels"])
        for side in ("student", "teacher")
    ]
    batch = ctkd.Batch(student=sides[0], teacher=sides[1])
    check_equal(inputs, published(name, inputs), ctkd.get_loss(OURS[name])(batch).value)


@pytest.mark.parametrize("name", ["uld, as published", "uld, TRL"])
def test_ragged_answers_are_averaged_per_sequence(name):
    inputs = ragged_inputs(1, V=12, W=9, head=0, teacher_lengths=(4, 5, 2), chunks=False)
    del inputs["student_vocab_size"]
    inputs["student_logits"].requires_grad_()
    loss = ctkd.get_loss("uld")
    total = 0.0
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        batch = ctkd.Batch.from_causal_lm(**one)
        output = loss(batch)
        total = total + output.value * output.count / min(output.count, batch.teacher.mask.sum())
    check_equal(inputs, published(name, inputs), total / 3)


def test_without_trl_the_message_says_how_to_install_it(monkeypatch):
    for module in ("trl", "trl.experimental.gold.gold_trainer"):
        monkeypatch.setitem(sys.modules, module, None)
    assert not trl_uld.is_installed()
    inputs = inputs_of(in_front=0)
    with pytest.raises(trl_uld.TrlMissingError, match=r'pip install "trl>=1\.16,<2"'):
        trl_uld.uld(*(inputs[name] for name in ORDER))


@by_name
def test_nothing_of_the_caller_is_written_to(name):
    inputs = inputs_of(in_front=1)
    before = {key: value.detach().clone() for key, value in inputs.items()}
    published(name, inputs)
    assert all(torch.equal(inputs[key], value) for key, value in before.items())
