"""Compiled loops say what the general way says, and read rows where they lie."""

import sys

import pytest
import torch

from ctkd import Batch, DenseLogits, HeadLogits, compiled
from ctkd.compiled import RowArray, has_kernels, is_readable
from ctkd.errors import BatchError
from ctkd.sorting import stable_top_ids, top_of
from tests.core.test_head_losses import with_heads
from tests.core.test_threads import torch_threads
from tests.losses.test_stored_teacher import build, forms
from tests.ragged_batches import loss_and_gradient, ragged_inputs


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


def columns_apart(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 2, generator=generator)[..., 0]


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


def test_rows_beyond_the_reach_of_32_bits():
    # Only the last columns of this are ever memory.
    wide = torch.empty(3, 2**30 + 1, dtype=torch.bfloat16)
    wide[2, -4:] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    last = RowArray.of(wide[:, -4:]).some(slice(2, 3))
    assert last.starts.tolist() == [2**31 + 2]
    ids, entries = top_of(last, 4, 2)
    assert (ids.tolist(), entries.tolist()) == ([[1, 2]], [[3.0, 2.0]])


@pytest.mark.parametrize(
    ("device", "dtype", "there_may_be"),
    [("cpu", torch.float32, True), ("cpu", torch.float64, False), ("meta", torch.float32, False)],
)
def test_where_there_are_compiled_loops(device, dtype, there_may_be):
    there_are = there_may_be and compiled._has_numba()
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


@pytest.fixture
def fresh_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("name", "settings"), [("uld", {}), ("gold", {}), ("shared_kl", {})])
def test_columns_beyond_the_tokenizer_get_no_gradient(name, settings, fresh_memory_is_nan):
    inputs = ragged_inputs(3, V=70, W=55, head=3, dtype=torch.float32)
    _, _, gradient = loss_and_gradient(build(name, settings, (70, 55)), inputs)
    assert gradient[..., :70].any() and not gradient[..., 70:].any()


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
        torch.testing.assert_close(found, expected)


@forms("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_backward_pass(name, settings, dtype):
    """What the first one used up is made again, with as many parts of every value."""
    inputs = ragged_inputs(3, V=70, W=55, head=3, dtype=dtype)
    logits = inputs["student_logits"].requires_grad_()
    value = build(name, settings, (70, 55))(Batch.from_causal_lm(**inputs)).value
    (first,) = torch.autograd.grad(value, logits, retain_graph=True)
    (second,) = torch.autograd.grad(value, logits)
    assert torch.equal(first, second) and first.any()


@forms("rows", "top_k", "observed")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(name, settings, dtype):
    inputs = ragged_inputs(3, V=70, W=55, head=3, dtype=torch.float32)
    loss = build(name, settings, (70, 55))

    def run():
        logits = inputs["student_logits"].clone().requires_grad_()
        value = loss(Batch.from_causal_lm(**{**inputs, "student_logits": logits})).value
        value.backward()
        return value, logits.grad

    (expected, wanted), before = run(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        value, gradient = run()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(value, expected) and torch.equal(gradient, wanted)


@forms("rows", "top_k", "observed")
def test_columns_may_lie_apart_in_a_single_sequence(name, settings):
    inputs = ragged_inputs(5, student_lengths=(4,), teacher_lengths=(4,), dtype=torch.float32)
    loss = build(name, settings)
    expected = loss_and_gradient(loss, inputs)
    for side in ("student", "teacher"):
        logits = inputs[f"{side}_logits"]
        inputs[f"{side}_logits"] = logits.transpose(1, 2).contiguous().transpose(1, 2)
    value, count, gradient = loss_and_gradient(loss, inputs)
    is_close(value, expected[0])
    assert torch.equal(count, expected[1])
    is_close(gradient, expected[2])


def test_one_row_of_columns_apart():
    logits = columns_apart(1, 1, 30)
    found = DenseLogits(logits)
    torch.testing.assert_close(
        found.log_probs(torch.arange(30).view(1, 1, -1)), logits.log_softmax(-1)
    )
    assert torch.equal(found.top_ids(30), logits.sort(descending=True).indices)
    assert torch.equal(stable_top_ids(logits[0], 3), logits[0].topk(3).indices)
    with pytest.raises(TypeError, match="side by side"):
        RowArray.of(logits)


def test_more_than_there_is_cannot_be_taken():
    for ask in (
        DenseLogits(torch.randn(1, 1, 5)).top_ids,
        DenseLogits(torch.randn(1, 1, 5)).sorted_probs,
    ):
        with pytest.raises(BatchError, match="largest 6 entries of each row.*5 columns"):
            ask(6)


def test_columns_that_do_not_exist_are_refused_before_anything_is_written():
    # What torch would write past a row it refuses itself.
    pytest.importorskip("numba", exc_type=ImportError)
    logits = torch.randn(1, 2, 9).requires_grad_()
    ids = torch.zeros(1, 2, 1, dtype=torch.int64)
    value = DenseLogits(logits, vocab_size=5).log_probs(ids).sum()
    ids += 6
    with pytest.raises(BatchError, match="from 6 to 6, but the logits have 5"):
        value.backward()


def test_all_columns_hold_everything_whatever_was_asked_before():
    logits = DenseLogits(8.0 * torch.randn(3, 7, 997, generator=torch.Generator().manual_seed(9)))
    first = logits.log_probs(torch.zeros(3, 7, 1, dtype=torch.int64))
    mass = logits.log_mass(torch.ones(997, dtype=torch.bool))
    assert mass.abs().max() < 3e-7
    logits.column_mass(temperature=1.0)
    assert torch.equal(logits.log_probs(torch.zeros(3, 7, 1, dtype=torch.int64)), first)


def test_a_weight_of_0_leaves_out_what_is_no_number():
    inputs = ragged_inputs(3, V=70, W=55, head=0, dtype=torch.float32)
    # An observed token without probability: its logarithm is minus infinity on both sides.
    for side in ("student", "teacher"):
        labels = inputs[f"{side}_labels"]
        place = (labels != -100).nonzero()[-1]
        inputs[f"{side}_logits"][place[0], place[1] - 1, labels[tuple(place)]] = -torch.inf
    for weights in ((0.0, 1.0), (1.0, 0.0)):
        settings = dict(zip(("matched_weight", "unmatched_weight"), weights, strict=True))
        loss = build("gold", {**settings, "merging": "first"}, (70, 55))
        value, _, gradient = loss_and_gradient(loss, inputs)
        assert value.isfinite() and gradient.isfinite().all()
        output = loss(Batch.from_causal_lm(**inputs))
        assert output.parts["matched" if not weights[0] else "unmatched"] == 0


def test_a_head_with_a_scale_rounds_once(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((2, 5, 8), (30, 8))
    )
    ids = torch.randint(30, (2, 5, 1), generator=generator)

    def run():
        leaf = hidden.clone().requires_grad_()
        HeadLogits(leaf, weight, scale=0.3).log_probs(ids).sum().backward()
        return leaf.grad

    # What lies between two bfloat16 may go either way; rounding twice changes a third of all.
    same = run() == generally(monkeypatch, run)
    assert same.double().mean() > 0.9
