"""Operators of torch whose answers are kernels': where they serve, and what is declared of them."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctkd.ops.costs import Cost

__all__ = ["kernel_cost", "nbytes", "operator", "power_of_two", "runs_on", "serves"]

_Answers = TypeVar("_Answers")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """True if kernels run on a device's tensors, or nothing does because they have no values."""
    if device.type == "meta":
        return True
    # The interpreter runs kernels on a CPU, for tests.
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return _HAS_TRITON and (interpreted or device.type == "cuda")


def serves(tensor: Tensor) -> bool:
    """True if kernels run on this tensor, or would where there are no values."""
    return tensor.dtype != torch.float64 and runs_on(tensor.device)


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
