import csv
import gzip
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctkd.distill.data.rows import EMBEDDED, Rows, load_rows, paths_of, stream_parts
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


def refused_of(sources) -> str:
    with pytest.raises(DataError) as caught:
        load_rows([str(source) for source in sources])
    return str(caught.value)


def json_list(path):
    write(path, json.dumps(ROWS))


def json_under_data(path):
    write(path, json.dumps({"version": 1, "data": ROWS}, indent=1))


def json_lines(path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    write(path, "\ufeff" + "\r\n".join([*lines, "", ""]))


def csv_file(path, **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"], **options)
        writer.writeheader()
        writer.writerows(ROWS)


def tsv_file(path):
    csv_file(path, delimiter="\t")


def zipped(fill):
    def fill_and_zip(path):
        fill(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return fill_and_zip


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
        ("g.tsv", tsv_file),
        ("h.json.gz", zipped(json_list)),
        ("i.v2.jsonl.gz", zipped(json_lines)),
        ("j.CSV.GZ", zipped(csv_file)),
        ("k.tsv.gz", zipped(tsv_file)),
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
    if ".json" not in name.lower() or ".jsonl" in name:
        (stream,) = stream_parts(str(tmp_path / name))
        for _ in range(2):
            blocks = list(stream.blocks(3))
            assert [row for block in blocks for row in block] == ROWS
            assert blocks[1].place(2) == f"{name} row 5" and blocks[1].all_text == rows.all_text
    else:
        with pytest.raises(DataError, match="is read as a whole, so it cannot be streamed"):
            stream_parts(str(tmp_path / name))
    assert capfd.readouterr().err == ""


def test_a_plain_text_is_one_document(tmp_path):
    text = "It rained.\r\n\r\n  Then it did not.\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Snow."))
    source = str(tmp_path / "?.txt*")
    assert list(load_rows(source)) == [{"text": text}, {"text": "Snow."}]
    streams = stream_parts(source)
    assert [list(one.read()) for one in streams for _ in range(2)] == [[{"text": text}]] * 2 + [
        [{"text": "Snow."}]
    ] * 2
    assert "a.txt has no rows" in refused(write(tmp_path / "a.txt", ""))


def test_files_are_read_in_the_order_given_and_rows_are_called_by_their_own(tmp_path):
    paths = [
        write(tmp_path / f"part-{name}.jsonl", f'{{"n": "{name}1"}}\n{{"n": "{name}2"}}\n')
        for name in "bca"
    ]
    rows = load_rows(paths)
    assert [row["n"] for row in rows] == ["b1", "b2", "c1", "c2", "a1", "a2"]
    assert rows.name == "part-b.jsonl, part-c.jsonl, part-a.jsonl"
    assert [rows.place(n) for n in (1, 4)] == ["part-b.jsonl row 1", "part-c.jsonl row 2"]
    (alone,) = {load_rows(one).name for one in (paths[0], paths[:1])}
    assert alone == "part-b.jsonl"
    assert f"{tmp_path / 'gone.csv'} does not exist" in refused_of([*paths, tmp_path / "gone.csv"])


def test_a_pattern_is_all_files_that_match_sorted(tmp_path, monkeypatch):
    for name in ("part-2", "part-10", "part-1", "other"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"n": name}))
    assert [row["n"] for row in load_rows(str(tmp_path / "part-*.jsonl"))] == [
        "part-1",
        "part-10",
        "part-2",
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("~/part-?.jsonl")) == 2
    message = refused(tmp_path / "prat-*.jsonl")
    assert message == f"no file matches the pattern {tmp_path}/prat-*.jsonl; expected at least one"
    # A file that is called so is meant itself.
    write(tmp_path / "part-[1].jsonl", json.dumps({"n": "itself"}))
    assert [row["n"] for row in load_rows(str(tmp_path / "part-[1].jsonl"))] == ["itself"]


