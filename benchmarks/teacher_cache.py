"""What a stored teacher saves, and what it loses.

First the time of a whole training step (collate, forward, loss, backward, AdamW) with the live
teacher, with a teacher read from disk, and with cross-entropy alone, in turn, on the same rows.
Then the error of every loss, in value and in the student's gradient, as a function of k; with
``--states``, whose cache has none, the size of a cache instead.

Run with `python -m benchmarks.teacher_cache`.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from tqdm import tqdm
from transformers import PreTrainedModel

import ctkd
from benchmarks.measuring import append_row, environment, time_in_turn
from benchmarks.options import note_option, results_option
from benchmarks.steps import Prepared
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import EncodedExample
from ctkd.distill.models.loading import head_width, last_logits
from ctkd.distill.preparing import Models
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.errors import CtkdError
from ctkd.logits import TopK, TopKLogits
from ctkd.loss import Loss


def measure_steps(prepared: Prepared, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each kind; the kinds take turns, so load hits all alike."""
    optimizer = prepared.optimizer()
    loss = prepared.config.loss
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            "live teacher": prepared.trainer(loss, folder, cached=False),
            "cached teacher": prepared.trainer(loss, folder),
            "sft": prepared.trainer("sft", folder),
        }
        steps = {kind: prepared.step_of(one, optimizer) for kind, one in trainers.items()}
        seconds = time_in_turn(steps, repeats, label="training steps")
    return {kind: statistics.median(found) for kind, found in seconds.items()}


def value_and_gradient(loss: Loss, batch: ctkd.Batch, logits: torch.Tensor) -> tuple[float, Any]:
    """The loss and its gradient into the student's logits."""
    logits.grad = None
    value = loss(batch).value
    value.backward()
    return float(value.detach()), logits.grad


@torch.no_grad()
def all_logits(model: PreTrainedModel, inputs: dict[str, Any], count: int) -> torch.Tensor:
    """Logits of the scored positions."""
    return last_logits(model, model, inputs, count)


def measure_errors(
    models: Models, rows: list[EncodedExample], kept: list[int], names: list[str]
) -> list[dict[str, Any]]:
    """Relative error of each loss's value and gradient when only k entries are stored."""
    pair = models.pair.narrowed(head_width(models.student), models.teacher_width)
    batch = Collator(
        student_pad_id=padding_id(models.student_tokenizer),
        teacher_pad_id=padding_id(models.teacher_tokenizer),
    )(rows)
    theirs = {name.removeprefix("teacher_"): value for name, value in batch.items()}
    logits = all_logits(models.student, batch, batch["labels"].shape[1]).requires_grad_()
    teacher = ctkd.Side.from_causal_lm(
        all_logits(models.teacher, theirs, batch["teacher_distill_labels"].shape[1]),
        batch["teacher_distill_labels"],
        chunk_ids=batch["teacher_distill_chunk_ids"],
        vocab_size=pair.teacher_size,
    )
    student = ctkd.Side.from_causal_lm(
        logits,
        batch["distill_labels"],
        chunk_ids=batch["distill_chunk_ids"],
        vocab_size=pair.student_size,
    )
    losses = {name: ctkd.get_loss(name, pair=pair) for name in names}
    asked = ctkd.Batch(student=student, teacher=teacher)
    live = {}
    for name, loss in tqdm(losses.items(), desc="live teacher", unit="loss"):
        live[name] = value_and_gradient(loss, asked, logits)
    found = []
    # One k at a time: all of a large vocabulary is several times as large as the logits.
    for k in tqdm([*kept, pair.teacher_size], desc="stored teacher", unit="k"):
        top = TopK.of(teacher.logits, teacher.token_ids, k, (1.0, 2.0))
        asked = ctkd.Batch(student=student, teacher=replace(teacher, logits=TopKLogits(top)))
        for name, loss in losses.items():
            row: dict[str, Any] = {"loss": name, "k": k, "needs": loss.teacher_needs}
            value, gradient = live[name]
            try:
                other, changed = value_and_gradient(loss, asked, logits)
                row["value_error"] = abs(other - value) / abs(value)
                row["gradient_error"] = float((changed - gradient).norm() / gradient.norm())
            except CtkdError as error:
                row["refused"] = str(error)
            found.append(row)
    return found


