"""How rows are read: many or few at a time, and as on a CPU or as on a device."""

import pytest

from ctkd import ops
from ctkd.ops import blocks, rows

# On a "device" values may not be looked at, so that rows that are none are worked through as well.
READINGS = ("one_block", "small_blocks", "device", "device_in_small_blocks")


def read_by(monkeypatch: pytest.MonkeyPatch, reading: str) -> None:
    """Read in one block or several, and as on a CPU or as where that would wait for a device."""
    if "small" in reading:
        # Two rows of 11 to 13 columns, of a head three.
        monkeypatch.setenv(blocks.VARIABLE, "29")
        monkeypatch.setattr(blocks, "_HEAD_ELEMENTS", 42)
    if "device" in reading:
        for module in (ops, rows):
            monkeypatch.setattr(module, "can_inspect", lambda _: False)