def test_paths_of_a_source_are_what_lies_on_disk(tmp_path):
    files = [Path(write(tmp_path / f"{name}.jsonl", "{}")) for name in "ab"]
    assert sorted(paths_of(str(tmp_path / "*.jsonl"))) == files
    assert paths_of([str(files[1]), "pocketqa", str(files[0])]) == files[::-1]
    assert paths_of(f"{tmp_path}:train") == [tmp_path]
    assert paths_of("org/name:train") == paths_of(None) == []


def test_a_cell_may_be_longer_than_csv_readers_allow(tmp_path):
    limit = csv.field_size_limit()
    cell = "x" * (limit + 1)
    for name, between in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path / name, f"prompt{between}answer\np{between}{cell}\n")
        assert list(load_rows(path)) == [{"prompt": "p", "answer": cell}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("".join(json.dumps(row) + "\n" for row in ROWS), ROWS),
        (json.dumps(ROWS, indent=1), ROWS),
        (json.dumps(ROWS[0]), ROWS[:1]),
    ],
)
def test_a_pipe_is_read_once(tmp_path, content, rows):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(content,))
    writer.start()
    assert list(load_rows(str(pipe))) == rows
    writer.join()


def count_standard_input(file: str) -> None:
    """Count the rows of a file that is redirected to standard input, and of the same piped."""
    content = Path(file).read_bytes()
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    for source in (os.open(file, os.O_RDONLY), reading):
        os.dup2(source, 0)
        print(len(load_rows("/dev/stdin")), flush=True)


def test_standard_input_is_a_source_whether_piped_or_redirected(tmp_path, forks):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    rows, output = write(tmp_path / "rows", text), tmp_path / "output"
    assert forks.run(count_standard_input, str(rows), output=output) == 0, output.read_text()
    assert output.read_text() == f"{len(ROWS)}\n{len(ROWS)}\n"


def test_a_parquet_file_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    import datasets

    parquet(tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    assert list(load_rows(str(tmp_path / "a.parquet"))) == ROWS


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet") == "a.parquet has no rows; expected at least one"


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
    assert list(load_rows(str(tmp_path / "two"), held_out=True)) == ROWS[1:2]
    assert list(load_rows(f"{tmp_path / 'two'}:train", held_out=True)) == ROWS
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read as a saved data set" in refused(tmp_path / "one")


@pytest.mark.parametrize(
    ("splits", "training", "held_out"),
    [
        (["train", "validation", "test"], "train", "test"),
        (["train", "validation"], "train", "validation"),
        (["only"], "only", "only"),
        (["train", "extra"], "train", None),
        (["validation", "test"], None, "test"),
        (["a", "b"], None, None),
    ],
)
def test_a_folder_of_splits_is_trained_on_one_and_measured_on_another(
    splits, training, held_out, tmp_path
):
    import datasets

    tables = {name: datasets.Dataset.from_list([{"split": name}]) for name in splits}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "all")
    for expected, options in ((training, {}), (held_out, {"held_out": True})):
        if expected is not None:
            assert list(load_rows(str(tmp_path / "all"), **options)) == [{"split": expected}]
            continue
        message = refused(tmp_path / "all", **options)
        wanted = "'test' or 'validation' or 'dev' or 'eval'" if options else "'train'"
        assert f"has no split {wanted}; it has {', '.join(splits)}; name one of them" in message
        assert message.endswith(f"{tmp_path / 'all'}:SPLIT")


def test_the_embedded_set():
    train, test = load_rows("pocketqa"), load_rows("pocketqa", split="test")
    assert train.columns == ["id", "passage", "title", "context", "question", "answers"]
    assert (train.name, test.name) == ("pocketqa:train", "pocketqa:test")
    assert not {row["passage"] for row in train} & {row["passage"] for row in test}
    assert [row["id"] for row in load_rows("pocketqa:test")] == [row["id"] for row in test]
    assert "pocketqa has no split 'dev'; it has train, test" in refused("pocketqa:dev")
    assert set(EMBEDDED) == {"pocketqa", "pydocs"}


