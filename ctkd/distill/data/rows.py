"""Rows from files, folders, the Hub or the embedded set.

A row is a mapping from column name to whatever the file holds; what the columns mean is the
business of `ctkd.distill.data.tasks`. JSON, JSON Lines, CSV and TSV are read here rather than by
`datasets`, which turns text into other things where it can: "1999-12-31" becomes a date, a CSV
answer "None" becomes nothing, and "1945" becomes 1945.0 where a cell of that column is empty.
Folders written by `save_to_disk` and the Hub are read by `datasets`. A stream of rows is read by
the same functions, so that a row is the same in it.
"""

import csv
import difflib
import glob
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ctkd.distill.data.pydocs import PYDOCS, read_pydocs
from ctkd.errors import DataError

__all__ = [
    "EMBEDDED",
    "NothingLeft",
    "RowStream",
    "Rows",
    "Source",
    "is_embedded",
    "joined",
    "kind_of",
    "load_parts",
    "load_rows",
    "names_of",
    "paths_of",
    "stream_parts",
]

Source = str | Sequence[str]
"""What to read rows from: one place, or several in their order."""

EMBEDDED: Mapping[str, tuple[str, ...]] = {"pocketqa": ("train", "test"), "pydocs": tuple(PYDOCS)}
"""The data sets that ship with ctkd or with Python, and their splits."""

_TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_SUFFIXES = (*_TEXTS, *(f"{suffix}.gz" for suffix in _TEXTS), ".parquet")
_HELD_OUT = ("test", "validation", "dev", "eval")
_WITH_SPLIT = re.compile(r"(.+):([^:\[\]]+(?:\[[^\]]*\])?)", re.DOTALL)
_HUB_ID = re.compile(
    r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?(:(?P<name>[\w.-]+))?"
)
# A C long is no longer than this on some systems.
_LONGEST_CELL = 2**31 - 1
# Rows of Parquet that are decoded together.
_DECODED = 256


class NothingLeft(DataError):
    """All rows that were read together were left out, each for a reason that concerns it alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows in their order, with the name that error messages call them by.

    Args:
        name: A file name, a folder name or a Hub id.
        rows: A list of mappings, or a `datasets.Dataset`.
        places: What error messages call each row, where name and number do not say it.
        all_text: Whether every value is text because the file knows nothing else.

    Example:
        >>> rows = Rows("colors", [{"name": "red"}, {"name": "blue", "cold": "yes"}])
        >>> len(rows), rows.columns, rows.place(2)
        (2, ['name', 'cold'], 'colors row 2')
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str] = ()
    all_text: bool = False

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in order of first appearance."""
        names = getattr(self.rows, "column_names", None)
        if names is not None:
            return list(names)
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def place(self, number: int) -> str:
        """The name of a row in error messages, counted from 1."""
        return self.places[number - 1] if self.places else f"{self.name} row {number}"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class RowStream:
    """Rows of one file, folder or split that are read as they are needed, as often as they are.

    Args:
        name: As that of `Rows`.
        read: Begins to read them.
        all_text: As that of `Rows`.

    Example:
        >>> stream = RowStream("colors", lambda: iter([{"name": "red"}, {"name": "blue"}]))
        >>> [(rows.place(1), list(rows)) for rows in stream.blocks(1)]
        [('colors row 1', [{'name': 'red'}]), ('colors row 2', [{'name': 'blue'}])]
    """

    name: str
    read: Callable[[], Iterator[Mapping[str, Any]]]
    all_text: bool = False

    def blocks(self, size: int) -> Iterator[Rows]:
        """Read all of them, so many at a time."""
        rows, read = self.read(), 0
        while block := list(itertools.islice(rows, size)):
            places = [f"{self.name} row {read + number}" for number in range(1, len(block) + 1)]
            read += len(block)
            yield Rows(self.name, block, places, self.all_text)


def is_embedded(source: Source) -> bool:
    """True if the name, which says no split, is that of an embedded set and of no file."""
    return isinstance(source, str) and source in EMBEDDED and not Path(source).exists()


def names_of(source: Source) -> str:
    """The places of a source as one text.

    Example:
        >>> names_of("rows.jsonl"), names_of(["a.jsonl", "b.jsonl"])
        ('rows.jsonl', 'a.jsonl, b.jsonl')
    """
    return source if isinstance(source, str) else ", ".join(source)


def paths_of(source: Source | None) -> list[Path]:
    """The files and folders on disk that a source names."""
    if source is None:
        return []
    if not isinstance(source, str):
        return [path for one in source for path in paths_of(one)]
    with_split = _WITH_SPLIT.fullmatch(source)
    for one in (source, with_split[1]) if with_split else (source,):
        path = Path(one).expanduser()
        found = [path] if path.exists() else [Path(name) for name in glob.glob(str(path))]
        if found:
            return found
    return []


