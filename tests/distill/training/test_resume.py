"""A run that was stopped, in whatever way, goes on to the same end."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctkd.distill.training import measuring
from ctkd.distill.training.output_folder import OutputFolder
from tests.distill.tiny_runs import error_of, finish, invoke, record, weights

ROOT = Path(__file__).parents[3]
STEPS = ["--max-steps", "60", "--learning-rate", "0.01"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(measuring, "plot_curves", lambda history, path: None)


@pytest.fixture
def answered(monkeypatch) -> list[str]:
    """What models were asked to answer for."""
    asked = []
    answer = measuring.answer

    def recorded(*arguments, progress, **settings):
        asked.append(progress)
        return answer(*arguments, progress=progress, **settings)

    monkeypatch.setattr(measuring, "answer", recorded)
    return asked


def same(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def training_logs(folder: Path) -> list[dict]:
    history = record(folder)["results"]["history"]
    names = ("step", "ce", "kd", "loss", "learning_rate", "grad_norm")
    return [{name: entry[name] for name in names} for entry in history if "ce" in entry]


def last_checkpoint(folder: Path) -> Path | None:
    return OutputFolder(folder, {}).last_checkpoint()


def stopped(words: list[str], number: int) -> tuple[int, str]:
    """Start a process, send it a signal after it has trained two steps, return how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from ctkd.cli import main; main()", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, steps = "", 0
    for line in process.stderr:
        said += line
        if line.startswith("step "):
            steps += 1
            if steps == 2:
                process.send_signal(number)
    assert process.stdout.read() == ""
    process.stdout.close()
    process.stderr.close()
    return process.wait(60), said


def test_a_run_that_is_stopped_three_times_ends_like_one_that_is_not(place, answered):
    straight, run = place.folder / "straight", place.folder / "stopped"
    finish(*place.train("straight", *STEPS))
    words = place.train("stopped", *STEPS)

    code, said = stopped(words, signal.SIGINT)
    assert code == 1, said
    assert "stopping after this step, with a checkpoint" in said
    first = last_checkpoint(run)
    assert first is not None
    step = int(first.name.split("-")[1])
    assert step < 60
    errors = [line for line in said.splitlines() if line.startswith("Error:")]
    assert errors == [
        f"Error: stopped at step {step} of 60; repeat the command with --resume to go on"
    ]
    assert "Traceback" not in said
    assert record(run)["results"]["steps"] == step
    assert "finished" not in record(run)["results"]

    code, said = stopped([*words, "--resume"], signal.SIGTERM)
    assert code == 1, said
    assert f"going on from {first.name}" in said
    second = last_checkpoint(run)
    assert step < int(second.name.split("-")[1]) < 60
    assert f"Error: stopped at step {second.name.split('-')[1]} of 60; repeat" in said

    code, said = stopped([*words, "--resume", "--save-steps", "1"], signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    third = last_checkpoint(run)
    # Its steps were logged and saved one by one, unlike those before.
    assert int(second.name.split("-")[1]) < int(third.name.split("-")[1]) < 60

    broken = run / "checkpoint-59"
    shutil.copytree(third, broken)
    (broken / "trainer_state.json").unlink()
    answered.clear()
    shown = finish(*words, "--resume")
    assert f"going on from {third.name}\n" in shown.stderr
    assert answered == ["student after: answering"]
    assert same(straight, run)
    assert training_logs(straight) == training_logs(run)
    assert [entry["step"] for entry in training_logs(run)] == list(range(1, 61))
    for stage in ("student before", "teacher", "losses before", "losses after", "student after"):
        assert record(straight)["results"][stage] == record(run)["results"][stage]
    assert not list(run.glob("checkpoint-*"))


def test_a_run_that_is_stopped_after_its_last_step_trains_no_more(place, monkeypatch):
    straight, run = place.folder / "short", place.folder / "late"
    finish(*place.train("short", "--learning-rate", "0.01"))
    answer = measuring.answer

    def interrupted(*arguments, progress, **settings):
        if progress.startswith("student after"):
            raise KeyboardInterrupt
        return answer(*arguments, progress=progress, **settings)

    monkeypatch.setattr(measuring, "answer", interrupted)
    words = place.train("late", "--learning-rate", "0.01")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = error_of(invoke(*words))
    assert said == "stopped; repeat the command with --resume to go on from the last checkpoint"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert last_checkpoint(run) == run / "checkpoint-2"
    (run / "model.safetensors").unlink()
    monkeypatch.setattr(measuring, "answer", answer)

    shown = finish(*words, "--resume")
    assert "going on from checkpoint-2" in shown.stderr
    assert "step " not in shown.stderr
    assert record(run)["results"]["steps"] == 2
    assert training_logs(straight) == training_logs(run)
    assert [e["step"] for e in record(run)["results"]["history"] if "eval_ce" in e] == [0, 2]
    assert same(straight, run)
    assert record(straight)["results"]["losses after"] == record(run)["results"]["losses after"]


def test_a_run_that_was_stopped_before_its_first_step_begins(place, monkeypatch):
    answer = measuring.answer

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "answer", interrupted)
    error_of(invoke(*place.train("early")))
    monkeypatch.setattr(measuring, "answer", answer)
    shown = finish(*place.train("early", "--resume"))
    assert "going on" not in shown.stderr
    assert record(place.folder / "early")["results"]["steps"] == 2


def test_a_finished_run_is_left_as_it_is(place, answered):
    words = place.train("done")
    table = finish(*words).stdout
    before = (place.folder / "done" / "ctkd.json").read_bytes()
    answered.clear()
    shown = finish(*words, "--resume")
    assert f"{place.folder / 'done'} is finished already; nothing is left to do" in shown.stderr
    assert shown.stdout == table
    assert answered == []
    assert (place.folder / "done" / "ctkd.json").read_bytes() == before

    said = error_of(invoke(*words, "--resume", "--seed", "5", "--kd-weight", "1"))
    assert "was started with other settings (kd_weight None -> 1.0, seed 0 -> 5)" in said
    assert (place.folder / "done" / "ctkd.json").read_bytes() == before


def test_an_overwritten_run_starts_anew(place, answered):
    words = place.train("anew", "--keep-checkpoints")
    finish(*words)
    answered.clear()
    finish(*words, "--overwrite", "--seed", "1", "--no-keep-checkpoints")
    assert len(answered) == 3
    assert record(place.folder / "anew")["settings"]["seed"] == 1
    assert not list(place.folder.glob("anew/checkpoint-*"))
