"""Rows of tensors: which are read, written and left alone."""

import pytest
import torch
from torch import Tensor

from ctkd import ops
from ctkd.ops import Rows, blocks
from tests.ops.reading import READINGS, read_by

B, L, V = 2, 4, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TENSORS = {
    "contiguous": lambda: randn(B, L, V),
    "transposed": lambda: randn(L, B, V).transpose(0, 1),
    "sliced": lambda: randn(B, L + 1, V)[:, :-1],
    "cut": lambda: randn(B, L, V + 2),
    "expanded": lambda: randn(B, 1, V).expand(B, L, V),
    "strided": lambda: randn(B, L, 2 * V)[..., ::2],
    "flat": lambda: randn(B * L, V),
    "bfloat16": lambda: randn(B, L, V).bfloat16(),
}
INDEXES = {
    "all": list(range(B * L)),
    "run over sequences": [2, 3, 4, 5],
    "scattered": [7, 0, 3, 3],
    "none": [],
    "with rows that are none": [0, -1, 5, -1],
    "nothing but rows that are none": [-1, -1],
}


# Each tensor is read in two ways, and in each way several tensors.
@pytest.mark.parametrize(
    ("name", "reading"),
    [(name, READINGS[(i + j) % 4]) for i, name in enumerate(TENSORS) for j in (0, 2)],
)
def test_rows_are_read(name, reading, monkeypatch):
    read_by(monkeypatch, reading)
    if "small" in reading:
        monkeypatch.setenv(blocks.VARIABLE, str(2 * V))
    tensor = TENSORS[name]()
    whole = tensor.reshape(-1, tensor.shape[-1])[:, :V]
    for numbers in INDEXES.values():
        index = torch.tensor(numbers, dtype=torch.int64)
        rows, real = Rows(tensor, index, V), index >= 0
        assert len(rows) == len(numbers)
        expected = whole[index[real]].to(torch.promote_types(tensor.dtype, torch.float32))
        assert torch.equal(rows.read()[real], expected)
        assert torch.equal(rows[1:].read(), rows.read()[1:])
        picked = torch.arange(len(numbers)).flip(0)
        assert torch.equal(rows[picked].read()[real.flip(0)], expected.flip(0))
        numbered, seen = torch.arange(len(numbers)), []
        for which, block in rows.blocks():
            seen += numbered[which].tolist()
            some = real[which]
            assert torch.equal(block[some], rows.read(which)[some])
            assert "small" not in reading or len(block) <= 2
        # Rows that are none are left out where that needs no waiting.
        assert seen == (numbered if "device" in reading else numbered[real]).tolist()


def test_rows_of_a_whole_tensor_are_a_view():
    tensor = randn(6, V)
    rows = Rows(tensor, None, 3)
    assert len(rows) == 6 and torch.equal(rows.read(), tensor[:, :3])
    assert rows.read(slice(2, 4)).data_ptr() == tensor[2].data_ptr()
    assert torch.equal(rows[2:][1:].read(), tensor[3:, :3])
    assert torch.equal(rows[torch.tensor([4, 1])].read(), tensor[[4, 1], :3])


def test_blocks_have_the_size_of_the_widest_side(monkeypatch):
    monkeypatch.setenv(blocks.VARIABLE, "20")
    sizes = [len(block) for _, block in Rows(randn(6, V), None, V).blocks(columns=10)]
    assert sizes == [2, 2, 2]


def test_rows_are_written_where_they_lie_and_nowhere_else():
    tensor = torch.full((B * L + 1, V + 1), 9.0, dtype=torch.bfloat16)
    index = torch.tensor([6, -1, 0])
    Rows(tensor, index, V).write(slice(None), randn(3, V))
    assert torch.equal(tensor[[6, 8, 0], :V], randn(3, V).bfloat16())
    assert (tensor[[1, 2, 3, 4, 5, 7]] == 9.0).all() and (tensor[:, V] == 9.0).all()
    Rows(tensor, None, V).write(torch.tensor([2]), randn(1, V, seed=1))
    assert torch.equal(tensor[2, :V], randn(1, V, seed=1)[0].bfloat16())


def test_a_tensor_without_rows():
    rows = Rows(torch.zeros(2, 0, V), torch.full((3,), -1), V)
    assert rows.read().shape == (3, V) and list(rows.blocks()) == []


@pytest.mark.parametrize("reading", ["one_block", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_gradient_is_cleared_where_no_row_is_named(reading, dtype, monkeypatch):
    read_by(monkeypatch, reading)
    # Fresh memory may hold anything.
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan"))
    )
    index = torch.tensor([5, -1, 2])
    gradient = ops.gradient_rows(torch.zeros(B, L, V, dtype=dtype), index)
    assert gradient.shape == (B * L + 1, V) and gradient.dtype == dtype
    assert (gradient[[0, 1, 3, 4, 6, 7]] == 0.0).all()
