"""`bpm` against the oracle, by hand, and where it must be zero, finite or indifferent."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ctkd
from baselines import bpm
from ctkd.batch import Batch
from ctkd.errors import BatchError, SettingError
from ctkd.tokenization import TokenBytes, TokenizerPair
from ctkd.tokenizers import PlaceholderPair
from tests.losses.test_gold import one_chunk, per_row, same_model
from tests.ragged_batches import answer_rows, loss_and_gradient, ragged_inputs


class Prefixes(PlaceholderPair):
    """Two vocabularies of given sizes and a given map."""

    def __init__(self, student_size: int, ids: list[int]) -> None:
        self.student_size, self.teacher_size = student_size, len(ids)
        self.ids = ids

    def prefix_student_ids(self) -> Tensor:
        return torch.tensor(self.ids)


SOME = Prefixes(11, [7, 0, -1, 7, 3, -1, 7, 10])
NO_TEACHER_REST = Prefixes(11, [7, 0, 2, 7, 3, 0, 7, 10])
NO_STUDENT_REST = Prefixes(3, [2, 0, -1, 2, 1, -1, 2, 0])
PAIRS = [SOME, NO_TEACHER_REST, NO_STUDENT_REST]
RESTS = ("class", "renormalize")


def table(pieces: str) -> TokenBytes:
    """Text tokens between bars, and an eos."""
    bytes_of = tuple(piece.encode() for piece in pieces.split("|"))
    return TokenBytes((*bytes_of, b""), ("text",) * len(bytes_of) + ("eos",))


def vocabulary(one: TokenBytes) -> list[tuple[str, bytes]]:
    return list(zip(one.roles, one.bytes_of, strict=True))


# Random tokens of these often lie inside each other. No student token begins "c".
WORDS = TokenizerPair(table("a|b|ab|ba|aa|bb|a|abb|b|a"), table("aab|baba|abab|baa|bc|abba|c"))


def word_inputs(seed: int) -> dict[str, Any]:
    """Texts of some of the teacher's tokens and an eos, cut into random tokens of the student."""
    generator = np.random.default_rng(seed)
    student, teacher = (one.bytes_of for one in (WORDS.student_bytes, WORDS.teacher_bytes))
    teacher_ids = [[*generator.integers(0, 4, size), 7] for size in (3, 2, 4)]
    student_ids = []
    for row in teacher_ids:
        text, ids = b"".join(teacher[one] for one in row), []
        while text:
            begin = [one for one in range(10) if text.startswith(student[one])]
            ids.append(generator.choice(begin))
            text = text[len(student[ids[-1]]) :]
        student_ids.append([*ids, 10])
    lengths = {
        f"{side}_lengths": tuple(map(len, rows))
        for side, rows in (("student", student_ids), ("teacher", teacher_ids))
    }
    inputs = ragged_inputs(seed, **lengths)
    for side, rows in (("student", student_ids), ("teacher", teacher_ids)):
        labels = inputs[f"{side}_labels"]
        labels[labels != -100] = torch.tensor([one for row in rows for one in row])
    aligned = WORDS.align(inputs["student_labels"], inputs["teacher_labels"])
    assert aligned.coverage == 1
    return {
        **inputs,
        "student_chunk_ids": aligned.student_chunk_ids,
        "teacher_chunk_ids": aligned.teacher_chunk_ids,
    }


def words_oracle(inputs: dict[str, Any], conditional: bool, **settings: Any) -> Any:
    sides = ("student", "teacher")
    vocabularies = tuple(map(vocabulary, (WORDS.student_bytes, WORDS.teacher_bytes)))
    given = {}
    if conditional:
        ids = tuple(per_row(inputs, side, "labels") for side in sides)
        given = {"ids": ids, "vocabularies": vocabularies}
    return oracle(inputs, bpm.longest_prefixes(*vocabularies), **given, **settings)


