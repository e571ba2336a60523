"""Operators of torch whose answers are kernels': where they serve, and what is declared of them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ctkd.ops.costs import Cost

__all__ = [
    "DEVICES",
    "Place",
    "kernel_cost",
    "kernels",
    "nbytes",
    "operator",
    "place_of",
    "power_of_two",
    "row_bytes",
]

_Answers = TypeVar("_Answers")

DEVICES = {"meta"}
"""Types of devices on whose tensors kernels run, or nothing does because they have no values."""
if importlib.util.find_spec("triton") is not None:
    DEVICES.add("cuda")
    # The interpreter runs kernels on a CPU, for tests.
    if os.environ.get("TRITON_INTERPRET") == "1":
        DEVICES.add("cpu")


def operator(
    name: str, answers: Callable[..., _Answers], *, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., _Answers]], Callable[..., _Answers]]:
    """Register an operator of torch, and what makes its answers where there are no values.

    `torch.library.custom_op` would load the compiler, which takes seconds, when it is called.
    """

    def register(function: Callable[..., _Answers]) -> Callable[..., _Answers]:
        def on_its_device(first: Tensor, *others: Any) -> _Answers:
            # Triton starts kernels on the current device, wherever the tensors lie.
            with torch.cuda.device_of(first):
                return function(first, *others)

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(f"ctkd::{name}", schema)
        torch.library.impl(f"ctkd::{name}", ("cpu", "cuda"), on_its_device)
        torch.library.register_fake(f"ctkd::{name}", answers)
        return function

    return register


def kernels(name: str) -> ModuleType:
    """A module of kernels; importing it imports triton."""
    return importlib.import_module(f"ctkd.ops.cuda.{name}")


class Place(NamedTuple):
    """First arguments of a kernel that reads or writes rows, in this order.

    Attributes:
        tensor: What holds them.
        numbers: (N,) int64, number of each row, -1 for none; any tensor where all rows are meant.
        length: Rows of a sequence, L.
        outer: Entries from a sequence to the next.
        inner: Entries from a row to the next.
    """

    tensor: Tensor
    numbers: Tensor
    length: int
    outer: int
    inner: int

    @property
    def is_aligned(self) -> bool:
        """Whether all rows begin at entries of which 16 bytes can be read at once."""
        return self.outer % 16 == 0 and self.inner % 16 == 0


def place_of(tensor: Tensor, index: Tensor | None) -> Place:
    """Where rows of a tensor (R, V') or (B, L, V') lie."""
    tensor = tensor.detach()
    numbers = tensor if index is None else index
    if tensor.ndim == 2:
        return Place(tensor, numbers, max(tensor.shape[0], 1), 0, tensor.stride(0))
    return Place(tensor, numbers, max(tensor.shape[1], 1), *tensor.stride()[:2])


def row_bytes(tensor: Tensor, index: Tensor | None, width: int) -> int:
    """What it takes to read rows once."""
    rows = tensor.shape[0] if index is None else index.shape[0]
    return rows * width * tensor.element_size() + (0 if index is None else index.nbytes)


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
