"""Rows of tensors and of heads: chunks of them, entries of them, and their gradients."""

import pytest
import torch
from torch import Tensor

from ctkd import ops
from ctkd.logits.sources import HeadRows, RowSource, TensorRows, version_of
from tests.ops.reading import READINGS, read_by

B, L, H, V = 2, 4, 3, 5
LAYOUTS = {
    "contiguous": lambda width: randn(B, L, width),
    "transposed": lambda width: randn(L, B, width).transpose(0, 1),
    "sliced": lambda width: randn(B, L + 1, width)[:, :-1],
    "expanded": lambda width: randn(B, 1, width).expand(B, L, width),
    "strided": lambda width: randn(B, L, 2 * width)[..., ::2],
}
INDEXES = {
    "all": list(range(B * L)),
    "run": [2, 3, 4, 5],
    "scattered": [7, 0, 3],
    "nothing": [],
    "none of them": [0, -1, 5, -1],
    "last none": [6, 7, -1],
}
by_kind = pytest.mark.parametrize("kind", ["tensor", "head"])
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(kind: str, layout: str) -> RowSource:
    if kind == "tensor":
        return TensorRows(LAYOUTS[layout](V))
    weight, bias = randn(V, H, seed=1).requires_grad_(), randn(V, seed=2).requires_grad_()
    return HeadRows(LAYOUTS[layout](H).requires_grad_(), weight, bias, scale=0.5, softcap=2.0)


def by_hand(source: RowSource) -> Tensor:
    """All rows, (B * L, V)."""
    if isinstance(source, TensorRows):
        return source.inputs[0].reshape(-1, V)
    hidden, weight, bias = source.inputs
    return 2.0 * torch.tanh(0.5 * (hidden.reshape(-1, H) @ weight.T + bias) / 2.0)


def entries(source, index, ids):
    """Chosen entries: log-probabilities of which no normalizer is taken."""
    zeros = torch.zeros(1, index.numel(), dtype=source.dtype, device=source.device)
    return source.chosen_log_probs(index.flatten(), ids, index.shape[1], zeros, (1.0,))[0]


