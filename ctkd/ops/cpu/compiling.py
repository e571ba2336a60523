"""Compilation of loops: without the interpreter's lock, cached on disk for the next process.

`compiled` keeps every operation in the order in which it is written, but for a product and a sum in
one step. `compiled_sum` also lets sums be added up in several parts at once; nothing in it may
depend on the order of additions.

Compiled code is kept in the user's cache folder, never in the package's: a folder that pip does not
own would outlive the package there and be imported in its place. What cannot be read or written is
compiled again, or not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite
import numba
import numpy as np
from filelock import FileLock
from numba.extending import overload

from ctkd.cache_folder import cache_dir

try:
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps
except ImportError:
    # numba promises none of these. Without them nothing is kept.
    NullCache = object

__all__ = ["compiled", "compiled_for_types", "compiled_sum"]

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Nothing calls a loop by its address in C, and an entry for that would be compiled for each.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
    "no_cfunc_wrapper": True,
}


def compiled(function: _Function) -> _Function:
    """Compile a function for the types that it is called with."""
    return _compiled(function, _OPTIONS)


def compiled_sum(function: _Function) -> _Function:
    """Compile a function whose sums may be added up in any order."""
    return _compiled(function, _OPTIONS | {"fastmath": {"contract", "reassoc"}})


def compiled_for_types(function: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Say what a function is in compiled code: what the decorated one returns for its types."""
    return cast(
        Callable[[_Function], _Function], overload(function, jit_options=_OPTIONS, strict=True)
    )


def _compiled(function: _Function, options: dict[str, Any]) -> _Function:
    dispatcher = numba.njit(**options)(function)
    if NullCache is not object:
        # `njit(cache=True)` would put numba's own cache here. That one writes into the package, or
        # to a folder set for the whole process, and a full disk makes the first call fail.
        dispatcher._cache = _DiskCache(function)
    return cast(_Function, dispatcher)


# Read at once: a file that is edited later is not what this process compiles.
_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()

# Environments and checkouts of one user share the cache; the loops of one take some megabytes.
_KEPT_FOLDERS = 8
# Seconds, several times those that the slowest function takes.
_LONGEST_WAIT = 120.0


def _folder(codegen: Any) -> Path:
    """Where the code of these sources, compiled by these packages for this CPU, is kept."""
    from ctkd import __version__

    made_by = (
        __version__,
        _SOURCES,
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        sys.implementation.cache_tag,
        getattr(sys, "abiflags", ""),
        # Where Intel's library of vector functions is installed, compiled code calls it.
        numba.config.USING_SVML,
        # Triple, name and features of the CPU, as they are or as numba's variables say.
        codegen.magic_tuple(),
    )
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
    own = numba.config.CACHE_DIR
    root = Path(own) / "ctkd" if own else cache_dir()
    return root / "kernels" / f"ctkd-{__version__}-numba-{numba.__version__}-{key}"


class _DiskCache(NullCache):  # type: ignore[misc]
    """Compiled code of one function, as numba's dispatchers ask for it: a file per signature.

    A file gets its name when it is complete, and begins with a hash of its content. So processes
    can share a folder, can be killed, and can remove a folder that another one uses: that one
    compiles again. Of processes that start together, one compiles a function and the others wait.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = f"{function.__module__}.{function.__qualname__}"
        self._locks: dict[Any, FileLock] = {}

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what was compiled for a signature, or None if there is none that can be used."""
        result = self._load(sig, target_context)
        # Without a lock, be it that the folder is read only, several compile it.
        with contextlib.suppress(Exception):
            if result is None:
                path = self._path(sig, target_context.codegen())
                _make_folder(path.parent)
                lock = FileLock(path.with_suffix(".lock"))
                lock.acquire(timeout=_LONGEST_WAIT)
                self._locks[sig] = lock
                result = self._load(sig, target_context)
                if result is not None:
                    self._locks.pop(sig).release()
        return result

    def _load(self, sig: Any, target_context: Any) -> Any:
        # Whatever is wrong with a file, or with the folder, the function is compiled again.
        with contextlib.suppress(Exception):
            target_context.refresh()
            path = self._path(sig, target_context.codegen())
            content = path.read_bytes()
            digest, body = content[:32], content[32:]
            if hashlib.sha256(body).digest() != digest:
                return None
            function, kept_sig, result = pickle.loads(body)
            if (function, kept_sig) != (self._function, sig):
                return None
            result = CompileResult._rebuild(target_context, *result)
            with contextlib.suppress(OSError):
                os.utime(path.parent)
            return result
        return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keep what was compiled for a signature, if that is possible."""
        # A full disk, a folder that is read only: the code is there in memory.
        with contextlib.suppress(Exception):
            self._save(sig, cres)
        # Also if nothing could be kept: those who wait compile for themselves then.
        with contextlib.suppress(Exception):
            self._locks.pop(sig).release()

    def _save(self, sig: Any, cres: Any) -> None:
        # Addresses in this process are of no use to another.
        if cres.library.has_dynamic_globals or any(not one.can_cache for one in cres.lifted):
            return
        body = dumps((self._function, sig, cres._reduce()))
        path = self._path(sig, cres.codegen)
        _make_folder(path.parent)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            partial.write_bytes(hashlib.sha256(body).digest() + body)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, sig: Any, codegen: Any) -> Path:
        name = hashlib.sha256(repr((self._function, sig)).encode()).hexdigest()[:24]
        return _folder(codegen) / name


def _make_folder(path: Path) -> None:
    """Make a folder for compiled code, and remove all but those that were used last."""
    if path.exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        others = path.parent.iterdir()
        folders = sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in folders[_KEPT_FOLDERS:]:
            shutil.rmtree(folder, ignore_errors=True)
