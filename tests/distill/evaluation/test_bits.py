"""Bits of text, against a loop over tokens."""

import copy
import json
import math

import pytest
import torch

from ctkd.distill.data.collator import padding_id
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.prompts import PromptForm
from ctkd.distill.evaluation.bits import text_bits
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.teachers.memory import TeacherMemory
from tests.distill import tiny


@pytest.fixture(scope="module")
def setup() -> tiny.Setup:
    return tiny.Setup(5)


def by_hand(model, side, width) -> float:
    """The bits of an answer, token by token, each in a pass of its own."""
    bits = 0.0
    for end in range(len(side.answer_ids)):
        ids = torch.tensor([side.prompt_ids + side.answer_ids[:end]])
        with torch.no_grad():
            probs = model(ids).logits[0, -1, :width].softmax(-1)
        bits -= math.log2(probs[side.answer_ids[end]])
    return bits


def test_bits_are_those_of_a_loop_whatever_the_batch_and_wherever_they_come_from(setup, tmp_path):
    texts, width = tiny.examples(5), len(setup.teacher_tokenizer)
    sides = [row.teacher for row in setup.rows]
    logits, pad = ModelLogits(setup.teacher), padding_id(setup.teacher_tokenizer)
    expected = [by_hand(setup.teacher, side, width) for side in sides]
    memory = TeacherMemory(logits, sides, pad_id=pad, vocab_size=width)
    for asked in (logits, memory):
        found = text_bits(asked, setup.teacher_tokenizer, texts, sides, batch_size=2)
        assert found.bits == pytest.approx(expected, abs=1e-9)
    bytes_ = [len(text.answer.encode()) for text in texts]
    assert found.summary() == {
        "bits_per_byte": pytest.approx(sum(expected) / sum(bytes_)),
        "n": 5,
        "bytes": sum(bytes_),
    }
    found.write(tmp_path / "bits.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "bits.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [text.id for text in texts]
    assert sum(line["bits"] for line in lines) == pytest.approx(sum(expected))


def test_columns_past_the_vocabulary_get_no_probability(setup):
    sides = [row.student for row in setup.rows]
    logits = ModelLogits(setup.student)
    width = len(setup.student_tokenizer)
    expected = [by_hand(setup.student, side, width) for side in sides]
    setup.student.train()
    found = text_bits(logits, setup.student_tokenizer, tiny.examples(5), sides)
    assert found.bits == pytest.approx(expected, abs=1e-9)
    assert setup.student.training


def test_in_a_chat_the_space_in_front_is_neither_read_nor_counted(setup):
    tokenizer = copy.deepcopy(setup.student_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    texts, form = tiny.examples(5), PromptForm(template="chat")
    rows = encode_examples(texts, tokenizer, max_length=64, student_form=form).rows
    found = text_bits(ModelLogits(setup.student), tokenizer, texts, [row.student for row in rows])
    assert all(text.answer.startswith(" ") for text in texts)
    assert found.bytes == tuple(len(text.answer.encode()) - 1 for text in texts)
    spelled = [tokenizer.decode(row.student.answer_ids) for row in rows]
    assert spelled == [text.answer[1:] for text in texts]
