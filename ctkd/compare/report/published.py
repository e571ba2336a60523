"""Numbers that papers printed, to stand beside a comparison's own.

A file holds one published table, as JSON: where it is from, and a flat list of its cells. The
numbers are other people's, from other models and settings: nothing here ranks or averages them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ctkd.errors import DataError

__all__ = ["PlacedCell", "PublishedCell", "PublishedTable", "beside", "read_published"]

_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCell:
    """One number of a published table.

    Args:
        method: Our name of the method where there is one ("sft", "seqkd", "uld", "teacher",
            "untrained student"), else the source's.
        label: What the source calls it, with what tells it from other rows of the same method.
        student: The trained model; None for a row about the teacher itself.
        teacher: The teacher of the setting that the cell belongs to, also for methods that do not
            ask it; None if the source names none.
        task: The data set or benchmark, in lower case: "fairytaleqa".
        metric: In lower case: "f1", "rouge_lsum".
        value: As printed, in the unit of the source.
    """

    method: str
    label: str
    student: str | None
    teacher: str | None
    task: str
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTable:
    """A published table and where it is from.

    Args:
        name: A short title; unique among tables that are read together.
        source: Title of the paper or page.
        arxiv: Its id there, or None.
        venue: Where it appeared, or None.
        table: Its number in the source, or None if that is not known.
        measured: What the numbers are, in words.
        seeds: Runs behind each number; None if the source does not say.
        note: What a reader must know before comparing; may be empty.
        cells: At least one.
    """

    name: str
    source: str
    arxiv: str | None
    venue: str | None
    table: str | None
    measured: str
    seeds: int | None
    note: str
    cells: tuple[PublishedCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedCell:
    """A cell together with the table that it stands in."""

    table: PublishedTable
    cell: PublishedCell


def read_published(path: Path | str) -> PublishedTable:
    """Read one published table.

    The file is a JSON object whose keys are the fields of `PublishedTable`, its "cells" a list of
    objects whose keys are those of `PublishedCell`. Every key must be there; null is None.

    Args:
        path: The file.

    Raises:
        DataError: If the file cannot be read, or something in it is not as described. The message
            names the cell, counted from 1.
    """
    path = Path(path)
    content = _keys(_load(path), PublishedTable, str(path))
    seeds = content["seeds"]
    if seeds is not None and (type(seeds) is not int or seeds < 1):
        raise DataError(f'{path}: expected "seeds" to be 1, 2, ... or null; got {_shown(seeds)}')
    if not isinstance(content["note"], str):
        raise DataError(f'{path}: expected "note" to be text; got {_shown(content["note"])}')
    rows = content["cells"]
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{path}: expected "cells" to be a list of objects; got {_shown(rows)}')
    cells = tuple(_cell(row, f"{path} cell {number}") for number, row in enumerate(rows, 1))
    _refuse_twins(cells, path)
    return PublishedTable(
        name=_text(content, "name", str(path)),
        source=_text(content, "source", str(path)),
        arxiv=_text_or_none(content, "arxiv", str(path)),
        venue=_text_or_none(content, "venue", str(path)),
        table=_text_or_none(content, "table", str(path)),
        measured=_text(content, "measured", str(path)),
        seeds=seeds,
        note=content["note"],
        cells=cells,
    )


def beside(
    tables: Iterable[PublishedTable], *, task_data: str, metric: str | None = None
) -> list[PlacedCell]:
    """Pick the cells about one data set, in the order of the tables.

    Args:
        tables: As `read_published` returns them.
        task_data: The data set, as in `PublishedCell.task`.
        metric: As in `PublishedCell.metric`; None for every metric.

    Returns:
        The cells with their tables; none if nothing was published about it.

    Example:
        >>> cell = PublishedCell(method="sft", label="SFT", student="OPT-350M",
        ...     teacher="LLaMA2-7B", task="fairytaleqa", metric="rouge_lsum", value=46.04)
        >>> table = PublishedTable(name="table 1", source="A paper", arxiv=None, venue=None,
        ...     table="1", measured="Rouge-LSum", seeds=None, note="", cells=(cell,))
        >>> [placed] = beside([table], task_data="fairytaleqa", metric="rouge_lsum")
        >>> placed.table.name, placed.cell.label, placed.cell.value
        ('table 1', 'SFT', 46.04)
        >>> beside([table], task_data="qed", metric="f1")
        []
    """
    return [
        PlacedCell(table=table, cell=cell)
        for table in tables
        for cell in table.cells
        if cell.task == task_data and metric in (None, cell.metric)
    ]


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "it cannot be opened"
        raise DataError(f"cannot read {path}: {reason}; expected a published table") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; expected a published table as JSON") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise DataError(f"{path} is not JSON that can be read: {error}") from error


def _keys(
    content: Any, kind: type[PublishedTable] | type[PublishedCell], where: str
) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object; got {_shown(content)}")
    wanted = [field.name for field in fields(kind)]
    missing = [key for key in wanted if key not in content]
    unknown = [key for key in content if key not in wanted]
    if missing or unknown:
        lacks = f"; missing: {_shown(missing)}" if missing else ""
        has = f"; unknown: {_shown(unknown)}" if unknown else ""
        raise DataError(f"{where}: expected the keys {', '.join(wanted)}{lacks}{has}")
    return content


def _cell(row: Any, where: str) -> PublishedCell:
    content = _keys(row, PublishedCell, where)
    return PublishedCell(
        method=_text(content, "method", where),
        label=_text(content, "label", where),
        student=_text_or_none(content, "student", where),
        teacher=_text_or_none(content, "teacher", where),
        task=_lower(content, "task", where),
        metric=_lower(content, "metric", where),
        value=_number(content, "value", where),
    )


def _refuse_twins(cells: tuple[PublishedCell, ...], path: Path) -> None:
    """A number typed twice is mostly a cell that was meant to be another."""
    seen: dict[tuple[str | None, ...], int] = {}
    for number, cell in enumerate(cells, 1):
        place = (cell.method, cell.label, cell.student, cell.teacher, cell.task, cell.metric)
        if place in seen:
            raise DataError(
                f"{path} cell {number}: expected one cell for each method, label, student, "
                f"teacher, task and metric; got the same as in cell {seen[place]}"
            )
        seen[place] = number


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content[key]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: expected "{key}" to be text; got {_shown(value)}')
    return value


def _text_or_none(content: Mapping[str, Any], key: str, where: str) -> str | None:
    value = content[key]
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise DataError(f'{where}: expected "{key}" to be text or null; got {_shown(value)}')
    return value


def _lower(content: Mapping[str, Any], key: str, where: str) -> str:
    value = _text(content, key, where)
    if value != value.lower() or value != value.strip():
        raise DataError(
            f'{where}: expected "{key}" in lower case, without white space around it; '
            f"got {_shown(value)}"
        )
    return value


def _number(content: Mapping[str, Any], key: str, where: str) -> float:
    value = content[key]
    if type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise DataError(f'{where}: expected "{key}" to be a finite number; got {_shown(value)}')


def _shown(value: object) -> str:
    """As JSON, on one line and short."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
