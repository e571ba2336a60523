"""Texts are written once, kept as they come, and found by the prompt alone."""

import json

import pytest

from ctkd.distill.models.generation import Generated, generate
from ctkd.distill.teachers import texts as teacher_texts
from ctkd.distill.teachers.texts import TeacherTexts
from ctkd.errors import OutputError
from tests.distill import tiny

TOKENIZER = tiny.tokenizer(300)
PROMPTS = [
    TOKENIZER(f"{tiny.TEXTS[number % 4]} {number} Well?{' Well?' * (number % 3)}").input_ids
    for number in range(9)
]


@pytest.fixture(scope="module")
def model():
    return tiny.model(len(TOKENIZER), seed=4)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(teacher_texts, "_GROUP", 4)


@pytest.fixture
def answered(monkeypatch) -> list[list[int]]:
    """The prompts that a model answered."""
    found = []

    def counting(model, tokenizer, prompts, **settings):
        found.extend(prompts)
        return generate(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(teacher_texts, "generate", counting)
    return found


def complete(path, model, prompts=PROMPTS, *, longest=6) -> TeacherTexts:
    texts = TeacherTexts(path, max_new_tokens=longest)
    texts.complete(prompts, lambda: (model, TOKENIZER))
    return texts


def test_texts_are_those_of_the_model(tmp_path, model):
    texts = complete(tmp_path / "deep" / "texts.jsonl", model)
    expected = [one.text for one in generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)]
    assert [texts.text(prompt) for prompt in PROMPTS] == expected
    assert any(expected)
    again = TeacherTexts(texts.path, max_new_tokens=6)
    assert [again.text(prompt) for prompt in PROMPTS] == expected
    assert (len(again), again.missing(PROMPTS), again.missing([[1], PROMPTS[0]])) == (9, 0, 1)
    assert again.text([1]) is None


def test_texts_know_whether_the_model_ended_them(tmp_path, model):
    found = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    texts = complete(tmp_path / "texts.jsonl", model)
    assert [texts.ended(prompt) for prompt in PROMPTS] == [one.ended for one in found]
    assert not all(one.ended for one in found)
    again = TeacherTexts(texts.path, max_new_tokens=6)
    assert [again.ended(prompt) for prompt in PROMPTS] == [one.ended for one in found]
    assert not texts.ended([1])


def test_nothing_is_answered_twice(tmp_path, model, answered):
    path = tmp_path / "texts.jsonl"
    complete(path, model, [*PROMPTS[:5], PROMPTS[0]])
    assert sorted(answered) == sorted(PROMPTS[:5])

    def load():
        raise AssertionError("the model is not needed")

    TeacherTexts(path, max_new_tokens=6).complete(PROMPTS[:5], load)
    TeacherTexts(path, max_new_tokens=6).complete([], load)
    assert len(answered) == 5


def test_groups_are_the_same_wherever_an_earlier_call_ended(tmp_path, model, answered, monkeypatch):
    whole = complete(tmp_path / "whole.jsonl", model)
    first = list(answered)
    answered.clear()
    append, groups = TeacherTexts._append, []

    def stopping(self, texts):
        append(self, texts)
        groups.append(texts)
        if len(groups) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(TeacherTexts, "_append", stopping)
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path / "part.jsonl", model)
    complete(tmp_path / "part.jsonl", model)
    assert answered == first
    assert (tmp_path / "part.jsonl").read_bytes() == whole.path.read_bytes()


def test_a_file_cut_at_any_byte_is_completed(tmp_path, model, answered, monkeypatch):
    names = iter(["née", "“ça”", "naïve\u2028", "日本", "x", "", "y", "z", "w"] * 100)
    monkeypatch.setattr(
        teacher_texts,
        "generate",
        lambda model, tokenizer, prompts, **_: [Generated(next(names), True) for _ in prompts],
    )
    path = tmp_path / "texts.jsonl"
    before = complete(path, model, PROMPTS[:4])
    expected = {tuple(prompt): before.text(prompt) for prompt in PROMPTS[:4]}
    whole = path.read_bytes()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        found = TeacherTexts(path, max_new_tokens=6)
        for prompt in PROMPTS[:4]:
            assert found.text(prompt) in (None, expected[tuple(prompt)])
        found.complete(PROMPTS[:4], lambda: (None, None))
        assert TeacherTexts(path, max_new_tokens=6).missing(PROMPTS[:4]) == 0


def test_a_line_that_is_not_as_it_was_written_does_not_count(tmp_path, model):
    path = tmp_path / "texts.jsonl"
    texts = complete(path, model, PROMPTS[:4])
    lines = path.read_text().splitlines()
    entry = json.loads(lines[1])
    assert set(entry) == {"prompt", "text", "ended", "check"}
    broken = [
        json.dumps({**entry, "text": entry["text"] + "x"}),
        json.dumps({**entry, "prompt": entry["prompt"][::-1]}),
        json.dumps({"prompt": entry["prompt"], "text": entry["text"]}),
        json.dumps([1]),
        "{",
    ]
    for line in broken:
        path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        found = TeacherTexts(path, max_new_tokens=6)
        assert len(found) == 3
        assert found.missing(PROMPTS[:4]) == 1
    assert texts.missing(PROMPTS[:4]) == 0


def test_answers_of_another_length_are_others(tmp_path, model, answered):
    path = tmp_path / "texts.jsonl"
    complete(path, model, PROMPTS[:2])
    assert TeacherTexts(path, max_new_tokens=7).missing(PROMPTS[:2]) == 2
    longer = complete(path, model, PROMPTS[:2], longest=7)
    assert len(answered) == 4
    assert len(longer) == 4
    assert TeacherTexts(path, max_new_tokens=6).missing(PROMPTS[:2]) == 0


def test_answers_of_one_line_and_of_several_are_kept_apart(tmp_path, model, monkeypatch):
    rules = []

    def several(model, tokenizer, prompts, *, stop_at_newline, **settings):
        rules.append((stop_at_newline, settings["ends"]))
        text = "first" if stop_at_newline else "first\nsecond"
        return [Generated(text, True)] * len(prompts)

    monkeypatch.setattr(teacher_texts, "generate", several)
    path = tmp_path / "texts.jsonl"
    for one_line, text in ((True, "first"), (False, "first\nsecond")):
        texts = TeacherTexts(path, max_new_tokens=6, one_line=one_line)
        assert texts.missing(PROMPTS[:2]) == 2
        texts.complete(PROMPTS[:2], lambda: (model, TOKENIZER), ends={7})
        again = TeacherTexts(path, max_new_tokens=6, one_line=one_line)
        assert [again.text(prompt) for prompt in PROMPTS[:2]] == [text, text]
    assert rules == [(True, {7}), (False, {7})]


def test_a_file_that_cannot_be_written_is_named(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to .*texts.jsonl: .*; make room, or"):
        complete(tmp_path / "file" / "texts.jsonl", model, PROMPTS[:1])
