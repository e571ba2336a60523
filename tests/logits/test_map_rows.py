"""Functions of whole rows of both sides, their parts and numbers per row, against autograd."""

import pytest
import torch
from torch import Tensor

from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, HeadLogits, TopK, TopKLogits, map_rows
from ctkd.logits.sources import TensorRows
from ctkd.ops import RowLoss
from tests.logits.cases import (
    ENGINES,
    HEADS,
    B,
    Engine,
    H,
    S,
    T,
    V,
    W,
    head_leaves,
    in_turn,
    leaf_of,
    materialized,
    randn,
)
from tests.ops.reading import read_by

# Flattened positions; the student's first row is used, and some lack a side.
POSITIONS = torch.tensor([[0, 7], [-1, -1], [1, 0], [3, -1], [-1, 2], [5, 1], [6, 11], [14, 7]])
KEPT = (POSITIONS >= 0).all(-1)
N = len(POSITIONS)


def three_parts(student: Tensor, teacher: Tensor, per_row: Tensor) -> Tensor:
    """Three numbers per row that depend on everything, and not linearly."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    both = (student[:, :W] + per_row[:, :1] - teacher).square().mean(-1)
    scaled = (student.exp() * per_row[:, 1:].exp()).square().sum(-1)
    return torch.stack([both, scaled, (per_row.prod(-1) * teacher[:, 0]).tanh()], dim=-1)


def two_parts(student: Tensor, teacher: Tensor) -> Tensor:
    gap = student.softmax(-1)[:, :W] - teacher.softmax(-1)
    return torch.stack([gap.abs().sum(-1), gap.square().sum(-1)], dim=-1)


THREE, TWO = RowLoss("", three_parts, parts=3), RowLoss("", two_parts, parts=2)


def teacher_of(
    kind: str, dtype: torch.dtype
) -> tuple[DenseLogits | HeadLogits | TopKLogits, Tensor]:
    """A teacher, differentiable where it can be, and its rows (B * T, W) in float64."""
    if kind == "head":
        hidden, weight = randn(B, T, H, seed=1).to(dtype), randn(W, H, seed=2).to(dtype)
        dense = hidden.double() @ weight.double().T
        return HeadLogits(hidden.requires_grad_(), weight.requires_grad_()), dense.flatten(0, 1)
    tensor = randn(B, T, W, seed=1).to(dtype)
    dense = tensor.double().flatten(0, 1)
    if kind == "stored":
        logits = DenseLogits(tensor)
        labels = torch.zeros(B, T, dtype=torch.int64)
        return TopKLogits(TopK.of(logits, labels, W, [1.0])), dense
    return DenseLogits(tensor.requires_grad_()), dense


class Sides:
    """Both sides, numbers per row, and their twins in float64."""

    def __init__(self, student: str, teacher: str, dtype: torch.dtype) -> None:
        values = [randn(B, S, V)] if student == "dense" else head_leaves("all_bias")
        pairs = [leaf_of(value.detach(), dtype) for value in values]
        self.leaves, self.twins = ([pair[side] for pair in pairs] for side in (0, 1))
        if student == "dense":
            self.student, dense = DenseLogits(*self.leaves), self.twins[0]
        else:
            self.student = HeadLogits(*self.leaves, **HEADS["all_bias"])
            dense = materialized(*self.twins, **HEADS["all_bias"])
        self.rows = dense.flatten(0, 1)
        self.teacher, self.teacher_rows = teacher_of(teacher, dtype)
        statistics = torch.promote_types(dtype, torch.float32)
        self.numbers, self.number_twins = leaf_of(randn(N, 2, seed=2), statistics)

    def expected(self, loss: RowLoss) -> Tensor:
        """The parts of all rows, by indexing."""
        rows = self.rows[POSITIONS[KEPT, 0]], self.teacher_rows[POSITIONS[KEPT, 1]]
        answers = loss.function(*rows, *([self.number_twins[KEPT]] if loss is THREE else []))
        parts = answers.new_zeros(N, loss.parts)
        return parts.index_put((KEPT.nonzero()[:, 0],), answers)

    def map(self, loss: RowLoss):
        numbers = self.numbers if loss is THREE else None
        return map_rows(self.student, self.teacher, POSITIONS, loss, per_row=numbers)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "engine"),
    in_turn(
        ["three", "two"],
        ["dense", "head"],
        ["dense", "head", "stored"],
        others=[name for name in ENGINES if name != "bfloat16"],
    ),
    indirect=["engine"],
)
def test_values_and_gradients(loss, student, teacher, engine):
    loss = THREE if loss == "three" else TWO
    sides = Sides(student, teacher, engine.dtype)
    values, parts = sides.map(loss)
    expected = sides.expected(loss)
    engine.agree([parts, values], [expected.detach(), expected.sum(-1)])
    assert not parts.requires_grad and (parts[~KEPT] == 0).all() and (parts[KEPT] != 0).all()
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    inputs, twins = list(sides.leaves), list(sides.twins)
    if loss is THREE:
        inputs, twins = [*inputs, sides.numbers], [*twins, sides.number_twins]
    wanted = torch.autograd.grad((expected.sum(-1) * weights).sum(), twins)
    assert all((gradient != 0).any() for gradient in wanted)
    # The second and the third pass go through a graph that was kept.
    for kept in (True, True, False):
        gradients = torch.autograd.grad((values * weights).sum(), inputs, retain_graph=kept)
        engine.agree(gradients, wanted)
    if loss is THREE:
        assert (gradients[-1][~KEPT] == 0).all()


@pytest.mark.parametrize("student", ["dense", "head"])
def test_the_teacher_gets_no_gradient(student):
    for teacher in ("dense", "head"):
        sides = Sides(student, teacher, torch.float32)
        sides.map(THREE).values.sum().backward()
        assert all(leaf.grad is not None for leaf in (*sides.leaves, sides.numbers))
        assert all(one.requires_grad and one.grad is None for one in sides.teacher.source.inputs)


@pytest.mark.parametrize("student", ["dense", "head"])
@pytest.mark.parametrize("differentiated", ["student", "numbers"])
def test_gradients_into_one_of_the_two(differentiated, student):
    engine, sides = ENGINES["float32"], Sides(student, "dense", torch.float32)
    if differentiated == "student":
        sides.numbers.requires_grad_(False)
        inputs, twins = sides.leaves, sides.twins
    else:
        for leaf in sides.leaves:
            leaf.requires_grad_(False)
        inputs, twins = [sides.numbers], [sides.number_twins]
    wanted = torch.autograd.grad(sides.expected(THREE).sum(), twins)
    engine.agree(torch.autograd.grad(sides.map(THREE).values.sum(), inputs), wanted)


def refuse(*_: object) -> None:
    raise RuntimeError("memory for a gradient was made")


def test_a_frozen_student_gets_no_memory_for_a_gradient(monkeypatch):
    sides = Sides("dense", "dense", torch.float32)
    sides.leaves[0].requires_grad_(False)
    monkeypatch.setattr(TensorRows, "gradient_buffer", refuse)
    sides.map(THREE).values.sum().backward()
    assert sides.numbers.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(mode, monkeypatch):
    sides = Sides("dense", "dense", torch.float32)
    monkeypatch.setattr(TensorRows, "gradient_buffer", refuse)
    with mode():
        values, parts = sides.map(THREE)
    assert not values.requires_grad
    ENGINES["float32"].agree(parts, sides.expected(THREE).detach())
    with pytest.raises(RuntimeError, match="memory for a gradient"):
        sides.map(THREE)


@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
def test_numbers_that_come_from_the_logits_themselves(engine):
    sides = Sides("dense", "dense", engine.dtype)
    ids = torch.arange(B * S).view(B, S, 1) % V

    def numbers(log_probs: Tensor) -> Tensor:
        return torch.stack([log_probs.flatten()[:N], log_probs.flatten()[4 : 4 + N]], dim=-1)

    sides.numbers = numbers(sides.student.log_probs(ids))
    sides.number_twins = numbers(sides.twins[0].log_softmax(-1).gather(2, ids))
    wanted = torch.autograd.grad(sides.expected(THREE).sum(), sides.twins)
    engine.agree(torch.autograd.grad(sides.map(THREE).values.sum(), sides.leaves), wanted)


def test_a_plain_function_will_do():
    sides = Sides("dense", "dense", torch.float32)
    values, parts = map_rows(
        sides.student,
        sides.teacher,
        POSITIONS,
        lambda *arguments: three_parts(*arguments).sum(-1),
        per_row=sides.numbers,
    )
    ENGINES["float32"].agree(values, sides.expected(THREE).sum(-1))
    assert torch.equal(parts, values.detach().unsqueeze(-1))


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_garbage_in_rows_that_are_left_out_reaches_nothing(engine):
    # A position that is left out may be read at row 0.
    positions = torch.where(POSITIONS == 0, 4, POSITIONS)
    student, teacher = randn(B * S, V).to(engine.dtype), randn(B * T, W).to(engine.dtype)
    for tensor, rows in ((student, positions[KEPT, 0]), (teacher, positions[KEPT, 1])):
        unused = torch.ones(len(tensor), dtype=torch.bool).index_fill(0, rows, False)
        assert unused[0]
        tensor[unused] = torch.nan
    numbers = randn(N, 2).float()
    numbers[~KEPT] = torch.nan
    student = student.view(B, S, V).requires_grad_()
    numbers.requires_grad_()
    values, parts = map_rows(
        DenseLogits(student),
        DenseLogits(teacher.view(B, T, W)),
        positions,
        THREE,
        per_row=numbers,
    )
    assert values.isfinite().all() and parts.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), (student, numbers)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits(dtype):
    engine, sides = Engine(dtype, "one_block"), Sides("dense", "dense", dtype)
    values, parts = sides.map(THREE)
    expected = sides.expected(THREE)
    assert values.dtype == parts.dtype == torch.float32
    engine.agree(parts, expected.detach())
    inputs = (*sides.leaves, sides.numbers)
    gradients = torch.autograd.grad(values.sum(), inputs)
    assert gradients[0].dtype == dtype and gradients[1].dtype == torch.float32
    wanted = torch.autograd.grad(expected.sum(), (*sides.twins, sides.number_twins))
    engine.agree(gradients[0], wanted[0], narrow=True)
    engine.agree(gradients[1], wanted[1])


@pytest.mark.parametrize("student", ["dense", "head"])
@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
def test_no_positions_at_all(student, engine):
    sides = Sides(student, "dense", engine.dtype)
    for positions in (POSITIONS[:0], torch.full((3, 2), -1)):
        numbers = torch.zeros(len(positions), 2, dtype=engine.dtype)
        values, parts = map_rows(sides.student, sides.teacher, positions, THREE, per_row=numbers)
        assert values.shape == (len(positions),) and parts.shape == (len(positions), 3)
        assert not values.any()
        for gradient in torch.autograd.grad(values.sum(), sides.leaves):
            assert not gradient.any()


@pytest.mark.parametrize("student", ["dense", "head"])
def test_on_the_meta_device(student):
    inputs = [leaf.detach().to("meta").requires_grad_() for leaf in head_leaves("bias")]
    logits = HeadLogits(*inputs)
    if student == "dense":
        inputs = [torch.zeros(B, S, V, device="meta", requires_grad=True)]
        logits = DenseLogits(*inputs)
    numbers = torch.zeros(N, 2, device="meta", requires_grad=True)
    teacher = DenseLogits(torch.zeros(B, T, W, device="meta"))
    values, parts = map_rows(logits, teacher, POSITIONS.to("meta"), THREE, per_row=numbers)
    assert values.shape == (N,) and parts.shape == (N, 3)
    for _ in range(2):
        gradients = torch.autograd.grad(values.sum(), (*inputs, numbers), retain_graph=True)
        assert [one.shape for one in gradients] == [one.shape for one in (*inputs, numbers)]
        assert {one.device.type for one in gradients} == {"meta"}


@pytest.mark.parametrize("student", ["dense", "head"])
def test_blocks_change_nothing(student, monkeypatch):
    whole = Sides(student, "head", torch.float32)
    expected = torch.autograd.grad(whole.map(THREE).values.sum(), whole.leaves)
    read_by(monkeypatch, "small_blocks")
    sides = Sides(student, "head", torch.float32)
    found = torch.autograd.grad(sides.map(THREE).values.sum(), sides.leaves)
    ENGINES["float32"].agree(found, expected)


def test_a_student_s_rows_and_a_teacher_s_logits_are_needed():
    dense, table, rows = DenseLogits(torch.zeros(1, 2, 5)), object(), torch.tensor([[0, 0]])
    stored = TopKLogits(TopK.of(dense, torch.zeros(1, 2, dtype=torch.int64), 2))
    for student in (table, stored):
        with pytest.raises(BatchError, match=f"as a tensor or .*, got {type(student).__name__}"):
            map_rows(student, dense, rows, TWO)
    for teacher in (table, dense.tensor):
        with pytest.raises(BatchError, match="needs the teacher's Logits, got (object|Tensor)"):
            map_rows(dense, teacher, rows, TWO)
