"""Published tables: reading a file, refusing a wrong one, and picking cells."""

import copy
import json
from dataclasses import FrozenInstanceError, fields

import pytest

from ctkd.compare.report.published import (
    PlacedCell,
    PublishedCell,
    PublishedTable,
    beside,
    read_published,
)
from ctkd.errors import DataError

CELL = {
    "method": "sft",
    "label": "SFT",
    "student": "OPT-350M",
    "teacher": "LLaMA2-7B",
    "task": "fairytaleqa",
    "metric": "rouge_lsum",
    "value": 46.04,
}
TABLE = {
    "name": "A paper, table 1",
    "source": "A paper",
    "arxiv": "2412.14528",
    "venue": None,
    "table": "1",
    "measured": "Rouge-LSum on FairytaleQA",
    "seeds": None,
    "note": "No seeds are reported.",
    "cells": [CELL, {**CELL, "method": "teacher", "label": "Teacher", "student": None, "value": 5}],
}


def write(folder, content):
    path = folder / "table.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def refused(path):
    with pytest.raises(DataError) as caught:
        read_published(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


def table_of(name, *cells):
    made = tuple(PublishedCell(**{**CELL, **cell}) for cell in cells)
    return PublishedTable(**{**TABLE, "name": name, "cells": made})


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_reads_every_field(tmp_path, kind):
    content = {**TABLE, "seeds": 5, "venue": "Üniversität"}
    table = read_published(kind(write(tmp_path, content)))
    for field in fields(PublishedTable):
        if field.name != "cells":
            assert getattr(table, field.name) == content[field.name]
    assert table.cells[0] == PublishedCell(**CELL)
    assert table.cells[1].student is None
    assert table.cells[1].value == 5 and type(table.cells[1].value) is float
    assert len(table.cells) == 2


def test_nothing_can_be_changed(tmp_path):
    table = read_published(write(tmp_path, TABLE))
    for thing, name in ((table, "note"), (table.cells[0], "value")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, None)
    assert hash(table) == hash(read_published(write(tmp_path, TABLE)))


def test_a_file_that_is_not_there(tmp_path):
    message = refused(tmp_path / "none.json")
    assert message.startswith("cannot read FILE: No such file") and "published table" in message
    assert "cannot read FILE" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": }', "FILE is not JSON: Expecting value (line 1, column 10)"),
        ("", "FILE is not JSON: Expecting value (line 1, column 1)"),
        ("9" * 5000, "FILE is not JSON that can be read: Exceeds the limit"),
        ("[1, 2]", "FILE: expected an object; got [1, 2]"),
        ("null", "FILE: expected an object; got null"),
    ],
)
def test_text_that_is_no_table(tmp_path, text, message):
    assert refused(write(tmp_path, text)).startswith(message)


