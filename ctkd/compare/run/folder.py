"""The folder of a comparison: what was begun there, and the records of its runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from ctkd.compare.plan.config import NOT_SHARED, TOP_K, CompareConfig
from ctkd.compare.records import Record
from ctkd.distill.teachers.cache import read_record
from ctkd.distill.training.output_folder import LOCK, alone, check_name, try_to_write
from ctkd.errors import CtkdError, DataError, OutputError
from ctkd.registry import source_fingerprint

__all__ = ["ROWS_FOLDER", "STATE", "ComparisonFolder", "append_record", "read_records"]

STATE = "comparison.json"
RESULTS = "results.jsonl"
ROWS_FOLDER = "data"

# They say how much is kept or shown, or where something lies, not what comes out.
_FREE = {"device", "save_steps", "logging_steps", "keep_checkpoints", "report_to"}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class ComparisonFolder:
    """A comparison's folder, held by one process at a time.

    ``comparison.json`` holds what was begun: the settings, and fingerprints of what they name.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record

    @classmethod
    @contextmanager
    def opened(cls, config: CompareConfig) -> Iterator[ComparisonFolder]:
        """Begin a comparison, or take up the one that is there.

        Raises:
            OutputError: If the folder holds something else, or a comparison with other settings; if
                another process works in it, or it cannot be written.
        """
        path = config.folder
        present = path.exists()
        record = _planned(config)
        try:
            check_name(path)
            _check_free(path)
            try_to_write(path)
            path.mkdir(parents=True, exist_ok=True)
        except OutputError:
            raise
        except OSError as error:
            # It may name a file that was only tried.
            error.filename = path
            raise _cannot_write(path, error) from error
        try:
            with alone(path):
                begun = (path / STATE).is_file()
                folder = cls(path, _taken_up(path, record) if begun else record)
                folder.write()
                try:
                    yield folder
                except CtkdError:
                    if not begun:
                        folder._forget()
                    raise
                except OSError as error:
                    # A full device can be met wherever runs write; anything else says more as it
                    # is.
                    if error.errno not in _FULL:
                        raise
                    raise _cannot_write(path, error) from error
        finally:
            if not present:
                with suppress(OSError):
                    path.rmdir()

    def dated(self, config: CompareConfig) -> CompareConfig:
        """The settings with the day that chat templates write: one for all runs."""
        cached = None if config.cache is None else read_record(Path(config.cache).expanduser())
        day = config.base.date or self.record.get("date") or (cached or {}).get("date")
        self.record["date"] = day or date.today().isoformat()
        self.write()
        return replace(config, common={**config.common, "date": self.record["date"]})

    @property
    def preparation(self) -> dict[str, float]:
        """Seconds of what was done before any run, by name."""
        seconds: dict[str, float] = self.record["preparation"]
        return seconds

    def spent(self, name: str, seconds: float, *, finished: bool) -> None:
        """Keep how long a preparation took.

        What was stopped adds up until it is finished. Later it is only looked up, which counts
        for nothing unless more had to be done than at first.

        Args:
            name: What was prepared.
            seconds: How long this attempt took.
            finished: Whether it came to its end.
        """
        before = self.preparation.get(name, 0.0)
        ended: list[str] = self.record.setdefault("prepared", [])
        total = max(before, seconds) if name in ended else before + seconds
        if finished and name not in ended:
            ended.append(name)
        self.preparation[name] = round(total, 1)
        self.write()

    def check_same(self, name: str, fingerprints: Mapping[str, str | None]) -> None:
        """Keep fingerprints, or refuse if they are others than when the comparison was begun.

        Raises:
            OutputError: If they are.
        """
        before = self.record.setdefault(name, dict(fingerprints))
        changed = [one for one in fingerprints if before.get(one) != fingerprints[one]]
        if changed or before.keys() != fingerprints.keys():
            what = ", ".join(changed or sorted({*before} ^ {*fingerprints}))
            raise OutputError(
                f"{self.path} was begun with other {name} ({what}); restore them, or choose "
                "another --output"
            )
        self.write()

    def keep(self, name: str, value: Any) -> None:
        """Add something to ``comparison.json``."""
        self.record[name] = value
        self.write()

    def write(self) -> None:
        """Write ``comparison.json`` at once or not at all.

        Raises:
            OutputError: If it cannot be written.
        """
        partial = self.path / f".{STATE}.partial"
        text = json.dumps(self.record, indent=2, ensure_ascii=False) + "\n"
        try:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(partial, self.path / STATE)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _forget(self) -> None:
        """Delete what was begun, if nothing was made: settings may be corrected then."""
        made_again = (STATE, LOCK, ROWS_FOLDER)
        if all(entry.name in made_again for entry in self.path.iterdir()):
            shutil.rmtree(self.path / ROWS_FOLDER, ignore_errors=True)
            (self.path / STATE).unlink()


