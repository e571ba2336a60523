"""The lines of ``results.jsonl``: written whole or not at all, and read after any kill."""

import dataclasses
import errno
import os

import pytest

from ctkd.compare.records import Answer, Record
from ctkd.compare.run import folder as records
from ctkd.compare.run.folder import append_record, read_records
from ctkd.errors import DataError, OutputError


def record(key, text="thé"):
    answer = Answer(
        id="q", group="p", prompt=text, prediction=text, references=(text,), scores={"f1": 50.0}
    )
    return Record(
        key=key, method="uld", stage="final", split="test", seed=0, settings={"warmup": 0.1},
        varied={"kd_weight": 1.5}, metrics={"f1": 50.0}, answers=(answer,), losses={"ce": 2.5},
        history=({"step": 1, "ce": 3.0},), steps=1, seconds_per_step=0.5, seconds=0.5,
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    assert read_records(tmp_path) == {}
    written = [record("a"), record("b", 'line\nbreak\r\u2028 "quoted" 数据 \x00')]
    for one in written:
        append_record(tmp_path, one)
    assert read_records(tmp_path) == {"a": written[0], "b": written[1]}


def test_of_two_with_one_key_the_later_counts(tmp_path):
    append_record(tmp_path, record("a"))
    later = dataclasses.replace(record("a"), steps=2)
    append_record(tmp_path, later)
    assert read_records(tmp_path) == {"a": later}


def test_a_line_cut_at_any_byte_is_left_out_and_swallows_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(tmp_path, record("a"))
    whole = path.read_bytes()
    line = record("b").as_json().encode()
    inside = line.index("é".encode()) + 1
    with pytest.raises(UnicodeDecodeError):
        line[:inside].decode()
    for length in (*range(1, len(line), 7), inside):
        path.write_bytes(whole + line[:length])
        assert list(read_records(tmp_path)) == ["a"]
        append_record(tmp_path, record("c"))
        assert list(read_records(tmp_path)) == ["a", "c"]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "3", '{"key": "a"}', '{"answers": [{}]}', '{"answers": 3}']
)
def test_a_whole_line_that_is_no_record_is_refused_by_its_number(tmp_path, line):
    append_record(tmp_path, record("a"))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"results\.jsonl line 2 is not a record"):
        read_records(tmp_path)


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
    append_record(tmp_path, record("a"))

    def full(_):
        # As the system reports it for an open file: without a name.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OutputError) as caught:
        append_record(tmp_path, record("b"))
    told = str(caught.value)
    assert told.startswith(f"cannot write to {tmp_path / 'results.jsonl'}: No space left on device")
    assert "\n" not in told
    monkeypatch.undo()
    append_record(tmp_path, record("c"))
    assert {"a", "c"} <= read_records(tmp_path).keys()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
def test_a_write_that_fails_half_way_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", "/dev/full")
    with pytest.raises(OutputError, match="cannot write to /dev/full: No space left on device"):
        append_record(tmp_path, record("a"))


def test_a_place_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot write to"):
        append_record(tmp_path, record("a"))
    with pytest.raises(DataError, match="cannot read"):
        read_records(tmp_path)
