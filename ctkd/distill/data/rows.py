"""Rows from files, folders, the Hub or the embedded set.

A row is a mapping from column name to whatever the file holds; what the columns mean is the
business of `ctkd.distill.data.tasks`. JSON, JSON Lines and CSV are read here rather than by
`datasets`, which turns text into other things where it can: "1999-12-31" becomes a date, a CSV
answer "None" becomes nothing, and "1945" becomes 1945.0 where a cell of that column is empty.
Parquet files, folders written by `save_to_disk` and the Hub are read by `datasets`.
"""

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctkd.errors import DataError

__all__ = ["EMBEDDED", "Rows", "is_embedded", "load_rows"]

EMBEDDED: Mapping[str, tuple[str, ...]] = {"pocketqa": ("train", "test")}
"""The data sets that ship with ctkd, and their splits."""

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows in their order, with the name that error messages call them by.

    Args:
        name: A file name, a folder name or a Hub id.
        rows: A list of mappings, or a `datasets.Dataset`.

    Example:
        >>> rows = Rows("colors", [{"name": "red"}, {"name": "blue", "cold": "yes"}])
        >>> len(rows), rows.columns
        (2, ['name', 'cold'])
    """

    name: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in order of first appearance."""
        names = getattr(self.rows, "column_names", None)
        if names is not None:
            return list(names)
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)


def is_embedded(source: str) -> bool:
    """True if the name, which says no split, is that of an embedded set and of no file."""
    return source in EMBEDDED and not Path(source).exists()


def load_rows(source: str, *, split: str | None = None) -> Rows:
    """Read rows by path, by the name of an embedded set, or by Hub id.

    The forms of `source`:

    - a file: ``.json`` (a list of objects, or such a list under the key "data"), ``.jsonl``,
      ``.csv`` (with a header; every cell is text) or ``.parquet``;
    - a folder written by `datasets`' `save_to_disk`;
    - ``pocketqa``, the set that ships with ctkd, with the splits "train" and "test";
    - a Hub id such as ``squad`` or ``org/name``.

    What is on disk goes before what is embedded, and that before the Hub. ``SOURCE:SPLIT`` names
    the split as well, for sources that have splits.

    Args:
        source: What to read.
        split: The split, where the source has splits: "train" if neither this nor ``:SPLIT`` says
            otherwise.

    Raises:
        DataError: If nothing is there, it cannot be read, it has no such split, or it has no rows.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "facts.jsonl")
        ...     _ = path.write_text('{"prompt": "1 + 1 =", "answer": " 2"}')
        ...     list(load_rows(str(path)))
        [{'prompt': '1 + 1 =', 'answer': ' 2'}]
    """
    path = Path(source).expanduser()
    if split is None and ":" in source and not path.exists():
        source, _, split = source.rpartition(":")
        path = Path(source).expanduser()
    if path.is_file():
        if split is not None:
            raise DataError(f"{source} is one file and has no splits; leave out {split!r}")
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, split)
    elif source in EMBEDDED:
        rows = _read_embedded(source, split or "train")
    elif _looks_like_path(source):
        raise DataError(f"{source} does not exist{_near(path)}")
    else:
        rows = _read_hub(source, split or "train")
    if not len(rows):
        raise DataError(f"{rows.name} has no rows; expected at least one")
    return rows


def _read_file(path: Path) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{path} does not say what it holds; expected a file that ends in one of "
            f"{', '.join(_SUFFIXES)}"
        )
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".csv":
                return Rows(path.name, _csv_rows(path, file))
            text = file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return Rows(path.name, _json_rows(path, text))


def _csv_rows(path: Path, lines: Iterator[str]) -> list[dict[str, str]]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        twice = sorted(name for name, count in Counter(header).items() if count > 1)
        if twice:
            raise DataError(f"{path} has two columns named {twice[0]!r}; rename one")
        rows: list[dict[str, str]] = []
        for cells in reader:
            if not cells:  # an empty line
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path.name} row {len(rows) + 1} (line {reader.line_num}) has {len(cells)} "
                    f"cells, but the header has {len(header)}; quote cells that hold commas"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is not CSV: {error}") from error
    return rows


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object a line is common under this ending, too
                raise DataError(
                    f"{path} is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
                ) from error
        else:
            if isinstance(content, dict) and "data" in content:
                content = content["data"]
            elif isinstance(content, dict) and "\n" not in text.strip():
                content = [content]
            if not isinstance(content, list):
                raise DataError(
                    f"{path} holds {_kind(content)}; expected a list of objects, or an object "
                    'with such a list under "data"'
                )
            return [_object(path, row, number) for number, row in enumerate(content, 1)]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} line {number} is not JSON: {error.msg} (column {error.colno}); expected "
                "one object a line"
            ) from error
        rows.append(_object(path, row, len(rows) + 1))
    return rows


def _object(path: Path, row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path.name} row {number} is {_kind(row)}; expected an object")
    return row


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "empty" if value is None else "a number")


def _read_parquet(path: Path) -> Rows:
    import datasets

    try:
        with _quiet():
            table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(f"{path} cannot be read as Parquet: {_cause(error)}") from error
    return Rows(path.name, table)


def _read_folder(path: Path, split: str | None) -> Rows:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        way_out = f"name one of its files: {_some(files)}" if files else "name a data file"
        raise DataError(f"{path} is a folder that save_to_disk did not write; {way_out}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(f"{path} cannot be read as a saved data set: {_cause(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = split or "train"
        if split not in loaded:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(loaded)}")
        return Rows(f"{path.name}:{split}", loaded[split])
    if split is not None:
        raise DataError(f"{path} has no splits; leave out {split!r}")
    return Rows(path.name, loaded)


def _read_embedded(name: str, split: str) -> Rows:
    if split not in EMBEDDED[name]:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(EMBEDDED[name])}")
    path = Path(__file__).with_name(name) / f"{split}.jsonl"
    return Rows(f"{name}:{split}", _read_file(path).rows)


def _read_hub(source: str, split: str) -> Rows:
    near = difflib.get_close_matches(source, EMBEDDED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if not _HUB_ID.fullmatch(source):
        raise DataError(
            f"{source!r} is neither a file, nor a folder, nor an embedded set "
            f"({', '.join(EMBEDDED)}), nor a Hub id (NAME or ORG/NAME){hint}"
        )
    import datasets

    try:
        table = datasets.load_dataset(source, split=split)
    except Exception as error:  # the Hub's client and datasets raise many kinds
        raise DataError(
            f"{source} is no file or folder here, nor an embedded set ({', '.join(EMBEDDED)}), and "
            f"split {split!r} could not be loaded from the Hub: {_cause(error)}{hint}"
        ) from error
    return Rows(f"{source}:{split}", table)


def _looks_like_path(source: str) -> bool:
    return (
        Path(source).suffix.lower() in _SUFFIXES
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
    )


def _near(path: Path) -> str:
    """Say what there is in place of a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f", nor does the folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    data = [name for name in names if Path(name).suffix.lower() in _SUFFIXES]
    return f"; data files there: {_some(data)}" if data else f"; {folder} holds no data files"


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _cause(error: Exception) -> str:
    """The first line of an error, with its kind, without its full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets` for a while."""
    import datasets

    were_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
