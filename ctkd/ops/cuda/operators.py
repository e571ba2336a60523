"""Operators of torch whose answers are kernels': where they serve, and what is declared of them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.rows import Rows

__all__ = [
    "DEVICES",
    "Call",
    "Matrix",
    "Place",
    "kernel_cost",
    "kernels",
    "nbytes",
    "operator",
    "place_of",
    "power_of_two",
    "row_bytes",
]

DEVICES = {"meta"}
"""Types of devices on whose tensors kernels run, or nothing does because they have no values."""
if importlib.util.find_spec("triton") is not None:
    DEVICES.add("cuda")
    # The interpreter runs kernels on a CPU, for tests.
    if os.environ.get("TRITON_INTERPRET") == "1":
        DEVICES.add("cpu")


class Call(Protocol):
    """A call of an operator: a dataclass whose fields are the arguments, tensors first."""

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def answers(self) -> Any:
        """The tensors that are made, without their values; None if there are none."""

    def start(self, answers: Any) -> None:
        """Start the kernels that fill them."""

    def cost(self) -> Cost:
        """What that costs."""


def operator(name: str, call: type[Call], *, mutates: tuple[str, ...] = ()) -> Any:
    """Register an operator of torch with its cost, and return it.

    `torch.library.custom_op` would load the compiler, which takes seconds, when it is called.
    """

    def compute(first: Any, *others: Any, **named: Any) -> Any:
        this = call(first, *others, **named)
        # Triton starts kernels on the current device, wherever the tensors lie.
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            answers = this.answers()
            this.start(answers)
            return answers

    given, made = (inspect.signature(one, eval_str=True) for one in (call, call.answers))
    # What a schema is made from.
    compute.__signature__ = given.replace(  # type: ignore[attr-defined]
        return_annotation=made.return_annotation
    )
    schema = torch.library.infer_schema(compute, mutates_args=mutates)
    torch.library.define(f"ctkd::{name}", schema)
    torch.library.impl(f"ctkd::{name}", ("cpu", "cuda"), compute)
    torch.library.register_fake(
        f"ctkd::{name}", lambda *args, **named: call(*args, **named).answers()
    )
    DECLARED[name] = lambda *args, **named: call(*args, **named).cost()
    return getattr(torch.ops.ctkd, name)


def kernels(name: str) -> ModuleType:
    """A module of kernels; importing it imports triton."""
    return importlib.import_module(f"ctkd.ops.cuda.{name}")


class Place(NamedTuple):
    """Rows as kernels are given them, to read or to write.

    Attributes:
        tensor: What holds them; None if there are none.
        numbers: (N,) int64, number of each row, -1 for none; None where all rows are meant.
        length: Rows of a sequence, L.
        outer: Entries from a sequence to the next.
        inner: Entries from a row to the next.
        width: Columns that count.
    """

    tensor: Tensor | None
    numbers: Tensor | None
    length: int
    outer: int
    inner: int
    width: int

    @property
    def is_aligned(self) -> bool:
        """Whether all rows begin at entries of which 16 bytes can be read at once."""
        return self.outer % 16 == 0 and self.inner % 16 == 0


def place_of(rows: Rows | None) -> Place:
    """Where rows of a tensor (R, V') or (B, L, V') lie, if there are any."""
    if rows is None:
        return Place(None, None, 0, 0, 0, 0)
    tensor = rows.tensor.detach()
    outer = 0 if tensor.ndim == 2 else tensor.stride(0)
    length = max(tensor.shape[-2], 1)
    return Place(tensor, rows.index, length, outer, tensor.stride(-2), rows.width)


class Matrix(NamedTuple):
    """Numbers (B, S) as kernels are given them.

    Attributes:
        tensor: What holds them.
        outer: Entries from a row to the next.
        inner: Entries from a number to the next.
    """

    tensor: Tensor
    outer: int
    inner: int

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        return cls(tensor, *tensor.stride())


def row_bytes(rows: Rows) -> int:
    """What it takes to read rows once."""
    index = 0 if rows.index is None else rows.index.nbytes
    return len(rows) * rows.width * rows.tensor.element_size() + index


def power_of_two(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(count - 1, 0).bit_length()


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes that lie behind tensors; what is expanded counts once."""
    total = 0
    for one in tensors:
        if one is not None and one.numel():
            sizes = (n for n, stride in zip(one.shape, one.stride(), strict=True) if stride)
            total += math.prod(sizes) * one.element_size()
    return total


def kernel_cost(moved: int, *given: Tensor | None) -> Cost:
    """What a kernel costs that moves so many bytes, with copies of what is not contiguous."""
    apart = [one for one in given if one is not None and not one.is_contiguous()]
    made = sum(one.numel() * one.element_size() for one in apart)
    return Cost(1 + len(apart), moved + nbytes(*apart) + made, made)