def test_what_is_on_disk_is_taken_before_what_is_embedded(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(ROWS).save_to_disk("pocketqa")
    assert list(load_rows("pocketqa")) == ROWS


def test_a_missing_file_names_what_there_is(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.doc"):
        write(tmp_path / name, "{}")
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in refused(tmp_path / "trian.jsonl")
    assert "data files there: test.jsonl, train.jsonl" in refused(tmp_path / "zzz.csv")
    assert "a.tar.gz does not exist; data files" in refused(tmp_path / "a.tar.gz")
    assert f"nor does the folder {tmp_path / 'gone'}" in refused(tmp_path / "gone" / "a.json")
    (tmp_path / "empty").mkdir()
    assert "holds no data files" in refused(tmp_path / "empty" / "a.json")
    assert "name one of its files: test.jsonl, train.jsonl" in refused(tmp_path)
    assert "name a data file" in refused(tmp_path / "empty")
    assert "expected a file that ends in one of .json" in refused(tmp_path / "notes.doc")
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
        ("a.json", " \n", r"a.json has no rows"),
        ("a.parquet.gz", "", r"does not say what it holds; expected a file that ends in"),
        ("a.csv", "a,b\n", r"a.csv has no rows"),
        ("a.csv", "", r"a.csv has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv row 2 \(line 3\) has 3 cells, but .* 2"),
        ("a.csv", 'a,b\n1,"2', r"line 2 is not CSV: unexpected end of data"),
        ("a.csv", "a,b,a\n1,2,3\n", r"two columns named 'a'"),
        ("a.parquet", "no parquet", r"cannot be read as Parquet: "),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a.tsv row 1 \(line 2\) has 3 cells, .* that hold tabs"),
        ("a.tsv", 'a\tb\n1\t"2', r"line 2 is not TSV: unexpected end of data"),
        ("a.csv.gz", "a,b\n1,2\n", r"a.csv.gz cannot be read: Not a gzipped file"),
        ("a.json", "[" * 10**5, r"a.json is nested too deep; expected objects of plain values"),
        ("a.jsonl", '{"a":' * 10**5, r"a.jsonl line 1 is nested too deep"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", r"line 1 holds a number that is too long"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(name, text, message, tmp_path):
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_zipped_file_that_was_cut_short_is_refused(tmp_path):
    zipped(json_lines)(tmp_path / "a.jsonl.gz")
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-9])
    assert "a.jsonl.gz cannot be read: Compressed file ended" in refused(tmp_path / "a.jsonl.gz")


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,answer\nWo?,Köln".encode("latin-1"))
    assert "a.csv is not UTF-8 text (line 2)" in refused(tmp_path / "a.csv")
    rows = b'{"a": 1}\n' * 9000
    (tmp_path / "b.jsonl").write_bytes(rows + b"\xff\n" + rows)
    with pytest.raises(DataError, match=r"b.jsonl is not UTF-8 text \(line 9001\)"):
        list(stream_parts(str(tmp_path / "b.jsonl"))[0].blocks(256))


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


def test_a_hub_id_may_name_configuration_and_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, *, split, **options):
        asked.append((path, options, split))
        table = datasets.Dataset.from_list(ROWS)
        splits = datasets.DatasetDict({"train": table, "validation": table.select([1])})
        return splits if split is None else splits["train"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_rows("cnn_dailymail:3.0.0:train")
    load_rows("org/name@refs/pr/1")
    load_rows("org/name@v1:en:train[:5]")
    assert asked == [
        ("cnn_dailymail", {"name": "3.0.0"}, "train"),
        ("org/name", {"revision": "refs/pr/1"}, "train"),
        ("org/name", {"revision": "v1", "name": "en"}, "train[:5]"),
    ]
    measured = load_rows("org/name", held_out=True)
    assert (measured.name, list(measured)) == ("org/name:validation", ROWS[1:2])
    (stream,) = stream_parts("org/name@v1:en:train")
    assert asked[-1] == ("org/name", {"revision": "v1", "name": "en", "streaming": True}, "train")
    assert stream.name == "org/name@v1:en:train" and list(stream.read()) == ROWS


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets
    from huggingface_hub import constants

    for settings in (constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    line = refused("pocket-qa")
    assert "\n" not in line
    assert line.startswith("pocket-qa is no file or folder here, nor an embedded set (pocketqa, ")
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
