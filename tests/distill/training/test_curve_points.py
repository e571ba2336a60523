"""Held-out losses while training, the seconds beside them, and runs that measure nothing."""

import json

import pytest
import torch

from ctkd.distill.training import measuring
from ctkd.distill.training import run as training
from ctkd.distill.training.measuring import summarize
from ctkd.distill.training.progress import StepReport
from ctkd.distill.training.run import Interrupted, train
from ctkd.errors import OutputError
from tests.distill.tiny_caches import CachePlace
from tests.distill.tiny_runs import finish, record, weights


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    return CachePlace(tmp_path_factory.mktemp("place"))


def quiet(line: str) -> None:
    pass


def held_out(folder) -> list[dict]:
    return [entry for entry in folder.results["history"] if "eval_ce" in entry]


def rises(values) -> bool:
    return all(first < second for first, second in zip(values, values[1:], strict=False))


CURVE = {"loss": "uld", "max_steps": 9, "eval_steps": 3, "logging_steps": 2}


def test_held_out_losses_are_kept_at_the_steps_asked_for(place, tmp_path):
    folder = train(place.config(output=str(tmp_path / "run"), **CURVE, measure="all"), say=quiet)
    entries = held_out(folder)
    assert [entry["step"] for entry in entries] == [0, 3, 6, 9]
    assert rises([entry["seconds"] for entry in entries])
    assert entries[0]["seconds"] == 0.0
    assert entries[-1]["seconds"] == folder.results["training seconds"]
    assert len({entry["eval_ce"] for entry in entries}) == 4
    assert all("eval_kd" in entry for entry in entries)
    logged = [entry for entry in folder.results["history"] if "ce" in entry]
    assert rises([entry["seconds"] for entry in logged])
    seconds = [entry["seconds"] for entry in sorted(entries + logged, key=lambda e: e["step"])]
    assert seconds == sorted(seconds)


def test_measuring_on_the_way_changes_nothing(place, tmp_path):
    plain = train(place.config(output=str(tmp_path / "plain"), max_steps=9), say=quiet)
    curve = train(place.config(output=str(tmp_path / "curve"), **CURVE), say=quiet)
    ours, theirs = weights(plain.path), weights(curve.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert held_out(plain) == []
    assert [entry["step"] for entry in held_out(curve)] == [3, 6, 9]


def stop_at(monkeypatch, step):
    """Interrupt a run as a signal does, behind that step."""

    class Stopping(training.StopOnSignal):
        def on_step_end(self, args, state, control, **_):
            self.stopped = state.global_step == step
            super().on_step_end(args, state, control)

    monkeypatch.setattr(training, "StopOnSignal", Stopping)


def test_a_resumed_run_goes_on_counting(place, tmp_path, monkeypatch):
    straight = train(place.config(output=str(tmp_path / "straight"), **CURVE), say=quiet)
    config = place.config(output=str(tmp_path / "run"), **CURVE)
    before = training.StopOnSignal
    stop_at(monkeypatch, 5)
    with pytest.raises(Interrupted, match="stopped at step 5 of 9"):
        train(config, say=quiet)
    spent = record(tmp_path / "run")["results"]["training seconds"]
    history = record(tmp_path / "run")["results"]["history"]
    # The fifth step lies behind the last line of the log.
    assert spent > max(entry["seconds"] for entry in history if "ce" in entry)
    monkeypatch.setattr(training, "StopOnSignal", before)
    clock = []
    monkeypatch.setattr(
        StepReport, "on_train_begin", seen(StepReport.on_train_begin, clock), raising=True
    )
    folder = train(config, resume=True, say=quiet)
    assert clock == [spent]
    entries = held_out(folder)
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    assert [entry["eval_ce"] for entry in entries] == [
        entry["eval_ce"] for entry in held_out(straight)
    ]
    assert entries[0] == next(entry for entry in history if "eval_ce" in entry)
    seconds = [entry["seconds"] for entry in folder.results["history"] if "seconds" in entry]
    assert seconds == sorted(seconds)
    assert entries[1]["seconds"] > spent
    assert folder.results["training seconds"] > spent


def seen(method, clock):
    """Note the seconds that a run begins with."""

    def noting(self, args, state, control, **rest):
        clock.append(state.stateful_callbacks["StepClock"]["attributes"]["total"])
        return method(self, args, state, control, **rest)

    return noting


def test_a_run_that_had_only_to_be_saved_keeps_its_seconds_and_memory(place, tmp_path, monkeypatch):
    config = place.config(output=str(tmp_path / "run"), save_steps=3)
    keep = training.OutputFolder.keep

    def stopping(self, name, value):
        keep(self, name, value)
        if name == "history":
            raise KeyboardInterrupt

    monkeypatch.setattr(training.OutputFolder, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config, say=quiet)
    before = record(tmp_path / "run")["results"]
    monkeypatch.setattr(training.OutputFolder, "keep", keep)
    monkeypatch.setattr(training.PeakMemory, "read", lambda self: 1)
    after = train(config, resume=True, say=quiet).results
    assert after["training seconds"] == before["training seconds"] > 0
    assert after["peak memory"] == before["peak memory"] > 1
    assert after["seconds per step"] == before["seconds per step"]


def test_a_checkpoint_from_before_the_clock_can_be_resumed(place, tmp_path, monkeypatch):
    config = place.config(output=str(tmp_path / "run"), max_steps=4, save_steps=1)
    before = training.StopOnSignal
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(config, say=quiet)
    monkeypatch.setattr(training, "StopOnSignal", before)
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    text = state.read_text()
    assert text.count('"StepClock"') == 1
    held = json.loads(text)
    del held["stateful_callbacks"]["StepClock"]
    held["log_history"] = [{"step": 1, "loss": 1.0, "ce": 1.0}]
    state.write_text(json.dumps(held))
    assert train(config, resume=True, say=quiet).results["steps"] == 4


def test_a_run_that_measures_nothing_only_trains(place, tmp_path, monkeypatch):
    answer = measuring.answer
    monkeypatch.setattr(measuring, "answer", None)
    folder = train(place.config(output=str(tmp_path / "run")), say=quiet)
    results = folder.results
    assert results["finished"]
    assert not [name for name in results if name.startswith(("student", "teacher", "losses"))]
    assert not list(folder.path.glob("predictions-*"))
    assert held_out(folder) == []
    assert [entry["step"] for entry in results["history"] if "ce" in entry] == [1, 2, 3]
    assert (results["steps"], results["training seconds"] > 0) == (3, True)
    shown = summarize(folder).splitlines()
    assert len(shown) == 2
    assert shown[0].endswith("s per step, 3 steps")
    assert shown[1].endswith(str(folder.path))
    monkeypatch.setattr(measuring, "answer", answer)
    both = train(place.config(output=str(tmp_path / "all"), measure="all"), say=quiet)
    ours, theirs = weights(folder.path), weights(both.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_measuring_is_a_setting_of_the_run(place, tmp_path):
    output = str(tmp_path / "run")
    train(place.config(output=output), say=quiet)
    with pytest.raises(OutputError, match=r"measure 'nothing' -> 'all'"):
        train(place.config(output=output, measure="all"), resume=True, say=quiet)


def test_the_command_line_asks_for_curves_and_for_nothing(place, tmp_path):
    words = place.words("train", "--loss", "sft", "--output", str(tmp_path / "run"))
    shown = finish(*words, "--max-steps", "2", "--eval-steps", "1", "--measure", "nothing")
    history = record(tmp_path / "run")["results"]["history"]
    assert [entry["step"] for entry in history if "eval_ce" in entry] == [1, 2]
    assert "held-out" not in shown.stdout
