"""Every loss with `HeadLogits` gives what it gives with the logits that the head makes."""

import pytest
import torch

from ctkd import HeadLogits
from ctkd.batch import Batch
from ctkd.testing import make_inputs
from tests.head_inputs import (
    HEADS,
    H,
    Leaves,
    make_leaves,
    materialised,
    numbers_of,
    randn,
    read_by,
)
from tests.losses.test_stored_teacher import build, forms
from tests.ragged_batches import ragged_inputs
from tests.rounding import rounding


def agree(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def with_heads(
    inputs: dict, sides: str, head: str = "all", *, garbage: bool = False
) -> tuple[dict, dict, dict[str, Leaves]]:
    """The inputs with heads on some sides, the same with tensors, and the leaves of each side."""
    heads, dense, all_leaves = dict(inputs), dict(inputs), {}
    settings = {**numbers_of(head), **({"softcap": 5.0} if "softcap" in HEADS[head] else {})}
    for side in ("student", "teacher"):
        logits, labels = inputs[f"{side}_logits"], inputs[f"{side}_labels"]
        hidden = 3.0 * randn(*logits.shape[:2], H, seed=len(side))
        scored = (labels != -100).roll(-1, 1).unsqueeze(-1)
        if garbage:
            hidden = hidden.masked_fill(~scored, torch.nan)
        leaves = make_leaves(hidden, logits.shape[2], bias="bias" in HEADS[head], seed=len(side))
        all_leaves[side] = leaves
        # Two graphs, of which each is differentiated once.
        for made in (dense, heads):
            whole = {**leaves, "hidden": leaves["hidden"].masked_fill(~scored, 0.0)}
            made[f"{side}_logits"] = materialised(**whole, **settings)
        if sides in (side, "both"):
            heads[f"{side}_logits"] = HeadLogits(**leaves, **settings)
    return heads, dense, all_leaves


@forms("rows", "top_k", "observed")
@pytest.mark.parametrize(
    ("sides", "reading", "garbage"),
    [
        ("student", "one_block", False),
        ("teacher", "one_block", False),
        ("both", "small_blocks", True),
        ("both", "padding_too_in_small_blocks", False),
        ("both", "padding_too", True),
    ],
)
def test_every_loss(name, settings, sides, reading, garbage, monkeypatch):
    read_by(monkeypatch, reading)
    heads, dense, leaves = with_heads(ragged_inputs(0), sides, garbage=garbage)
    loss = build(name, settings)
    output, expected = (loss(Batch.from_causal_lm(**inputs)) for inputs in (heads, dense))
    agree((output.value, output.count), (expected.value, expected.count))
    agree(output.parts, expected.parts)
    wanted = torch.autograd.grad(expected.value, list(leaves["student"].values()))
    assert all(gradient.abs().max() > 1e-4 for gradient in wanted)
    output.value.backward()
    agree([leaf.grad for leaf in leaves["student"].values()], list(wanted))
    assert all(leaf.grad is None for leaf in leaves["teacher"].values())


@forms("rows", "top_k", "observed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(name, settings, dtype):
    heads, dense, leaves = with_heads(ragged_inputs(1), "both", "bias")
    loss = build(name, settings)
    narrow = {side: {k: v.detach().to(dtype) for k, v in leaves[side].items()} for side in leaves}
    wide = {side: {k: v.double() for k, v in narrow[side].items()} for side in leaves}
    for side in leaves:
        # Logits as narrow as the hidden states: which of two is larger may depend on that.
        rounded = narrow[side]["hidden"] @ narrow[side]["weight"].T + narrow[side]["bias"]
        exact = materialised(**{k: v.requires_grad_() for k, v in wide[side].items()})
        dense[f"{side}_logits"] = exact + (rounded.double() - exact).detach()
        inputs = {k: v.requires_grad_() for k, v in narrow[side].items()}
        heads[f"{side}_logits"] = HeadLogits(**inputs)
    output, expected = (loss(Batch.from_causal_lm(**inputs)) for inputs in (heads, dense))
    assert output.value.dtype == torch.float32
    agree(output.value.double(), expected.value, 1e-5 if dtype == torch.float32 else 5e-3)
    wanted = torch.autograd.grad(expected.value, list(wide["student"].values()))
    gradients = torch.autograd.grad(output.value, list(narrow["student"].values()))
    for gradient, right in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype and gradient.isfinite().all()
        error = (gradient.double() - right).norm() / right.norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.02), error


@forms("rows", "top_k", "observed")
@pytest.mark.parametrize("reading", ["one_block", "small_blocks", "padding_too_in_small_blocks"])
def test_narrow_tensors_are_read_as_the_same_numbers_in_float32(
    name, settings, reading, monkeypatch
):
    """Blocks are widened one after another in the same place."""
    read_by(monkeypatch, reading)
    loss, found = build(name, settings), {}
    for dtype in (torch.bfloat16, torch.float32):
        inputs = ragged_inputs(2)
        for side in ("student", "teacher"):
            inputs[f"{side}_logits"] = inputs[f"{side}_logits"].detach().bfloat16().to(dtype)
        leaf = inputs["student_logits"].requires_grad_()
        value = loss(Batch.from_causal_lm(**inputs)).value
        value.backward()
        assert leaf.grad.dtype == dtype
        found[dtype] = value, leaf.grad.float()
    (value, gradient), (expected, wanted) = found.values()
    assert wanted.abs().max() > 1e-4
    # Widened rows lie otherwise in memory, so that sums and powers may round otherwise.
    torch.testing.assert_close(value, expected, rtol=rounding(torch.float32, 11), atol=0)
    # A gradient is rounded once when it is known, and once when it has its weight.
    torch.testing.assert_close(gradient, wanted, rtol=2**-7, atol=1e-9)


@forms("rows", "top_k", "observed")
def test_on_the_meta_device(name, settings):
    if str(settings.get("matching")).startswith("assignment"):
        pytest.skip("scipy needs numbers")
    if settings.get("alignment") == "dtw":
        settings = {**settings, "alignment": "chunk"}
    inputs = make_inputs(dtype=torch.float32, device="meta")
    leaves = {}
    for side in ("student", "teacher"):
        width = inputs[f"{side}_logits"].shape[2]
        weight, bias = (torch.zeros(width, *more, device="meta") for more in ((4,), ()))
        leaves[side] = [inputs[f"{side}_hidden"], weight, bias]
        leaves[side] = [leaf.detach().requires_grad_() for leaf in leaves[side]]
        inputs[f"{side}_logits"] = HeadLogits(*leaves[side], scale=0.5, softcap=3.0)
    output = build(name, settings, (7, 5)).to("meta")(Batch.from_causal_lm(**inputs))
    assert output.value.is_meta and output.count.is_meta
    output.value.backward()
    for leaf in leaves["student"]:
        assert leaf.grad.is_meta and leaf.grad.shape == leaf.shape
