"""Where rows come from: what is read without a copy, and what is carried back."""

import pytest
import torch
from torch import Tensor

from ctkd import rows as rows_module
from ctkd.head_rows import HeadRows
from ctkd.powers import Workspace
from ctkd.row_sources import RowSource, TensorRows

B, L, H, V = 2, 4, 3, 5
READINGS = ("one_block", "small_blocks", "padding_too", "padding_too_in_small_blocks")


@pytest.fixture(params=READINGS)
def reading(request, monkeypatch) -> str:
    """How rows are read: in one block or several, as on the CPU or as elsewhere."""
    if "small" in request.param:
        monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * V + 1})
        monkeypatch.setattr(rows_module, "HEAD_BLOCK_ELEMENTS", {"cpu": 3 * V + 1})
    if "padding" in request.param:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def head(hidden: Tensor) -> HeadRows:
    return HeadRows(hidden, randn(V, H, seed=1), randn(V, seed=2), scale=0.5, softcap=2.0)


def by_hand(source: RowSource) -> Tensor:
    """All rows, (B * L, V)."""
    if isinstance(source, TensorRows):
        return source.tensor.reshape(-1, V)
    raw = source.inputs[0].reshape(-1, H) @ source.weight.T + source.bias
    return 2.0 * torch.tanh(0.5 * raw / 2.0)


LAYOUTS = {
    "contiguous": lambda width: randn(B, L, width),
    "transposed": lambda width: randn(L, B, width).transpose(0, 1),
    "sliced": lambda width: randn(B, L + 1, width)[:, :-1],
    "cut": lambda width: randn(B, L, width + 2)[..., :width],
    "expanded": lambda width: randn(B, 1, width).expand(B, L, width),
    "strided": lambda width: randn(B, L, 2 * width)[..., ::2],
}
SOURCES = {
    f"{kind}_{layout}": (make, width, layout)
    for kind, make, width in (("tensor", TensorRows, V), ("head", head, H))
    for layout in LAYOUTS
}
ROWS = {
    "all": list(range(B * L)),
    "run": [1, 2, 3],
    "run_over_sequences": [2, 3, 4, 5],
    "scattered": [7, 0, 3],
    "none": [],
    "with_dummies": [0, B * L, 5, B * L],
    "run_into_the_dummy": [6, 7, B * L],
}


def make(name: str) -> RowSource:
    kind, width, layout = SOURCES[name]
    return kind(LAYOUTS[layout](width))


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_read(name, reading):
    source = make(name)
    for rows in ROWS.values():
        rows_are_read(source, torch.tensor(rows, dtype=torch.int64), "small" in reading)


def rows_are_read(source: RowSource, numbers: Tensor, in_small_blocks: bool) -> None:
    # What is read for a dummy is some row.
    real = numbers < B * L
    expected = by_hand(source)[numbers[real]]
    torch.testing.assert_close(source.read(numbers)[real], expected, rtol=1e-13, atol=1e-13)
    assert source.read(numbers).shape == (len(numbers), V)
    blocks = list(source.blocks(numbers))
    positions = torch.arange(len(numbers))
    seen = [positions[which].tolist() for which, _ in blocks]
    assert sum(seen, []) == positions.tolist()
    assert [len(one) for one in seen] == [len(block) for _, block in blocks]
    if blocks:
        together = torch.cat([block for _, block in blocks])[real]
        torch.testing.assert_close(together, expected, rtol=1e-13, atol=1e-13)
    if in_small_blocks:
        assert max(map(len, seen), default=0) <= 2
    ids = torch.tensor([[0, 4, 4]]).expand(len(numbers), 3) + torch.zeros_like(numbers)[:, None]
    picked = source.pick(numbers, ids)[real]
    torch.testing.assert_close(picked, expected[:, [0, 4, 4]], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SOURCES)
