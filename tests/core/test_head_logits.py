"""`HeadLogits` answers what `DenseLogits` answers on the logits that the head makes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ctkd import HeadLogits
from ctkd.batch import Side
from ctkd.dense_logits import DenseLogits
from ctkd.errors import BatchError, SettingError
from ctkd.pair_solvers import RowSolution
from ctkd.row_logits import RowLogits
from ctkd.row_pairs import map_row_pairs, map_row_pairs_to_parts, solve_row_pairs
from tests.head_inputs import (
    HEADS,
    READINGS,
    H,
    Leaves,
    V,
    make_leaves,
    materialised,
    numbers_of,
    randn,
    read_by,
)

B, S = 3, 5
LENGTHS = (5, 3, 0)
LAYOUTS = ("plain", "garbage", "cut_head", "packed_rows", "not_contiguous")
CASES = [(head, "plain", "small_blocks") for head in HEADS if head != "all"]
CASES += [("all", "plain", reading) for reading in READINGS]
CASES += [("all", layout, reading) for layout in LAYOUTS[1:] for reading in READINGS[1::2]]


def two_of(head: str, layout: str) -> tuple[Leaves, HeadLogits, DenseLogits]:
    """Leaves, what is under test, and the same from a tensor of logits."""
    mask = torch.arange(S) < torch.tensor(LENGTHS).unsqueeze(1)
    shape = (S, B, H) if layout == "not_contiguous" else (B, S, H)
    hidden = randn(B, S + 4, H) if layout == "packed_rows" else randn(*shape)
    if layout == "garbage":
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), torch.nan)
    width = V + 2 if layout in ("cut_head", "packed_rows") else V
    leaves = make_leaves(hidden, width, bias="bias" in HEADS[head])
    settings = {"mask": mask, "vocab_size": V if width > V else None}
    if layout == "packed_rows":
        orders = [torch.randperm(S + 4, generator=torch.Generator().manual_seed(b)) for b in (0, 1)]
        settings["rows"] = torch.stack([*orders, orders[0]])[:, :S]
    inputs = dict(leaves)
    if layout == "not_contiguous":
        inputs["hidden"] = leaves["hidden"].transpose(0, 1)
    logits = HeadLogits(**inputs, **numbers_of(head), **settings)
    if layout == "garbage":
        inputs["hidden"] = leaves["hidden"].masked_fill(~mask.unsqueeze(-1), 0.0)
    return leaves, logits, DenseLogits(materialised(**inputs, **numbers_of(head)), **settings)


KEPT = torch.tensor([[True, False, True, True, False]]).expand(B, S)
COLUMNS = torch.arange(V) % 3 == 1
# Of a sequence's five rows only scored ones, each once; the teacher has four rows.
PAIRS = torch.tensor([[0, 3], [-1, -1], [2, 0], [1, -1], [-1, 2], [5, 1], [7, 7], [4, 7]])


def ids_of(rows: int) -> Tensor:
    ids = torch.randint(V, (B, rows, 4), generator=torch.Generator().manual_seed(3))
    ids[..., 3] = ids[..., 1]
    return ids


def teacher() -> DenseLogits:
    return DenseLogits(randn(B, 4, 8, seed=9))


def squares(student: Tensor, other: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Two parts that depend on everything."""
    probs = student.softmax(-1)[:, :8]
    scale = 1.0 if numbers is None else numbers[:, :1].exp()
    gaps = (scale * probs - other.softmax(-1)).square().sum(-1)
    return torch.stack([gaps, (student * other.sum(-1, keepdim=True)).tanh().mean(-1)], dim=-1)


def per_pair_of(logits: RowLogits) -> Tensor:
    return logits.log_probs(torch.zeros(B, S, 1, dtype=torch.int64))[:, :4].reshape(-1, 1)[:8]


