"""Checkpoints are whole or not there, damage is noticed, and only a run's own are deleted."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ctkd.distill.training.checkpoints import Checkpoints
from ctkd.errors import OutputError


class Run:
    """Checkpoints of a folder, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, []
        self.checkpoints = Checkpoints(folder, self.said.append)

    def write(self, step: int, *, files: dict[str, bytes] | None = None) -> Path:
        path = self.folder / f"checkpoint-{step}"
        with self.checkpoints.writing(step) as partial:
            for name, content in (files or {"model.safetensors": b"weights" * step}).items():
                file = partial / path.name / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        return path

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_two_are_kept_and_the_last_is_taken(run):
    assert run.checkpoints.last() is None
    for step in (9, 20, 100):
        run.write(step)
    assert run.names() == ["checkpoint-100", "checkpoint-20"]
    assert run.checkpoints.last() == run.folder / "checkpoint-100"
    assert run.said == []
    run.checkpoints.remove()
    assert run.names() == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:-2],
        lambda content: content + b"0",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: bytes(len(content)),
    ],
    ids="empty shorter longer flipped zeros".split(),
)
@pytest.mark.parametrize("name", ["model.safetensors", "more/state.json", "ctkd_checkpoint.json"])
def test_the_one_before_a_damaged_one_is_taken(run, name, spoil):
    files = {"model.safetensors": b"weights", "more/state.json": b"{}"}
    first, second = run.write(1, files=files), run.write(2, files=files)
    (second / name).write_bytes(spoil((second / name).read_bytes()))
    assert run.checkpoints.last() == first
    assert "is not as it was written; the checkpoint before it is looked for" in run.said[0]


def test_a_lost_file_is_damage(run):
    first, second = run.write(1), run.write(2)
    (second / "model.safetensors").unlink()
    assert run.checkpoints.last() == first


def test_if_all_are_damaged_nothing_begins_anew_by_itself(run):
    for path in (run.write(1), run.write(2)):
        (path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(OutputError) as raised:
        run.checkpoints.last()
    for number in (1, 2):
        assert f"checkpoint-{number}/model.safetensors is not as it was written" in str(
            raised.value
        )
    assert "start anew with --overwrite" in str(raised.value)


def foreign(folder: Path) -> dict[str, Path]:
    """What is called like checkpoints, and is none."""
    found = {name: folder / name for name in ("checkpoint-5", "checkpoint-6", "checkpoint-best")}
    found["checkpoint-5"].mkdir()
    (found["checkpoint-5"] / "model.safetensors").write_bytes(b"years of work")
    found["checkpoint-6"].write_text("a file")
    found["checkpoint-best"].symlink_to(found["checkpoint-5"])
    return found


def test_what_the_run_did_not_write_is_not_touched(run, tmp_path_factory):
    others = foreign(run.folder)
    elsewhere = Run(tmp_path_factory.mktemp("elsewhere"))
    (run.folder / "checkpoint-7").symlink_to(elsewhere.write(7))
    before = run.names()
    assert run.checkpoints.last() is None
    for step in (4, 5, 6, 7):
        run.write(step)
    assert sum("none of this run's, so step" in line for line in run.said) == 3
    assert run.checkpoints.last() == run.folder / "checkpoint-4"
    run.checkpoints.remove()
    assert run.names() == before
    assert (others["checkpoint-5"] / "model.safetensors").read_bytes() == b"years of work"
    assert (elsewhere.folder / "checkpoint-7" / "model.safetensors").is_file()


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        SafetensorError("Error while serializing: I/O error: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_leaves_what_was_there(run, error):
    first = run.write(1)
    with (
        pytest.raises(OutputError, match=r"cannot write .*checkpoint-2: .*go on with --resume"),
        run.checkpoints.writing(2) as partial,
    ):
        (partial / "half").write_bytes(b"half")
        raise error
    with (
        pytest.raises(OutputError, match="cannot write .*; make room"),
        run.checkpoints.writing_result() as partial,
    ):
        raise error
    assert run.names() == ["checkpoint-1"]
    assert run.checkpoints.last() == first


def test_other_errors_are_what_they_are(run):
    with pytest.raises(RuntimeError, match="out of memory"), run.checkpoints.writing(2):
        raise RuntimeError("CUDA out of memory")
    assert run.names() == []


def test_what_was_cut_short_is_no_checkpoint(run):
    run.write(1)
    with pytest.raises(KeyboardInterrupt), run.checkpoints.writing(2) as partial:
        (partial / "checkpoint-2").mkdir()
        raise KeyboardInterrupt
    # A process that is killed leaves it behind; the next checkpoint clears it away.
    left = run.folder / ".checkpoint.partial" / "checkpoint-2"
    left.mkdir(parents=True)
    assert run.checkpoints.last() == run.folder / "checkpoint-1"
    run.write(3)
    assert run.names() == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_that_a_kill_left_half_deleted_is_deleted_later(run, monkeypatch):
    def killed(path, **_):
        raise KeyboardInterrupt

    run.write(1)
    with monkeypatch.context() as patch:
        # All its files are gone then.
        patch.setattr(os, "rmdir", killed)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoints.remove()
    run.checkpoints.remove()
    assert run.names() == []


def test_a_result_is_moved_in_when_it_is_whole(run):
    (run.folder / "model.safetensors").write_bytes(b"old")
    with run.checkpoints.writing_result() as partial:
        (partial / "model.safetensors").write_bytes(b"new")
        (partial / "templates").mkdir()
        (partial / "templates" / "one.jinja").write_bytes(b"{}")
        assert (run.folder / "model.safetensors").read_bytes() == b"old"
    assert run.names() == ["model.safetensors", "templates"]
    assert (run.folder / "model.safetensors").read_bytes() == b"new"
    assert (run.folder / "templates" / "one.jinja").read_bytes() == b"{}"
