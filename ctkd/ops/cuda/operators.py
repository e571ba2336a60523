"""Operators of torch whose answers are kernels': where they serve, and what is declared of them."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctkd.ops.costs import Cost

__all__ = ["kernel_cost", "nbytes", "operator", "power_of_two", "serves"]

_Answers = TypeVar("_Answers")


def serves(tensor: Tensor) -> bool:
    """True if kernels run on this tensor, or would where there are no values."""
    if tensor.dtype == torch.float64:
        return False
    kind = tensor.device.type
    if kind == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()
    return kind == "meta" or (kind == "cuda" and _has_triton())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def operator(
    name: str, answers: Callable[..., _Answers]
) -> Callable[[Callable[..., _Answers]], Callable[..., _Answers]]:
    """Register an operator of torch, and what makes its answers where there are no values.

    `torch.library.custom_op` would load the compiler, which takes seconds, when it is called.
    """

    def register(function: Callable[..., _Answers]) -> Callable[..., _Answers]:
        def on_its_device(first: Tensor, *others: Any) -> _Answers:
            # Triton starts kernels on the current device, wherever the tensors lie.
            with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
                return function(first, *others)

        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"ctkd::{name}", schema)
        torch.library.impl(f"ctkd::{name}", ("cpu", "cuda"), on_its_device)
        torch.library.register_fake(f"ctkd::{name}", answers)
        return function

    return register


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