def closed_form(student: Tensor, other: Tensor, numbers: Tensor | None, wanted: bool):
    assert numbers is not None
    first = student[:, :8] * other
    values = torch.stack([first.square().sum(-1), numbers[:, 0] * student.sum(-1)], dim=-1)
    if not wanted:
        return RowSolution(values)
    gradient = numbers[:, :1].expand(student.shape).clone()
    gradient[:, :8] += 2.0 * first * other
    return RowSolution(values, gradient, student.sum(-1, keepdim=True))


def solved(logits: RowLogits) -> Tensor:
    sums, parts = solve_row_pairs(
        logits, teacher(), PAIRS, closed_form, parts=2, per_pair=per_pair_of(logits)
    )
    assert not parts.requires_grad
    return torch.cat([sums.unsqueeze(-1), parts], dim=-1)


def mapped(logits: RowLogits) -> Tensor:
    numbers = per_pair_of(logits)
    sums, parts = map_row_pairs_to_parts(
        logits, teacher(), PAIRS, squares, parts=2, per_pair=numbers
    )
    return torch.cat([sums.unsqueeze(-1), parts], dim=-1)


QUESTIONS = {
    **{
        f"log_probs_at_{temperatures}_{standardise}": (
            lambda x, t=temperatures, s=standardise: torch.stack(
                [y for rows in (1, S) for y in x.log_probs_at(ids_of(rows), t, standardise=s)]
            )
        )
        for temperatures in ((1.0,), (1.0, 2.0), (0.7, 2.0))
        for standardise in (False, True)
    },
    "log_mass": lambda x: x.log_mass(COLUMNS),
    "log_mass_tempered": lambda x: x.log_mass(COLUMNS, temperature=0.7),
    "top_ids": lambda x: x.top_ids(4),
    "column_mass": lambda x: x.column_mass(),
    "column_mass_standardised": lambda x: x.column_mass(
        KEPT, temperature=0.7, standardise=True, asked_next=(2.0,)
    ),
    "column_distance": lambda x: x.column_distance(randn(B, S, 3, seed=2), KEPT, temperature=1.5),
    "whole_rows": lambda x: x.whole_rows(torch.tensor([0, 1, 0]), torch.tensor([4, 2, 0])),
    "sorted_probs": lambda x: x.sorted_probs(V, temperature=2.0),
    "map_row_pairs": lambda x: map_row_pairs(x, teacher(), PAIRS, lambda *y: squares(*y).sum(-1)),
    "map_row_pairs_to_parts": mapped,
    "solve_row_pairs": solved,
}
WITHOUT_GRADIENT = {"top_ids", "column_mass", "column_mass_standardised", "column_distance"}
WITHOUT_GRADIENT |= {"whole_rows"}


def agree(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("head", "layout", "reading"), CASES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_answers(question, head, layout, reading, monkeypatch):
    read_by(monkeypatch, reading)
    leaves, logits, dense = two_of(head, layout)
    answer, expected = (QUESTIONS[question](x) for x in (logits, dense))
    agree(answer, expected)
    assert expected.abs().max() > 0
    assert answer.requires_grad == expected.requires_grad == (question not in WITHOUT_GRADIENT)
    if question in WITHOUT_GRADIENT:
        return
    weights = randn(*expected.shape, seed=5)
    wanted = torch.autograd.grad((expected * weights).sum(), list(leaves.values()))
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted)
    # The second pass goes through a graph that was kept.
    for kept in (True, False):
        gradients = torch.autograd.grad(
            (answer * weights).sum(), list(leaves.values()), retain_graph=kept
        )
        agree(gradients, wanted)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("question", ["log_probs_at_(1.0, 2.0)_False", "log_mass", "mapped"])
def test_frozen_tensors_get_no_gradient(frozen, question):
    leaves, logits, dense = two_of("all", "plain")
    ask = mapped if question == "mapped" else QUESTIONS[question]
    trained = {name: leaf for name, leaf in leaves.items() if name != frozen}
    wanted = torch.autograd.grad(ask(dense).sum(), list(trained.values()))
    leaves[frozen].requires_grad_(False)
    ask(logits).sum().backward()
    assert leaves[frozen].grad is None
    agree([leaf.grad for leaf in trained.values()], list(wanted))


