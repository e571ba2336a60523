"""A run's folder is taken up, replaced or refused, and nothing else is ever deleted."""

import json
import os
import re

import pytest

from ctkd.distill.training.output_folder import LOCK, RECORD, OutputFolder, alone, try_to_write
from ctkd.errors import OutputError

SETTINGS = {"loss": "uld", "seed": 0, "logging_steps": 5}
WAYS = [{}, {"resume": True}, {"overwrite": True}]


def prepare(path, settings=SETTINGS, *, resume=False, overwrite=False) -> OutputFolder:
    return OutputFolder.prepare(path, settings, resume=resume, overwrite=overwrite)


def check(path, settings=SETTINGS, *, resume=False, overwrite=False) -> OutputFolder:
    return OutputFolder.check(path, settings, resume=resume, overwrite=overwrite)


def refusal(path, settings=SETTINGS, **way) -> str:
    """What both of them say, which change nothing."""
    before = contents(path.parent)
    with pytest.raises(OutputError) as first:
        check(path, settings, **way)
    with pytest.raises(OutputError) as second:
        prepare(path, settings, **way)
    assert contents(path.parent) == before
    assert str(first.value) == str(second.value)
    assert "\n" not in str(first.value)
    return str(first.value)


def contents(folder) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def checkpoint(folder, step) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_is_made_with_its_record(tmp_path, way, there):
    path = tmp_path / "runs" / "one"
    if there:
        path.mkdir(parents=True)
    folder = prepare(path, **way)
    assert json.loads((path / RECORD).read_text()) == {"settings": SETTINGS, "results": {}}
    assert list(contents(path)) == [RECORD]
    assert folder.results == {}


def test_a_check_makes_nothing(tmp_path):
    check(tmp_path / "runs" / "one")
    assert contents(tmp_path) == {}


def test_results_are_on_disk_as_soon_as_they_are_kept(tmp_path):
    folder = prepare(tmp_path / "one")
    folder.keep("teacher", {"f1": 12.5})
    assert json.loads((tmp_path / "one" / RECORD).read_text())["results"] == {
        "teacher": {"f1": 12.5}
    }
    assert prepare(tmp_path / "one", resume=True).results == {"teacher": {"f1": 12.5}}


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    folder = prepare(tmp_path / "one")
    before = (tmp_path / "one" / RECORD).read_bytes()
    with pytest.raises(TypeError):
        folder.keep("teacher", {"f1": object()})
    assert (tmp_path / "one" / RECORD).read_bytes() == before


def test_a_run_that_is_there_needs_a_decision(tmp_path):
    prepare(tmp_path / "one").keep("teacher", {})
    said = refusal(tmp_path / "one")
    assert "exists already" in said
    for way_out in ("--resume", "--overwrite", "--output"):
        assert way_out in said


def test_overwriting_empties_the_folder(tmp_path):
    path = tmp_path / "one"
    prepare(path).keep("finished", "today")
    checkpoint(path, 10)
    (path / "model.safetensors").write_bytes(b"old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept.txt").write_text("not the run's")
    (path / "link").symlink_to(elsewhere)
    other = {**SETTINGS, "seed": 1}
    assert check(path, other, overwrite=True).record == {"settings": other, "results": {}}
    assert (path / "model.safetensors").exists()
    prepare(path, other, overwrite=True)
    assert list(contents(path)) == [RECORD]
    assert json.loads((path / RECORD).read_text()) == {"settings": other, "results": {}}
    assert (elsewhere / "kept.txt").exists()


