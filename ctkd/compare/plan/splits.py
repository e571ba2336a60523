"""The rows of a comparison, written down once, so that every run reads the same ones.

Only rows that both sides can read are kept: a method without a teacher would otherwise be trained
on rows, and in an order, that a method with one never sees.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctkd.compare.plan.config import CompareConfig
from ctkd.distill.config import TrainConfig
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.rows import Source, is_embedded, load_rows
from ctkd.distill.data.tasks import Example, examples, get_task, split_off
from ctkd.distill.preparing import HELD_OUT_FRACTION, Forms, Models, encode
from ctkd.errors import DataError, OutputError

__all__ = ["COLUMNS", "CURVE_ROWS", "CutRows", "Split", "Splits", "cut_rows", "prepare_splits"]

CURVE_ROWS = 32
COLUMNS = {"id": "id", "group": "group", "ends": "ends"}
"""Columns of the files written here that a run has to map."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows in a file.

    Args:
        name: Of the split.
        path: The file, JSON Lines with ``id``, ``group``, ``ends`` and the fields of the task.
        examples: What the file holds.
        fingerprint: SHA-256 of the file.
        cut: What it was cut to, "first 200 of 5,000"; None where all rows were taken.
    """

    name: str
    path: Path
    examples: tuple[Example, ...]
    fingerprint: str
    cut: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """All rows of a comparison.

    Args:
        train: What every run is trained on.
        dev: What settings are chosen on; None without a sweep.
        test: What is reported.
        curve: The first rows of the development split, of the test split if there is none, at most
            `CURVE_ROWS`: held-out cross-entropy while training is averaged over them.
        held_out: Held-out rows of the teacher cache: those of the test split and the curve.
        shared: What two of the splits have in common; empty if nothing.
    """

    train: Split
    dev: Split | None
    test: Split
    curve: Split
    held_out: Split
    shared: str = ""

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each split by name."""
        splits = (self.train, self.dev, self.test, self.curve)
        return {one.name: one.fingerprint for one in splits if one is not None}


@dataclass(frozen=True, slots=True)
class _Row:
    example: Example
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CutRows:
    """Rows of each split, whether models can read them or not.

    Args:
        train, dev, test: The rows; no development split without a sweep.
        cuts: What the latter two were cut to, where not all of their rows were taken.
    """

    train: list[_Row]
    dev: list[_Row] | None
    test: list[_Row]
    cuts: dict[str, str]


def prepare_splits(
    config: CompareConfig, cut: CutRows, models: Models, folder: Path, say: Say
) -> Splits:
    """Filter the rows and write them down.

    Args:
        config: The comparison.
        cut: Its rows.
        models: Tokenizers of both sides, and the student.
        folder: Where the files go; those that are there must hold the same rows.
        say: Prints one line of progress.

    Raises:
        DataError: If no row is left in a split.
        OutputError: If the folder holds other rows already, or cannot be written.
    """
    train, dev, test, cuts = cut.train, cut.dev, cut.test, cut.cuts
    train, forms = _readable_training(config.teacher_base, models, train, say)
    if dev is not None:
        dev = _readable(config.teacher_base, models, dev, forms, "held-out", say)
    test = _readable(config.teacher_base, models, test, forms, "held-out", say)
    shared = _overlap({"training": train, "development": dev or [], "test": test})
    if shared:
        say(f"warning: {shared}; what is measured there may be remembered")
    curve = (dev or test)[:CURVE_ROWS]
    task = config.base.task
    splits = Splits(
        train=_write("train", train, folder, task),
        dev=_write("dev", dev, folder, task, cuts.get("dev")) if dev else None,
        test=_write("test", test, folder, task, cuts.get("test")),
        curve=_write("curve", curve, folder, task),
        held_out=_write("held-out", [*curve, *test] if dev else test, folder, task),
        shared=shared,
    )
    say(
        f"{len(train)} training examples, {f'{len(dev)} for development, ' if dev else ''}"
        f"{len(test)} for the test"
    )
    return splits


