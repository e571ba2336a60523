"""What a stored teacher saves, and what it loses.

First the time of a whole training step (collate, forward, loss, backward, AdamW) with the live
teacher, with a teacher read from disk, and with cross-entropy alone, in turn, on the same rows.
Then the error of every loss, in value and in the student's gradient, as a function of k.

Run with `python -m benchmarks.teacher_cache`.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments

import ctkd
from ctkd.distill.cache_writing import write_cache
from ctkd.distill.collator import Collator, padding_id
from ctkd.distill.config import TrainConfig
from ctkd.distill.data import load_rows
from ctkd.distill.encoded import EncodedPair
from ctkd.distill.models import head_width, last_logits, load_tokenizer
from ctkd.distill.preparing import Forms, Models, encode, load_examples, load_models
from ctkd.distill.teacher_cache import TeacherCache
from ctkd.distill.trainer import CrossTokenizerTrainer
from ctkd.errors import CtkdError
from ctkd.loss import Loss
from ctkd.top_k_logits import TopK, TopKLogits

RESULTS = Path(__file__).parent / "results" / "teacher_cache.jsonl"
KINDS = ("live teacher", "cached teacher", "sft")


def quiet(line: str) -> None:
    """Say nothing."""


def write_rows(path: Path, tokenizer: Any, rows: int, length: int, scored: int) -> None:
    """Cut the embedded passages into texts of so many of the student's tokens."""
    passages = dict.fromkeys(str(row["context"]) for row in load_rows("pocketqa"))
    ids = tokenizer(" ".join(passages), add_special_tokens=False).input_ids
    # The end of sequence is the last token.
    texts = [ids[start : start + length - 1] for start in range(0, rows * length, length)]
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            cut = len(text) + 1 - scored
            row = {"prompt": tokenizer.decode(text[:cut]), "answer": tokenizer.decode(text[cut:])}
            file.write(json.dumps(row) + "\n")


def make_trainer(
    kind: str, config: TrainConfig, models: Models, cache: TeacherCache, folder: str
) -> CrossTokenizerTrainer:
    """A trainer of the same student, by one of `KINDS`."""
    distils, cached = kind != "sft", kind == "cached teacher"
    student = models.student
    pair = models.pair.narrowed(head_width(student), models.teacher_width)
    return CrossTokenizerTrainer(
        student,
        TrainingArguments(
            output_dir=folder, remove_unused_columns=False, report_to="none", disable_tqdm=True
        ),
        loss=config.make_loss(pair) if distils else None,
        teacher=models.teacher if distils and not cached else None,
        teacher_cache=cache if cached else None,
        student_vocab_size=pair.student_size,
        teacher_vocab_size=pair.teacher_size,
        data_collator=Collator(
            student_pad_id=padding_id(models.student_tokenizer),
            teacher_pad_id=padding_id(models.teacher_tokenizer) if distils else None,
            teacher_cache=cache if cached else None,
        ),
    )


def step_of(
    trainer: CrossTokenizerTrainer, optimizer: torch.optim.Optimizer
) -> Callable[[list[EncodedPair]], None]:
    """One whole optimizer step on some rows."""

    def step(rows: list[EncodedPair]) -> None:
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        trainer.compute_loss(trainer.model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(
    config: TrainConfig,
    models: Models,
    cache: TeacherCache,
    rows: list[EncodedPair],
    repeats: int,
) -> dict[str, float]:
    """Median seconds of a step of each kind; the kinds take turns, so load hits all alike."""
    size = config.batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    alone = [[replace(row, teacher=None) for row in batch] for batch in batches]
    optimizer = torch.optim.AdamW(models.student.parameters(), lr=1e-6)
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            kind: step_of(make_trainer(kind, config, models, cache, folder), optimizer)
            for kind in KINDS
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in tqdm(range(repeats + 1), desc="training steps", unit="turn"):
            for kind, step in steps.items():
                chosen = (alone if kind == "sft" else batches)[turn % len(batches)]
                start = time.perf_counter()
                step(chosen)
                if turn:  # the first turn warms up
                    seconds[kind].append(time.perf_counter() - start)
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
    models: Models, rows: list[EncodedPair], kept: list[int], names: list[str]
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


@click.command()
@click.option("--student", default="smollm2-135m-instruct", show_default=True)
@click.option("--teacher", default="gemma-3-270m", show_default=True)
@click.option("--loss", default="multilevelot", show_default=True, help="Of the training step.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--length", default=128, show_default=True, help="Tokens of a row.")
@click.option("--scored", default=64, show_default=True, help="Of them, tokens of the answer.")
@click.option("--repeats", default=7, show_default=True, help="Timed steps of each kind.")
@click.option("--k", "kept", multiple=True, type=int, help="Of the error table. [16 ... 1024]")
@click.option("--note", default="", help="What to write into the result, such as the load.")
@click.option("--skip-steps", is_flag=True, help="Print the error table alone.")
def main(
    student: str,
    teacher: str,
    loss: str,
    batch_size: int,
    length: int,
    scored: int,
    repeats: int,
    kept: tuple[int, ...],
    note: str,
    skip_steps: bool,
) -> None:
    """Print times, ratios and errors, and append them to benchmarks/results."""
    load_before = os.getloadavg()[0]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_before": round(load_before, 2),
        "note": note,
        "versions": {
            name: importlib.metadata.version(name) for name in ("ctkd", "torch", "transformers")
        },
        "student": student,
        "teacher": teacher,
        "rows": f"{batch_size} x {length}, {scored} scored",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        config = TrainConfig(
            loss=loss,
            student=student,
            teacher=teacher,
            data=str(path),
            eval_data=str(path),
            task="text",
            batch_size=batch_size,
        )
        write_rows(path, load_tokenizer(student), 4 * batch_size, length, scored)
        cache = write_cache(config, Path(folder, "cache"), texts="none", say=click.echo)
        models = load_models(config, quiet)
        examples, _ = load_examples(config, quiet)
        rows = encode(config, models, examples, Forms.of(config, examples), "training", quiet).rows
        result["share_beyond_256"] = round(share_beyond(cache), 5)
        if not skip_steps:
            seconds = measure_steps(config, models, cache, rows, repeats)
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
        errors = measure_errors(
            models, rows[:4], list(kept) or [16, 32, 64, 128, 256, 512, 1024], ctkd.list_losses()
        )
    click.echo(f"\n{errors_table(errors)}")
    result["errors"] = errors
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    click.echo(f"\nappended to {RESULTS}")


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
