"""Compiled loops say what the general way says, and read rows where they lie."""

import sys

import pytest
import torch

from ctkd import Batch, DenseLogits, HeadLogits, compiled
from ctkd.compiled import RowArray, has_kernels, is_readable
from tests.core.test_head_losses import with_heads
from tests.core.test_threads import torch_threads
from tests.losses.test_stored_teacher import build, forms
from tests.ragged_batches import ragged_inputs


def generally(monkeypatch, function):
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "DEVICES_WITH_KERNELS", set())
        return function()


def rows_in(array: RowArray, width: int) -> list[list[float]]:
    return [array.values[start : start + width].tolist() for start in array.starts]


def is_close(actual, expected, dtype=torch.float32):
    actual, expected = actual.detach(), expected.detach()
    rounding = 2e-6 if dtype == torch.float32 else 2**-7
    largest = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=10 * rounding, atol=rounding * largest)


def layouts(logits):
    """The same numbers in other places."""
    wide = torch.zeros(*logits.shape[:2], 3 * logits.shape[2], dtype=logits.dtype)
    wide[..., 4 : 4 + logits.shape[2]] = logits
    yield "contiguous", logits.contiguous()
    yield "part of wider rows", wide[..., 4 : 4 + logits.shape[2]]
    yield "sequences inside", logits.transpose(0, 1).contiguous().transpose(0, 1)
    yield "columns apart", logits.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_found_where_they_lie(dtype):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.tensor([11, 0, 5, 5])
    expected = logits.view(12, 5)[rows]
    for name, other in layouts(logits):
        assert is_readable(other) == (name != "columns apart")
        if is_readable(other):
            array = RowArray.of(other, rows)
            found = torch.from_numpy(array.values)
            found = found.view(dtype) if dtype == torch.bfloat16 else found
            assert found.data_ptr() == other.data_ptr(), name
            for start, row in zip(array.starts, expected, strict=True):
                assert torch.equal(found[start : start + 5], row), name


def test_parts_and_no_rows_at_all():
    block = torch.arange(12.0).view(4, 3)
    array = RowArray.of(block)
    assert rows_in(array, 3) == block.tolist()
    assert rows_in(array.some(slice(1, 3)), 3) == block[1:3].tolist()
    assert rows_in(RowArray.of(block[1:, :2]), 2) == block[1:, :2].tolist()
    assert RowArray.of(torch.empty(0, 5)).values.size == 0
    assert RowArray.of(torch.empty(2, 0, 5), torch.empty(0, dtype=torch.int64)).starts.size == 0


@pytest.mark.parametrize(
    ("device", "dtype", "there_are"),
    [("cpu", torch.float32, True), ("cpu", torch.float64, False), ("meta", torch.float32, False)],
)
def test_where_there_are_compiled_loops(device, dtype, there_are):
    assert has_kernels(torch.device(device), dtype) == there_are


def test_without_numba_everything_goes_the_general_way_and_that_is_told(monkeypatch):
    compiled._has_numba.cache_clear()
    # What numba itself raises where numpy is too new for it is an ImportError as well.
    monkeypatch.setitem(sys.modules, "numba", None)
    try:
        with pytest.warns(UserWarning, match="numba cannot be imported .*; install"):
            assert not has_kernels(torch.device("cpu"), torch.float32)
        logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0))
        found = DenseLogits(logits).log_probs(torch.zeros(1, 2, 1, dtype=torch.int64))
        torch.testing.assert_close(found, logits.log_softmax(-1)[..., :1])
    finally:
        compiled._has_numba.cache_clear()


@forms("rows", "top_k", "observed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loss(name, settings, dtype, monkeypatch):
    inputs = ragged_inputs(3, V=70, W=55, head=3, dtype=dtype)
    loss = build(name, settings, (70, 55))

    def run():
        logits = inputs["student_logits"].clone().requires_grad_()
        output = loss(Batch.from_causal_lm(**{**inputs, "student_logits": logits}))
        output.value.backward()
        return output, logits.grad

    (fast, gradient), (slow, expected) = run(), generally(monkeypatch, run)
    is_close(fast.value, slow.value)
    for part, value in slow.parts.items():
        is_close(fast.parts[part], value)
    assert expected.abs().max() > 1e-5
    is_close(gradient, expected, dtype)
    assert not gradient[..., 70:].any()


@forms("rows", "top_k", "observed")
@pytest.mark.parametrize("head", ["plain", "scale", "softcap"])
def test_every_loss_on_heads(name, settings, head, monkeypatch):
    inputs = ragged_inputs(4, dtype=torch.float32)
    heads, _, leaves = with_heads(inputs, "both", head)
    loss = build(name, settings)
    leaves = {
        side: {k: v.detach().float() for k, v in found.items()} for side, found in leaves.items()
    }

    def run():
        made = dict(heads)
        for side, found in leaves.items():
            there = heads[f"{side}_logits"]
            made[f"{side}_logits"] = HeadLogits(
                **{k: v.requires_grad_() for k, v in found.items()},
                scale=there.source.scale,
                softcap=there.source.softcap,
            )
        value = loss(Batch.from_causal_lm(**made)).value
        return value, torch.autograd.grad(value, list(leaves["student"].values()))

    (value, gradients), (expected, wanted) = run(), generally(monkeypatch, run)
    is_close(value, expected)
    for gradient, right in zip(gradients, wanted, strict=True):
        assert right.abs().max() > 1e-5
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("standardise", [False, True])
def test_questions_in_every_layout(dtype, standardise, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    logits = (3 * torch.randn(2, 6, 40, generator=generator)).to(dtype)
    mask = torch.tensor([[True] * 5 + [False], [True] * 2 + [False] * 4])
    some = torch.tensor([[True, False] * 3, [True] * 6])
    ids = torch.randint(33, (2, 6, 3), generator=generator)
    weight = torch.randn(2, 6, 3, generator=generator)

    def ask(tensor):
        tensor = tensor.detach().requires_grad_()
        asked = DenseLogits(tensor, mask=mask, vocab_size=33)
        mass = asked.column_mass(some, temperature=2.0, standardise=standardise, asked_next=[0.5])
        found = asked.log_probs_at(ids, [2.0, 0.5, 1.0], standardise=standardise)
        sum((weight * one).sum() for one in found).backward()
        return mass, torch.stack(found), tensor.grad, asked.top_ids(7)

    expected = generally(monkeypatch, lambda: ask(logits))
    for name, other in layouts(logits):
        *found, ids_of_top = ask(other)
        for one, right in zip(found[:2], expected, strict=False):
            is_close(one, right)
        is_close(found[2], expected[2], dtype)
        assert torch.equal(ids_of_top, expected[3]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_threads_share_sequences_and_their_rows(threads, sequences):
    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(sequences, 9, 40, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 0, 4, 1, 7])[:sequences].unsqueeze(1)
    expected = DenseLogits(logits.double(), mask=mask).column_mass(temperature=2.0)
    with torch_threads(threads):
        mass = DenseLogits(logits, mask=mask).column_mass(temperature=2.0)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_row_with_nan_costs_nobody_else_anything():
    logits = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(7))
    ids = torch.zeros(2, 3, 1, dtype=torch.int64)
    expected = DenseLogits(logits).log_probs(ids)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = logits.clone()
        spoiled[0, 1] = value
        found = DenseLogits(spoiled).log_probs(ids)
        assert found[0, 1].isnan()
        found[0, 1] = expected[0, 1]
        assert torch.equal(found, expected)