def agree(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@by_kind
@by_layout
def test_rows_are_read(kind, layout, monkeypatch):
    for reading in READINGS:
        read_by(monkeypatch, reading)
        source = make(kind, layout)
        whole = by_hand(source).detach()
        for numbers in map(torch.tensor, INDEXES.values()):
            index = numbers.to(torch.int64)
            real, seen = index >= 0, torch.zeros(len(index), dtype=torch.bool)
            for which, rows in source.chunks(index, V - 1):
                inner = torch.arange(len(index))[which]
                for some, block in rows.blocks():
                    place = inner[some]
                    here = real[place]
                    agree(block[here], whole[index[place[here]], : V - 1])
                    seen[place] = True
            # Those that are none may be left out, or given as any row that is none.
            assert seen[real].all()
            ids = torch.tensor([[0, 4, 4]]).expand(len(index), 3)
            agree(
                entries(source, index[None], ids[None])[0, real], whole[index[real]][:, [0, 4, 4]]
            )
        groups, ids = torch.tensor([[0, 3, 1], [7, -1, 4]]), torch.tensor([[1, 2], [4, 0]])
        picked = entries(source, groups, ids[:, None])
        assert picked.shape == (2, 3, 2)
        for group, position in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
            agree(picked[group, position], whole[groups[group, position], ids[group]])


@pytest.mark.parametrize("reading", READINGS)
def test_what_a_head_computes_where_there_is_no_row_is_no_row(reading, monkeypatch):
    read_by(monkeypatch, reading)
    source, index = make("head", "contiguous"), torch.tensor([3, -1, 0, -1, 5])
    mass = torch.zeros(1, V, dtype=torch.float64)
    for which, rows in source.chunks(index, V):
        sequence = torch.zeros_like(index)[which]
        mass += ops.column_mass(rows, sequence, 1, [1.0])[0]
    agree(mass[0], by_hand(source).detach()[[3, 0, 5]].softmax(-1).sum(0))


def test_narrow_rows_are_widened():
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        tensor = randn(B, L, V).to(narrow)
        source = TensorRows(tensor)
        assert source.dtype == torch.float32
        ((_, rows),) = source.chunks(torch.tensor([0, 5]), V)
        assert rows.tensor.data_ptr() == tensor.data_ptr()
        assert torch.equal(rows.read(), tensor.flatten(0, 1)[[0, 5]].float())
        entry = entries(source, torch.tensor([[1]]), torch.tensor([[[2]]])).item()
        assert entry == tensor[0, 1, 2].item()


@by_kind
@by_layout
def test_gradients(kind, layout, monkeypatch):
    for reading in READINGS:
        with monkeypatch.context() as patch:
            read_by(patch, reading)
            source = make(kind, layout)
            buffer = source.gradient_buffer(torch.arange(2))
            # A head keeps one if all its rows are computed together.
            assert (buffer is None) == (kind == "head" and "small_blocks" in reading)
            for numbers in map(torch.tensor, INDEXES.values()):
                check_gradients(source, numbers.to(torch.int64), None)
                if kind == "head" and buffer is not None:
                    check_gradients(source, numbers.to(torch.int64), buffer.fill_(torch.nan))


def check_gradients(source: RowSource, index: Tensor, buffer: Tensor | None) -> None:
    target = randn(B * L + 1, V, seed=4)
    target[-1] = 0.0

    def write(which, rows, out) -> None:
        out.write(slice(None), target[index[which]])

    gradients = source.backward(index, write, buffer)
    real = index[index >= 0]
    if isinstance(source, TensorRows):
        expected = torch.zeros(B * L, V, dtype=torch.float64)
        expected[real] = target[real]
        agree(gradients[0].flatten(0, 1), expected)
        return
    value = (by_hand(source)[real] * target[real]).sum()
    agree(gradients, torch.autograd.grad(value, source.inputs))


@pytest.mark.parametrize("reading", ["one_block", "device"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_garbage_where_there_is_no_row_reaches_no_weight(softcap, reading, monkeypatch):
    read_by(monkeypatch, reading)
    hidden = randn(B, L, H)
    # What is read for none of the rows is the first or the last.
    hidden[-1, -1] = hidden[0, 0] = torch.nan
    leaves = [hidden.requires_grad_(), randn(V, H, seed=1).requires_grad_()]
    source = HeadRows(*leaves, None, scale=1.0, softcap=softcap)
    index = torch.tensor([1, -1])
    for buffer in (None, torch.full((B * L + 1, V), torch.nan, dtype=torch.float64)):
        gradients = source.backward(
            index,
            lambda which, _, out: out.write(
                slice(None), (index[which] == 1).unsqueeze(-1).double().expand(-1, V)
            ),
            buffer,
        )
        assert all(gradient.isfinite().all() for gradient in gradients)


@by_kind
def test_the_version_follows_the_inputs(kind):
    source = make(kind, "contiguous")
    before = version_of(source.inputs)
    assert version_of(source.inputs) == before
    for tensor in source.inputs:
        with torch.no_grad():
            tensor.mul_(2.0)
        assert version_of(source.inputs) != before
        before = version_of(source.inputs)
    with torch.inference_mode():
        assert version_of(make(kind, "contiguous").inputs) is None


def test_a_weight_of_another_dtype_gets_its_gradient_part_by_part(monkeypatch):
    """A vocabulary larger than what is multiplied at a time."""
    hidden, weight = randn(1, 2, H).float(), randn((1 << 14) + 7, H, seed=1).bfloat16()
    source = HeadRows(
        hidden.requires_grad_(), weight.requires_grad_(), None, scale=1.0, softcap=None
    )
    target = randn(2, len(weight), seed=2).float()
    _, gradient = source.backward(
        torch.arange(2), lambda which, _, out: out.write(slice(None), target[which]), None
    )
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, (target.T @ hidden[0].detach()).bfloat16())
