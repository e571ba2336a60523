"""Where the cache lies, and that nothing half done gets a final name."""

import multiprocessing
import os
from pathlib import Path

import pytest

from ctkd.cache_folder import building, cache_dir, locked
from ctkd.errors import ModelError


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CTKD_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"CTKD_CACHE": "~/a"}, "~/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/ctkd"),
        ({"CTKD_CACHE": "", "XDG_CACHE_HOME": ""}, "~/.cache/ctkd"),
        ({}, "~/.cache/ctkd"),
    ],
)
def test_cache_dir(monkeypatch, variables, expected):
    monkeypatch.delenv("CTKD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected).expanduser()


def test_building_renames_on_success(tmp_path):
    with building(tmp_path / "deep" / "final") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "deep" / "final").exists()
    assert (tmp_path / "deep" / "final" / "file").read_text() == "whole"
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["final"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_building_leaves_nothing_on_failure(tmp_path, failure):
    with pytest.raises(failure), building(tmp_path / "final") as folder:
        (folder / "file").touch()
        raise failure
    assert list(tmp_path.iterdir()) == []


def _append_under_lock(final: Path) -> None:
    with locked(final):
        log = final.with_name("log")
        log.write_text(log.read_text() + f"in {os.getpid()}\n")
        # Long enough for another process to come in between if it could.
        multiprocessing.Event().wait(0.05)
        log.write_text(log.read_text() + f"out {os.getpid()}\n")


def test_processes_take_turns(tmp_path):
    (tmp_path / "log").touch()
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_append_under_lock, args=(tmp_path / "final",)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(lines) == 6
    for entry, leave in zip(lines[::2], lines[1::2], strict=True):
        assert entry.replace("in", "out") == leave


def _die_with_lock(final: Path) -> None:
    with locked(final):
        os._exit(1)


def test_a_dead_process_holds_no_lock(tmp_path, capsys):
    worker = multiprocessing.get_context("fork").Process(
        target=_die_with_lock, args=(tmp_path / "final",)
    )
    worker.start()
    worker.join(30)
    with locked(tmp_path / "final"):
        assert "waiting" not in capsys.readouterr().err


@pytest.mark.parametrize("enter", [locked, building])
def test_a_cache_that_cannot_be_written(tmp_path, enter):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ModelError, match="cannot write to the cache folder .*; set CTKD_CACHE"),
        enter(tmp_path / "file" / "final"),
    ):
        pass
