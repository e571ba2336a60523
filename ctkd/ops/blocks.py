"""Block sizes: rows that are worked on at a time.

The environment variable ``CTKD_BLOCK_ELEMENTS`` sets another number of logits, for every device and
for heads.
"""

from __future__ import annotations

import os

import torch

from ctkd.errors import SettingError

__all__ = ["VARIABLE", "block_rows", "head_rows"]

VARIABLE = "CTKD_BLOCK_ELEMENTS"

_BYTES = 4
# A few cores' second caches hold that much.
_CPU_ELEMENTS = 1 << 18
# A device runs out of work on less; more, or more than a part of its memory, gains nothing.
_DEVICE_ELEMENTS = 1 << 22, 1 << 26
_PART_OF_MEMORY = 512
# What a block and what is made of it may take of the memory that is free.
_PART_OF_FREE = 8
# Enough for the matrix product of a head to be worthwhile, in elements and, on a device, in rows.
_HEAD_ELEMENTS, _HEAD_ROWS = 1 << 24, 1 << 10


def block_rows(width: int, device: torch.device, least_elements: int = 0) -> int:
    """Rows of a given width to work on at a time, at least one.

    Args:
        width: Columns.
        device: Of the rows.
        least_elements: Lower bound of the logits in a block, if the variable is not set.

    Raises:
        SettingError: If the environment variable is no whole number above 0.

    Example:
        >>> block_rows(1 << 40, torch.device("meta"))
        1
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        elements = _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS[0]
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device.index or 0).total_memory
            elements = min(max(memory // _BYTES // _PART_OF_MEMORY, elements), _DEVICE_ELEMENTS[1])
        elements = max(elements, least_elements)
        # Memory that is free differs from run to run, so it decides only where it must.
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            elements = min(elements, _free_memory(device) // _BYTES // _PART_OF_FREE)
    elif given.isdecimal() and int(given) > 0:
        elements = int(given)
    else:
        raise SettingError(
            f"the environment variable {VARIABLE} must be a whole number above 0, the logits to "
            f"work on at a time, got {given!r}"
        )
    return max(1, elements // max(width, 1))


def _free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, or that torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def head_rows(width: int, device: torch.device, least_rows: int = _HEAD_ROWS) -> int:
    """Rows of a given width that a head computes at a time, at least one.

    Args:
        width: Columns.
        device: Of the rows.
        least_rows: Lower bound on a device, if they fit there.
    """
    least = _HEAD_ELEMENTS if device.type == "cpu" else max(_HEAD_ELEMENTS, least_rows * width)
    return block_rows(width, device, least)
