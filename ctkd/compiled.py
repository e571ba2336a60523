"""Rows of logits as the compiled loops of `ctkd.kernels` take them, and when those serve.

They serve float32 and bfloat16 on a CPU, where they read and write rows as they lie in memory: no
widened copy, no block, a few rows of room for each thread. Everything else goes the general way,
through operators of torch, and so does a machine on which numba cannot be imported.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctkd.rows import skips_padding

__all__ = ["RowArray", "as_columns", "as_numpy", "has_kernels", "is_readable", "readable"]

# The general way is the reference; a test that leaves this empty takes it.
DEVICES_WITH_KERNELS = {"cpu"}

_READABLE = (torch.float32, torch.bfloat16)


class RowArray(NamedTuple):
    """Rows in memory.

    Attributes:
        values: float32, or bfloat16 as uint16, one dimension.
        starts: (n,) int64, where each row begins.
    """

    values: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, block: Tensor, rows: Tensor | None = None) -> RowArray:
        """Rows (n, V) of a block, or some rows of it, in a dtype that is readable.

        Args:
            block: (n, V), or (B, L, V) of which row b * L + i is ``block[b, i]``.
            rows: (m,) int64.
        """
        if not is_readable(block):
            raise TypeError(
                f"rows must be float32 or bfloat16 with columns side by side, got {block.dtype} "
                f"with strides {block.stride()}; see `readable`"
            )
        *sizes, width = block.shape
        strides = block.stride()[:-1]
        count = int(np.prod(sizes))
        index = np.arange(count) if rows is None else rows.numpy()
        starts = np.zeros(len(index), np.int64)
        for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
            starts += index % max(size, 1) * stride
            index = index // max(size, 1)
        reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        extent = reach + width if count else 0
        values = block.detach().as_strided((extent,), (1,), block.storage_offset())
        return cls(as_numpy(values), starts)

    def some(self, which: slice) -> RowArray:
        """Part of the rows."""
        return RowArray(self.values, self.starts[which])


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor on the CPU as an array in the same memory, bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.detach().numpy()


def as_columns(ids: Tensor) -> npt.NDArray[np.uint32]:
    """Columns of a vocabulary as compiled loops take them."""
    return ids.numpy().astype(np.uint32)


def is_readable(tensor: Tensor) -> bool:
    """Whether compiled loops can read and write rows where they lie."""
    side_by_side = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    return tensor.dtype in _READABLE and side_by_side


def readable(block: Tensor) -> Tensor:
    """A block (n, V), or a copy of it that compiled loops can read."""
    return block if is_readable(block) else block.float().contiguous()


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are compiled loops for answers of a dtype on a device."""
    return (
        device.type in DEVICES_WITH_KERNELS
        and dtype == torch.float32
        and skips_padding(device)
        and _has_numba()
    )


@functools.cache
def _has_numba() -> bool:
    try:
        importlib.import_module("numba")
    # Whatever goes wrong in another package, there is the general way.
    except Exception as error:
        warnings.warn(
            f"losses on a CPU take several times as long as they could, because numba cannot be "
            f"imported ({error}); install a numba that goes with this Python and this numpy",
            stacklevel=2,
        )
        return False
    return True
