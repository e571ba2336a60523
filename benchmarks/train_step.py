"""A whole training step that distils, beside the same step on cross-entropy alone.

The teacher is read from disk. Logits come from hidden states a block at a time (the default of
training), or all at once. Each step is compared with the `sft` step of its own way, and all are
taken in turn on the same rows and the same student.

Run with `python -m benchmarks.train_step`.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from benchmarks.loss_speed import verdict
from benchmarks.measuring import append_row, draw_bars, environment, time_in_turn
from benchmarks.options import note_option, results_option, threads_option
from benchmarks.steps import Prepared

BAR = 1.10
WAYS = {"hidden states": False, "whole logits": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to take a step.

    Args:
        label: Of the loss.
        loss: Its name, or "sft".
        options: Of the loss.
        way: One of `WAYS`.
    """

    label: str
    loss: str
    options: dict[str, Any]
    way: str

    @property
    def name(self) -> str:
        return f"{self.label}, {self.way}"

    @property
    def unit(self) -> str:
        """Name of the step to compare with."""
        return f"sft, {self.way}"


def kinds_of(losses: tuple[str, ...]) -> list[Kind]:
    """Each loss and sft, both ways; "uld:256" is uld with ``top_k=256``."""
    kinds = []
    for way in WAYS:
        for label in ("sft", *dict.fromkeys(losses)):
            loss, _, top_k = label.partition(":")
            if top_k and not top_k.isdecimal():
                raise click.BadParameter(f"{label!r}: after the colon comes top_k, a whole number")
            options = {"top_k": int(top_k)} if top_k else {}
            kinds.append(Kind(label=label, loss=loss, options=options, way=way))
    return kinds


def measure(prepared: Prepared, kinds: list[Kind], repeats: int) -> dict[str, float]:
    """Median seconds of a step of each kind."""
    optimizer = prepared.optimizer()
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            trainer = prepared.trainer(
                kind.loss, folder, whole_logits=WAYS[kind.way], options=kind.options
            )
            taken_whole = trainer.student_logits.why_whole
            if taken_whole and not WAYS[kind.way]:
                click.echo(f"{kind.name}: all logits at once after all, because {taken_whole}")
            steps[kind.name] = prepared.step_of(trainer, optimizer)
        seconds = time_in_turn(steps, repeats, label="training steps")
    return {name: statistics.median(found) for name, found in seconds.items()}


def table(kinds: list[Kind], seconds: dict[str, float]) -> str:
    """One row per kind: seconds, the part of its own sft, and of the faster of both."""
    fastest = min(seconds[kind.name] for kind in kinds if kind.loss == "sft")
    rows = []
    for kind in kinds:
        taken = seconds[kind.name]
        ratio = taken / seconds[kind.unit]
        judged = kind.loss != "sft"
        rows.append(
            [
                kind.name,
                f"{taken:.3f}",
                f"{ratio:.3f}",
                f"{taken / fastest:.3f}",
                f"{BAR:.2f}" if judged else "",
                verdict(ratio, BAR) if judged else "",
            ]
        )
    return tabulate(
        rows,
        headers=["step", "s", "/ its sft", "/ faster sft", "bar", "holds"],
        colalign=("left", "right", "right", "right", "right", "left"),
        disable_numparse=True,
    )


@click.command()
@click.option("--student", default="smollm2-135m-instruct", show_default=True)
@click.option("--teacher", default="gemma-3-270m", show_default=True)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    default=("multilevelot", "uld", "uld:256"),
    show_default=True,
    help="uld:256 is uld with top_k 256.",
)
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--length", default=128, show_default=True, type=click.IntRange(min=4))
@click.option(
    "--scored",
    default=64,
    show_default=True,
    type=click.IntRange(min=2),
    help="Of the length, tokens of the answer.",
)
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=1))
@threads_option
@note_option
@results_option
def main(
    student: str,
    teacher: str,
    losses: tuple[str, ...],
    batch_size: int,
    length: int,
    scored: int,
    repeats: int,
    note: str,
    results: Path,
) -> None:
    """Print the time of a whole distilling step as a ratio to one with cross-entropy alone."""
    if scored >= length:
        raise click.BadParameter(f"{scored} scored tokens leave no prompt in {length}")
    kinds = kinds_of(losses)
    result = {**environment("transformers"), "note": note, "student": student, "teacher": teacher}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Prepared.make(
            folder,
            student=student,
            teacher=teacher,
            loss=next(kind.loss for kind in kinds if kind.loss != "sft"),
            batch_size=batch_size,
            length=length,
            scored=scored,
        )
        seconds = measure(prepared, kinds, repeats)
    click.echo(f"\n{table(kinds, seconds)}\n")
    ratios = {kind.name: round(seconds[kind.name] / seconds[kind.unit], 4) for kind in kinds}
    rows = f"{batch_size} x {length}, {scored} scored"
    row = {
        **result,
        "rows": rows,
        "repeats": repeats,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "ratios_to_own_sft": ratios,
    }
    append_row(results / "train_step.jsonl", row)
    judged = {kind.name: ratios[kind.name] for kind in kinds if kind.loss != "sft"}
    draw_bars(
        results / "train_step.svg",
        {f"{student}, {rows}": judged},
        across="time of a step / the same with sft",
        limits=dict.fromkeys(judged, BAR),
    )


if __name__ == "__main__":
    main()