def test_shared_picks(name, reading):
    source = make(name)
    rows, ids = torch.tensor([[0, 3, 1], [7, B * L, 4]]), torch.tensor([[1, 2], [4, 0]])
    picked = source.pick_shared(rows, ids)
    assert picked.shape == (2, 3, 2)
    whole = by_hand(source)
    for group, position in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        expected = whole[rows[group, position], ids[group]]
        torch.testing.assert_close(picked[group, position], expected, rtol=1e-13, atol=1e-13)


def start(source: TensorRows, row: int) -> int:
    return source.tensor[row // L, row % L].data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "cut"])
def test_a_run_within_a_sequence_is_a_view(layout):
    source = TensorRows(LAYOUTS[layout](V))
    rows = torch.tensor([5, 6, 7])
    assert source.read(rows).data_ptr() == start(source, 5)
    ((_, block),) = source.blocks(rows)
    assert block.data_ptr() == start(source, 5)


def test_a_run_over_sequences_is_a_view_where_strides_allow(monkeypatch):
    rows = torch.tensor([2, 3, 4, 5])
    whole, cut = (TensorRows(LAYOUTS[layout](V)) for layout in ("contiguous", "sliced"))
    assert whole.read(rows).data_ptr() == start(whole, 2)
    assert cut.read(rows).data_ptr() != start(cut, 2)
    assert whole.read(torch.tensor([2, 4])).data_ptr() != start(whole, 2)
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * V + 1})
    starts = [block.data_ptr() for _, block in whole.blocks(rows)]
    assert starts == [start(whole, 2), start(whole, 4)]


def test_narrow_rows_are_widened():
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        tensor = randn(B, L, V).to(narrow)
        source = TensorRows(tensor)
        read = source.read(torch.tensor([0, 5]))
        assert read.dtype == source.dtype == torch.float32
        assert torch.equal(read, tensor.flatten(0, 1)[[0, 5]].float())
        assert source.pick(torch.tensor([1]), torch.tensor([[2]])).item() == tensor[0, 1, 2].item()


def test_blocks_are_widened_in_one_place(monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * V})
    tensor, numbers = randn(B, L, V).bfloat16(), torch.tensor([0, 1, 5, 3, 2])
    for source in (TensorRows(tensor), TensorRows(tensor.transpose(0, 1))):
        found = [(block.data_ptr(), block.clone()) for _, block in source.blocks(numbers)]
        assert len({place for place, _ in found}) == 1
        read = source.read(numbers)
        assert torch.equal(torch.cat([block for _, block in found]), read)
        assert torch.equal(read, source.tensor.flatten(0, 1)[numbers].float())


def test_rows_that_are_read_stay_until_their_workspace_is_used_again():
    source, workspace = TensorRows(randn(B, L, V).bfloat16()), Workspace()
    first, other = source.read(torch.tensor([0]), workspace), source.read(torch.tensor([1]))
    kept = first.clone()
    assert torch.equal(first, kept) and first.data_ptr() != other.data_ptr()
    assert source.read(torch.tensor([1]), workspace).data_ptr() == first.data_ptr()
    assert torch.equal(first, other)