def oracle(
    inputs: dict[str, Any], prefixes: list[int], **settings: Any
) -> tuple[Tensor, int, Tensor]:
    leaf = inputs["student_logits"].detach().clone().requires_grad_()
    inputs = {**inputs, "student_logits": leaf}
    sides = ("student", "teacher")
    value, count = bpm.loss(
        *(answer_rows(inputs, side) for side in sides),
        *(per_row(inputs, side, "chunk_ids") for side in sides),
        prefixes,
        **settings,
    )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), count, gradient


@pytest.mark.parametrize("rest", RESTS)
def test_the_oracle_agrees(rest):
    for pair, temperature, seed in itertools.product(PAIRS, (1.0, 0.5, 3.0), (1, 2)):
        inputs = ragged_inputs(seed, V=pair.student_size, ties=seed == 2)
        settings = {"rest": rest, "temperature": temperature}
        expected, expected_count, expected_gradient = oracle(inputs, pair.ids, **settings)
        loss = ctkd.get_loss("bpm", pair=pair, **settings)
        value, count, gradient = loss_and_gradient(loss, inputs)
        assert count == expected_count > 4
        assert expected > 0.1
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


def test_narrow_types_and_probabilities_that_underflow():
    generator = torch.Generator().manual_seed(0)
    for rest, dtype, far in itertools.product(RESTS, (torch.float32, torch.bfloat16), (0.0, 240.0)):
        inputs = ragged_inputs(3, dtype=dtype)
        for side in ("student", "teacher"):
            logits = inputs[f"{side}_logits"]
            moved = torch.randint(0, 2, logits.shape, generator=generator).to(dtype)
            inputs[f"{side}_logits"] = logits - far * moved
        loss = ctkd.get_loss("bpm", pair=SOME, rest=rest)
        value, _, gradient = loss_and_gradient(loss, inputs)
        wide = {
            name: one.double() if torch.is_tensor(one) and one.is_floating_point() else one
            for name, one in inputs.items()
        }
        expected, _, expected_gradient = oracle(wide, SOME.ids, rest=rest)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        close = 1e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=close, atol=1e-5)


@pytest.mark.parametrize("rest", RESTS)
def test_the_oracle_agrees_inside_teacher_tokens(rest):
    differ = 0
    for seed, temperature in itertools.product(range(12), (1.0, 2.0)):
        inputs = word_inputs(seed)
        if seed % 4 == 3:  # hardly any text is expected but a token, which goes nowhere
            inputs["teacher_logits"][..., 6] += 14.0
        settings = {"rest": rest, "temperature": temperature}
        values = []
        for conditional in (True, False):
            expected, expected_count, expected_gradient = words_oracle(
                inputs, conditional, **settings
            )
            loss = ctkd.get_loss("bpm", pair=WORDS, conditional=conditional, **settings)
            value, count, gradient = loss_and_gradient(loss, inputs)
            assert count == expected_count
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)
            values.append(value)
        differ += abs(values[0] - values[1]) > 1e-3
    assert differ > 8


STUDENT = TokenBytes((b" ", b" wa", b"lk", b"x", b""), ("text",) * 4 + ("eos",))
TEACHER = TokenBytes((b" walk", b" was", b" the", b"q", b""), ("text",) * 4 + ("eos",))