def load_rows(source: Source, *, split: str | None = None, held_out: bool = False) -> Rows:
    """Read rows by path, by the name of an embedded set, or by Hub id.

    The forms of `source`:

    - a file: ``.json`` (a list of objects, or such a list under the key "data"), ``.jsonl``,
      ``.csv`` or ``.tsv`` (with a header; every cell is text), ``.txt`` (one document, in the
      column "text"), each also as ``.gz``, or ``.parquet``;
    - a pattern such as ``part-*.jsonl``: all files that match, sorted by name;
    - a stream such as ``/dev/stdin``, of JSON or JSON Lines, which is read once;
    - a folder written by `datasets`' `save_to_disk`;
    - ``pocketqa``, questions on short passages, which ship with ctkd, and ``pydocs``, chapters of
      the reference that ships with Python, each with the splits "train" and "test";
    - a Hub id such as ``squad`` or ``org/name``, with ``@REVISION`` behind where one is meant;
    - several of these, whose rows follow each other.

    A name is looked for on disk, then among the embedded sets, then on the Hub. ``SOURCE:SPLIT``
    names the split as well, for sources that have splits; ``HUB-ID:CONFIGURATION:SPLIT`` the
    configuration, too.

    Args:
        source: What to read.
        split: The split, where the source has splits and says none itself. By default "train".
        held_out: Whether the default split is instead the first of "test", "validation", "dev" and
            "eval" that the source has.

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
    return joined(load_parts(source, split=split, held_out=held_out))


def load_parts(source: Source, *, split: str | None = None, held_out: bool = False) -> list[Rows]:
    """As `load_rows`, with the rows of each file by themselves."""
    parts = []
    for place, named in _places(source, split):
        rows = _read(place, named, held_out)
        if not len(rows):
            raise DataError(f"{rows.name} has no rows; expected at least one")
        parts.append(rows)
    return parts


def stream_parts(source: Source) -> list[RowStream]:
    """As `load_parts`, with rows that are read when they are asked for, never all at once.

    Embedded sets, which are small, are held. A folder of `save_to_disk` is mapped into memory.

    Raises:
        DataError: As `load_rows` does, as far as it is seen without reading; if a file can only be
            read as a whole, as JSON is, or only once. Other errors come while rows are read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "facts.jsonl")
        ...     _ = path.write_text('{"prompt": "1 + 1 =", "answer": " 2"}')
        ...     (stream,) = stream_parts(str(path))
        ...     [list(rows) for rows in stream.blocks(256)]
        [[{'prompt': '1 + 1 =', 'answer': ' 2'}]]
    """
    return [_stream(place, named) for place, named in _places(source, None)]


def _places(source: Source, split: str | None) -> Iterator[tuple[Path | str, str | None]]:
    """The files and folders that a source means, or names of other sets, each with its split."""
    if not isinstance(source, str):
        for one in source:
            yield from _places(one, split)
        return
    if not source.strip():
        raise DataError("the name of the data is empty; name a file, a folder or a hub id")
    path = Path(source).expanduser()
    with_split = _WITH_SPLIT.fullmatch(source)
    if split is None and with_split and not path.exists():
        source, split = with_split.groups()
        path = Path(source).expanduser()
    if path.is_dir():
        yield path, split
    elif path.exists():
        if split is not None:
            raise DataError(f"{source} is one file and has no splits; leave out {split!r}")
        yield path, None
    elif source in EMBEDDED:
        yield source, split
    elif glob.has_magic(source):
        found = sorted(glob.glob(str(path)))
        if not found:
            raise DataError(f"no file matches the pattern {source}; expected at least one")
        for one in found:
            yield from _places(one, split)
    elif _looks_like_path(source):
        raise DataError(f"{source} does not exist{_near(path)}")
    else:
        yield source, split


def _read(place: Path | str, split: str | None, held_out: bool) -> Rows:
    if isinstance(place, Path):
        return _read_folder(place, split, held_out) if place.is_dir() else _read_file(place)
    if place in EMBEDDED:
        return _read_embedded(place, split or ("test" if held_out else "train"))
    return _read_hub(place, split, held_out)


def _stream(place: Path | str, split: str | None) -> RowStream:
    if isinstance(place, Path) and not place.is_dir():
        return _stream_file(place)
    if isinstance(place, Path) or place in EMBEDDED:
        rows = _read(place, split, held_out=False)
    else:
        rows = _read_hub(place, split, held_out=False, streaming=True)

    def read() -> Iterator[Mapping[str, Any]]:
        try:
            yield from rows
        except Exception as error:  # the Hub's client and datasets raise many kinds
            raise DataError(f"{rows.name} cannot be read any further: {_cause(error)}") from error

    return RowStream(rows.name, read)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several files as one, each still called by its own file and number.

    Example:
        >>> parts = [Rows("a", [{"name": "red"}]), Rows("b", [{"name": "blue"}])]
        >>> rows = joined(parts)
        >>> rows.name, rows.place(2)
        ('a, b', 'b row 1')
    """
    if len(parts) == 1:
        return parts[0]
    return Rows(
        _some([part.name for part in parts]),
        [row for part in parts for row in part],
        [part.place(number) for part in parts for number in range(1, len(part) + 1)],
    )