def test_a_folder_behind_a_link_can_be_overwritten(tmp_path):
    prepare(tmp_path / "disk").keep("finished", "today")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    prepare(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run").is_symlink()
    assert json.loads((tmp_path / "disk" / RECORD).read_text())["results"] == {}


def test_an_overwriting_that_is_cut_short_cannot_be_resumed(tmp_path, monkeypatch):
    path = tmp_path / "one"
    prepare(path).keep("finished", "today")
    checkpoint(path, 10)

    def full(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ctkd.distill.training.output_folder.shutil.rmtree", full)
    with pytest.raises(OutputError, match="Input/output error; choose another --output"):
        prepare(path, overwrite=True)
    monkeypatch.undo()
    assert "other settings" in refusal(path, resume=True)
    prepare(path, overwrite=True)
    assert list(contents(path)) == [RECORD]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "foreign",
    [
        {"thesis.tex": "years of work"},
        {"ctkd.json": '{"loss": "uld"}', "thesis.tex": "years of work"},
        {"ctkd.json": '{"settings": {}, "results": []}'},
        {"ctkd.json": "[1, 2]"},
        {"ctkd.json": "{ cut off"},
        {"ctkd.json/inner.txt": "a folder of that name"},
    ],
)
def test_what_is_no_run_is_never_touched(tmp_path, way, foreign):
    path = tmp_path / "home"
    for name, text in foreign.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    assert re.search("choose another (--output|folder)$", refusal(path, **way))
    if list(foreign) == ["thesis.tex"]:
        assert "holds no ctkd.json, so it is not a run" in refusal(path, **way)


def test_resuming_and_overwriting_contradict_each_other(tmp_path):
    prepare(tmp_path / "one")
    assert "contradict each other" in refusal(tmp_path / "one", resume=True, overwrite=True)


def test_a_run_is_resumed_with_its_own_settings_alone(tmp_path):
    prepare(tmp_path / "one")
    said = refusal(tmp_path / "one", {**SETTINGS, "seed": 1, "task": "qa"}, resume=True)
    assert "seed 0 -> 1" in said
    assert "task None -> 'qa'" in said
    assert "loss " not in said
    assert "give the same ones to resume" in said


def test_how_much_is_shown_or_kept_may_change(tmp_path):
    prepare(tmp_path / "one").keep("teacher", {})
    other = {**SETTINGS, "logging_steps": 1, "save_steps": 1, "device": "cpu", "output": "x"}
    folder = prepare(tmp_path / "one", other, resume=True)
    assert folder.record == {"settings": other, "results": {"teacher": {}}}


@pytest.mark.parametrize("below", ["", "run", "runs/deep/run"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "notes.txt").write_text("x")
    said = refusal(tmp_path / "notes.txt" / below)
    assert said == f"{tmp_path / 'notes.txt'} is a file; choose a folder with --output"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/proc/self/fdinfo")  # its own files change while one looks
    path = link / "runs" / "one"
    said = refusal(path)
    assert said.startswith(f"cannot write to {path}: ")
    assert "choose another --output" in said


def test_a_name_that_is_too_long_is_refused(tmp_path):
    assert "File name too long; choose another --output" in refusal(tmp_path / ("a" * 300))


def test_trying_to_write_leaves_nothing(tmp_path):
    try_to_write(tmp_path / "not" / "there")
    assert contents(tmp_path) == {}


def test_a_folder_is_one_process_s(tmp_path):
    path = tmp_path / "one"
    prepare(path)
    with alone(path):
        for way in WAYS[1:]:
            with pytest.raises(OutputError, match="another process works in .*one; wait for it"):
                check(path, **way)
        with pytest.raises(OutputError, match="another process"), alone(path):
            pass
    for way in WAYS[1:]:
        check(path, **way)
    with alone(path):
        prepare(path, overwrite=True)
        assert sorted(contents(path)) == [LOCK, RECORD]
    assert list(contents(path)) == [RECORD]


def test_a_first_record_that_was_cut_short_is_nothing(tmp_path):
    (tmp_path / ".ctkd.json.partial").write_text('{"settings": {')
    OutputFolder.prepare(tmp_path, {"loss": "uld"}, resume=False, overwrite=False)
    assert OutputFolder.record_of(tmp_path)["settings"] == {"loss": "uld"}


def test_a_folder_that_was_only_locked_is_free(tmp_path):
    with alone(tmp_path / "one"):
        assert prepare(tmp_path / "one").results == {}


def test_numbers_that_json_has_not_are_none(tmp_path):
    folder = prepare(tmp_path / "one")
    folder.keep("history", [{"grad_norm": float("nan"), "ce": 1.5}, {"ce": float("inf")}])
    text = (tmp_path / "one" / RECORD).read_text()
    held = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert held["results"]["history"] == [{"grad_norm": None, "ce": 1.5}, {"ce": None}]


def test_a_run_may_be_told_that_what_it_reads_lies_elsewhere(tmp_path):
    path = tmp_path / "run"
    folder = prepare(path, {**SETTINGS, "data": "here/rows"})
    folder.keep("steps", 3)
    assert "data 'here/rows' -> 'there/rows'" in refusal(
        path, {**SETTINGS, "data": "there/rows"}, resume=True
    )
    OutputFolder.relocate(path, {"data": "there/rows"})
    again = prepare(path, {**SETTINGS, "data": "there/rows"}, resume=True)
    assert again.results == {"steps": 3}
    before = (path / RECORD).stat().st_mtime_ns
    OutputFolder.relocate(path, {"data": "there/rows"})
    assert (path / RECORD).stat().st_mtime_ns == before
    with pytest.raises(OutputError):
        OutputFolder.relocate(tmp_path / "nowhere", {"data": "there/rows"})
