"""The rows of a comparison are written once, and read by every run as the data gives them."""

import dataclasses
import json
from pathlib import Path

import pytest

from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.plan.splits import COLUMNS, Splits, cut_rows, prepare_splits
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import examples
from ctkd.distill.preparing import Models
from ctkd.errors import DataError, OutputError
from ctkd.tokenization.pair import TokenizerPair
from tests.distill import tiny

SWEEP = {"learning_rate": (1e-5, 1e-4)}
PASSAGES = 12


@pytest.fixture(scope="module")
def models() -> Models:
    student, teacher = tiny.tokenizer(280), tiny.tokenizer(330)
    model = tiny.model(len(student), seed=1)
    return Models(model, student, None, teacher, TokenizerPair(student, teacher))


@pytest.fixture
def qa(tmp_path) -> Path:
    path = tmp_path / "qa.jsonl"
    rows = [
        {"key": f"q{number}", "passage": f"{tiny.TEXTS[number % 4]} {number // 2}.",
         "question": f"Who, {number}?", "answers": [f" the cat{number % 3} ", "it"], "other": 1.5}
        for number in range(2 * PASSAGES)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(models, folder, qa, **settings) -> tuple[Splits, list[str]]:
    common = {
        "data": str(qa), "columns": {"context": "passage", "id": "key"}, "max_length": 100,
        "max_new_tokens": 4, **settings.pop("common", {}),
    }  # fmt: skip
    said = []
    config = CompareConfig(losses=("sft",), common=common, **settings)
    cut = cut_rows(config, said.append)
    return prepare_splits(config, cut, models, folder / "data", said.append), said


def test_runs_read_what_the_data_says(models, tmp_path, qa):
    splits, _ = prepared(models, tmp_path, qa, sweep=SWEEP)
    found = {one.id: one for one in examples(load_rows(str(qa)), "qa",
             {"context": "passage", "id": "key"})}  # fmt: skip
    seen = []
    for split in (splits.train, splits.dev, splits.test):
        for one in examples(load_rows(str(split.path)), "qa", COLUMNS):
            assert dataclasses.replace(one, where="") == dataclasses.replace(
                found[one.id], where=""
            )
            seen.append(one.id)
    assert sorted(seen) == sorted(found)
    groups = [{one.group for one in split.examples}
              for split in (splits.train, splits.dev, splits.test)]  # fmt: skip
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert set(splits.fingerprints()) == {"train", "dev", "test", "curve"}


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("summarization", {"dialogue": "A: cat. {n}", "summaries": ["the cat", " a cat"]}),
        ("summarization", {"document": "The cat {n}", "summaries": "the cat"}),
        ("text", {"prompt": "The cat {n} ", "answer": " sat on"}),
        ("qa", {"context": "The {{cat}} {n}", "question": "?", "answers": {"text": ["the cat"]}}),
    ],
)
def test_every_task_is_written_as_it_is_read(models, tmp_path, task, row):
    path = tmp_path / "rows.json"
    rows = [{name: text.format(n=n) if isinstance(text, str) else text
             for name, text in row.items()} for n in range(10)]  # fmt: skip
    path.write_text(json.dumps(rows))
    common = {"task": task, "columns": {}}
    splits, _ = prepared(models, tmp_path, path, common=common)
    expected = {one.prompt: (one.answer, one.references, one.group)
                for one in examples(load_rows(str(path)), task)}  # fmt: skip
    found = {one.prompt: (one.answer, one.references, one.group)
             for one in (*splits.train.examples, *splits.test.examples)}  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("text", {"instruction": "The cat {n}", "input": "", "output": "sat on"}),
        ("text", {"prompt": "The cat {n}", "completion": " sat on"}),
        ("qa", {"paragraphs": [{"context": "The cat.", "qas": [
            {"id": "a{n}", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]},
            {"id": "b{n}", "question": "Why?", "answers": [], "is_impossible": True},
        ]}]}),
    ],
)  # fmt: skip
def test_published_layouts_are_written_as_the_task_has_them(models, tmp_path, task, row):
    text = json.dumps(row)
    paths = [tmp_path / f"{name}.jsonl" for name in ("a", "b")]
    for name, path in enumerate(paths):
        path.write_text("".join(text.replace("{n}", f"{name}{n}") + "\n" for n in range(5)))
    common = {"task": task, "columns": {}, "data": [str(paths[0])], "eval_data": str(paths[1])}
    splits, _ = prepared(models, tmp_path, None, common=common)
    for split, path in ((splits.train, paths[0]), (splits.test, paths[1])):
        rows = read_rows(str(path), task, say=lambda line: None)
        expected = [(one.prompt, one.answer, one.group) for one in examples(rows, task)]
        found = [(one.prompt, one.answer, one.group) for one in split.examples]
        assert found == expected and len(found) == 5


