"""The most memory that a stretch of work held."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["PeakMemory"]

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
