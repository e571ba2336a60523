import csv
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctkd.distill.data.rows import EMBEDDED, Rows, load_rows
from ctkd.distill.data.tasks import Example, split_off
from ctkd.errors import DataError, SettingError

# Each value is one that `datasets` alone reads as something other than text.
TRAPS = ["1999-12-31", "2020-01-01 00:00:00", "None", "NA", "1945", "true", " padded ", "a\u2028b"]
ROWS = [{"prompt": f"question {i}", "answer": value} for i, value in enumerate(TRAPS)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(source, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def json_list(path):
    write(path, json.dumps(ROWS))


def json_under_data(path):
    write(path, json.dumps({"version": 1, "data": ROWS}, indent=1))


def json_lines(path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    write(path, "\ufeff" + "\r\n".join([*lines, "", ""]))


def csv_file(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def parquet(path):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(path))


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("a.json", json_list),
        ("b.JSON", json_under_data),
        ("c.jsonl", json_lines),
        ("d.json", json_lines),
        ("e.csv", csv_file),
        ("f.parquet", parquet),
    ],
)
def test_every_file_format_keeps_text_as_text(name, fill, tmp_path, capfd):
    fill(tmp_path / name)
    capfd.readouterr()
    rows = load_rows(str(tmp_path / name))
    assert list(rows) == ROWS
    assert rows.columns == ["prompt", "answer"]
    assert rows.name == name
    assert len(rows) == len(ROWS)
    assert capfd.readouterr().err == ""


def test_a_home_folder_and_a_relative_path_are_understood(tmp_path, monkeypatch):
    json_list(tmp_path / "a.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert list(load_rows("~/a.json")) == list(load_rows("a.json")) == ROWS


def test_folders_of_save_to_disk(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(tmp_path / "two")
    assert list(load_rows(str(tmp_path / "one"))) == ROWS
    assert load_rows(str(tmp_path / "two")).name == "two:train"
    assert list(load_rows(str(tmp_path / "two"), split="dev")) == ROWS[1:2]
    assert list(load_rows(f"{tmp_path / 'two'}:dev")) == ROWS[1:2]
    assert "has no split 'test'; it has train, dev" in refused(tmp_path / "two", split="test")
    assert "has no splits; leave out 'dev'" in refused(tmp_path / "one", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read as a saved data set" in refused(tmp_path / "one")


def test_the_embedded_set():
    train, test = load_rows("pocketqa"), load_rows("pocketqa", split="test")
    assert train.columns == ["id", "passage", "title", "context", "question", "answers"]
    assert (train.name, test.name) == ("pocketqa:train", "pocketqa:test")
    assert not {row["passage"] for row in train} & {row["passage"] for row in test}
    assert [row["id"] for row in load_rows("pocketqa:test")] == [row["id"] for row in test]
    assert "pocketqa has no split 'dev'; it has train, test" in refused("pocketqa:dev")
    assert set(EMBEDDED) == {"pocketqa"}


def test_what_is_on_disk_goes_before_what_is_embedded(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(ROWS).save_to_disk("pocketqa")
    assert list(load_rows("pocketqa")) == ROWS


def test_a_missing_file_names_what_there_is(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.txt"):
        write(tmp_path / name, "{}")
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in refused(tmp_path / "trian.jsonl")
    assert "data files there: test.jsonl, train.jsonl" in refused(tmp_path / "zzz.csv")
    assert f"nor does the folder {tmp_path / 'gone'}" in refused(tmp_path / "gone" / "a.json")
    (tmp_path / "empty").mkdir()
    assert "holds no data files" in refused(tmp_path / "empty" / "a.json")
    assert "name one of its files: test.jsonl, train.jsonl" in refused(tmp_path)
    assert "name a data file" in refused(tmp_path / "empty")
    assert "expected a file that ends in one of .json" in refused(tmp_path / "notes.txt")
    assert "has no splits; leave out 'dev'" in refused(tmp_path / "train.jsonl", split="dev")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"a": 1},]', r"a.json is not JSON: .* \(line 1, column 1"),
        ("a.json", "\n\n{", r"a.json is not JSON: .* \(line 3, column"),
        ("a.json", '{"a": 1}\n{"a" 2}', r"a.json line 2 is not JSON: Expecting ':'"),
        ("a.json", '{\n"paragraphs": []}', r"holds an object; expected a list of objects"),
        ("a.json", '"text"', r"holds text; expected a list"),
        ("a.json", '[{"a": 1}, null]', r"a.json row 2 is empty; expected an object"),
        ("a.jsonl", '{"a": 1}\n\n[1]', r"a.jsonl row 2 is a list; expected an object"),
        ("a.jsonl", '{"a": 1}\n\n{"a"', r"a.jsonl line 3 is not JSON"),
        ("a.jsonl", "\n \n", r"a.jsonl has no rows"),
        ("a.json", "[]", r"a.json has no rows"),
        ("a.csv", "a,b\n", r"a.csv has no rows"),
        ("a.csv", "", r"a.csv has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv row 2 \(line 3\) has 3 cells, but .* 2"),
        ("a.csv", 'a,b\n1,"2', r"line 2 is not CSV: unexpected end of data"),
        ("a.csv", "a,b,a\n1,2,3\n", r"two columns named 'a'"),
        ("a.parquet", "no parquet", r"cannot be read as Parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(name, text, message, tmp_path):
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,answer\nWo?,Köln".encode("latin-1"))
    assert "a.csv is not UTF-8 text" in refused(tmp_path / "a.csv")


def test_a_hub_id_goes_to_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_rows("org/name")) == ROWS
    assert load_rows("squad:validation").name == "squad:validation"
    assert load_rows("squad", split="train[:5]").columns == ["prompt", "answer"]
    assert asked == [("org/name", "train"), ("squad", "validation"), ("squad", "train[:5]")]


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    code = (
        "from ctkd.distill.data.rows import load_rows\n"
        "from ctkd.errors import DataError\n"
        "try: load_rows('pocket-qa')\n"
        "except DataError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    (line,) = done.stdout.strip().split("\n")
    assert line.startswith("pocket-qa is no file or folder here, nor an embedded set (pocketqa)")
    assert line.endswith("; did you mean pocketqa?")


def test_what_cannot_be_a_hub_id_is_not_asked_for():
    assert "nor a Hub id" in refused("my data!")


def test_rows_of_a_list_know_all_columns():
    rows = Rows("list", [{"a": 1}, {"b": 2, "a": 3}])
    assert rows.columns == ["a", "b"]


def made(groups: list[str]) -> list[Example]:
    return [
        Example(id=str(i), prompt="p", answer="a", references=("a",), group=group)
        for i, group in enumerate(groups)
    ]


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 10),
)
def test_a_split_never_parts_a_group_and_loses_nothing(groups, fraction, seed):
    examples = made(groups)
    if len(set(groups)) == 1:
        with pytest.raises(DataError, match="all belong to one passage"):
            split_off(examples, fraction, seed)
        return
    train, held = split_off(examples, fraction, seed)
    assert train and held
    assert not {e.group for e in train} & {e.group for e in held}
    assert sorted(train + held, key=lambda e: int(e.id)) == examples
    assert [int(e.id) for e in train] == sorted(int(e.id) for e in train)
    assert (train, held) == split_off(examples, fraction, seed)
    if len({e.group for e in train}) > 1:
        assert len(held) >= fraction * len(examples)


def test_the_held_out_part_is_no_larger_than_asked_by_more_than_a_group():
    examples = made([f"g{i // 4}" for i in range(100)])
    train, held = split_off(examples, 0.2, seed=0)
    assert (len(train), len(held)) == (80, 20)
    others = {tuple(e.id for e in split_off(examples, 0.2, seed=seed)[1]) for seed in range(5)}
    assert len(others) == 5


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(SettingError, match="between 0 and 1"):
        split_off(made(["a", "b"]), fraction, 0)