def rows_to_visit(reading: str) -> list[Tensor]:
    """Rows of a backward pass; on the CPU there are only real ones."""
    numbers = [torch.tensor(rows, dtype=torch.int64) for rows in ROWS.values()]
    return [rows for rows in numbers if "padding" in reading or not (rows == B * L).any()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("buffered", [False, True])
def test_a_tensor_s_gradient(layout, dtype, buffered, reading):
    source = TensorRows(LAYOUTS[layout](V).to(dtype))
    for numbers in rows_to_visit(reading):
        check_a_tensor_s_gradient(source, numbers, buffered)


def check_a_tensor_s_gradient(source: TensorRows, numbers: Tensor, buffered: bool) -> None:
    dtype = source.tensor.dtype
    target = randn(B * L + 1, V, seed=4)
    buffer = source.row_buffer(numbers) if buffered else None
    if buffer is not None:
        assert buffer.shape == (B * L + 1, V)
        buffer[numbers] = 1.0
        assert buffer.sum() == V * len(numbers.unique())

    def fill(which: slice, block: Tensor, gradient: Tensor) -> None:
        assert block.shape == gradient.shape == (len(numbers[which]), V)
        assert block.dtype == gradient.dtype == source.dtype
        added = target[numbers[which]].to(source.dtype)
        gradient.copy_(gradient + added if buffered else added)

    (gradient,) = source.carry_back(numbers, fill, buffer)
    assert gradient.dtype == dtype and gradient.shape == (B, L, V)
    expected = torch.zeros(B * L + 1, V, dtype=torch.float64)
    expected[numbers] = target[numbers] + (1.0 if buffered else 0.0)
    expected = expected[:-1].to(dtype if dtype == torch.float64 else torch.float32).to(dtype)
    # Rows that nobody visits get zeros, whatever the memory held.
    torch.testing.assert_close(gradient.flatten(0, 1), expected, rtol=1e-2, atol=1e-2)
    unvisited = torch.ones(B * L + 1, dtype=torch.bool)
    unvisited[numbers] = False
    assert not gradient.flatten(0, 1)[unvisited[:-1]].any()


def test_memory_of_a_tensor_s_gradient_is_cleared(monkeypatch, reading):
    """A fresh gradient may hold anything."""
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *shape, dtype=None: self.new_full(shape, float("nan"), dtype=dtype),
    )
    source, numbers = TensorRows(randn(B, L, V)), torch.tensor([1, 2, 6])
    (gradient,) = source.carry_back(numbers, lambda _, block, out: out.copy_(block))
    rows = gradient.flatten(0, 1)
    assert torch.equal(rows[numbers], source.tensor.flatten(0, 1)[numbers])
    assert not rows[[0, 3, 4, 5, 7]].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_s_gradients(layout, reading):
    hidden = LAYOUTS[layout](H).requires_grad_()
    weight, bias = randn(V, H, seed=1).requires_grad_(), randn(V, seed=2).requires_grad_()
    source = HeadRows(hidden, weight, bias, scale=0.5, softcap=2.0)
    assert source.row_buffer(torch.arange(2)) is None
    for numbers in rows_to_visit(reading):
        check_a_head_s_gradients(source, numbers)


def check_a_head_s_gradients(source: HeadRows, numbers: Tensor) -> None:
    target = randn(B * L + 1, V, seed=4)
    target[-1] = 0.0

    def fill(which: slice, block: Tensor, gradient: Tensor) -> None:
        assert block.shape == gradient.shape == (len(numbers[which]), V)
        gradient.copy_(target[numbers[which]])

    gradients = source.carry_back(numbers, fill)
    real = numbers[numbers < B * L]
    value = (by_hand(source)[real] * target[real]).sum()
    expected = torch.autograd.grad(value, source.inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)
    unvisited = torch.ones(B * L, dtype=torch.bool)
    unvisited[real] = False
    assert not gradients[0].flatten(0, 1)[unvisited].any()


def test_garbage_at_a_dummy_reaches_no_weight(monkeypatch):
    """What a dummy reads is the last row, which may be padding."""
    monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    hidden = randn(B, L, H)
    hidden[-1, -1] = torch.nan
    weight = randn(V, H, seed=1)
    for softcap in (None, 2.0):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        source = HeadRows(*leaves, None, scale=1.0, softcap=softcap)
        gradients = source.carry_back(
            torch.tensor([0, B * L]),
            lambda which, _, out: out.copy_((torch.arange(2)[which] == 0).unsqueeze(-1).double()),
        )
        assert all(gradient.isfinite().all() for gradient in gradients), softcap


@pytest.mark.parametrize("name", ["tensor_contiguous", "head_contiguous", "head_transposed"])
def test_the_version_follows_the_inputs(name):
    source = make(name)
    before = source.version
    assert source.version == before
    for tensor in source.inputs:
        tensor.mul_(2.0)
        assert source.version != before
        before = source.version
    expected = by_hand(source)
    torch.testing.assert_close(source.read(torch.arange(B * L)), expected, rtol=1e-13, atol=1e-13)
    with torch.inference_mode():
        assert make(name).version is None