def test_worked_by_hand():
    # phi: " walk" and " was" to " wa", " the" to " ", eos to eos, "q" to nothing.
    # s = 0.1, 0.3 and 0.2, rest "lk" and "x" 0.4; t = 0.15, 0.5 and 0.25, rest "q" 0.1.
    student = torch.tensor([[0.1, 0.3, 0.15, 0.25, 0.2]], dtype=torch.float64)
    teacher = torch.tensor([[0.3, 0.2, 0.15, 0.1, 0.25]], dtype=torch.float64)
    batch = Batch.from_causal_lm(**one_chunk(student, [1], teacher, [0]))
    pair = TokenizerPair(STUDENT, TEACHER)
    log = math.log
    whole = 0.15 * log(0.15 / 0.1) + 0.5 * log(0.5 / 0.3) + 0.25 * log(0.25 / 0.2)
    expected = {
        "class": whole + 0.1 * log(0.1 / 0.4),
        # Without the rest 0.9 is left of t and 0.6 of s.
        "renormalize": whole / 0.9 + log(0.6 / 0.9),
    }
    for rest, value in expected.items():
        output = ctkd.get_loss("bpm", pair=pair, rest=rest)(batch)
        assert output.value.item() == pytest.approx(value, rel=1e-12)
        assert output.count == 1
    # The student reads " wa" of " walk". What is left of " was" no student token begins, so "lk" is
    # sure to come, and has 0.3.
    row = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]], dtype=torch.float64)
    batch = Batch.from_causal_lm(**one_chunk(torch.cat([student, row]), [1, 2], teacher, [0]))
    output = ctkd.get_loss("bpm", pair=pair)(batch)
    assert output.parts["root"].item() == pytest.approx(expected["class"], rel=1e-12)
    assert output.parts["inside"].item() == pytest.approx(-log(0.3), rel=1e-12)
    assert output.count == 1


@pytest.mark.parametrize("rest", RESTS)
def test_a_student_that_is_the_teacher_costs_nothing_and_one_row_off_does(rest):
    loss = ctkd.get_loss("bpm", pair=Prefixes(8, [0, 1, -1, 3, 4, -1, 6, 7]), rest=rest)
    inputs = same_model()
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert abs(value) < 1e-14 and gradient.abs().max() < 1e-14
    for side in ("student", "teacher"):
        logits = inputs[f"{side}_logits"].roll(1, 1)
        assert loss_and_gradient(loss, {**inputs, f"{side}_logits": logits})[0] > 0.1
    # Only the class of the rest sees how much lies outside the image.
    inputs["student_logits"][..., [2, 5]] += 2.0
    value = loss_and_gradient(loss, inputs)[0]
    assert value > 0.05 if rest == "class" else abs(value) < 1e-14


def test_only_the_first_position_of_a_chunk_counts():
    inputs = ragged_inputs(9)
    loss = ctkd.get_loss("bpm", pair=SOME)
    expected = loss_and_gradient(loss, inputs)
    for side in ("student", "teacher"):
        chunk_ids = inputs[f"{side}_chunk_ids"]
        later = ((chunk_ids >= 0) & (chunk_ids == chunk_ids.roll(1, 1))).roll(-1, 1)
        assert later.any()
        inputs[f"{side}_logits"][later] = 7.0
    torch.testing.assert_close(loss_and_gradient(loss, inputs), expected, rtol=0, atol=0)


def test_blocks_and_padding_change_nothing(monkeypatch, uninspected):
    inputs = ragged_inputs(6)
    loss = ctkd.get_loss("bpm", pair=SOME)
    expected = loss_and_gradient(loss, inputs)
    monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", "25")
    with uninspected():
        actual = loss_and_gradient(loss, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-16)


def test_only_the_first_token_of_a_chunk_and_those_inside_the_teachers_first_count():
    """Also where a special token, which has no bytes, is numbered with others by hand."""
    wa, walk, eos = 1, 0, 4
    generator = torch.Generator().manual_seed(0)
    for ids, teacher_ids in (
        ([eos, wa, wa], [walk]),
        ([wa, wa, wa], [eos]),
        ([wa, eos], [eos, walk]),
    ):
        student, teacher = (
            torch.rand(len(one), 5, dtype=torch.float64, generator=generator)
            for one in (ids, teacher_ids)
        )
        inputs = one_chunk(student, ids, teacher, teacher_ids)
        pair = TokenizerPair(STUDENT, TEACHER)
        vocabularies = tuple(map(vocabulary, (STUDENT, TEACHER)))
        sides = ("student", "teacher")
        expected, _, _ = oracle(
            inputs,
            bpm.longest_prefixes(*vocabularies),
            ids=tuple(per_row(inputs, side, "labels") for side in sides),
            vocabularies=vocabularies,
        )
        value, _, _ = loss_and_gradient(ctkd.get_loss("bpm", pair=pair), inputs)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


