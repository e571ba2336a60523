"""The backend that was asked for, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ctkd.errors import SettingError

__all__ = ["BACKENDS", "VARIABLE", "chosen", "use_backend"]

BACKENDS = ("auto", "reference", "cpu", "cuda")
VARIABLE = "CTKD_BACKEND"

chosen: str = os.environ.get(VARIABLE, "auto")
"""Name of a backend; what the variable says is checked when an operation is to run."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Send every operation to one backend; what it cannot serve goes to the reference.

    This is for the whole process: the backward pass may run in threads of torch's own. With
    ``"cuda"`` tensors on a CPU are treated as if they were on a device: triton's interpreter runs
    the kernels, if ``TRITON_INTERPRET`` is 1.

    Args:
        name: One of `BACKENDS`; ``"auto"`` chooses by device and dtype.

    Raises:
        SettingError: If there is no such backend.

    Example:
        >>> import torch
        >>> from ctkd import ops
        >>> with use_backend("reference"):
        ...     ops.backend_for("top_k", ops.Rows(torch.zeros(1, 2), None, 2)).__name__
        'ctkd.ops.reference'
    """
    if name not in BACKENDS:
        raise SettingError(f"the backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    global chosen
    before, chosen = chosen, name
    try:
        yield
    finally:
        chosen = before
