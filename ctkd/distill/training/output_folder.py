"""The folder a run writes to, and the file in it that says how to repeat the run."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from ctkd.distill.printable import NO_TEXT, is_text
from ctkd.distill.processes import is_first
from ctkd.errors import OutputError

__all__ = ["FREE", "LOCK", "RECORD", "OutputFolder", "alone", "check_name", "try_to_write"]

RECORD = "ctkd.json"
LOCK = ".lock"
FREE = frozenset(
    ("output", "logging_steps", "save_steps", "keep_checkpoints", "report_to", "device")
    + ("push_to_hub", "hub_model_id", "hub_private")
)
"""Settings that may change on the way: they say how much is shown or kept, and where."""


class OutputFolder:
    """One run's folder.

    ``ctkd.json`` is written when the run starts and again whenever a stage ends, so that nothing
    already computed is lost.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record

    @staticmethod
    def check(
        path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool
    ) -> OutputFolder:
        """Do as `prepare`, but touch nothing.

        Raises:
            OutputError: As `prepare`.
        """
        record = _plan(path, settings, resume=resume, overwrite=overwrite)
        if (path / LOCK).exists():
            with alone(path):
                pass
        return OutputFolder(path, record)

    @classmethod
    def prepare(
        cls, path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool
    ) -> OutputFolder:
        """Make the folder, or take up the one that is there.

        Args:
            path: The folder.
            settings: Of the run, as they go into ``ctkd.json``.
            resume: Go on with the run of these settings that is there, if any.
            overwrite: Delete the run that is there.

        Raises:
            OutputError: If the folder holds something and neither was asked for, holds something
                other than a run, or a run with other settings; or if it cannot be written.
        """
        record = _plan(path, settings, resume=resume, overwrite=overwrite)
        with _as_output_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                _empty(path)
            folder = cls(path, record)
            folder.write()
        return folder

    @property
    def results(self) -> dict[str, Any]:
        """Results of the stages that have ended."""
        results: dict[str, Any] = self.record["results"]
        return results

    def keep(self, name: str, value: Any) -> None:
        """Add the result of a stage and write it to disk."""
        self.results[name] = value
        self.write()

    @staticmethod
    def record_of(path: Path) -> dict[str, Any]:
        """The record of the run in a folder; one without settings if it holds no run."""
        return _read(path / RECORD) if (path / RECORD).is_file() else {"settings": {}}

    @classmethod
    def relocate(cls, path: Path, places: Mapping[str, Any]) -> None:
        """Record that the inputs of a run lie elsewhere now.

        Args:
            path: The folder of the run.
            places: The settings that say so. The caller vouches that what lies there is the same.

        Raises:
            OutputError: If the folder's ``ctkd.json`` cannot be read or written.
        """
        record = _read(path / RECORD)
        settings = {**record["settings"], **places}
        if settings != record["settings"]:
            with _as_output_errors(path):
                cls(path, {**record, "settings": settings}).write()

    def write(self) -> None:
        """Write ``ctkd.json`` at once or not at all; of several processes the first one does."""
        if not is_first():
            return
        partial = self.path / f".{RECORD}.partial"
        # JSON has no numbers that are not finite.
        text = json.dumps(_finite(self.record), indent=2, ensure_ascii=False, allow_nan=False)
        # Of a name that is no text, the backslash form is JSON's escape.
        partial.write_text(text + "\n", "utf-8", errors="backslashreplace")
        os.replace(partial, self.path / RECORD)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out of it.

    Raises:
        OutputError: If another one is in it, or it cannot be written.
    """
    with _as_output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise OutputError(
                f"another process works in {path}; wait for it, or choose another --output"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (path / LOCK).unlink()
        lock.release()


def _plan(path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """The record to start from, if the folder can be used as asked."""
    if resume and overwrite:
        raise OutputError("--resume and --overwrite contradict each other; give one of them")
    check_name(path)
    record: dict[str, Any] = {"settings": settings, "results": {}}
    with _as_output_errors(path):
        for place in (path, *path.parents):
            if place.exists() and not place.is_dir():
                raise OutputError(f"{place} is a file; choose a folder with --output")
        # What was cut short while the first record was written is nothing.
        ours = (LOCK, f".{RECORD}.partial")
        present = path.is_dir() and any(entry.name not in ours for entry in path.iterdir())
        if not present:
            try_to_write(path)
            return record
        if not (path / RECORD).is_file():
            raise OutputError(
                f"{path} is not empty and holds no {RECORD}, so it is not a run of ctkd; choose "
                "another --output"
            )
        if not (resume or overwrite):
            raise OutputError(
                f"{path} exists already; go on with --resume, replace it with --overwrite, or "
                "choose another --output"
            )
        before = _read(path / RECORD)
        try_to_write(path)
        if resume:
            _check_same(path, before["settings"], settings)
            return {**before, "settings": settings}
    return record


def _empty(path: Path) -> None:
    """Delete what is in the folder, but not the folder, which may be a link or a mount."""
    # If this is cut short, what is left is still a run, but none that could be resumed.
    OutputFolder(path, {"settings": {}, "results": {}}).write()
    for entry in list(path.iterdir()):
        if entry.name in (RECORD, LOCK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def _as_output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}; choose another --output, or "
            "change its permissions"
        ) from error


def check_name(folder: Path) -> None:
    """Refuse a folder whose name tokenizers could not be saved under.

    Raises:
        OutputError: If its name is no text.
    """
    if not is_text(str(folder)):
        raise OutputError(f"cannot write to {folder}: {NO_TEXT}")


def try_to_write(folder: Path) -> None:
    """Make a file in the folder, or in the nearest above it that exists, and remove it.

    Raises:
        OSError: If that is impossible.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _finite(value: Any) -> Any:
    """A value with None in the place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [*map(_finite, value)] if isinstance(value, list | tuple) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}); restore it, or choose another folder"
        ) from error
    if not isinstance(record, dict) or not all(
        isinstance(record.get(part), dict) for part in ("settings", "results")
    ):
        raise OutputError(f"{path} was not written by ctkd; choose another folder")
    return record


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted({*before, *now} - FREE)
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in changed)
        raise OutputError(
            f"{path} was started with other settings ({shown}); give the same ones to resume, or "
            "use --overwrite or another --output"
        )
