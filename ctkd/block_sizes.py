"""How many logits to work on at a time, from the size of a CPU's cache or a device's memory.

The environment variable ``CTKD_BLOCK_ELEMENTS`` sets another number, for every device.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from ctkd.errors import SettingError

__all__ = ["VARIABLE", "block_elements", "least_rows"]

VARIABLE = "CTKD_BLOCK_ELEMENTS"

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 1 << 19
_BYTES = 4
# A device runs out of work on less, and gains nothing on more than a part of its memory.
_PART_OF_MEMORY = 512


def block_elements(device: torch.device) -> int:
    """Float32 numbers in a block.

    One block fills the second caches of as many of a CPU's cores as torch has threads, which share
    it: with less to do between two meetings, threads wait for each other.

    Raises:
        SettingError: If the environment variable is no whole number above 0.

    Example:
        >>> 1 << 16 <= block_elements(torch.device("cpu")) <= 1 << 21
        True
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return _checked(given)
    found = _found(device.type, device.index)
    return min(found * torch.get_num_threads(), 1 << 21) if device.type == "cpu" else found


def least_rows(device: torch.device) -> int:
    """Rows in a block, however wide they are: two for each thread of a CPU that works on it.

    Example:
        >>> least_rows(torch.device("meta"))
        1
    """
    if device.type != "cpu" or VARIABLE in os.environ:
        return 1
    return 2 * torch.get_num_threads()


def _checked(given: str) -> int:
    if not given.isdecimal() or int(given) == 0:
        raise SettingError(
            f"the environment variable {VARIABLE} must be a whole number above 0, the logits to "
            f"work on at a time, got {given!r}"
        )
    return int(given)


@functools.cache
def _found(kind: str, index: int | None) -> int:
    if kind == "cpu":
        return min(max(_second_cache() // _BYTES, 1 << 16), 1 << 18)
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(index or 0).total_memory
        return min(max(memory // _BYTES // _PART_OF_MEMORY, 1 << 22), 1 << 26)
    return 1 << 24


def _second_cache() -> int:
    """Bytes of a core's second cache, as Linux tells them; a usual size elsewhere."""
    for folder in sorted(_CACHES.glob("index*")):
        try:
            level = (folder / "level").read_text().strip()
            size = (folder / "size").read_text().strip()
        except OSError:
            continue
        if level == "2" and size.endswith("K") and size[:-1].isdecimal():
            return int(size[:-1]) << 10
    return _USUAL_CACHE
