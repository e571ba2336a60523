"""The most memory that a stretch of work held."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ["PeakMemory", "give_back_freed_memory"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its creation on: of a CUDA device what torch holds, else the whole process.

    The process is measured on Linux alone, where the kernel keeps the mark.

    Args:
        device: Where the work happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measured = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text("5")
        except OSError:
            self._measured = False

    def read(self) -> int | None:
        """Bytes; None where they cannot be measured."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._measured:
            return None
        for line in _STATUS.read_text().splitlines():
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
