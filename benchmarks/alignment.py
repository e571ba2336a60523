"""Time the alignment of two tokenizations, beside the plain walk over the same rows.

Run with ``python -m benchmarks.alignment``.
"""

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import torch
from tabulate import tabulate

from baselines import alignment as walk
from ctkd.distill.data.rows import load_rows
from ctkd.distill.models.loading import load_tokenizer
from ctkd.tokenization.alignment import Aligner
from ctkd.tokenization.token_bytes import TokenBytes

RESULTS = Path(__file__).with_name("results") / "alignment.jsonl"
REPEATS = 5


def median_seconds(task: Callable[[], object], repeats: int = REPEATS) -> float:
    """Run a task some times and return the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def answers(rows: int, characters: int) -> list[str]:
    """Cut the embedded passages, joined again and again, into texts of equal length."""
    passages = list(dict.fromkeys(row["context"] for row in load_rows("pocketqa")))
    starts = itertools.cycle(range(len(passages)))
    text = ""
    while len(text) < rows * characters:
        start = next(starts)  # each round begins elsewhere, so that fewer texts are alike
        text += " ".join(passages[start:] + passages[:start]) + " "
    return [text[row * characters : (row + 1) * characters] for row in range(rows)]


def cpu_name() -> str:
    """Return the processor's name, or the architecture where the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@click.command()
@click.option("--rows", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--tokens",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="The student's tokens per row, about.",
)
@click.option("--student", default="smollm2-135m-instruct", show_default=True)
@click.option("--teacher", default="gemma-3-270m", show_default=True)
@click.option("--save/--no-save", default=True, show_default=True, help="Append to results/.")
def main(rows: int, tokens: int, student: str, teacher: str, save: bool) -> None:
    """Time Aligner on answers cut from the embedded texts."""
    torch.set_num_threads(1)
    tokenizers = [load_tokenizer(student), load_tokenizer(teacher)]
    sample = answers(1, 20_000)
    sample_ids = tokenizers[0](sample[0], add_special_tokens=False)["input_ids"]
    texts = answers(rows, round(tokens * len(sample[0]) / len(sample_ids)))
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers]
    tables = [TokenBytes.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    aligner = Aligner(*tables)
    tensors = []
    for side in ids:
        padded = np.full((rows, max(map(len, side))), -100)
        for row, row_ids in enumerate(side):
            padded[row, : len(row_ids)] = row_ids
        tensors.append(torch.from_numpy(padded))
    found = aligner.align(*tensors)

    def walk_all() -> list[walk.Row]:
        return [
            walk.align(tables[0], ours, tables[1], theirs)
            for ours, theirs in zip(*ids, strict=True)
        ]

    for row, expected in enumerate(walk_all()):
        ours = found.student_chunk_ids[row, : len(expected.student)].tolist()
        theirs = found.teacher_chunk_ids[row, : len(expected.teacher)].tolist()
        if (ours, theirs) != (expected.student, expected.teacher):
            raise click.ClickException(f"the aligner and the walk disagree in row {row}")
    align_s = median_seconds(lambda: aligner.align(*tensors))
    figures = {
        "tables_s": median_seconds(
            lambda: [TokenBytes.from_tokenizer(tokenizer) for tokenizer in tokenizers]
        ),
        "aligner_s": median_seconds(lambda: Aligner(*tables)),
        "align_tensors_s": align_s,
        "align_lists_s": median_seconds(lambda: aligner.align(*ids)),
        "walk_s": median_seconds(walk_all),
    }
    walk_s = figures["walk_s"]
    names = {
        "tables_s": "read both tables off the tokenizers (once)",
        "aligner_s": "build the aligner (once)",
        "align_tensors_s": f"align {rows} rows, tensors",
        "align_lists_s": f"align {rows} rows, lists",
        "walk_s": f"plain walk over {rows} rows",
    }
    once = ("tables_s", "aligner_s")
    table = [
        [names[key], f"{value * 1000:.1f}", "" if key in once else f"{walk_s / value:.1f}"]
        for key, value in figures.items()
    ]
    lengths = [sum(map(len, side)) / rows for side in ids]
    click.echo(f"{student} ({lengths[0]:.0f} tokens a row), {teacher} ({lengths[1]:.0f})")
    click.echo(f"{cpu_name()}, 1 thread, median of {REPEATS}")
    click.echo(tabulate(table, headers=["", "ms", "walk's time / this"], disable_numparse=True))
    click.echo(found.report())
    if save:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": cpu_name(),
            "threads": 1,
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
            },
            "student": student,
            "teacher": teacher,
            "rows": rows,
            "student_tokens": sum(map(len, ids[0])),
            "teacher_tokens": sum(map(len, ids[1])),
            **{key: round(value, 5) for key, value in figures.items()},
            "walk_over_align": round(walk_s / align_s, 1),
            "coverage": found.coverage,
            "one_to_one_share": round(found.one_to_one_share, 4),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        click.echo(f"appended a row to {RESULTS.parent.name}/{RESULTS.name}")


if __name__ == "__main__":
    main()
