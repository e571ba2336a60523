"""Runs a comparison in processes that kill themselves at chosen moments."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.run import runner
from ctkd.distill.teachers import texts as teacher_texts
from ctkd.distill.training import measuring, output_folder, progress


class Moments:
    """Counts what happens, writes it down, and dies where it was told to."""

    def __init__(self, log: Path, last: tuple[str, int] | None) -> None:
        self.log, self.last = log, last
        self.counts: dict[str, int] = {}

    def happened(self, what: str, detail: object = "") -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        with self.log.open("a") as file:
            file.write(json.dumps([what, detail]) + "\n")
        if self.last == (what, self.counts[what]):
            with self.log.open("a") as file:
                file.write(json.dumps(["killed", what]) + "\n")
            os.kill(os.getpid(), signal.SIGKILL)


def watch(moments: Moments) -> None:
    """Report every moment at which a comparison could die."""
    step_end = progress.StepReport.on_step_end
    generate, append = teacher_texts.generate, runner.append_record
    replace, unlink = os.replace, Path.unlink

    def stepped(self, args, state, control, **rest):
        # Before the step is saved.
        moments.happened("step", [Path(args.output_dir).name, state.global_step])
        return step_end(self, args, state, control, **rest)

    def generated(model, tokenizer, prompts, **rest):
        texts = generate(model, tokenizer, prompts, **rest)
        for prompt in prompts:
            moments.happened("answer", [Path(model.config._name_or_path).name, prompt])
        return texts

    def appended(folder, record):
        moments.happened("record", record.key)
        if moments.last == ("half a record", moments.counts["record"]):
            with (folder / "results.jsonl").open("a") as file:
                file.write(record.as_json()[:200])
            moments.happened("half a record")
        append(folder, record)
        moments.happened("recorded", record.key)

    def replaced(source, target):
        if Path(target).name == output_folder.RECORD and not Path(target).exists():
            moments.happened("first ctkd.json")
        replace(source, target)
        if Path(target).name == output_folder.RECORD and '"finished"' in Path(target).read_text():
            moments.happened("finished")

    def unlinked(self, *rest, **settings):
        if self.suffix == ".safetensors":
            moments.happened("deleting weights")
        unlink(self, *rest, **settings)

    progress.StepReport.on_step_end = stepped
    teacher_texts.generate = generated
    runner.append_record = appended
    os.replace = replaced
    Path.unlink = unlinked
    measuring.plot_curves = lambda history, path: None
    runner.write_report = lambda comparison, analysis, folder, published: folder


def main(attempts: list[dict[str, Any]], ends: str) -> None:
    """One process after another; how each ended is written to a file.

    An attempt has settings for `CompareConfig`, the moment at which to die (None for never), a log,
    to which every step, answer and record is written, and perhaps a folder to move to another place
    before.
    """
    ended = []
    for attempt in attempts:
        if attempt["move"]:
            os.rename(*attempt["move"])
        child = os.fork()
        if child == 0:
            last = attempt["moment"]
            watch(Moments(Path(attempt["log"]), None if last is None else tuple(last)))
            config = CompareConfig.from_mapping(attempt["settings"])
            runner.compare(config, say=lambda line: None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended.append("killed" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}")
    Path(ends).write_text(json.dumps(ended))
