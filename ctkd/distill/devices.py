"""Devices: which one to work on, when it is done, and the most memory that work on it held.

No other module of `ctkd.distill` and `ctkd.compare` names a type of device. Settings name one
without torch, which takes seconds to load.
"""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ctkd.errors import ModelError, SettingError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEVICES",
    "Device",
    "PeakMemory",
    "choose_device",
    "give_back_freed_memory",
    "is_cpu",
    "now",
]

Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[str, ...] = get_args(Device)
"""Names that settings take for a device."""

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def choose_device(name: str) -> torch.device:
    """Find the device of that name; "auto" takes a GPU where there is one.

    Raises:
        SettingError: If it is none of `DEVICES`.
        ModelError: If it is not there.
    """
    import torch

    if name not in DEVICES:
        raise SettingError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch finds none; use --device cpu")
    return torch.device(name)


def is_cpu(device: torch.device) -> bool:
    """True if a device is the processor itself, with no memory of its own to copy to."""
    return device.type == "cpu"


def now() -> float:
    """Seconds of a clock, read when all work that was started on an accelerator is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Measures from its creation on: of a CUDA device what torch holds, else the whole process.

    The process is measured on Linux alone, where the kernel keeps the mark.

    Args:
        device: Where the work happens.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._measured = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text("5", encoding="utf-8")
        except OSError:
            self._measured = False

    def read(self) -> int | None:
        """Bytes; None where they cannot be measured."""
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._measured:
            return None
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def give_back_freed_memory() -> None:
    """Hand what earlier work has freed back to the system, as far as that is possible.

    The C library keeps freed memory for later. In a process that does one work after another, a
    later one would be charged with what an earlier one had needed. Only glibc can be asked to
    give it back; with another C library this collects Python's garbage and no more.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    trim(0)
