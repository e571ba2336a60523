"""How loops are compiled: without the interpreter's lock, kept on disk for the next process.

`compiled` keeps every operation in the order in which it is written, but for a product and a sum in
one step. `compiled_sum` also lets sums be added up in several parts at once; nothing in it may
depend on the order of additions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.extending import overload

__all__ = ["compiled", "compiled_for_types", "compiled_sum"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def compiled(function: _Function) -> _Function:
    """Compile for the types it is called with."""
    return _compiled(function, _OPTIONS)


def compiled_sum(function: _Function) -> _Function:
    """Compile a function whose sums may be added up in any order."""
    return _compiled(function, _OPTIONS | {"fastmath": {"contract", "reassoc"}})


def compiled_for_types(function: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Say what a function is in compiled code: what the decorated one returns for its types."""
    return cast(
        Callable[[_Function], _Function], overload(function, jit_options=_OPTIONS, strict=True)
    )


# What is kept on disk is found again by a function's name and the state of its own file, whatever
# became of the functions it calls. So the name says of which sources of this package it was made.
_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]


def _compiled(function: _Function, options: dict[str, Any]) -> _Function:
    function.__qualname__ += f"_{_SOURCES}"
    try:
        return cast(_Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:
        # No folder to keep it in.
        return cast(_Function, numba.njit(**options)(function))
