"""The comparison that this project stands for: published losses on real data, on equal terms.

    python -m benchmarks.quality FOLDER

takes the files fairytaleqa_train.parquet and fairytaleqa_validation.parquet (columns story,
context, question, answers) of a folder, keeps rows with a short passage and a short first answer,
cuts a development split off the training stories, fine-tunes the teacher on the rest, and compares
losses between that teacher and a student: settings are chosen on the development split, and the
validation rows are looked at once.

It takes hours on a CPU. Stopped at any moment, the same command goes on where it was.
"""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from ctkd.cli.options import quieten, say
from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.plan.methods import parse_sweep
from ctkd.compare.report import tables
from ctkd.compare.report.published import PublishedTable, read_published
from ctkd.compare.report.report import as_json, terminal
from ctkd.compare.run.runner import Outcome, compare
from ctkd.distill.config import TrainConfig
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import examples, split_off
from ctkd.distill.training.run import Interrupted, train
from ctkd.errors import CtkdError, DataError

RESULTS = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent.parent / "baselines" / "published"
COLUMNS = {"group": "story"}
# Two trials each: both weights that are in use for the transport losses, the default and another
# for the rest.
SWEEP = {
    "sft": "learning_rate=5e-5,1e-4",
    "seqkd": "learning_rate=5e-5,1e-4",
    "uld": "kd_weight=0.15,1.5",
    "mined": "kd_weight=0.1,0.5",
    "multilevelot": "kd_weight=0.15,1.5",
    "multilevelot_released": "kd_weight=0.15,1.5",
    "alm": "kd_weight=10,100",
}


def read(path: Path, longest_context: int, longest_answer: int) -> list[dict[str, Any]]:
    """Rows whose context and first answer are shorter than so many characters."""
    table = load_rows(str(path))
    missing = {"story", "context", "question", "answers"} - set(table.columns)
    if missing:
        raise DataError(f"{path} has no column {', '.join(sorted(missing))}; give FairytaleQA")
    rows = [
        {
            "id": str(number),
            "story": row["story"],
            "context": row["context"],
            "question": row["question"],
            "answers": list(row["answers"]),
        }
        for number, row in enumerate(table)
        if len(row["context"]) < longest_context
        and row["answers"]
        and len(row["answers"][0]) < longest_answer
    ]
    if not rows:
        raise DataError(f"{path} has no row short enough; raise --longest-context")
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON Lines, if they are not there, and return the path as text."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    elif path.read_text(encoding="utf-8") != text:
        raise DataError(f"{path} holds other rows; choose another --output")
    stories = len({row["story"] for row in rows})
    say(f"{path.name}: {len(rows)} rows of {stories} stories")
    return str(path)


def splits(
    data: Path, output: Path, longest_context: int, longest_answer: int, dev_fraction: float
) -> dict[str, str]:
    """Write the training, development and test rows; return their paths."""
    rows = read(data / "fairytaleqa_train.parquet", longest_context, longest_answer)
    test = read(data / "fairytaleqa_validation.parquet", longest_context, longest_answer)
    everything = write(output / "all_train.jsonl", rows)
    _, held = split_off(examples(load_rows(everything), "qa", COLUMNS), dev_fraction, 0)
    of_dev = {example.id for example in held}
    return {
        "train": write(output / "train.jsonl", [row for row in rows if row["id"] not in of_dev]),
        "dev": write(output / "dev.jsonl", [row for row in rows if row["id"] in of_dev]),
        "test": write(output / "test.jsonl", test),
    }


def default_sweeps(methods: list[str]) -> list[str]:
    """What is tried for each method, as many values for one as for another."""
    unknown = [method for method in methods if method not in SWEEP]
    if unknown:
        raise DataError(f"no values to try are known for {unknown[0]}; give --sweep for all losses")
    return [f"{method}.{SWEEP[method]}" for method in methods]


def fine_tuned(
    base: str,
    paths: dict[str, str],
    output: Path,
    *,
    task: str = "qa",
    columns: Mapping[str, str] = COLUMNS,
) -> str:
    """Train the teacher on the task, on the rows that the students are trained on."""
    config = TrainConfig(
        loss="sft",
        student=base,
        data=paths["train"],
        eval_data=paths["dev"],
        task=task,
        columns=dict(columns),
        batch_size=8,
        save_steps=30,
        eval_limit=64,
        max_new_tokens=24,
        output=str(output),
    )
    return str(train(config, resume=True, say=say).path)


def without_places(value: Any) -> Any:
    """Leave of every path its last part alone: where it lay on a machine tells nobody anything."""
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    if isinstance(value, str) and "/" in value and Path(value).exists():
        return Path(value).name
    return value


