"""What a comparison does once is asked for as losses need it, timed, and kept in its folder."""

import errno
import json
import os
from types import SimpleNamespace

import pytest

from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.run import preparation
from ctkd.compare.run.folder import STATE, ComparisonFolder
from ctkd.errors import OutputError
from ctkd.registry import list_losses


def opened(tmp_path, **settings):
    return ComparisonFolder.opened(CompareConfig(output=str(tmp_path / "out"), **settings))


def temperatures(tmp_path, **settings) -> list[float]:
    kept = {} if settings.get("live_teacher") else {"top_k": 256}
    config = CompareConfig(output=str(tmp_path / "out"), **kept, **settings)
    with ComparisonFolder.opened(config) as folder:
        return preparation._temperatures(config, folder)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        ("uld", [1, 2]),
        # It divides likelihoods of chunks by 100, and asks at 1.
        ("alm", [1, 2]),
        ("uld:student_temperature=3.0", [1, 2]),
        ("multilevelot_released:student_temperature=3.0", [1, 2]),
        ("gold:student_temperature=3.0", [1, 2]),
        ("uld:teacher_temperature=3.0", [1, 2, 3]),
        ("multilevelot_released:teacher_temperature=3.0", [1, 2, 3]),
        ("gold:teacher_temperature=3.0", [1, 2, 3]),
        ("mined:temperature=3.0:k=500", [1, 2, 3]),
        ("multilevelot:sd_temperature=3.0", [1, 2, 3]),
        ("multilevelot:sl_temperature=3.0", [1, 2, 3]),
        # A term that weighs nothing asks for nothing.
        ("multilevelot:sd_temperature=3.0:sd_weight=0", [1, 2]),
    ],
)
def test_the_cache_is_made_for_the_temperatures_that_losses_ask_the_teacher_at(
    tmp_path, loss, found
):
    assert temperatures(tmp_path, losses=("sft", loss)) == found


def test_every_temperature_of_a_grid_is_asked_for(tmp_path):
    sweep = {"uld.teacher_temperature": (0.5, 4.0)}
    assert temperatures(tmp_path, losses=("uld",), sweep=sweep) == [0.5, 1, 2, 4]


def test_no_loss_as_it_comes_needs_another_cache_than_the_usual(tmp_path):
    assert temperatures(tmp_path, losses=("sft",)) == [1, 2]
    # So all of them may be added to a comparison that was begun.
    assert temperatures(tmp_path, losses=tuple(list_losses())) == [1, 2]


def test_a_live_teacher_is_asked_at_any_temperature(tmp_path):
    hot = ("uld:teacher_temperature=3.0",)
    assert temperatures(tmp_path, losses=("sft",), live_teacher=True) == [1, 2]
    assert temperatures(tmp_path, losses=hot, live_teacher=True) == [1, 2]


def test_what_was_stopped_adds_up_until_it_is_finished(tmp_path):
    for seconds, finished in ((2.0, False), (3.0, False), (1.0, True), (4.0, True)):
        with opened(tmp_path) as folder:
            folder.spent("teacher cache", seconds, finished=finished)
    assert folder.preparation == {"teacher cache": 6.0}
    with opened(tmp_path) as folder:
        # More than a look: a loss was added that needs more.
        folder.spent("teacher cache", 9.0, finished=True)
    assert folder.preparation == {"teacher cache": 9.0}


def test_the_time_of_what_is_stopped_is_kept(tmp_path, monkeypatch):
    now = iter([10.0, 15.0, 20.0, 22.0])
    monkeypatch.setattr(preparation, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    with opened(tmp_path) as folder:
        with pytest.raises(KeyboardInterrupt), preparation._timed("maps", folder):
            raise KeyboardInterrupt
        assert json.loads((folder.path / STATE).read_text())["preparation"] == {"maps": 5.0}
        with preparation._timed("maps", folder):
            pass
        assert folder.preparation == {"maps": 7.0}


def test_an_error_of_the_work_is_not_taken_for_one_of_writing(tmp_path):
    missing = FileNotFoundError(errno.ENOENT, "No such file", "weights.gguf")
    with pytest.raises(FileNotFoundError) as caught, opened(tmp_path):
        raise missing
    assert caught.value is missing


@pytest.mark.parametrize("name", [None, "somewhere/model.safetensors"])
def test_a_full_device_is_told_as_such_wherever_it_is_met(tmp_path, name):
    with pytest.raises(OutputError) as caught, opened(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", name)
    assert f"cannot write to {name or tmp_path / 'out'}: No space left on device" in str(
        caught.value
    )
    assert "make room" in str(caught.value)


def test_what_cannot_be_written_is_told_with_the_folder_released(tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    with monkeypatch.context() as patch, pytest.raises(OutputError) as caught:
        patch.setattr(os, "replace", refused)
        with opened(tmp_path):
            pass
    assert str(caught.value).startswith(f"cannot write to {tmp_path / 'out' / STATE}: Permission")
    # Nothing was begun, and nobody holds the folder.
    with opened(tmp_path) as folder:
        assert (folder.path / STATE).is_file()