def cut_rows(config: CompareConfig, say: Say) -> CutRows:
    """Read training, development (with a sweep only) and test rows, no passage on two sides.

    Raises:
        DataError: If data cannot be used.
    """
    base = config.base
    train = _load(base.data, base, say)
    held_out = base.eval_data or (base.data if is_embedded(base.data) else None)
    if held_out is None:
        train, test = _split_off(train, HELD_OUT_FRACTION, base.seed)
        say(f"no evaluation data given: cut off {len(test)} of the training examples as test split")
    else:
        test = _load(held_out, base, say, held_out=True)
    dev = None
    if config.dev_data is not None:
        dev = _load(config.dev_data, base, say)
    elif config.sweep:
        train, dev = _split_off(train, config.dev_fraction, base.seed)
        say(f"cut off {len(dev)} of the training examples to choose settings on")
    limit = base.eval_limit
    cuts = {}
    for name, title, rows in (("dev", "development", dev or []), ("test", "test", test)):
        if len(rows) > limit:
            cuts[name] = f"first {limit:,} of {len(rows):,}"
            say(f"{title} split: the {cuts[name]} examples (--eval-limit)")
    return CutRows(train, None if dev is None else dev[:limit], test[:limit], cuts)


def _load(source: Source, base: TrainConfig, say: Say, *, held_out: bool = False) -> list[_Row]:
    rows = read_rows(source, base.task, base.columns, say=say, held_out=held_out)
    parsed = examples(rows, base.task, base.columns)
    task = get_task(base.task)
    if task.window:
        # Each part of a document is a row of its own.
        return [_Row(example, {task.target: example.answer}) for example in parsed]
    return [
        _Row(example, _fields(base, row, example))
        for row, example in zip(rows, parsed, strict=True)
    ]


def _fields(base: TrainConfig, row: Mapping[str, Any], example: Example) -> dict[str, Any]:
    """The fields of the task that the example's prompt was made from, and its references."""
    task = get_task(base.task)
    if task.is_chat:
        return {task.target: [message.as_dict() for message in example.messages]}
    for needed, body in task.bodies.items():
        values = {field: row.get(base.columns.get(field, field)) for field in needed}
        texts = all(isinstance(value, str) for value in values.values())
        if texts and body.format_map(values) == example.prompt:
            return {**values, task.target: list(example.references)}
    raise DataError(f"{example.where}: its prompt cannot be told from its columns")


def _split_off(rows: list[_Row], fraction: float, seed: int) -> tuple[list[_Row], list[_Row]]:
    kept, held = split_off([row.example for row in rows], fraction, seed)
    by_id = {row.example.id: row for row in rows}
    return [by_id[one.id] for one in kept], [by_id[one.id] for one in held]


def _readable_training(
    teacher_base: TrainConfig, models: Models, rows: list[_Row], say: Say
) -> tuple[list[_Row], Forms]:
    while True:
        forms = Forms.of(teacher_base, [row.example for row in rows])
        kept = _readable(teacher_base, models, rows, forms, "training", say)
        # A row that is left out may have been a shot, and other shots leave other room.
        if len(kept) == len(rows) or not teacher_base.teacher_shots:
            return kept, forms
        rows = kept


def _readable(
    teacher_base: TrainConfig, models: Models, rows: list[_Row], forms: Forms, what: str, say: Say
) -> list[_Row]:
    encoded = encode(teacher_base, models, [row.example for row in rows], forms, what, say)
    kept = {row.id for row in encoded.rows}
    readable = [row for row in rows if row.example.id in kept]
    if not readable:
        raise DataError(f"no {what} row is left; raise max_length, or give other data")
    return readable


def _overlap(splits: Mapping[str, Sequence[_Row]]) -> str:
    groups = {name: {row.example.group for row in rows} for name, rows in splits.items()}
    found = []
    for first, second in (("training", "test"), ("training", "development"),
                          ("development", "test")):  # fmt: skip
        shared = len(groups[first] & groups[second])
        if shared:
            found.append(
                f"{shared} {'text is' if shared == 1 else 'texts are'} in the {first} split and in "
                f"the {second} split"
            )
    return ", ".join(found)


def _write(
    name: str, rows: Sequence[_Row], folder: Path, task: str, cut: str | None = None
) -> Split:
    path = folder / f"{name}.jsonl"
    # These are rows of two sources, whose ids need not differ.
    ids = name != "held-out"
    text = "".join(
        json.dumps(
            {
                "id": row.example.id if ids else str(number),
                "group": row.example.group,
                "ends": row.example.ends,
                **row.fields,
            },
            ensure_ascii=False,
        )
        + "\n"
        for number, row in enumerate(rows)
    )
    content = text.encode(errors="backslashreplace")
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            os.replace(partial, path)
        elif path.read_bytes() != content:
            raise OutputError(
                f"the {name} rows in {path} are others than those of the data now; the comparison "
                "was begun with them: restore the data, or choose another --output"
            )
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another --output"
        ) from error
    return Split(
        name=name,
        path=path,
        examples=tuple(examples(load_rows(str(path)), task, COLUMNS)),
        fingerprint=hashlib.sha256(content).hexdigest(),
        cut=cut,
    )
