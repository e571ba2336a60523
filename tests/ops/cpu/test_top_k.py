"""Largest entries of rows by compiled loops, against numpy's stable sort."""

import numpy as np
import pytest

from ctkd.ops.cpu.top_k import top_k
from tests.ops.cpu.row_arrays import DTYPES, block_of, row_array
from tests.ops.sorted_rows import KINDS, rows_of

WHICH = np.array([2, 0])


@pytest.mark.parametrize("dtype", DTYPES)
# From 2,048 columns on, a bound from the maxima of groups comes first.
@pytest.mark.parametrize("width, k", [(1, 1), (7, 7), (300, 12), (2048, 5), (5003, 64), (2049, 1)])
def test_top_k(width, k, dtype):
    for kind in KINDS:
        rows = row_array(rows_of(kind, width, seed=width, count=3).numpy(), dtype)
        ids, entries = np.full((3, k), -1), np.full((3, k), -1.0, np.float32)
        top_k(WHICH, rows, width, ids, entries)
        block = block_of(rows, width)
        expected = np.argsort(-block, axis=-1, kind="stable")[:, :k]
        assert np.array_equal(ids[WHICH], expected[WHICH])
        assert np.array_equal(entries[WHICH], np.take_along_axis(block, expected, -1)[WHICH])
        assert (ids[1] == -1).all() and (entries[1] == -1.0).all()


@pytest.mark.parametrize("width", [9, 4000])
def test_nan_is_largest(width):
    block = np.arange(width, dtype=np.float32)[None].copy()
    block[0, [2, 5]] = np.nan
    ids, entries = np.zeros((1, 3), np.int64), np.zeros((1, 3), np.float32)
    top_k(np.zeros(1, np.int64), row_array(block, "float32"), width, ids, entries)
    assert ids[0].tolist() == [2, 5, width - 1]
    assert np.isnan(entries[0, :2]).all() and entries[0, 2] == width - 1
