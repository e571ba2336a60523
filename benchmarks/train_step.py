"""A whole training step that distils, beside the same step on cross-entropy alone, or TRL's.

The part "stored": the teacher is read from disk. Logits come from hidden states a block at a time
(the default of training), or all at once. Each step is compared with the `sft` step of its own way,
and all are taken in turn on the same rows and the same student.

The part "gold": the teacher is live, and a step with the loss `gold` is compared in time and peak
memory with one of TRL's ``GOLDTrainer``, the baseline, on the same models, texts, batches and
AdamW, off-policy, without accumulation, mixed precision or checkpointing of activations. TRL is set
to what ``merging="bayesian"`` is here. The losses of the first batch, printed beside, agree but for
the steps of 1e-6 taken in between and the average: over chunks here, over those of a row and then
over rows in TRL. What differs:

- TRL tokenizes for the teacher and aligns in every step; ctkd does so once, before training.
- TRL computes logits of prompts and padding as well, and keeps the probabilities of whole answers.
- TRL's trainer has the teacher keep its keys and values; ctkd's reads cross-entropy, for its log.
- By default TRL merges as "observed", on rows that are one position late: as much work. The
  default of `gold` is ``merging="first"``, another function and less work, in a line of its own.
- TRL aligns byte-level tokenizers alone. Others it is made to pair by position, the k-th token with
  the k-th, which needs no merging, and the losses do not agree.

Memory is what a step in a fresh process needs beyond models, gradients and the state of AdamW.

Run with `python -m benchmarks.train_step`.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

from baselines.trl_uld import HOW_TO_INSTALL, is_installed
from benchmarks.loss_speed import verdict
from benchmarks.measuring import append_row, draw_bars, environment, peak_of, time_in_turn
from benchmarks.options import note_option, results_option, threads_option
from benchmarks.steps import Prepared

BAR = 1.10
MEBIBYTE = 2**20
WAYS = {"hidden states": False, "whole logits": True}
PARTS = {
    "stored": ("smollm2-135m-instruct", "gemma-3-270m"),
    "gold": ("pocket-llama", "smollm2-135m-instruct"),
}
"""Student and teacher of each part. TRL's alignment refuses Gemma's tokenizer."""
TRL = "GOLDTrainer, TRL"


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


_MERGING = {"merging": "bayesian"}
GOLD_KINDS = {
    kind.name: kind
    for kind in (
        Kind(label="gold, bayesian", loss="gold", options=_MERGING, way="hidden states"),
        Kind(label="gold, bayesian", loss="gold", options=_MERGING, way="whole logits"),
        Kind(label="gold, first", loss="gold", options={}, way="hidden states"),
        Kind(label="sft", loss="sft", options={}, way="hidden states"),
    )
}
"""What is measured beside TRL. The last, which asks no teacher, is the baseline without TRL."""


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


def live_step(prepared: Prepared, name: str, folder: str, optimizer: Any) -> Callable[[], float]:
    """A step of one of `GOLD_KINDS`, or of TRL, with the live teacher."""
    if name == TRL:
        return prepared.trl_step_of(prepared.trl_trainer(folder), optimizer)
    kind = GOLD_KINDS[name]
    trainer = prepared.trainer(
        kind.loss, folder, cached=False, whole_logits=WAYS[kind.way], options=kind.options
    )
    return prepared.step_of(trainer, optimizer)


def measure_gold(
    prepared: Prepared, names: list[str], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step of each kind, and its loss on the first batch."""
    optimizer = prepared.optimizer()
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: live_step(prepared, name, folder, optimizer) for name in names}
        losses = {name: step() for name, step in steps.items()}
        seconds = time_in_turn(steps, repeats, label="steps with the live teacher")
    return {name: statistics.median(found) for name, found in seconds.items()}, losses


def measure_memory(arguments: list[str], names: list[str]) -> dict[str, int]:
    """Bytes of a step of each kind beyond models, gradients and AdamW's state."""
    extra = {}
    with tqdm(names, desc="memory", unit="step") as progress:
        for name in progress:
            progress.set_postfix_str(name)
            extra[name] = peak_of(["-m", "benchmarks.peak_step", name, *arguments], 1)
    return extra