def test_a_weight_that_thaws_gets_a_gradient():
    leaves, logits, dense = two_of("all", "plain")
    ids = ids_of(1)
    wanted = torch.autograd.grad(dense.log_probs(ids).sum(), leaves["weight"])
    leaves["weight"].requires_grad_(False)
    logits.log_probs(ids).sum().backward()
    leaves["weight"].requires_grad_()
    logits.log_probs(ids).sum().backward()
    agree((leaves["weight"].grad,), wanted)


@pytest.mark.parametrize(
    ("changed", "layout"),
    [("hidden", "plain"), ("hidden", "not_contiguous"), ("weight", "plain"), ("bias", "plain")],
)
def test_answers_are_new_after_something_changed(changed, layout):
    leaves, logits, _ = two_of("all", layout)
    ids = ids_of(1)
    logits.log_probs(ids)
    with torch.no_grad():
        leaves[changed].mul_(-1.7)
    inputs = dict(leaves)
    if layout == "not_contiguous":
        inputs["hidden"] = leaves["hidden"].transpose(0, 1)
    dense = DenseLogits(materialised(**inputs, **numbers_of("all")), mask=logits.mask)
    agree(logits.log_probs(ids), dense.log_probs(ids))


def test_gradcheck():
    leaves, _, _ = two_of("all", "plain")
    rows = torch.tensor([[0, 1], [6, 2]])

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        logits = HeadLogits(*tensors, scale=0.25, softcap=2.0)
        return (
            *logits.log_probs_at(ids_of(1), (1.3, 2.6)),
            logits.log_mass(COLUMNS),
            map_row_pairs(logits, teacher(), rows, lambda *y: squares(*y).sum(-1)),
        )

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("question", QUESTIONS)
def test_without_gradients(question, mode):
    _, logits, dense = two_of("all", "plain")
    expected = QUESTIONS[question](dense).detach()
    with mode():
        answer = QUESTIONS[question](logits)
        assert not answer.requires_grad
        agree(answer, expected)
    agree(QUESTIONS[question](logits).detach(), expected)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_another_dtype(hidden_dtype):
    leaves, _, dense = two_of("bias", "plain")
    other = torch.bfloat16 if hidden_dtype == torch.float32 else torch.float32
    inputs = {
        name: leaf.detach().to(hidden_dtype if name == "hidden" else other).requires_grad_()
        for name, leaf in leaves.items()
    }
    answer = HeadLogits(**inputs, mask=dense.mask).log_probs(ids_of(1))
    agree(answer.double(), dense.log_probs(ids_of(1)), 0.05)
    answer.sum().backward()
    wanted = torch.autograd.grad(dense.log_probs(ids_of(1)).sum(), list(leaves.values()))
    for leaf, right in zip(inputs.values(), wanted, strict=True):
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


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_at_all(shape):
    hidden, weight = torch.zeros(*shape, H, requires_grad=True), torch.ones(V, H).requires_grad_()
    logits = HeadLogits(hidden, weight)
    answer = logits.log_probs(torch.zeros(shape[0], 1, 2, dtype=torch.int64))
    (answer.sum() + logits.log_mass(COLUMNS).sum()).backward()
    assert answer.shape == (*shape, 2) and logits.top_ids(2).shape == (*shape, 2)
    assert torch.equal(logits.column_mass(), torch.zeros(shape[0], V))
    assert not weight.grad.any() and hidden.grad.shape == hidden.shape


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
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), "1"])
def test_bad_numbers_are_refused(setting, value):
    with pytest.raises(SettingError, match=f"{setting} must be a finite number above 0, got"):
        HeadLogits(**FITTING, **{setting: value})


def test_packed_logits_are_not_packed_again():
    labels = torch.tensor([[-100, 1]])
    side = Side.from_causal_lm(HeadLogits(**FITTING), labels)
    with pytest.raises(BatchError, match="packed already"):
        Side.from_causal_lm(side.logits, labels[:, :1])
