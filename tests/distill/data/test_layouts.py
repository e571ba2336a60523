"""Data sets as they are published, read without any preparation."""

import csv
import json

import pytest

from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import examples, split_off
from ctkd.errors import DataError


def written(path, content) -> str:
    if isinstance(content, list) and path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def read(source, task, columns=None):
    """The examples of a source, and what was said."""
    said: list[str] = []
    rows = read_rows(source, task, columns, say=said.append)
    return examples(rows, task, columns), said


def refused(source, task, columns=None) -> str:
    with pytest.raises(DataError) as caught:
        read(source, task, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def question(name, *answers, **more):
    spans = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": name, "question": f"{name}?", "answers": spans, **more}


def squad(*questions):
    first, *rest = questions
    paragraphs = [{"context": "One.", "qas": [first]}, {"context": "Two.", "qas": rest}]
    return {"version": "v2.0", "data": [{"title": "Numbers", "paragraphs": paragraphs}]}


def test_squad_is_read_as_it_is_shipped(tmp_path):
    content = squad(question("a", "it", "that"), question("b", "two"), question("c", "three"))
    path = written(tmp_path / "dev-v1.1.json", content)
    found, said = read(path, "qa")
    assert [(one.id, one.prompt, one.references) for one in found] == [
        ("a", "Context: One.\nQuestion: a?\nAnswer:", ("it", "that")),
        ("b", "Context: Two.\nQuestion: b?\nAnswer:", ("two",)),
        ("c", "Context: Two.\nQuestion: c?\nAnswer:", ("three",)),
    ]
    assert found[0].group != found[1].group == found[2].group
    assert found[2].where == "dev-v1.1.json row 1, question c"
    assert said == []
    (titled, *_) = examples(read_rows(path, "qa", say=print), "qa", use_title=True)
    assert titled.prompt.startswith("Title: Numbers\nContext: One.")


def test_unanswerable_questions_are_counted_and_left_out(tmp_path):
    none = question("b", is_impossible=True, plausible_answers=[{"text": "x"}])
    some = question("c", "three", is_impossible=False)
    path = written(tmp_path / "v2.json", squad(question("a", "it"), none, some))
    found, said = read(path, "qa")
    assert [one.id for one in found] == ["a", "c"]
    assert found[1].where == "v2.json row 1, question c"
    assert said == ["v2.json: left out 1 of 3 questions as unanswerable"]
    path = written(tmp_path / "none.json", squad(none, {**none, "id": "d"}))
    assert refused(path, "qa") == "none.json has no answers; all of its 2 rows lack one"


def test_unanswerable_questions_of_flat_rows_are_counted_and_left_out(tmp_path):
    rows = [
        {"context": "c", "question": "q", "gold": {"text": texts, "answer_start": [0] * len(texts)}}
        for texts in (["a"], [], ["b"], [])
    ]
    path = written(tmp_path / "flat.json", rows)
    found, said = read(path, "qa", {"answers": "gold"})
    assert [(one.where, one.answer) for one in found] == [
        ("flat.json row 1", " a"),
        ("flat.json row 3", " b"),
    ]
    assert said == ["flat.json: left out 2 of 4 questions as unanswerable"]
    # An answer that was forgotten is still an error.
    rows[1]["gold"] = []
    path = written(tmp_path / "flat.json", rows)
    assert "flat.json row 2 has no answer in column 'gold'" in refused(
        path, "qa", {"answers": "gold"}
    )


@pytest.mark.parametrize(
    ("article", "message"),
    [
        ({"paragraphs": 5}, "expected a list of objects as 'paragraphs', got a number"),
        ({"paragraphs": [{"context": "c"}]}, "expected a list of objects as 'qas', got empty"),
        ({"paragraphs": []}, "has no questions; expected at least one"),
    ],
)
def test_squad_that_is_broken_is_refused(article, message, tmp_path):
    assert message in refused(written(tmp_path / "a.json", [article]), "qa")


def test_instructions_become_prompts(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Say nothing.", "input": "", "output": " "},
        {"instruction": "Sing.", "input": None, "output": "Lo"},
    ]
    found, said = read(written(tmp_path / "alpaca.json", rows), "text")
    assert [(one.where, one.prompt, one.answer) for one in found] == [
        ("alpaca.json row 1", "Instruction: Add.\nInput: 1 and 1\nResponse:", " 2"),
        ("alpaca.json row 2", "Instruction: Sing.\nResponse:", " La"),
        ("alpaca.json row 4", "Instruction: Sing.\nResponse:", " Lo"),
    ]
    assert said == [
        "alpaca.json: prompts are made of instruction and input, answers are its outputs",
        "alpaca.json: left out 1 of 4 rows without an output",
    ]
    rows[1]["output"] = 5
    message = refused(written(tmp_path / "alpaca.json", rows), "text")
    assert message == "alpaca.json row 2: column 'output' is a number; expected text"


def test_completions_are_answers(tmp_path):
    path = written(tmp_path / "a.json", [{"prompt": "1 + 1 =", "completion": " 2"}])
    found, said = read(path, "text")
    assert [(one.prompt, one.answer) for one in found] == [("1 + 1 =", " 2")]
    assert said == ["a.json: answers are its column 'completion'"]
    path = written(tmp_path / "a.json", [{"question": "1 + 1 =", "completion": " 2"}])
    assert read(path, "text", {"prompt": "question"})[0][0].answer == " 2"


def test_texts_alone_are_trained_on_as_a_whole(tmp_path):
    path = written(tmp_path / "a.json", [{"text": f"Page {n}."} for n in range(20)])
    found, said = read(path, "text")
    assert {one.prompt for one in found} == {""}
    assert [one.answer for one in found] == [f"Page {n}." for n in range(20)]
    assert said == ["a.json: its column 'text' is trained on as a whole, without a prompt"]
    # They are not about one passage, so a part can be held out.
    assert [len(part) for part in split_off(found, 0.1, 0)] == [18, 2]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "answer": "a", "completion": "c", "instruction": "i", "output": "o"},
        {"prompt": "p", "answer": "a", "text": "t"},
    ],
)
def test_the_columns_of_the_task_override_other_layouts(row, tmp_path):
    found, said = read(written(tmp_path / "a.json", [row]), "text")
    assert (found[0].prompt, found[0].answer, said) == ("p", "a", [])
    renamed = {"p" if name == "prompt" else name: value for name, value in row.items()}
    found, said = read(written(tmp_path / "a.json", [renamed]), "text", {"prompt": "p"})
    assert (found[0].prompt, found[0].answer, said) == ("p", "a", [])


