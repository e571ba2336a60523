"""A run that was stopped, in whatever way, goes on to the same end."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctkd.cli import main
from ctkd.distill.training import measuring, progress
from ctkd.distill.training.checkpoints import Checkpoints
from tests.distill.tiny_runs import error_of, finish, invoke, record, weights

STEPS = 8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return Checkpoints(folder, print).last()


def signaled(monkeypatch, number: int, words: list[str], of: int = STEPS) -> str:
    """Run a command here, send the process a signal in its second step, return what it said."""
    step_end, steps = progress.StepReport.on_step_end, []

    def second(self, args, state, control, **rest):
        steps.append(state.global_step)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return step_end(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(progress.StepReport, "on_step_end", second)
        result = invoke(*words)
    assert result.stdout == ""
    last = f"stopped at step {steps[1]} of {of}; repeat the command with --resume to go on"
    assert error_of(result) == last
    assert result.exit_code == 1
    return result.stderr


def killed(*words: str) -> None:
    """A command whose process is killed in its second step."""
    steps = []

    def second(*_, **__):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    progress.StepReport.on_step_end = second
    main(words)


@pytest.mark.slow
def test_a_run_that_is_stopped_three_times_ends_like_one_that_is_not(
    place, answered, monkeypatch, forks
):
    straight, run = place.folder / "straight", place.folder / "stopped"
    options = ["--max-steps", str(STEPS), "--learning-rate", "0.01"]
    finish(*place.train("straight", *options))
    words = place.train("stopped", *options)

    said = signaled(monkeypatch, signal.SIGINT, words)
    assert "stopping after this step, with a checkpoint" in said
    assert last_checkpoint(run).name == "checkpoint-2"
    assert record(run)["results"]["steps"] == 2
    assert "finished" not in record(run)["results"]

    said = signaled(monkeypatch, signal.SIGTERM, [*words, "--resume"])
    assert "going on from checkpoint-2\n" in said
    assert last_checkpoint(run).name == "checkpoint-4"

    output = place.folder / "killed.log"
    end = forks.run(killed, *words, "--resume", "--save-steps", "1", output=output)
    assert end == -signal.SIGKILL, output.read_text()
    # The first of its steps was saved, the second was not.
    third = last_checkpoint(run)
    assert third.name == "checkpoint-5"

    # Of another one alone, the last is damaged in a way that could be read.
    broken = run / "checkpoint-7"
    shutil.copytree(third, broken)
    state = broken / "trainer_state.json"
    state.write_text(state.read_text().replace("1", "2", 1))
    answered.clear()
    shown = finish(*words, "--resume")
    assert f"{state} is not as it was written" in shown.stderr
    assert f"going on from {third.name}\n" in shown.stderr
    assert answered == ["student after: answering"]
    assert same(straight, run)
    assert training_logs(straight) == training_logs(run)
    assert [entry["step"] for entry in training_logs(run)] == list(range(1, STEPS + 1))
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
    # In the last step: what is left to do is not begun.
    signaled(monkeypatch, signal.SIGTERM, words, of=2)
    assert last_checkpoint(run) == run / "checkpoint-2" and "finished" not in record(run)["results"]
    words.append("--resume")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = error_of(invoke(*words))
    assert said == "stopped; repeat the command with --resume to go on from the last checkpoint"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert last_checkpoint(run) == run / "checkpoint-2"
    (run / "model.safetensors").unlink()
    monkeypatch.setattr(measuring, "answer", answer)

    shown = finish(*words)
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


def test_a_run_goes_on_with_the_models_that_it_was_begun_with(place, monkeypatch, tmp_path):
    models = {"student": place.student, "teacher": place.teacher}
    copies = {which: shutil.copytree(path, tmp_path / which) for which, path in models.items()}
    words = place.train("same", *(f"--{which}={path}" for which, path in copies.items()))

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "answer", interrupted)
        error_of(invoke(*words))
    for which, path in copies.items():
        kept = weights(path)
        save_file({name: one + 1 for name, one in kept.items()}, path / "model.safetensors")
        assert f"{path} has other weights than" in error_of(invoke(*words, "--resume"))
        shutil.copy(models[which] / "model.safetensors", path)
    finish(*words, "--resume")


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
