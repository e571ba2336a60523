"""`HeadLogits` answers what the whole logits that the head makes answer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ctkd.batch import Side
from ctkd.errors import BatchError, SettingError
from ctkd.logits import DenseLogits, HeadLogits, RowLogits
from tests.logits.cases import (
    COLUMNS,
    DIFFERENTIABLE,
    ENGINES,
    HEADS,
    MASK,
    QUERIES,
    B,
    H,
    Naive,
    S,
    V,
    head_leaves,
    ids_of,
    in_turn,
    leaf_of,
    materialized,
    randn,
    weighed,
)

LAYOUTS = ("plain", "garbage", "cut_head", "packed_rows", "not_contiguous")
PACKED = torch.tensor([[7, 0, 3, 8, 2], [4, 5, 1, 0, 0], [0, 1, 2, 3, 4]])
# Logits of a bfloat16 head are bfloat16 before anything is asked of them.
EXACT = [name for name in ENGINES if name != "bfloat16"]


def build(
    head: str, layout: str, dtype: torch.dtype
) -> tuple[list[tuple[Tensor, Tensor]], HeadLogits, Naive]:
    """Leaves with their twins in float64, what is under test, and the naive logits of the twins."""
    shape = {"not_contiguous": (S, B, H), "packed_rows": (B, S + 4, H)}.get(layout, (B, S, H))
    hidden = randn(*shape)
    if layout == "garbage":
        hidden = hidden.masked_fill(~MASK.unsqueeze(-1), torch.nan)
    width = V + 2 if layout in ("cut_head", "packed_rows") else V
    values = [hidden, randn(width, H, seed=50)]
    if "bias" in head:
        values.append(randn(width, seed=51))
    leaves = [leaf_of(value, dtype) for value in values]
    inputs, twins = ([pair[side] for pair in leaves] for side in (0, 1))
    settings = {"mask": MASK, "vocab_size": V if width > V else None}
    if layout == "not_contiguous":
        inputs[0], twins[0] = inputs[0].transpose(0, 1), twins[0].transpose(0, 1)
    if layout == "packed_rows":
        settings["rows"] = PACKED
        twins[0] = torch.stack([twins[0][b, PACKED[b]] for b in range(B)])
    if layout == "garbage":
        twins[0] = twins[0].masked_fill(~MASK.unsqueeze(-1), 0.0)
    logits = HeadLogits(*inputs, **HEADS[head], **settings)
    return leaves, logits, Naive(materialized(*twins, **HEADS[head])[..., :V], MASK)


@pytest.mark.parametrize(
    ("query", "engine", "head", "layout"),
    [
        (query, engine, head, LAYOUTS[(number + number // 5) % 5])
        for number, (query, engine, head) in enumerate(in_turn(QUERIES, EXACT, others=HEADS))
    ],
    indirect=["engine"],
)
def test_queries(query, engine, head, layout):
    leaves, logits, naive = build(head, layout, engine.dtype)
    answer, expected = (QUERIES[query](one) for one in (logits, naive))
    engine.agree(answer, expected)
    assert expected.abs().max() > 0
    assert answer.requires_grad == (query in DIFFERENTIABLE)
    if query in DIFFERENTIABLE:
        inputs, twins = ([pair[side] for pair in leaves] for side in (0, 1))
        wanted = torch.autograd.grad(weighed(expected), twins)
        assert all(gradient.abs().max() > 1e-3 for gradient in wanted)
        # The second pass goes through a graph that was kept.
        for kept in (True, False):
            gradients = torch.autograd.grad(weighed(answer), inputs, retain_graph=kept)
            engine.agree(gradients, wanted)


def test_bfloat16():
    """No further off than a few roundings of bfloat16 logits, whatever is added up."""
    for query in DIFFERENTIABLE.values():
        leaves, logits, naive = build("bias", "plain", torch.bfloat16)
        answer, expected = query(logits), query(naive)
        assert answer.dtype == torch.float32
        torch.testing.assert_close(answer.double(), expected, rtol=2**-5, atol=2**-5)
        inputs, twins = ([pair[side] for pair in leaves] for side in (0, 1))
        wanted = torch.autograd.grad(weighed(expected), twins)
        gradients = torch.autograd.grad(weighed(answer), inputs)
        for gradient, right in zip(gradients, wanted, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert (gradient.double() - right).norm() < 2**-5 * right.norm()


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["hidden", "weight", "bias"])
@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
def test_frozen_tensors_get_no_gradient(frozen, engine):
    for query in ("log_probs", "log_mass", "per_row"):
        leaves, logits, naive = build("all_bias", "plain", engine.dtype)
        trained = [pair for number, pair in enumerate(leaves) if number != frozen]
        wanted = torch.autograd.grad(weighed(QUERIES[query](naive)), [x for _, x in trained])
        leaves[frozen][0].requires_grad_(False)
        weighed(QUERIES[query](logits)).backward()
        assert leaves[frozen][0].grad is None
        engine.agree([leaf.grad for leaf, _ in trained], wanted)


def test_a_weight_that_thaws_gets_a_gradient():
    leaves, logits, naive = build("all_bias", "plain", torch.float32)
    (_, (weight, twin), _) = leaves
    ids = ids_of(1, logits)
    wanted = torch.autograd.grad(naive.log_probs(ids).sum(), twin)
    weight.requires_grad_(False)
    logits.log_probs(ids).sum().backward()
    weight.requires_grad_()
    logits.log_probs(ids).sum().backward()
    ENGINES["float32"].agree((weight.grad,), wanted)


@pytest.mark.parametrize(
    ("changed", "layout"), [(0, "plain"), (0, "not_contiguous"), (1, "plain"), (2, "plain")]
)
def test_answers_are_new_after_something_changed(changed, layout):
    leaves, logits, _ = build("all_bias", layout, torch.float32)
    ids = ids_of(1, logits)
    logits.log_probs(ids)
    with torch.no_grad():
        leaves[changed][0].mul_(-1.7)
    inputs = [leaf.detach().double() for leaf, _ in leaves]
    if layout == "not_contiguous":
        inputs[0] = inputs[0].transpose(0, 1)
    naive = Naive(materialized(*inputs, **HEADS["all_bias"]), MASK)
    ENGINES["float32"].agree(logits.log_probs(ids), naive.log_probs(ids))


def test_gradcheck():
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        logits = HeadLogits(*tensors, scale=0.25, softcap=2.0)
        probs = logits.log_probs_at(ids_of(1, logits), (1.3, 2.6))
        return *probs, logits.log_mass(COLUMNS), QUERIES["two_parts"](logits)[:, 0]

    assert torch.autograd.gradcheck(function, head_leaves("all_bias"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
def test_without_gradients(mode, engine):
    for query in QUERIES.values():
        _, logits, naive = build("all_bias", "plain", engine.dtype)
        expected = query(naive)
        with mode():
            answer = query(logits)
            assert not answer.requires_grad
            engine.agree(answer, expected)
        engine.agree(query(logits), expected)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_another_dtype(hidden_dtype):
    leaves, _, naive = build("bias", "plain", torch.float64)
    other = torch.bfloat16 if hidden_dtype == torch.float32 else torch.float32
    inputs = [
        twin.detach().to(other if number else hidden_dtype).requires_grad_()
        for number, (_, twin) in enumerate(leaves)
    ]
    ids = ids_of(1, naive)
    answer = HeadLogits(*inputs, mask=MASK).log_probs(ids)
    # Logits of up to 8 are rounded to bfloat16, or made of numbers that are.
    torch.testing.assert_close(answer.double(), naive.log_probs(ids), rtol=0.05, atol=0.05)
    answer.sum().backward()
    wanted = torch.autograd.grad(naive.log_probs(ids).sum(), [twin for _, twin in leaves])
    for leaf, right in zip(inputs, wanted, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - right).norm() / right.norm() < 0.05


@pytest.mark.parametrize("backward_too", [False, True])
def test_under_autocast(backward_too):
    """Gradients are no further off than those of logits from a linear layer."""
    hidden, weight = randn(1, 40, 64), randn(500, 64, seed=2)
    ids = torch.randint(500, (1, 40, 1), generator=torch.Generator().manual_seed(3))

    def gradients(make: Callable[[Tensor, Tensor], RowLogits], dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            value = make(*leaves).log_probs(ids).sum()
            if backward_too:
                value.backward()
        if not backward_too:
            value.backward()
        return [leaf.grad.double() for leaf in leaves]

    def by_layer(*leaves: Tensor) -> DenseLogits:
        return DenseLogits(torch.nn.functional.linear(*leaves))

    found, of_layer = gradients(HeadLogits, torch.float32), gradients(by_layer, torch.float32)
    for one, other, right in zip(found, of_layer, gradients(by_layer, torch.float64), strict=True):
        assert (one - right).norm() < 1.5 * (other - right).norm()


def test_a_head_with_a_scale_rounds_once():
    hidden, weight = (randn(*size, seed=len(size)).bfloat16() for size in ((2, 5, 8), (30, 8)))
    ids = torch.randint(30, (2, 5, 1), generator=torch.Generator().manual_seed(3))
    leaf = hidden.clone().requires_grad_()
    HeadLogits(leaf, weight, scale=0.3).log_probs(ids).sum().backward()
    # The logits, rounded as the head rounds them, and their exact gradient, rounded once.
    logits = ((hidden @ weight.T) * 0.3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).gather(2, ids).sum(), logits)
    expected = (0.3 * gradient).bfloat16() @ weight
    # What lies between two bfloat16 may go either way; rounding twice changes a third of all.
    assert (leaf.grad == expected).double().mean() > 0.9


@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_at_all(shape, engine):
    hidden = torch.zeros(*shape, H, dtype=engine.dtype, requires_grad=True)
    weight = torch.ones(V, H, dtype=engine.dtype).requires_grad_()
    logits = HeadLogits(hidden, weight)
    answer = logits.log_probs(torch.zeros(shape[0], 1, 2, dtype=torch.int64))
    (answer.sum() + logits.log_mass(COLUMNS).sum()).backward()
    assert answer.shape == (*shape, 2) and logits.top_ids(2).shape == (*shape, 2)
    assert torch.equal(logits.column_mass(), torch.zeros(shape[0], V))
    assert not weight.grad.any() and hidden.grad.shape == hidden.shape


def test_on_the_meta_device():
    for name, query in QUERIES.items():
        leaves = [leaf.detach().to("meta").requires_grad_() for leaf in head_leaves("all_bias")]
        logits = HeadLogits(*leaves, mask=MASK.to("meta"), **HEADS["all_bias"])
        _, twin, _ = build("bias", "plain", torch.float64)
        answer, expected = query(logits), query(twin)
        assert (answer.shape, answer.dtype) == (expected.shape, expected.dtype)
        assert answer.is_meta
        if name in DIFFERENTIABLE:
            gradients = torch.autograd.grad(answer.sum(), leaves)
            assert [one.shape for one in gradients] == [leaf.shape for leaf in leaves]


FITTING = {"hidden": torch.zeros(1, 2, 3), "weight": torch.zeros(5, 3)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": torch.zeros(2, 3)}, r"\(B, L, H\) .* \(V, H\), got \(2, 3\) and \(5, 3\)"),
        ({"weight": torch.zeros(3, 5)}, r"got \(1, 2, 3\) and \(3, 5\)"),
        ({"weight": torch.zeros(15)}, r"got \(1, 2, 3\) and \(15,\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(V,\), \(5,\), got \(3,\)"),
        ({"hidden": torch.zeros(1, 2, 3, dtype=torch.int64)}, "hidden states must be floating"),
        ({"weight": torch.zeros(5, 3, dtype=torch.int64)}, "weight must be floating point, got"),
        ({"bias": torch.zeros(5, dtype=torch.bool)}, "bias must be floating point, got torch.bool"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight is on meta, the hidden .* on cpu"),
        ({"vocab_size": 6}, "the tokenizer has 6 tokens, but the logits only 5 columns"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask must be .*\(1, 2\), got \(1, 3\)"),
        ({"mask": torch.ones(1, 2)}, "mask must be a bool tensor, got torch.float32"),
    ],
)
def test_bad_inputs_are_refused(settings, message):
    with pytest.raises(BatchError, match=message):
        HeadLogits(**{**FITTING, **settings})


@pytest.mark.parametrize("setting", ["scale", "softcap"])
def test_bad_numbers_are_refused(setting):
    for value in (0.0, -1.0, float("inf"), float("nan"), "1"):
        with pytest.raises(SettingError, match=f"{setting} must be a finite number above 0, got"):
            HeadLogits(**FITTING, **{setting: value})


def test_packed_logits_are_not_packed_again():
    labels = torch.tensor([[-100, 1]])
    side = Side.from_causal_lm(HeadLogits(**FITTING), labels)
    with pytest.raises(BatchError, match="packed already"):
        Side.from_causal_lm(side.logits, labels[:, :1])
