"""Checkpoints of a run: each is there whole or not at all, and is checked before it is read."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ctkd.distill.processes import is_first, wait_for_all
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import OutputError

__all__ = ["MOST_KEPT", "Checkpoints", "RunTrainer"]

_LIST = "ctkd_checkpoint.json"
_PARTIAL = ".checkpoint.partial"
MOST_KEPT = 2
"""One that is whole should be left when the last one turns out to be damaged."""
_BLOCK = 1 << 22


class Checkpoints:
    """The checkpoints that a run has written into its folder; others there are never touched.

    Each lists its files with sizes and checksums. Where several processes train together, all write
    into a folder that the first one makes, moves and deletes.

    Args:
        folder: Of the run.
        say: Prints one line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write ``checkpoint-<step>`` into, which is moved out of it when it is whole.

        Raises:
            OutputError: If it cannot be written; the earlier ones are still there.
        """
        target = self._folder / f"checkpoint-{step}"
        with self._by_all(target) as partial:
            yield partial
            wait_for_all()
            if not is_first():
                return
            written = partial / target.name
            files = {
                str(file.relative_to(written)): _fingerprint(file)
                for file in sorted(written.rglob("*"))
                if file.is_file()
            }
            (written / _LIST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
            if _is_own(target):
                self._move_out(target)
            if os.path.lexists(target):
                self._say(f"warning: {target} is none of this run's, so step {step} is not kept")
            else:
                written.replace(target)
        self._delete(self._own()[:-MOST_KEPT])

    @contextmanager
    def writing_result(self) -> Iterator[Path]:
        """A folder to write files into, which are moved into the run's when all of them are whole.

        Raises:
            OutputError: If they cannot be written; the checkpoints are still there.
        """
        with self._by_all(self._folder) as partial:
            yield partial
            wait_for_all()
            if not is_first():
                return
            for file in [one for one in partial.rglob("*") if one.is_file()]:
                target = self._folder / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)

    @contextmanager
    def trying(self, target: Path) -> Iterator[Path]:
        """A folder to write into, which is deleted in the end.

        Args:
            target: What an error says could not be written.

        Raises:
            OutputError: If nothing can be written into it.
        """
        partial = self._folder / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
        except Exception as error:
            if not _is_about_writing(error):
                raise
            raise OutputError(
                f"cannot write {target}: {error}; make room or change the permissions, and go on "
                "with --resume"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _by_all(self, target: Path) -> Iterator[Path]:
        """What `trying` makes in the first process, when it is there, in all of them."""
        made = self.trying(target) if is_first() else nullcontext(self._folder / _PARTIAL)
        with made as partial:
            wait_for_all()
            yield partial

    def last(self) -> Path | None:
        """The last checkpoint that holds what was written; None if none was written.

        Raises:
            OutputError: If some were written, and all are damaged.
        """
        faults = []
        for path in reversed(self._own()):
            fault = _fault(path)
            if fault is None:
                return path
            faults.append(f"{path / fault} is not as it was written")
            self._say(f"warning: {faults[-1]}; the checkpoint before it is looked for")
        if faults:
            raise OutputError(
                f"{'; '.join(faults)}, and there is no other checkpoint; restore it, or start anew "
                "with --overwrite"
            )
        return None

    def remove(self) -> None:
        """Delete all that this run has written."""
        self._delete(self._own())

    def _delete(self, old: list[Path]) -> None:
        shutil.rmtree(self._folder / _PARTIAL, ignore_errors=True)
        for path in old:
            self._move_out(path)
        shutil.rmtree(self._folder / _PARTIAL, ignore_errors=True)

    def _move_out(self, path: Path) -> None:
        """Move a checkpoint where it is deleted, now or after a kill: a part of it is no one's."""
        (self._folder / _PARTIAL).mkdir(exist_ok=True)
        path.replace(self._folder / _PARTIAL / f"old-{path.name}")

    def _own(self) -> list[Path]:
        numbers = {
            int(path.name.removeprefix("checkpoint-")): path
            for path in self._folder.glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdecimal() and _is_own(path)
        }
        return [numbers[step] for step in sorted(numbers)]


class RunTrainer(CrossTokenizerTrainer):
    """The trainer of a run, which writes its checkpoints by way of `Checkpoints`."""

    checkpoints: Checkpoints
    _written_to: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._written_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights()
        with self.checkpoints.writing(self.state.global_step) as folder:
            self._written_to = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._written_to = None


def _is_own(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / _LIST).is_file()


def _fingerprint(file: Path) -> list[int]:
    """Size and checksum."""
    checksum = size = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]


def _fault(checkpoint: Path) -> str | None:
    """The name of a file that is not as it was written, None if there is none."""
    try:
        files = json.loads((checkpoint / _LIST).read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError, RecursionError):
        return _LIST
    for name, written in files:
        try:
            found = _fingerprint(checkpoint / name)
        except (OSError, ValueError):  # no file, or no name of one
            return str(name)
        if found != written:
            return str(name)
    return None


def _is_about_writing(error: Exception) -> bool:
    """True for a full disk and the like, however the library that wrote puts it."""
    if isinstance(error, RuntimeError):
        return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return isinstance(error, OSError | SafetensorError) and not isinstance(error, OutputError)
