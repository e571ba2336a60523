"""The folder in which ctkd keeps what it fetched or converted, and how it is filled safely.

Nothing half done is ever left under a final name: a folder is built beside its place and
renamed. Two processes that want the same folder take turns.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from ctkd.errors import ModelError

__all__ = ["building", "cache_dir", "locked", "say"]


def cache_dir() -> Path:
    """Return the cache folder; it need not exist yet.

    `$CTKD_CACHE` if set, else `$XDG_CACHE_HOME/ctkd`, else `~/.cache/ctkd`.

    Example:
        >>> import os
        >>> os.environ["CTKD_CACHE"] = "/data/ctkd"
        >>> cache_dir().as_posix()
        '/data/ctkd'
        >>> del os.environ["CTKD_CACHE"]
    """
    if own := os.environ.get("CTKD_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ctkd"
    return Path.home() / ".cache" / "ctkd"


def say(line: str) -> None:
    """Tell the user about a stage that takes long, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Hold the lock of a folder of the cache; a second process (or thread) waits, and says so.

    The lock is the operating system's, so a killed process leaves none behind.

    Args:
        final: the folder that is about to be built.

    Raises:
        ModelError: the lock file cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(final.with_name(final.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"waiting for another process that is preparing {final.name}")
            lock.acquire()
    except OSError as error:
        raise _unwritable(final.parent, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """Yield an empty folder; it takes the name `final` on success and vanishes on any failure.

    Hold the lock of `final` meanwhile: what an earlier, killed process left is removed first.

    Args:
        final: the folder's name once it is complete; it must not exist.

    Raises:
        ModelError: the empty folder cannot be made.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(final.parent, error) from error
    try:
        yield partial
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _unwritable(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"cannot write to the cache folder {folder}: {error.strerror or error}; set CTKD_CACHE "
        "to a folder that can be written"
    )
