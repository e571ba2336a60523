"""Arithmetic on rows of logits: tensors in, tensors out, by the backend that serves them.

``reference`` (torch) is the definition and serves every device and dtype; ``cpu`` (numba) serves
float32 and bfloat16 rows on a CPU, ``cuda`` (Triton) those and float16 on a CUDA device, where they
lie. Tensors on the meta device go the way of CUDA, whose costs are counted there. This module is
the only place that chooses. The environment variable ``CTKD_BACKEND``, which is read when this is
imported, and `use_backend` override it, for tests and for anyone who suspects a kernel.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ctkd.errors import SettingError
from ctkd.ops import choice, cuda, reference
from ctkd.ops.blocks import block_rows, head_rows
from ctkd.ops.choice import BACKENDS, VARIABLE, use_backend
from ctkd.ops.costs import cost_of
from ctkd.ops.rows import (
    STANDARD_DEVIATION_EPSILON,
    Packed,
    RowLoss,
    Rows,
    RowValues,
    SoftmaxTerm,
    Which,
    can_inspect,
    is_whole,
    statistics_dtype,
)

__all__ = [
    "BACKENDS",
    "STANDARD_DEVIATION_EPSILON",
    "VARIABLE",
    "Packed",
    "RowLoss",
    "RowValues",
    "Rows",
    "SoftmaxTerm",
    "Which",
    "add_column_distance_",
    "backend_for",
    "block_rows",
    "can_inspect",
    "chosen_log_probs",
    "column_mass",
    "cost_of",
    "current_stream",
    "full_precision",
    "gradient_rows",
    "greedy_partners",
    "head_rows",
    "host_zero",
    "is_whole",
    "kernels_for",
    "log_normalizers",
    "log_probs_of",
    "not_traced",
    "pack_scored",
    "pass_rows",
    "row_loss",
    "softmax_backward",
    "statistics_dtype",
    "top_k",
    "use_backend",
]

_NOT_TRACED = (
    "ctkd reads rows of logits itself and leaves what a backward pass has to do on nodes of "
    "autograd, which a graph cannot hold; leave out fullgraph=True, or compile the model alone"
)
_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def backend_for(operation: str, *rows: Rows) -> ModuleType:
    """The module that serves an operation, or the row loss of that name, on these rows.

    Args:
        operation: A function of this module that takes rows, or ``"uld"``, ``"gold"``,
            ``"shared_kl"`` or ``"bpm"``; other losses are made of the former. What a backend does
            not know goes to the reference.
        rows: `Rows` of a tensor of logits.

    Raises:
        SettingError: If the environment variable names no backend.

    Example:
        >>> rows = Rows(torch.zeros(3, 5, dtype=torch.float64), None, 5)
        >>> backend_for("log_normalizers", rows).__name__
        'ctkd.ops.reference'
    """
    if choice.chosen not in BACKENDS:
        raise SettingError(
            f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {choice.chosen!r}"
        )
    on_host = choice.chosen != "cuda" and rows[0].tensor.device.type == "cpu"
    if choice.chosen == "reference" or (choice.chosen == "cpu" and not on_host):
        return reference
    backend = _cpu() if on_host else cuda
    if backend is None or operation not in backend.OPERATIONS:
        return reference
    for one in rows:
        tensor = one.tensor
        # Kernels read and write rows where they lie.
        lies_in_rows = tensor.stride(-1) == 1 or tensor.shape[-1] < 2
        is_known = tensor.dtype in backend.DTYPES and tensor.device.type in backend.DEVICES
        if not (lies_in_rows and is_known):
            return reference
    return backend


def kernels_for(part: str, *tensors: Tensor) -> ModuleType | None:
    """The module with a device's kernels for a part of a loss; None if torch is to compute it.

    Args:
        part: Name of the module.
        tensors: What it would be computed from.
    """
    if choice.chosen not in ("auto", "cuda"):
        return None
    for tensor in tensors:
        on_host = choice.chosen == "auto" and tensor.device.type == "cpu"
        if on_host or tensor.dtype == torch.float64 or tensor.device.type not in cuda.DEVICES:
            return None
    return importlib.import_module(f"ctkd.ops.cuda.{part}")


@functools.cache
def _cpu() -> ModuleType | None:
    try:
        return importlib.import_module("ctkd.ops.cpu")
    # Whatever goes wrong in another package, there is the reference.
    except Exception as error:
        warnings.warn(
            f"losses on a CPU take several times as long as they could, because numba cannot be "
            f"imported ({error}); install a numba that goes with this Python and this numpy",
            stacklevel=2,
        )
        return None


def _dispatched(function: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
    """An operation of the reference, run by the backend that serves its rows."""

    @functools.wraps(function)
    def operation(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        first = args[0]
        name = first.name if isinstance(first, RowLoss) else function.__name__
        rows: Iterator[Any] = filter(Rows.__instancecheck__, args)
        backend = backend_for(name, *rows)
        answer: _Answer = getattr(backend, function.__name__)(*args, **kwargs)
        return answer

    return operation


log_normalizers = _dispatched(reference.log_normalizers)
column_mass = _dispatched(reference.column_mass)
add_column_distance_ = _dispatched(reference.add_column_distance_)
top_k = _dispatched(reference.top_k)
softmax_backward = _dispatched(reference.softmax_backward)
row_loss = _dispatched(reference.row_loss)


def pack_scored(
    targets: Tensor, ignored: int, size: int, length: int, chunk_ids: Tensor | None = None
) -> Packed:
    """See `ctkd.ops.reference.pack_scored`."""
    packing = reference if kernels_for("operators", targets) is None else cuda
    packed: Packed = packing.pack_scored(targets, ignored, size, length, chunk_ids)
    return packed


def greedy_partners(distance: Tensor) -> tuple[Tensor, Tensor]:
    """See `ctkd.ops.reference.greedy_partners`."""
    backend = backend_for("greedy_partners", Rows(distance, None, distance.shape[-1]))
    answers: tuple[Tensor, Tensor] = backend.greedy_partners(distance)
    return answers


def chosen_log_probs(
    rows: Rows,
    ids: Tensor,
    positions: int,
    normalizers: Tensor,
    temperatures: Sequence[float],
) -> list[Tensor]:
    """Log-probabilities of chosen entries at each temperature, (B, S, K); 0 where there is no row.

    Args:
        rows: N = B * S rows of a tensor (B, L, V').
        ids: (B, S or 1, K) columns.
        positions: S.
        normalizers: (T, N) or (T, E, N) as of `log_normalizers`; the latter standardize.
        temperatures: T of them.
    """
    if rows.index is None:
        raise TypeError("chosen entries are those of rows that an index names")
    if backend_for("chosen_log_probs", rows) is cuda:
        return cuda.chosen_log_probs(rows, ids, positions, normalizers, temperatures)
    length = max(rows.tensor.shape[1], 1)
    index = rows.index.view(ids.shape[0], positions, 1).clamp_min(0)
    entries = rows.tensor[index // length, index % length, ids].to(normalizers.dtype)
    return log_probs_of(entries, rows.index, normalizers, temperatures)


def log_probs_of(
    entries: Tensor,
    index: Tensor,
    normalizers: Tensor,
    temperatures: Sequence[float],
) -> list[Tensor]:
    """As `chosen_log_probs`, of entries (B, S, K) of rows (N,), -1 for none."""
    shape, answers = (*entries.shape[:2], 1), []
    if normalizers.ndim == 3:
        entries = entries / (normalizers[0, 1].view(shape) + STANDARD_DEVIATION_EPSILON)
        normalizers = normalizers[:, 0]
    padding = (index < 0).view(shape)
    for temperature, normalizer in zip(temperatures, normalizers, strict=True):
        log_probs = entries / temperature - normalizer.view(shape)
        answers.append(log_probs.masked_fill_(padding, 0.0))
    return answers


def gradient_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Memory for the gradient of a tensor (..., V') of R rows, (R + 1, V').

    Rows without an index are 0, the others are not cleared. The last one takes what is written
    for -1.
    """
    count = tensor.shape[:-1].numel()
    gradient = tensor.new_empty(count + 1, tensor.shape[-1])
    if backend_for("clear_rows", Rows(gradient, index, tensor.shape[-1])) is cuda:
        cuda.clear_rows(gradient, index)
        return gradient
    others = torch.ones(count + 1, dtype=torch.bool, device=index.device)
    others[index] = False  # -1 is the last row.
    if can_inspect(others):
        # torch would look at every entry if it were given the mask.
        return gradient.index_fill_(0, others.nonzero().squeeze(-1), 0.0)
    return gradient.masked_fill_(others.unsqueeze(-1), 0.0)


def pass_rows(device: torch.device) -> int:
    """Rows at a time whose gradient is computed in scratch memory."""
    return 4 * torch.get_num_threads() if device.type == "cpu" else 64


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, so that forward and backward pass agree."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def current_stream(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Contexts in which a device is told what to do where it is told now."""
    if device.type == "cuda":
        return functools.partial(torch.cuda.stream, torch.cuda.current_stream(device))
    return nullcontext


def host_zero() -> Tensor:
    """A zero that no device has to compute, ()."""
    return torch.zeros((), device="cpu")


def not_traced(function: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
    """Let a function run as it is inside what `torch.compile` compiles.

    What reads rows looks at values, writes through arrays in the same memory and hangs requests on
    nodes of autograd: a compiler can follow none of it, and ``fullgraph=True`` is refused.
    `torch.compiler.disable` does the same, but loads the compiler, which takes seconds.
    """
    left_alone: list[Callable[_Arguments, _Answer]] = []

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        # Asked first: of a list of all modules, the compiler would look at every one.
        if not left_alone:
            # A compiler that is not loaded compiles nothing.
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            left_alone.append(torch.compiler.disable(function, reason=_NOT_TRACED))  # type: ignore[no-untyped-call]
        return left_alone[0](*args, **kwargs)

    return call