def limits_of(config: CompareConfig, longest_context: int, longest_answer: int) -> list[str]:
    """What the tables of a comparison do and do not show, in sentences."""
    steps, rows = config.common["max_steps"], config.common["batch_size"]
    return [
        f"All methods start from one student, see the same rows in the same order for {steps} "
        f"steps of {rows} rows, and are measured alike; settings were chosen on a development "
        "split cut off the training stories, and the test rows were looked at once.",
        f"Rows are those with a passage under {longest_context} characters and a first answer "
        f"under {longest_answer}: the easier part of the data. Nothing is said about longer ones.",
        "One teacher, one student, one learning rate schedule: another pair of models, or training "
        "until nothing changes any more, may order the methods differently.",
        "Seeds change the order of the rows and nothing else, so the spread over seeds says "
        "little about other students or other data.",
        "Few values were tried of few settings; each method may have a better one.",
        "Seconds per step hold for what else the machine did at the time: they are no comparison "
        "of costs. `benchmarks/train_step.py` makes that.",
    ]


def keep(outcome: Outcome, name: str, published: list[PublishedTable], limits: list[str]) -> Path:
    """Keep the tables of a comparison, without the data's texts, as a page and a line of JSON."""
    comparison, analysis = outcome.comparison, outcome.analysis
    comparison = dataclasses.replace(comparison, settings=without_places(comparison.settings))
    found = [tables.results(comparison, analysis), tables.trials(comparison)]
    found += [tables.common_settings(comparison), tables.own_settings(comparison)]
    found += tables.published_numbers(published, comparison, analysis)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parts = [
        f"# {name}, {date[:10]}",
        f"{analysis.heading}. {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
        "\n".join(f"- {sentence}" for sentence in analysis.sentences()),
        "## What this shows, and what it does not",
        "\n".join(f"- {sentence}" for sentence in limits),
    ]
    for table in found:
        if table is not None:
            parts += [f"## {table.title}", table.markdown()]
    path = RESULTS / f"quality_{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    line = without_places({"date": date, "name": name, **as_json(comparison, analysis)})
    with (RESULTS / "quality.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--output", default="quality", show_default=True, help="Folder of the comparison.")
@click.option("--teacher", help="A teacher that knows the task. [--base, fine-tuned here]")
@click.option("--base", default="gemma-3-270m", show_default=True, help="What to fine-tune.")
@click.option("--student", default="smollm2-135m-instruct", show_default=True)
@click.option("--losses", default="sft,uld,mined,multilevelot", show_default=True)
@click.option("--sweep", "sweeps", multiple=True, help="As ctkd compare has it. [two values each]")
@click.option("--seeds", default=3, show_default=True)
@click.option("--max-steps", default=60, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--longest-context", default=650, show_default=True, help="In characters.")
@click.option("--longest-answer", default=60, show_default=True, help="In characters.")
@click.option("--dev-fraction", default=0.06, show_default=True)
@click.option("--teacher-cache", help="A cache of that teacher on these rows. [made here]")
@click.option("--keep", "name", help="Copy the tables to benchmarks/results under this name.")
def main(
    data: Path,
    output: str,
    teacher: str | None,
    base: str,
    student: str,
    losses: str,
    sweeps: tuple[str, ...],
    seeds: int,
    max_steps: int,
    batch_size: int,
    longest_context: int,
    longest_answer: int,
    dev_fraction: float,
    teacher_cache: str | None,
    name: str | None,
) -> None:
    """Compare losses on FairytaleQA, whose files lie in the folder DATA."""
    quieten()
    folder = Path(output)
    try:
        paths = splits(data, folder / "rows", longest_context, longest_answer, dev_fraction)
        if teacher is None:
            teacher = fine_tuned(base, paths, folder / "teacher-model")
        methods = [one.strip() for one in losses.split(",")]
        config = CompareConfig(
            losses=tuple(methods),
            seeds=seeds,
            sweep=dict(parse_sweep(text) for text in sweeps or default_sweeps(methods)),
            dev_data=paths["dev"],
            common={
                "student": student,
                "teacher": teacher,
                "data": paths["train"],
                "eval_data": paths["test"],
                "columns": COLUMNS,
                "max_steps": max_steps,
                "batch_size": batch_size,
                "eval_limit": 1_000_000,
                "max_new_tokens": 24,
                "save_steps": 20,
            },
            output=str(folder / "comparison"),
            cache=teacher_cache,
            curve_points=3,
            # At 256 the spread tail still moves uld by a tenth on free text.
            top_k=1024,
            published=(str(PUBLISHED / "multilevelot_table1.json"),),
            published_task="fairytaleqa",
        )
        outcome = compare(config, say=say)
    except Interrupted as error:
        stopped = str(error).split(";")[0]
        raise click.ClickException(f"{stopped}; repeat the same command to go on") from error
    except CtkdError as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    click.echo(terminal(outcome.comparison, outcome.analysis))
    click.echo(f"report: {outcome.report_path}")
    if name is not None:
        tables_of_papers = [read_published(path) for path in config.published]
        limits = limits_of(config, longest_context, longest_answer)
        click.echo(f"kept: {keep(outcome, name, tables_of_papers, limits)}")


if __name__ == "__main__":
    main()
