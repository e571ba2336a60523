"""Losses say of heads what they say of the logits that the heads make, also compiled."""

import pytest
import torch
from torch import Tensor

import ctkd
from ctkd import HeadLogits
from ctkd.batch import Batch
from ctkd.ops import use_backend
from ctkd.testing import make_inputs, make_pair
from tests.logits.cases import ENGINES, HEADS, H, V, W, in_turn, materialized, randn
from tests.logits.losses import LOSSES, loss_of
from tests.ragged_batches import loss_and_gradient, ragged_inputs
from tests.rounding import rounding

Leaves = dict[str, list[Tensor]]


def with_heads(
    dtype: torch.dtype, sides: str, head: str = "all_bias", *, garbage: bool = False
) -> tuple[dict, dict, Leaves, Leaves]:
    """Inputs with heads on some sides, the same in float64 with tensors, and the leaves of both."""
    heads = ragged_inputs(0, V=V, W=W, head=0, dtype=dtype)
    dense, leaves, twins = dict(heads), {}, {}
    numbers = {**HEADS[head], **({"softcap": 5.0} if "softcap" in HEADS[head] else {})}
    for side in ("student", "teacher"):
        labels, width = heads[f"{side}_labels"], heads[f"{side}_logits"].shape[2]
        scored = (labels != -100).roll(-1, 1).unsqueeze(-1)
        values = [3.0 * randn(*labels.shape, H, seed=len(side)), randn(width, H, seed=50)]
        values += [randn(width, seed=51)] if "bias" in head else []
        if garbage:
            values[0] = values[0].masked_fill(~scored, torch.nan)
        leaves[side] = [value.to(dtype).requires_grad_() for value in values]
        twins[side] = [leaf.detach().double().requires_grad_() for leaf in leaves[side]]

        def whole(hidden, *rest, scored=scored):
            return materialized(hidden.masked_fill(~scored, 0.0), *rest, **numbers)

        dense[f"{side}_logits"] = whole(*twins[side])
        heads[f"{side}_logits"] = whole(*leaves[side])
        if sides in (side, "both"):
            heads[f"{side}_logits"] = HeadLogits(*leaves[side], **numbers)
    return heads, dense, leaves, twins