def test_curves_are_drawn_on_the_development_split_where_there_is_one(models, tmp_path, qa):
    splits, _ = prepared(models, tmp_path / "with", qa, sweep=SWEEP)
    assert [one.id for one in splits.curve.examples] == [one.id for one in splits.dev.examples]
    prompts = [one.prompt for one in splits.held_out.examples]
    assert prompts == [one.prompt for one in (*splits.curve.examples, *splits.test.examples)]

    splits, _ = prepared(models, tmp_path / "without", qa)
    assert splits.dev is None
    assert [one.id for one in splits.curve.examples] == [one.id for one in splits.test.examples]
    assert len(splits.held_out.examples) == len(splits.test.examples)


def test_development_data_of_its_own_leaves_the_training_rows_alone(models, tmp_path, qa):
    cut, _ = prepared(models, tmp_path / "cut", qa, sweep=SWEEP)
    lines = qa.read_text().splitlines(keepends=True)
    halves = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, half in zip(halves, (lines[:PASSAGES], lines[PASSAGES:]), strict=True):
        path.write_text("".join(half))
    own, said = prepared(models, tmp_path / "own", qa, sweep=SWEEP, dev_data=[*map(str, halves)])
    assert len(own.dev.examples) == 2 * PASSAGES
    assert len(own.train.examples) == len(cut.train.examples) + len(cut.dev.examples)
    assert cut.shared == ""
    assert own.shared == (
        "21 texts are in the training split and in the development split, "
        "3 texts are in the development split and in the test split"
    )
    assert f"warning: {own.shared}; what is measured there may be remembered" in said


def test_rows_that_the_teacher_cannot_read_are_left_out_for_all(tmp_path, qa):
    student, teacher = tiny.tokenizer(330), tiny.tokenizer(280)
    model = tiny.model(len(student), seed=1)
    models = Models(model, student, None, teacher, TokenizerPair(student, teacher))
    row = {"key": "long", "passage": tiny.TEXTS[3] * 3, "question": "?", "answers": ["it"]}
    prompt = f"Context: {row['passage']}\nQuestion: ?\nAnswer:"
    lengths = [len(one(prompt + " it")["input_ids"]) for one in (student, teacher)]
    assert lengths[0] + 10 < lengths[1]
    with qa.open("a") as file:
        file.write(json.dumps(row) + "\n")
    eval_data = tmp_path / "test.jsonl"
    eval_data.write_text("".join(qa.read_text().splitlines(keepends=True)[:3]))
    for limit, kept in ((sum(lengths) // 2, False), (lengths[1] + 5, True)):
        common = {"eval_data": str(eval_data), "max_length": limit}
        splits, said = prepared(models, tmp_path / str(limit), qa, common=common)
        ids = {one.id for one in splits.train.examples}
        assert ("long" in ids) == kept
        assert ids >= {f"q{number}" for number in range(2 * PASSAGES)}
        assert any("are in the training split and in the test split" in one for one in said)


def test_no_more_rows_are_answered_than_asked_for(models, tmp_path, qa):
    common = {"eval_data": str(qa), "eval_limit": 3}
    splits, said = prepared(models, tmp_path, qa, common=common)
    assert [one.id for one in splits.test.examples] == ["q0", "q1", "q2"]
    assert "test split: the first 3 of 24 examples (--eval-limit)" in said
    assert (splits.train.cut, splits.test.cut) == (None, "first 3 of 24")


def test_where_all_rows_are_taken_nothing_is_said_of_a_cut(models, tmp_path, qa):
    common = {"eval_data": str(qa), "eval_limit": 2 * PASSAGES}
    splits, said = prepared(models, tmp_path, qa, sweep=SWEEP, dev_data=str(qa), common=common)
    assert splits.test.cut is splits.dev.cut is None
    assert not any("--eval-limit" in line for line in said)
    common["eval_limit"] = 5
    other = tmp_path / "other"
    splits, said = prepared(models, other, qa, sweep=SWEEP, dev_data=str(qa), common=common)
    assert splits.test.cut == splits.dev.cut == "first 5 of 24"
    assert "development split: the first 5 of 24 examples (--eval-limit)" in said


def test_equal_rows_are_taken_up_and_others_refused(models, tmp_path, qa):
    first, _ = prepared(models, tmp_path, qa)
    again, _ = prepared(models, tmp_path, qa)
    assert first.fingerprints() == again.fingerprints()
    before = first.train.path.read_bytes()
    qa.write_text(qa.read_text().replace("Who, 3?", "Why, 3?"))
    with pytest.raises(OutputError) as caught:
        prepared(models, tmp_path, qa)
    assert "are others than those of the data now" in str(caught.value)
    assert first.train.path.read_bytes() == before


def test_a_split_without_a_readable_row_is_refused(models, tmp_path, qa):
    with pytest.raises(DataError):
        prepared(models, tmp_path, qa, common={"max_length": 3})
