"""Rows in memory for tests of the kernels."""

import numpy as np
import torch

from ctkd.ops.cpu.arrays import RowArray

DTYPES = ("float32", "bfloat16")
GAP = 3
FILL = 7.0
# Unit roundoff of float32. A softmax multiplies, adds and exponentiates in a handful of roundings,
# and an exponent of up to 30 carries its own rounding into the result.
ROUNDOFF = 2.0**-24
TOLERANCE = 64 * ROUNDOFF


def row_array(block, dtype: str) -> RowArray:
    """Rows (n, V), stored from the last to the first with gaps between them."""
    count, width = np.shape(block)
    starts = np.arange(count)[::-1] * (width + GAP) + GAP
    values = np.full(count * (width + GAP) + GAP, FILL, np.float32)
    for start, row in zip(starts, block, strict=True):
        values[start : start + width] = row
    if dtype == "bfloat16":
        values = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    return RowArray(values, starts)


def blank(count: int, width: int, dtype: str) -> RowArray:
    return row_array(np.full((count, width), FILL), dtype)


def empty(dtype: str) -> RowArray:
    return RowArray(blank(0, 0, dtype).values[:0], np.zeros(0, np.int64))


def floats_of(values) -> np.ndarray:
    """Values as float64."""
    tensor = torch.from_numpy(values)
    if values.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.double().numpy()


def block_of(rows: RowArray, width: int) -> np.ndarray:
    """Rows (n, V) as float64."""
    values = floats_of(rows.values)
    return np.stack([values[start : start + width] for start in rows.starts])


def check_gaps(rows: RowArray, width: int) -> None:
    """Nothing between the rows was written."""
    values = floats_of(rows.values).copy()
    for start in rows.starts:
        values[start : start + width] = FILL
    assert (values == FILL).all()


def assert_close(actual, expected, dtype: str = "float32", scale: float = 1.0) -> None:
    """Compare with a tolerance of float32 arithmetic and, for bfloat16, of one rounding."""
    relative = 2.0**-8 if dtype == "bfloat16" else TOLERANCE
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=TOLERANCE * scale)


def softmax(logits, axis: int = -1) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)