@pytest.mark.parametrize(
    ("case", "engine", "sides"),
    [
        (case, engine, ("student", "both")[(number + number // 4) % 2])
        for number, (case, engine) in enumerate(
            in_turn(LOSSES, others=[name for name in ENGINES if name != "bfloat16"])
        )
    ],
    indirect=["engine"],
)
def test_heads(case, engine, sides):
    heads, dense, leaves, twins = with_heads(engine.dtype, sides, garbage=sides == "both")
    loss = loss_of(case)
    output, expected = (loss(Batch.from_causal_lm(**inputs)) for inputs in (heads, dense))
    engine.agree(
        [output.value, output.count, *output.parts.values()],
        [expected.value, expected.count, *expected.parts.values()],
    )
    wanted = torch.autograd.grad(expected.value, twins["student"])
    assert all(gradient.abs().max() > 1e-4 for gradient in wanted)
    output.value.backward()
    engine.agree([leaf.grad for leaf in leaves["student"]], wanted)
    if sides == "both":
        assert all(leaf.grad is None for leaf in leaves["teacher"])


@pytest.mark.parametrize(
    ("case", "head"), in_turn(LOSSES, others=["plain", "scale", "softcap", "bias"])
)
def test_kernels_and_the_reference_agree_on_heads_and_on_a_head_s_own_tensor(case, head):
    heads, _, leaves, _ = with_heads(torch.float32, "teacher", head)
    loss, found = loss_of(case), []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            value = loss(Batch.from_causal_lm(**heads)).value
            found.append([value, *torch.autograd.grad(value, leaves["student"], retain_graph=True)])
    ENGINES["float32"].agree(*found)


@pytest.mark.parametrize("case", LOSSES)
def test_narrow_heads(case):
    heads, dense, leaves, twins = with_heads(torch.bfloat16, "both", "bias")
    for side in ("student", "teacher"):
        # Logits as narrow as the hidden states: which of two is larger may depend on that.
        hidden, weight, bias = leaves[side]
        rounded = (hidden @ weight.T + bias).detach().double()
        exact = dense[f"{side}_logits"]
        dense[f"{side}_logits"] = exact + (rounded - exact).detach()
    loss = loss_of(case)
    output, expected = (loss(Batch.from_causal_lm(**inputs)) for inputs in (heads, dense))
    assert output.value.dtype == torch.float32
    torch.testing.assert_close(output.value.double(), expected.value, rtol=5e-3, atol=5e-3)
    wanted = torch.autograd.grad(expected.value, twins["student"])
    for gradient, right in zip(
        torch.autograd.grad(output.value, leaves["student"]), wanted, strict=True
    ):
        assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
        assert (gradient.double() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize(
    ("case", "engine"),
    in_turn(LOSSES, others=["bfloat16", "device", "device_in_small_blocks"]),
    indirect=["engine"],
)
def test_narrow_tensors_are_read_as_the_same_numbers_in_float32(case, engine):
    loss, found = loss_of(case), []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = ragged_inputs(2)
        for side in ("student", "teacher"):
            inputs[f"{side}_logits"] = inputs[f"{side}_logits"].bfloat16().to(dtype)
        value, _, gradient = loss_and_gradient(loss, inputs)
        assert gradient.dtype == dtype
        found.append((value, gradient.float()))
    (value, gradient), (expected, wanted) = found
    assert wanted.abs().max() > 1e-4
    # Widened rows lie otherwise in memory, so that sums and powers may round otherwise.
    torch.testing.assert_close(value, expected, rtol=rounding(torch.float32, 11), atol=0)
    # A gradient is rounded once when it is known, and once when it has its weight.
    torch.testing.assert_close(gradient, wanted, rtol=2**-7, atol=1e-9)


def test_columns_may_lie_apart_in_a_single_sequence():
    for case in LOSSES:
        inputs = ragged_inputs(5, student_lengths=(4,), teacher_lengths=(4,), dtype=torch.float32)
        loss = loss_of(case)
        expected = loss_and_gradient(loss, inputs)
        for side in ("student", "teacher"):
            logits = inputs[f"{side}_logits"]
            inputs[f"{side}_logits"] = logits.transpose(1, 2).contiguous().transpose(1, 2)
        ENGINES["float32"].agree(loss_and_gradient(loss, inputs), expected)


def test_heads_on_the_meta_device():
    for case in LOSSES:
        inputs = make_inputs(dtype=torch.float32, device="meta")
        leaves = {}
        for side in ("student", "teacher"):
            width = inputs[f"{side}_logits"].shape[2]
            tensors = [inputs[f"{side}_hidden"]]
            tensors += [torch.zeros(width, *more, device="meta") for more in ((4,), ())]
            leaves[side] = [tensor.detach().requires_grad_() for tensor in tensors]
            inputs[f"{side}_logits"] = HeadLogits(*leaves[side], scale=0.5, softcap=3.0)
        output = loss_of(case, (7, 5)).to("meta")(Batch.from_causal_lm(**inputs))
        assert output.value.is_meta and output.count.is_meta
        output.value.backward()
        for leaf in leaves["student"]:
            assert leaf.grad.is_meta and leaf.grad.shape == leaf.shape


def test_a_weight_of_0_leaves_out_what_is_no_number():
    inputs = ragged_inputs(3, V=70, W=55, head=0, dtype=torch.float32)
    # An observed token without probability: its logarithm is minus infinity on both sides.
    for side in ("student", "teacher"):
        labels = inputs[f"{side}_labels"]
        place = (labels != -100).nonzero()[-1]
        inputs[f"{side}_logits"][place[0], place[1] - 1, labels[tuple(place)]] = -torch.inf
    for weights in ((0.0, 1.0), (1.0, 0.0)):
        settings = dict(zip(("matched_weight", "unmatched_weight"), weights, strict=True))
        loss = ctkd.get_loss("gold", pair=make_pair(70, 55), merging="first", **settings)
        value, _, gradient = loss_and_gradient(loss, inputs)
        assert value.isfinite() and gradient.isfinite().all()
        output = loss(Batch.from_causal_lm(**inputs))
        assert output.parts["matched" if not weights[0] else "unmatched"] == 0