def share_beyond(cache: TeacherCache) -> float:
    """Mean probability of the columns that the cache does not know."""
    shares = []
    for shard in cache.record["shards"]:
        shares.append(load_file(cache.path / shard["file"])["log_rests"][:, 0, 0].exp())
    return float(torch.cat(shares).mean())


def cache_sizes(cache: TeacherCache, kept: list[int]) -> dict[str, int]:
    """Bytes of a position, with hidden states and with so many logits at two temperatures."""
    head = cache.record["head"]
    width = 2 if cache.record["states"] == "bfloat16" else 4
    return {
        f"{cache.kept}, a position": width * head["width"],
        "their head": (cache.path / head["file"]).stat().st_size,
        **{f"top {k}, a position": 8 * k + 16 * 2 + 20 for k in kept},
    }


@click.command()
@click.option("--student", default="smollm2-135m-instruct", show_default=True)
@click.option("--teacher", default="gemma-3-270m", show_default=True)
@click.option("--loss", default="multilevelot", show_default=True, help="Of the training step.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--length", default=128, show_default=True, help="Tokens of a row.")
@click.option("--scored", default=64, show_default=True, help="Of them, tokens of the answer.")
@click.option("--repeats", default=7, show_default=True, help="Timed steps of each kind.")
@click.option(
    "--states",
    type=click.Choice(["none", "bfloat16", "float32"]),
    default="none",
    show_default=True,
    help="Keep hidden states in this dtype, not the largest logits.",
)
@click.option("--k", "kept", multiple=True, type=int, help="Of the error table. [16 ... 1024]")
@note_option
@results_option
@click.option("--skip-steps", is_flag=True, help="Print the error table alone.")
def main(
    student: str,
    teacher: str,
    loss: str,
    batch_size: int,
    length: int,
    scored: int,
    repeats: int,
    states: str,
    kept: tuple[int, ...],
    note: str,
    results: Path,
    skip_steps: bool,
) -> None:
    """Print times, ratios and errors, and append them to benchmarks/results."""
    result: dict[str, Any] = {
        **environment("transformers"),
        "note": note,
        "student": student,
        "teacher": teacher,
        "rows": f"{batch_size} x {length}, {scored} scored",
        "loss": loss,
        "states": states,
    }
    with tempfile.TemporaryDirectory() as folder:
        prepared = Prepared.make(
            folder,
            student=student,
            teacher=teacher,
            loss=loss,
            batch_size=batch_size,
            length=length,
            scored=scored,
            states=states,
        )
        if states == "none":
            result["share_beyond_256"] = round(share_beyond(prepared.cache), 5)
        if not skip_steps:
            seconds = measure_steps(prepared, repeats)
            result["steps"] = {kind: round(value, 3) for kind, value in seconds.items()}
            cached = seconds["cached teacher"]
            result["cached_over_live"] = round(cached / seconds["live teacher"], 3)
            result["cached_over_sft"] = round(cached / seconds["sft"], 3)
            click.echo(
                tabulate(
                    [[kind, value, cached / value] for kind, value in seconds.items()],
                    headers=[f"step with {loss}", "s", "cached / it"],
                    floatfmt=".2f",
                )
            )
        if states != "none":
            sizes = cache_sizes(prepared.cache, [256, 1024])
            click.echo(tabulate(sizes.items(), headers=["cache", "bytes"]))
            append_row(results / "teacher_cache.jsonl", {**result, "bytes": sizes})
            return
        errors = measure_errors(
            prepared.models,
            prepared.rows[:4],
            list(kept) or [16, 32, 64, 128, 256, 512, 1024],
            ctkd.list_losses(),
        )
    click.echo(f"\n{errors_table(errors)}")
    append_row(results / "teacher_cache.jsonl", {**result, "errors": errors})


def errors_table(errors: list[dict[str, Any]]) -> str:
    """One row per loss, one column per k: error of the value, and of the gradient."""
    ks = list(dict.fromkeys(row["k"] for row in errors))
    rows = []
    for name in dict.fromkeys(row["loss"] for row in errors):
        for what in ("value", "gradient"):
            cells = {
                row["k"]: f"{row[f'{what}_error']:.1e}" if f"{what}_error" in row else "refused"
                for row in errors
                if row["loss"] == name
            }
            rows.append([name, what, *(cells[k] for k in ks)])
    return tabulate(rows, headers=["relative error", "of", *(f"k = {k}" for k in ks)])


if __name__ == "__main__":
    main()