def _check_free(path: Path) -> None:
    """Refuse a folder of something else, before anything in it is touched."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise OutputError(f"{place} is a file; choose a folder with --output")
    if not path.is_dir() or (path / STATE).is_file():
        return
    if any(entry.name not in (LOCK, f".{STATE}.partial") for entry in path.iterdir()):
        raise OutputError(
            f"{path} is not empty and holds no {STATE}, so it is no comparison; choose another "
            "--output"
        )


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to {error.filename or path}: {error.strerror or error}; make room, change "
        "the permissions, or choose another --output"
    )


def _planned(config: CompareConfig) -> dict[str, Any]:
    from ctkd import __version__

    settings = {
        **{name: value for name, value in config.base.as_dict().items() if name not in NOT_SHARED},
        **{name: getattr(config, name) for name in ("dev_data", "dev_fraction", "curve_points")},
        "live_teacher": config.is_live,
        "top_k": config.top_k or TOP_K,
        # A metric that chose settings is a setting of the result; else it is one more column.
        "metric": config.metric_name if config.sweep else None,
        "sweep": bool(config.sweep),
    }
    methods = {
        one.name: {"loss": one.loss, "settings": one.settings,
                   "sweep": {name: list(values) for name, values in one.grid.items()}}
        for one in config.methods
    }  # fmt: skip
    for one in config.methods:
        source = source_fingerprint(one.loss) if one.distils else None
        if source is not None:
            methods[one.name]["source"] = source
    return {
        "ctkd": __version__, "settings": settings, "methods": methods, "preparation": {}
    }  # fmt: skip


def _taken_up(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    try:
        before = json.loads((path / STATE).read_text(encoding="utf-8"))
        kept = {name: dict(before[name]) for name in ("settings", "methods", "preparation")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path / STATE} cannot be read ({error}); choose another --output"
        ) from error
    # As they are after a way through the file.
    wanted = json.loads(json.dumps(now))
    # Without a sweep no metric chooses anything.
    has_sweep = kept["settings"].get("sweep"), wanted["settings"]["sweep"]
    free = _FREE if len(set(has_sweep)) == 1 else _FREE | {"metric"}
    changes = _changes(kept["settings"], wanted["settings"], skip=free)
    for name in kept["methods"].keys() & wanted["methods"].keys():
        changes += _changes(kept["methods"][name], wanted["methods"][name], of=f" of {name}")
    if changes:
        raise OutputError(
            f"{path} was begun with other settings ({', '.join(changes)}); give the same ones to "
            "go on, or choose another --output. Losses and seeds may be added"
        )
    return {
        **before,
        "settings": wanted["settings"],
        "methods": {**kept["methods"], **wanted["methods"]},
    }


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, of: str = "", skip: set[str] | None = None
) -> list[str]:
    names = sorted({*before, *now} - (skip or set()))
    return [
        f"{name}{of} {before.get(name)!r} -> {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def append_record(folder: Path, record: Record) -> None:
    """Add a record to ``results.jsonl``, on disk before this returns.

    Raises:
        OutputError: If it cannot be written; what was there stays readable.
    """
    path = folder / RESULTS
    try:
        filled = path.exists() and path.stat().st_size > 0
        cut = filled and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            # A line that a kill cut short stays unreadable; it must not swallow this one.
            file.write(("\n" if cut else "") + record.as_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}; make room, or make it writable, "
            "then repeat the same command to go on"
        ) from error


def read_records(folder: Path) -> dict[str, Record]:
    """Read ``results.jsonl`` by key; a line that a kill cut short is left out.

    Raises:
        DataError: If the file cannot be read, or a whole line is not a record.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; make it readable, or choose another "
            "--output"
        ) from error
    records = {}
    # Bytes, as a kill may cut a line inside a character.
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            record = Record.from_json(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            # Cut short, or empty: what it was about is measured again.
            continue
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} line {number} is not a record of a comparison as it was written; remove "
                "the line, its run is then repeated"
            ) from error
        records[record.key] = record
    return records
