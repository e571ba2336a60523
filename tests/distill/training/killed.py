"""Runs a command in processes that are killed at random moments; a script of its own.

Arguments: a folder for logs, and the words of the command. First the command is run in one process
to its end, in a folder "straight". Then it is killed in each of the stages below in "killed", and
goes on with ``--resume`` in the next process. Each process logs to ``NAME-NUMBER.log``.
"""

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

# The command imports these as it goes: here, so that no fork has to.
import accelerate  # noqa: F401
import rouge_score.rouge_scorer  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

from ctkd.cli import main as ctkd_main
from ctkd.distill.training import measuring, progress, run
from ctkd.distill.training.checkpoints import Checkpoints
from ctkd.distill.training.output_folder import OutputFolder

# Stages of a run, in each of which one process dies. Before the results the run must not end: it
# makes few steps in each.
STAGES = [
    "loading", "beginning", "steps", "saving", "saving", "saving", "steps", "result", "measuring",
    "removing",
]  # fmt: skip
MOST_STEPS = 5
STEPS, SAVE_STEPS = 40, 3
SAVES = STEPS // SAVE_STEPS


class Stage:
    """The stage of this process; it counts what happens to files there, and steps."""

    def __init__(self, last: tuple[str, int] | None) -> None:
        self.name, self.last = "loading", last
        self.counts: Counter[str] = Counter()

    def happened(self, event: str, arguments: tuple) -> None:
        """An audit hook: files are opened, renamed and deleted, and steps end."""
        if event == "ctkd.step" or (self.name != "steps" and event in _EVENTS):
            self.counts[self.name] += 1
            if self.last == (self.name, self.counts[self.name]):
                print(f"killed in {self.name}: {event} {arguments!s:.200}", file=sys.stderr)
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)

    def begins(self, name: str, function, ends_in: str | None = None):
        """The function, which begins a stage, and after which perhaps another one begins."""

        def within(*arguments, **settings):
            self.name = name
            found = function(*arguments, **settings)
            self.name = ends_in or self.name
            return found

        return within


_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def watch(stage: Stage) -> None:
    """Tell the stages apart."""
    step_end = progress.StepReport.on_step_end

    def stepped(self, args, state, control, **rest):
        sys.audit("ctkd.step", state.global_step)
        return step_end(self, args, state, control, **rest)

    progress.StepReport.on_step_end = stepped
    OutputFolder.prepare = stage.begins("beginning", OutputFolder.prepare)
    run._train_from = stage.begins("steps", run._train_from)
    save = run.RunTrainer._save_checkpoint
    run.RunTrainer._save_checkpoint = stage.begins("saving", save, "steps")
    Checkpoints.writing_result = stage.begins("result", Checkpoints.writing_result)
    run.Measure.losses = stage.begins("measuring", run.Measure.losses)
    Checkpoints.remove = stage.begins("removing", Checkpoints.remove)
    measuring.plot_curves = lambda history, path: None
    sys.addaudithook(stage.happened)


def attempt(words: list[str], log: Path, last: tuple[str, int] | None) -> tuple[bool, Counter]:
    """Whether a process of the command was killed, and what it counted if not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        stage = Stage(last)
        code = 1
        try:
            watch(stage)
            code = ctkd_main(words, standalone_mode=False) or 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os.write(writer, repr(dict(stage.counts)).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    counts = os.read(reader, 10_000)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True, Counter()
    if os.WEXITSTATUS(status):
        raise SystemExit(log.read_text())
    return False, Counter(eval(counts))


def main() -> None:
    """A run that nothing stops, then one that is killed in every stage."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    words += ["--max-steps", str(STEPS), "--save-steps", str(SAVE_STEPS)]
    _, counts = attempt(
        [*words, "--output", str(folder / "straight")], folder / "straight-0.log", None
    )
    print("counted", dict(counts), flush=True)
    # Of one checkpoint, and of the losses at the end alone.
    most = {**counts, "steps": MOST_STEPS, "saving": counts["saving"] // SAVES, "measuring": 3}
    chance = random.Random(11)
    words += ["--output", str(folder / "killed"), "--resume"]
    for number, stage in enumerate([*STAGES, None]):
        moment = None if stage is None else (stage, chance.randint(1, most[stage]))
        killed, _ = attempt(words, folder / f"killed-{number}.log", moment)
        print("killed" if killed else "ended", moment, flush=True)


if __name__ == "__main__":
    main()