def test_tokens_that_a_teacher_rules_out_and_rows_that_are_not_compared():
    """Of a row of minus infinity all tokens that may follow are expected alike."""
    pair = TokenizerPair(STUDENT, TEACHER)
    for dtype in (torch.float64, torch.float32):
        student = torch.tensor([[0.1, 0.3, 0.15, 0.25, 0.2]] * 2, dtype=dtype)
        for teacher, rest in (
            ([0.0] * 5, "class"),
            ([0.0, 0.0, 0.0, 1.0, 0.0], "renormalize"),
        ):
            inputs = one_chunk(student, [1, 2], torch.tensor([teacher], dtype=dtype), [0])
            loss = ctkd.get_loss("bpm", pair=pair, rest=rest)
            output = loss(Batch.from_causal_lm(**inputs))
            shares = torch.tensor(
                [0.4, 0.2, 0.2, 0.2] if rest == "class" else [0.5, 0.25, 0.25]
            ).log()
            probs = torch.tensor(
                [0.3, 0.1, 0.2, 0.4] if rest == "class" else [0.5, 1 / 6, 1 / 3]
            ).log()
            expected = float((shares.exp() * (shares - probs)).sum())
            assert output.parts["root"].item() == pytest.approx(expected, rel=1e-5)
        # Nothing is expected inside " walk": what the student says there does not matter.
        teacher = torch.tensor([[1e-9, 1e-9, 0.4, 0.3, 0.3]], dtype=dtype)
        student[1, 2] = math.nan
        inputs = one_chunk(student, [1, 2], teacher, [0])
        value, _, gradient = loss_and_gradient(ctkd.get_loss("bpm", pair=pair), inputs)
        assert value.isfinite() and gradient[0, 0].any() and not gradient[0, 1].any()


def test_ids_that_are_not_scored_may_be_anything():
    batch = Batch.from_causal_lm(**ragged_inputs(4))
    loss, sides = ctkd.get_loss("bpm", pair=SOME), {}
    for name, garbage in (("student", -100), ("teacher", 1000)):
        side = getattr(batch, name)
        assert not side.mask.all()
        ids = side.token_ids.masked_fill(~side.mask, garbage)
        sides[name] = replace(side, token_ids=ids)
    assert loss(replace(batch, **sides)).value == loss(batch).value


def test_what_is_refused():
    for settings, message in (
        ({"rest": "drop"}, "rest must be one of class, renormalize, got 'drop'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"conditional": "flase"}, "conditional must be true or false, got 'flase'"),
    ):
        with pytest.raises(SettingError, match=message):
            ctkd.get_loss("bpm", pair=SOME, **settings)
    with pytest.raises(SettingError, match="no student token begins any of these; use a loss"):
        ctkd.get_loss("bpm", pair=Prefixes(3, [-1, -1]))
    with pytest.raises(SettingError, match="needs to know both tokenizers"):
        ctkd.get_loss("bpm")
    inputs, loss = ragged_inputs(1), ctkd.get_loss("bpm", pair=SOME)
    with pytest.raises(BatchError, match=r"student's logits have 13 columns.*vocab_size=11"):
        loss(Batch.from_causal_lm(**{**inputs, "student_vocab_size": None}))
    with pytest.raises(BatchError, match="no chunk_ids"):
        loss(Batch.from_causal_lm(**{**inputs, "teacher_chunk_ids": None}))
    assert not loss.state_dict() and "rest='class'" in repr(loss) and "image=4" in repr(loss)