def _read_file(path: Path) -> Rows:
    suffix = _suffix_of_rows(path)
    if suffix == ".parquet":
        return Rows(path.name, list(_parquet_rows(path)))
    delimiter = _delimiter(suffix)
    if delimiter is not None:
        return Rows(path.name, list(_csv_rows(path, delimiter)), all_text=True)
    if suffix.startswith(".txt"):
        return Rows(path.name, list(_document(path)))
    with _reading(path) as file:
        text = file.read()
    return Rows(path.name, _json_rows(path, text, in_lines=suffix.startswith(".jsonl")))


def _document(path: Path) -> Iterator[dict[str, str]]:
    """The only row of a file of plain text; none of an empty file."""
    with _reading(path) as file:
        if text := file.read():
            yield {"text": text}


def _stream_file(path: Path) -> RowStream:
    suffix = _suffix_of_rows(path)
    if _is_read_once(path):
        raise DataError(
            f"{path} can be read only once, so it cannot be streamed; save it as a file first"
        )
    if suffix == ".parquet":
        return RowStream(path.name, lambda: _parquet_rows(path))
    delimiter = _delimiter(suffix)
    if delimiter is not None:
        return RowStream(path.name, lambda: _csv_rows(path, delimiter), all_text=True)
    if suffix.startswith(".txt"):
        return RowStream(path.name, lambda: _document(path))
    if not suffix.startswith(".jsonl"):
        raise DataError(
            f"{path} is JSON, which is read as a whole, so it cannot be streamed; write one object "
            "a line, as .jsonl"
        )

    def lines() -> Iterator[Mapping[str, Any]]:
        with _reading(path, newline="\n") as file:
            yield from _json_lines(path, file)

    return RowStream(path.name, lines)


def _suffix_of_rows(path: Path) -> str:
    """The end of a file's name, if it is one that is read."""
    suffix = _suffix(path)
    if suffix not in _SUFFIXES and not _is_read_once(path):
        raise DataError(
            f"{path} does not say what it holds; expected a file that ends in one of "
            f"{', '.join(_SUFFIXES)}"
        )
    return suffix


def _is_read_once(path: Path) -> bool:
    return not path.is_file() or path.parts[:2] == ("/", "dev")


def _delimiter(suffix: str) -> str | None:
    return "," if suffix.startswith(".csv") else "\t" if suffix.startswith(".tsv") else None


@contextmanager
def _reading(path: Path, newline: str = "") -> Iterator[IO[str]]:
    try:
        with _opened(path, newline) as file:
            yield file
    except UnicodeDecodeError as error:
        # Of a file the decoder tells a place in its buffer alone; a stream was read at once.
        where = f"byte {error.start}" if _is_read_once(path) else f"line {_broken_line(path)}"
        raise DataError(f"{path} is not UTF-8 text ({where}); convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {cause}") from error


def _broken_line(path: Path) -> int:
    """The first line that is not UTF-8."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _opened(path: Path, newline: str) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _suffix(path: Path) -> str:
    """The end of a name that says what a file holds, in lower case."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    with _reading(path) as file:
        lines = _csv_lines(path, file, delimiter)
        _, header = next(lines, (0, []))
        twice = sorted(name for name, count in Counter(header).items() if count > 1)
        if twice:
            raise DataError(f"{path} has two columns named {twice[0]!r}; rename one")
        for number, (line, cells) in enumerate(lines, 1):
            if len(cells) != len(header):
                between = "tabs" if delimiter == "\t" else "commas"
                raise DataError(
                    f"{path.name} row {number} (line {line}) has {len(cells)} cells, but the "
                    f"header has {len(header)}; quote cells that hold {between}"
                )
            yield dict(zip(header, cells, strict=True))