def gold_table(
    unit: str, seconds: dict[str, float], extra: dict[str, int], losses: dict[str, float]
) -> str:
    """One row per kind: seconds and MiB, each beside its part of the baseline's, and the loss."""
    rows = [
        [
            name,
            f"{taken:.3f}",
            f"{taken / seconds[unit]:.3f}",
            f"{extra[name] / MEBIBYTE:.0f}",
            f"{extra[name] / extra[unit]:.3f}",
            f"{losses[name]:.3f}",
        ]
        for name, taken in seconds.items()
    ]
    return tabulate(
        rows,
        headers=["step", "s", f"/ {unit}", "extra MiB", f"/ {unit}", "loss"],
        colalign=("left", *["right"] * 5),
        disable_numparse=True,
    )


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="[both]")
@click.option("--student", help=f"[{PARTS['stored'][0]}; for gold {PARTS['gold'][0]}]")
@click.option("--teacher", help=f"[{PARTS['stored'][1]}; for gold {PARTS['gold'][1]}]")
@click.option(
    "--loss",
    "losses",
    multiple=True,
    default=("multilevelot", "uld", "uld:256"),
    show_default=True,
    help="Of the part stored; uld:256 is uld with top_k 256.",
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
    parts: tuple[str, ...],
    student: str | None,
    teacher: str | None,
    losses: tuple[str, ...],
    batch_size: int,
    length: int,
    scored: int,
    repeats: int,
    note: str,
    results: Path,
) -> None:
    """Print the time of a whole distilling step as a ratio to one with cross-entropy alone.

    Then time and memory of one with gold and a live teacher as ratios to TRL's GOLDTrainer.
    """
    if scored >= length:
        raise click.BadParameter(f"{scored} scored tokens leave no prompt in {length}")
    kinds = kinds_of(losses)
    rows = f"{batch_size} x {length}, {scored} scored"
    size = {"batch_size": batch_size, "length": length, "scored": scored}
    for part in parts or PARTS:
        models = {"student": student or PARTS[part][0], "teacher": teacher or PARTS[part][1]}
        row = {**environment("transformers"), "note": note, "part": part, **models}
        row |= {"rows": rows, "repeats": repeats}
        title = f"{models['student']}, {rows}"
        if part == "stored":
            _stored(row, {**models, **size}, kinds, repeats, results, title)
        else:
            _gold(row, {**models, **size}, repeats, results, title)


def _stored(
    row: dict[str, Any],
    chosen: dict[str, Any],
    kinds: list[Kind],
    repeats: int,
    results: Path,
    title: str,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loss = next(kind.loss for kind in kinds if kind.loss != "sft")
        seconds = measure(Prepared.make(folder, loss=loss, **chosen), kinds, repeats)
    click.echo(f"\n{table(kinds, seconds)}\n")
    ratios = {kind.name: round(seconds[kind.name] / seconds[kind.unit], 4) for kind in kinds}
    row["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
    row["ratios_to_own_sft"] = ratios
    append_row(results / "train_step.jsonl", row)
    judged = {kind.name: ratios[kind.name] for kind in kinds if kind.loss != "sft"}
    draw_bars(
        results / "train_step.svg",
        {title: judged},
        across="time of a step / the same with sft",
        limits=dict.fromkeys(judged, BAR),
    )


def _gold(
    row: dict[str, Any], chosen: dict[str, Any], repeats: int, results: Path, title: str
) -> None:
    names = list(GOLD_KINDS)
    if is_installed():
        names.insert(0, TRL)
        row["versions"]["trl"] = version("trl")
    else:
        click.echo(f"without {TRL}, ratios are to sft: {HOW_TO_INSTALL}", err=True)
    unit = names[0] if TRL in names else names[-1]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Prepared.make(folder, loss="gold", cached=False, **chosen)
        seconds, losses = measure_gold(prepared, names, repeats)
    threads = ("--threads", str(torch.get_num_threads()))
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in chosen.items()]
    extra = measure_memory([text for both in (*options, threads) for text in both], names)
    click.echo(f"\n{gold_table(unit, seconds, extra, losses)}\n")
    ratios = {
        "time": {name: round(value / seconds[unit], 4) for name, value in seconds.items()},
        "memory": {name: round(value / extra[unit], 4) for name, value in extra.items()},
    }
    row["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
    row |= {"extra_bytes": extra, "losses": losses, "baseline": unit, "ratios": ratios}
    append_row(results / "train_step.jsonl", row)
    draw_bars(
        results / "gold_step.svg",
        {f"{what}, {title}": found for what, found in ratios.items()},
        across=f"of a step / the same of {unit}",
    )


if __name__ == "__main__":
    main()