def test_layouts_may_differ_from_file_to_file(tmp_path):
    paths = [
        written(tmp_path / "a.json", [{"prompt": "p", "completion": "a"}]),
        written(tmp_path / "b.json", [{"text": "t"}]),
        written(tmp_path / "c.json", [{"prompt": "q", "answer": "b"}, {"prompt": "r"}]),
    ]
    assert refused(paths, "text").startswith("c.json row 2 has no answer")
    written(tmp_path / "c.json", [{"prompt": "q", "answer": "b"}])
    found, said = read(paths, "text")
    assert [(one.prompt, one.answer) for one in found] == [("p", "a"), ("", "t"), ("q", "b")]
    assert len(said) == 2


@pytest.mark.parametrize(
    ("cell", "references"),
    [
        ('["a", "b"]', ("a", "b")),
        ("['a', 'b']", ("a", "b")),
        (""" ["it's", 'so'] """, ("it's", "so")),
        ("{'text': ['a'], 'answer_start': [3]}", ("a",)),
        ('[{"text": "a"}, {"text": "b"}]', ("a", "b")),
        ("['a\\d']", ("a\\d",)),
        # These are text.
        ("[laughs]", ("[laughs]",)),
        ("{x} and [y]", ("{x} and [y]",)),
        ("a, b", ("a, b",)),
        ('"a"', ('"a"',)),
    ],
)
def test_a_cell_that_holds_a_list_is_that_list(cell, references, tmp_path):
    for task, row in (
        ("qa", {"context": "c", "question": "q", "answers": cell}),
        ("summarization", {"document": "d", "summaries": cell}),
    ):
        found, said = read(written(tmp_path / "a.csv", [row]), task)
        assert (found[0].references, found[0].answer) == (references, f" {references[0]}")
        assert said == []
    # The task text expects no list, and JSON has lists of its own.
    found, _ = read(written(tmp_path / "a.csv", [{"prompt": "p", "answer": cell}]), "text")
    assert found[0].answer == cell
    row = {"context": "c", "question": "q", "answers": cell}
    found, _ = read(written(tmp_path / "a.json", [row]), "qa")
    assert found[0].references == (cell.strip(),)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("{'text': array(['a'], dtype=object)}", "looks like a list of answers, but is neither"),
        ("['a' 'b']", "looks like a list of answers, but is neither JSON nor Python: ['a' 'b'];"),
        ("['a', 'b]", "looks like a list of answers"),
        ("[1945]", "holds int 1945 as an answer; expected text; write numbers in quotes"),
        ("[]", "has no answer in column 'answers'"),
    ],
)
def test_a_cell_that_holds_no_list_of_answers_is_refused(cell, message, tmp_path):
    row = {"context": "c", "question": "q", "answers": "a"}
    path = written(tmp_path / "a.csv", [row, {**row, "answers": cell}])
    found = refused(path, "qa")
    assert found.startswith("a.csv row 2") and message in found


def test_unanswerable_questions_of_a_csv_file_are_left_out(tmp_path):
    row = {"context": "c", "question": "q", "answers": "{'text': [], 'answer_start': []}"}
    path = written(tmp_path / "a.csv", [row, {**row, "answers": "a"}])
    found, said = read(path, "qa")
    assert ([one.where for one in found], len(said)) == (["a.csv row 2"], 1)


def test_other_data_is_what_it_was(tmp_path):
    rows = [{"context": "c", "question": "q", "answers": ["a"], "is_impossible": False}]
    path = written(tmp_path / "a.json", rows)
    assert list(read_rows(path, "qa", say=print)) == list(load_rows(path)) == rows