def _csv_lines(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not empty, with the number of the line they end in."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            kind = "TSV" if delimiter == "\t" else "CSV"
            raise DataError(f"{path} line {reader.line_num} is not {kind}: {error}") from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if cells:
            yield reader.line_num, cells


def _json_rows(path: Path, text: str, *, in_lines: bool) -> list[dict[str, Any]]:
    if not in_lines and text.strip():
        try:
            content = _parsed(str(path), text)
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
                    f"{path} holds {kind_of(content)}; expected a list of objects, or an object "
                    'with such a list under "data"'
                )
            return [_object(path, row, number) for number, row in enumerate(content, 1)]
    return list(_json_lines(path, text.split("\n")))


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    read = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parsed(f"{path} line {number}", line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} line {number} is not JSON: {error.msg} (column {error.colno}); expected "
                "one object a line"
            ) from error
        read += 1
        yield _object(path, row, read)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise DataError(f"{where} is nested too deep; expected objects of plain values") from None
    except ValueError as error:
        raise DataError(f"{where} holds a number that is too long; write it as text") from error


def _object(path: Path, row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path.name} row {number} is {kind_of(row)}; expected an object")
    return row


def kind_of(value: object) -> str:
    """The JSON name of a value's kind.

    Example:
        >>> kind_of([1]), kind_of(None)
        ('a list', 'empty')
    """
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "empty" if value is None else "a number")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    # What `datasets` reads Parquet with; `datasets` itself would first copy the file to its cache.
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_DECODED):
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        raise DataError(f"{path} cannot be read as Parquet: {_cause(error)}") from error


def _read_folder(path: Path, split: str | None, held_out: bool) -> Rows:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(file.name for file in path.iterdir() if _suffix(file) in _SUFFIXES)
        way_out = f"name one of its files: {_some(files)}" if files else "name a data file"
        raise DataError(f"{path} is a folder that save_to_disk did not write; {way_out}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(f"{path} cannot be read as a saved data set: {_cause(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose(str(path), loaded, split, held_out)
        return Rows(f"{path.name}:{chosen}", loaded[chosen])
    if split is not None:
        raise DataError(f"{path} has no splits; leave out {split!r}")
    return Rows(path.name, loaded)


def _choose(source: str, splits: Iterable[str], split: str | None, held_out: bool) -> str:
    """The split that is meant: the one named, the only one, or the usual one for this use."""
    there = list(splits)
    if split is None and len(there) == 1:
        return there[0]
    wanted = (split,) if split is not None else _HELD_OUT if held_out else ("train",)
    chosen = next((name for name in wanted if name in there), None)
    if chosen is None:
        raise DataError(
            f"{source} has no split {' or '.join(map(repr, wanted))}; it has {', '.join(there)}; "
            f"name one of them as {source}:SPLIT"
        )
    return chosen


def _read_embedded(name: str, split: str) -> Rows:
    if split not in EMBEDDED[name]:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(EMBEDDED[name])}")
    if name == "pydocs":
        return Rows(f"{name}:{split}", read_pydocs(split))
    path = Path(__file__).with_name(name) / f"{split}.jsonl"
    return Rows(f"{name}:{split}", _read_file(path).rows)


def _read_hub(source: str, split: str | None, held_out: bool, *, streaming: bool = False) -> Rows:
    near = difflib.get_close_matches(source, EMBEDDED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    parts = _HUB_ID.fullmatch(source)
    if parts is None:
        raise DataError(
            f"{source!r} is neither a file, nor a folder, nor an embedded set "
            f"({', '.join(EMBEDDED)}), nor a Hub id (NAME or ORG/NAME){hint}"
        )
    import datasets

    if split is None and not held_out:
        split = "train"
    options: dict[str, Any] = {"split": split, **({"streaming": True} if streaming else {})}
    options.update({name: value for name, value in parts.groupdict().items() if value is not None})
    try:
        loaded = datasets.load_dataset(**options)
    except Exception as error:  # the Hub's client and datasets raise many kinds
        what = "its splits" if split is None else f"split {split!r}"
        raise DataError(
            f"{source} is no file or folder here, nor an embedded set ({', '.join(EMBEDDED)}), and "
            f"{what} could not be loaded from the Hub: {_cause(error)}{hint}"
        ) from error
    if split is None:
        split = _choose(source, loaded, None, held_out)
        loaded = loaded[split]
    return Rows(f"{source}:{split}", loaded)


def _looks_like_path(source: str) -> bool:
    return (
        _suffix(Path(source)) in _SUFFIXES
        or source.endswith(".gz")
        or source.startswith((".", "/", "~"))
        or source.partition("@")[0].count("/") > 1
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
    data = [name for name in names if _suffix(Path(name)) in _SUFFIXES]
    return f"; data files there: {_some(data)}" if data else f"; {folder} holds no data files"


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _cause(error: Exception) -> str:
    """An error in one line, with its kind, without its full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