def test_text_in_another_encoding(tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes("é".encode("latin-1"))
    assert refused(path) == "FILE is not UTF-8 text; expected a published table as JSON"


@pytest.mark.parametrize("key", TABLE)
def test_a_table_without_a_key(tmp_path, key):
    content = {name: value for name, value in TABLE.items() if name != key}
    message = refused(write(tmp_path, content))
    assert message.startswith("FILE: expected the keys name, source, arxiv, venue, table, measured")
    assert message.endswith(f'; missing: ["{key}"]')


@pytest.mark.parametrize("key", CELL)
def test_a_cell_without_a_key(tmp_path, key):
    content = copy.deepcopy(TABLE)
    del content["cells"][1][key]
    message = refused(write(tmp_path, content))
    assert message == (
        "FILE cell 2: expected the keys method, label, student, teacher, task, metric, value"
        f'; missing: ["{key}"]'
    )


def test_keys_that_are_not_known(tmp_path):
    assert refused(write(tmp_path, {**TABLE, "title": ""})).endswith('; unknown: ["title"]')
    content = copy.deepcopy(TABLE)
    content["cells"][0]["vlaue"] = content["cells"][0].pop("value")
    message = refused(write(tmp_path, content))
    assert message.startswith("FILE cell 1: expected the keys")
    assert message.endswith('; missing: ["value"]; unknown: ["vlaue"]')


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "", 'FILE: expected "name" to be text; got ""'),
        ("source", None, 'FILE: expected "source" to be text; got null'),
        ("measured", " \n", 'FILE: expected "measured" to be text; got " \\n"'),
        ("arxiv", 2412.14528, 'FILE: expected "arxiv" to be text or null; got 2412.14528'),
        ("venue", "", 'FILE: expected "venue" to be text or null; got ""'),
        ("table", 1, 'FILE: expected "table" to be text or null; got 1'),
        ("note", None, 'FILE: expected "note" to be text; got null'),
        ("seeds", 0, 'FILE: expected "seeds" to be 1, 2, ... or null; got 0'),
        ("seeds", True, 'FILE: expected "seeds" to be 1, 2, ... or null; got true'),
        ("seeds", 1.5, 'FILE: expected "seeds" to be 1, 2, ... or null; got 1.5'),
        ("cells", [], 'FILE: expected "cells" to be a list of objects; got []'),
        ("cells", {"a": 1}, 'FILE: expected "cells" to be a list of objects; got {"a": 1}'),
        ("cells", [CELL, 3], "FILE cell 2: expected an object; got 3"),
    ],
)
def test_a_wrong_value_in_a_table(tmp_path, key, value, message):
    assert refused(write(tmp_path, {**TABLE, key: value})) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", None, '"method" to be text; got null'),
        ("label", "  ", '"label" to be text; got "  "'),
        ("student", 350, '"student" to be text or null; got 350'),
        ("teacher", "", '"teacher" to be text or null; got ""'),
        ("task", ["qed"], '"task" to be text; got ["qed"]'),
        ("task", "QED", '"task" in lower case, without white space around it; got "QED"'),
        ("metric", "f1 ", '"metric" in lower case, without white space around it; got "f1 "'),
        ("value", "46.04", '"value" to be a finite number; got "46.04"'),
        ("value", True, '"value" to be a finite number; got true'),
        ("value", None, '"value" to be a finite number; got null'),
        ("value", float("nan"), '"value" to be a finite number; got NaN'),
        ("value", float("-inf"), '"value" to be a finite number; got -Infinity'),
        ("value", 10**400, f'"value" to be a finite number; got 1{"0" * 56}...'),
    ],
)
def test_a_wrong_value_in_a_cell(tmp_path, key, value, message):
    content = copy.deepcopy(TABLE)
    content["cells"][1][key] = value
    assert refused(write(tmp_path, content)) == f"FILE cell 2: expected {message}"


def test_a_long_value_is_cut(tmp_path):
    content = {**TABLE, "seeds": "x" * 100}
    assert refused(write(tmp_path, content)).endswith(f'got "{"x" * 56}...')


def test_a_cell_given_twice(tmp_path):
    content = copy.deepcopy(TABLE)
    content["cells"].append({**CELL, "value": 1.0})
    assert refused(write(tmp_path, content)) == (
        "FILE cell 3: expected one cell for each method, label, student, teacher, task and "
        "metric; got the same as in cell 1"
    )


@pytest.mark.parametrize("key", ["method", "label", "student", "teacher", "task", "metric"])
def test_cells_that_differ_in_one_thing(tmp_path, key):
    content = {**TABLE, "cells": [CELL, {**CELL, key: "other"}]}
    assert len(read_published(write(tmp_path, content)).cells) == 2


def test_beside_picks_by_data_and_metric_in_order():
    first = table_of("first", {"value": 1.0}, {"metric": "f1"}, {"label": "again", "value": 2.0})
    second = table_of("second", {"task": "qed"})
    third = table_of("third", {"value": 3.0})
    found = beside(iter([third, second, first]), task_data="fairytaleqa", metric="rouge_lsum")
    assert [(placed.table.name, placed.cell.value) for placed in found] == [
        ("third", 3.0),
        ("first", 1.0),
        ("first", 2.0),
    ]
    assert found[1] == PlacedCell(table=first, cell=first.cells[0])


def test_beside_without_a_metric_picks_all_about_the_data():
    first = table_of("first", {"value": 1.0}, {"metric": "f1", "value": 2.0}, {"task": "qed"})
    found = beside([first], task_data="fairytaleqa")
    assert [placed.cell.value for placed in found] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("task", "metric"), [("pocketqa", "f1"), ("fairytaleqa", "f1"), ("fairytale", "rouge_lsum")]
)
def test_beside_may_find_nothing(task, metric):
    assert beside([table_of("first", {})], task_data=task, metric=metric) == []
    assert beside([], task_data=task, metric=metric) == []
