"""`Logits.log_mass` against the logarithm of a sum over a dense softmax."""

import pytest
import torch
from torch import Tensor

from ctkd import rows as rows_module
from ctkd.dense_logits import DenseLogits
from ctkd.errors import BatchError

B, S, V, HEAD = 3, 5, 11, 13
MASK = torch.arange(S) < torch.tensor([[5], [3], [0]])
COLUMNS = torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor([0, 4, 5, 10]), True)
READINGS = ("one_block", "small_blocks", "padding_too", "padding_too_in_small_blocks")


@pytest.fixture(params=READINGS, autouse=True)
def reading(request, monkeypatch) -> str:
    """How rows are read: in one block or several, with or without those that are not scored."""
    if "small" in request.param:
        monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * V + 3})
    if "padding" in request.param:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    return request.param


def padded_head(dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits with two columns too many, and with nan behind the mask."""
    generator = torch.Generator().manual_seed(3)
    logits = 2.0 * torch.randn(B, S, HEAD, generator=generator, dtype=torch.float64)
    return logits.masked_fill(~MASK.unsqueeze(-1), torch.nan).to(dtype).requires_grad_()


def dense_answer(logits: Tensor, temperature: float, columns: Tensor = COLUMNS) -> Tensor:
    scored = logits[..., :V].double().masked_fill(~MASK.unsqueeze(-1), 0.0)
    mass = (scored / temperature).softmax(-1)[..., columns].sum(-1)
    return mass.log().masked_fill(~MASK, 0.0)


def weigh(answer: Tensor) -> Tensor:
    return (answer * torch.linspace(1.0, 2.0, B * S, dtype=torch.float64).view(B, S)).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_value_and_gradient_are_those_of_a_dense_softmax(temperature):
    leaf = padded_head()
    answer = DenseLogits(leaf, mask=MASK, vocab_size=V).log_mass(COLUMNS, temperature=temperature)
    expected = dense_answer(leaf, temperature)
    torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-14)
    assert (answer[MASK] < 0).all()
    (gradient,) = torch.autograd.grad(weigh(answer), leaf)
    (expected_gradient,) = torch.autograd.grad(weigh(expected), leaf)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
    assert (gradient[..., V:] == 0).all()


def test_packed_rows_get_their_own_gradients():
    leaf = padded_head()
    order = torch.tensor([4, 2, 0, 1, 3])
    source = leaf.detach()[:, order.argsort()].requires_grad_()
    logits = DenseLogits(source, mask=MASK, rows=order.expand(B, S).clone(), vocab_size=V)
    (gradient,) = torch.autograd.grad(weigh(logits.log_mass(COLUMNS)), source)
    (expected,) = torch.autograd.grad(weigh(dense_answer(leaf, 1.0)), leaf)
    torch.testing.assert_close(gradient[:, order], expected, rtol=1e-11, atol=1e-14)


def test_finite_differences():
    leaf = padded_head().detach()[:1].requires_grad_()

    def answer(tensor: Tensor) -> Tensor:
        return DenseLogits(tensor, mask=MASK[:1], vocab_size=V).log_mass(COLUMNS, temperature=1.5)

    torch.autograd.gradcheck(answer, leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes(dtype):
    leaf = padded_head(dtype)
    answer = DenseLogits(leaf, mask=MASK, vocab_size=V).log_mass(COLUMNS)
    expected = dense_answer(leaf, 1.0)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(weigh(answer), leaf)
    (expected_gradient,) = torch.autograd.grad(weigh(expected), leaf)
    assert gradient.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-5)


def test_a_mass_too_small_for_a_probability():
    leaf = torch.tensor([[[0.0, -2000.0, -2000.0]]], dtype=torch.float64, requires_grad=True)
    answer = DenseLogits(leaf).log_mass(torch.tensor([False, True, True]))
    assert answer.item() == pytest.approx(-2000 + 0.6931471805599453, rel=1e-12)
    (gradient,) = torch.autograd.grad(answer.sum(), leaf)
    assert gradient.flatten().tolist() == pytest.approx([-1.0, 0.5, 0.5], rel=1e-9)


def test_all_columns_hold_everything_and_none_nothing():
    logits = DenseLogits(padded_head(), mask=MASK, vocab_size=V)
    everything = torch.ones(V, dtype=torch.bool)
    assert logits.log_mass(everything).abs().max() < 1e-14
    assert (logits.log_mass(~everything)[MASK] == -torch.inf).all()


def test_it_runs_on_the_meta_device():
    leaf = padded_head(torch.float32).detach().to("meta").requires_grad_()
    logits = DenseLogits(leaf, mask=MASK.to("meta"), vocab_size=V)
    answer = logits.log_mass(COLUMNS.to("meta"))
    (gradient,) = torch.autograd.grad(answer.sum(), leaf)
    assert answer.shape == (B, S) and answer.device.type == "meta"
    assert gradient.shape == leaf.shape


@pytest.mark.parametrize("columns", [torch.ones(HEAD, dtype=torch.bool), torch.ones(V)], ids=str)
def test_columns_of_another_vocabulary_are_refused(columns):
    with pytest.raises(BatchError, match=r"columns must be a bool tensor of \(11,\)"):
        DenseLogits(padded_head(), mask=MASK, vocab_size=V).log_mass(columns)
