"""Functions that `torch.compile` leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["not_traced"]

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def not_traced(function: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
    """Let a function run as it is inside what `torch.compile` compiles.

    What reads rows looks at values, writes through arrays in the same memory and hangs requests on
    nodes of autograd: a compiler can follow none of it. `torch.compiler.disable` does the same, but
    loads the compiler, which takes seconds.
    """
    left_alone: list[Callable[_Arguments, _Answer]] = []

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        # A compiler that is not loaded compiles nothing.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not left_alone:
            left_alone.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return left_alone[0](*args, **kwargs)

    return call
