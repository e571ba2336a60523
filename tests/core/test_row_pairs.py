"""Parts and numbers per pair in `ctkd.row_pairs`, against plain autograd on whole tensors."""

import pytest
import torch
from torch import Tensor

from ctkd import rows as rows_module
from ctkd.block_sizes import VARIABLE
from ctkd.dense_logits import DenseLogits
from ctkd.pair_solvers import RowSolution
from ctkd.row_pairs import map_row_pairs, map_row_pairs_to_parts, solve_row_pairs

B, S, T, V, W = 3, 5, 6, 11, 8
# Flattened positions; the student's first row is used, and one pair lacks each side.
PAIRS = torch.tensor([[0, 7], [-1, -1], [1, 0], [3, -1], [-1, 2], [5, 1], [6, 17], [14, 7]])
KEPT = (PAIRS >= 0).all(-1)
READINGS = ("one_block", "small_blocks", "padding_too", "padding_too_in_small_blocks")


@pytest.fixture(params=READINGS, autouse=True)
def reading(request, monkeypatch) -> str:
    """How pairs are read: in one block or several, with or without those that are left out."""
    if "small" in request.param:
        monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * V + 3})
    if "padding" in request.param:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    return request.param


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_has_as_many_rows(reading, threads, monkeypatch):
    if "small" in reading:
        pytest.skip("as many rows as the test says")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    asked = []

    def solver(student: Tensor, teacher: Tensor, *_) -> RowSolution:
        asked.append(len(student))
        return RowSolution(student.sum(-1, keepdim=True))

    columns = 3001
    monkeypatch.setenv(VARIABLE, str(7 * columns))
    rows = torch.arange(20).unsqueeze(-1).expand(-1, 2)
    sides = [DenseLogits(torch.zeros(1, 20, columns)) for _ in range(2)]
    solve_row_pairs(*sides, rows, solver)
    # A size that was asked for is kept.
    assert asked == [7, 7, 6]
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(rows_module, "block_elements", lambda _: (4 * threads + 1) * columns)
    asked.clear()
    solve_row_pairs(*sides, rows, solver)
    assert asked[0] == 4 * threads and sum(asked) == 20


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def three_parts(student: Tensor, teacher: Tensor, per_pair: Tensor) -> Tensor:
    """Three numbers per pair that depend on everything, and not linearly."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    both = (student[:, :W] + per_pair[:, :1] - teacher).square().mean(-1)
    scaled = (student.exp() * per_pair[:, 1:].exp()).square().sum(-1)
    return torch.stack([both, scaled, (per_pair.prod(-1) * teacher[:, 0]).tanh()], dim=-1)


def two_parts(student: Tensor, teacher: Tensor) -> Tensor:
    gap = student.softmax(-1)[:, :W] - teacher.softmax(-1)
    return torch.stack([gap.abs().sum(-1), gap.square().sum(-1)], dim=-1)


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = randn(B, S, V), randn(B, T, W, seed=1)
    return (
        student.requires_grad_(),
        teacher.requires_grad_(),
        randn(len(PAIRS), 2, seed=2).requires_grad_(),
    )


def plain(student: Tensor, teacher: Tensor, per_pair: Tensor | None) -> Tensor:
    """The parts of all pairs, by indexing."""
    rows = student.flatten(0, 1)[PAIRS[KEPT, 0]], teacher.detach().flatten(0, 1)[PAIRS[KEPT, 1]]
    found = two_parts(*rows) if per_pair is None else three_parts(*rows, per_pair[KEPT])
    return found.new_zeros(len(PAIRS), found.shape[1]).index_put((KEPT.nonzero()[:, 0],), found)


def agree(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("with_numbers", [False, True])
def test_values_and_gradients(with_numbers):
    student, teacher, per_pair = leaves()
    numbers = per_pair if with_numbers else None
    values, parts = map_row_pairs_to_parts(
        DenseLogits(student),
        DenseLogits(teacher),
        PAIRS,
        three_parts if with_numbers else two_parts,
        parts=3 if with_numbers else 2,
        per_pair=numbers,
    )
    expected = plain(student, teacher, numbers)
    agree(parts, expected.detach())
    agree(values, expected.sum(-1))
    assert not parts.requires_grad and (parts[~KEPT] == 0).all() and (parts[KEPT] != 0).all()

    weights = torch.linspace(0.5, 2.0, len(PAIRS), dtype=torch.float64)
    inputs = (student, per_pair) if with_numbers else (student,)
    wanted = torch.autograd.grad((expected.sum(-1) * weights).sum(), inputs)
    assert all((gradient != 0).any() for gradient in wanted)
    # The second and the third pass go through a graph that was kept.
    for kept_graph in (True, True, False):
        gradients = torch.autograd.grad((values * weights).sum(), inputs, retain_graph=kept_graph)
        agree(gradients, wanted)
    if with_numbers:
        assert (gradients[1][~KEPT] == 0).all()


def test_the_teacher_gets_no_gradient():
    student, teacher, per_pair = leaves()
    values, _ = map_row_pairs_to_parts(
        DenseLogits(student), DenseLogits(teacher), PAIRS, three_parts, parts=3, per_pair=per_pair
    )
    values.sum().backward()
    assert student.grad is not None and per_pair.grad is not None and teacher.grad is None


@pytest.mark.parametrize("differentiated", ["student", "per_pair"])
def test_gradients_into_one_of_the_two(differentiated):
    student, teacher, per_pair = leaves()
    leaf = student if differentiated == "student" else per_pair
    student, per_pair = (side if side is leaf else side.detach() for side in (student, per_pair))
    values, _ = map_row_pairs_to_parts(
        DenseLogits(student), DenseLogits(teacher), PAIRS, three_parts, parts=3, per_pair=per_pair
    )
    expected = plain(student, teacher, per_pair).sum(-1)
    agree(
        torch.autograd.grad(values.sum(), leaf),
        torch.autograd.grad(expected.sum(), leaf),
    )


def test_numbers_that_come_from_the_logits_themselves():
    student, teacher, _ = leaves()
    logits = DenseLogits(student)

    def numbers(log_probs: Tensor) -> Tensor:
        return torch.stack([log_probs.flatten()[:8], log_probs.flatten()[4:12]], dim=-1)

    ids = torch.arange(B * S).view(B, S, 1) % V
    values, _ = map_row_pairs_to_parts(
        logits,
        DenseLogits(teacher),
        PAIRS,
        three_parts,
        parts=3,
        per_pair=numbers(logits.log_probs(ids)),
    )
    expected = plain(student, teacher, numbers(student.log_softmax(-1).gather(2, ids)))
    agree(
        torch.autograd.grad(values.sum(), student),
        torch.autograd.grad(expected.sum(), student),
    )


def test_map_row_pairs_takes_numbers_too():
    student, teacher, per_pair = leaves()
    values = map_row_pairs(
        DenseLogits(student),
        DenseLogits(teacher),
        PAIRS,
        lambda *arguments: three_parts(*arguments).sum(-1),
        per_pair=per_pair,
    )
    expected = plain(student, teacher, per_pair).sum(-1)
    agree(values, expected)
    agree(
        torch.autograd.grad(values.sum(), (student, per_pair)),
        torch.autograd.grad(expected.sum(), (student, per_pair)),
    )


def test_garbage_in_rows_that_are_left_out_reaches_nothing():
    student, teacher, per_pair = (leaf.detach() for leaf in leaves())
    # A pair that is left out may be read at row 0.
    pairs = torch.where(PAIRS == 0, 4, PAIRS)
    for tensor, rows, count in ((student, pairs[KEPT, 0], B * S), (teacher, pairs[KEPT, 1], B * T)):
        unused = torch.ones(count, dtype=torch.bool)
        unused[rows] = False
        assert unused[0]
        tensor.flatten(0, 1)[unused] = torch.nan
    per_pair[~KEPT] = torch.nan
    student.requires_grad_()
    per_pair.requires_grad_()
    values, parts = map_row_pairs_to_parts(
        DenseLogits(student), DenseLogits(teacher), pairs, three_parts, parts=3, per_pair=per_pair
    )
    assert values.isfinite().all() and parts.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), (student, per_pair)):
        assert gradient.isfinite().all()


def test_without_gradients():
    student, teacher, per_pair = leaves()
    arguments = DenseLogits(student), DenseLogits(teacher), PAIRS, three_parts
    expected = plain(student, teacher, per_pair)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            values, parts = map_row_pairs_to_parts(*arguments, parts=3, per_pair=per_pair)
            assert not values.requires_grad
            agree(parts, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits(dtype):
    student, teacher, per_pair = (leaf.detach().to(dtype) for leaf in leaves())
    wide = student.double().requires_grad_(), per_pair.double().requires_grad_()
    student.requires_grad_()
    per_pair = per_pair.float().requires_grad_()
    values, parts = map_row_pairs_to_parts(
        DenseLogits(student), DenseLogits(teacher), PAIRS, three_parts, parts=3, per_pair=per_pair
    )
    assert values.dtype == parts.dtype == torch.float32
    expected = plain(wide[0], teacher.double(), wide[1])
    torch.testing.assert_close(parts.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(values.sum(), (student, per_pair))
    assert gradients[0].dtype == dtype and gradients[1].dtype == torch.float32
    wanted = torch.autograd.grad(expected.sum(), wide)
    for gradient, right, rounding in zip(gradients, wanted, (dtype, torch.float32), strict=True):
        tolerance = 1e-2 if rounding == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient.double(), right, rtol=tolerance, atol=1e-5)


def test_no_pairs_at_all():
    student, teacher, _ = leaves()
    values, parts = map_row_pairs_to_parts(
        DenseLogits(student),
        DenseLogits(teacher),
        PAIRS[:0],
        three_parts,
        parts=3,
        per_pair=torch.zeros(0, 2, dtype=torch.float64),
    )
    assert values.shape == (0,) and parts.shape == (0, 3)
    values.sum().backward()
    assert (student.grad == 0).all()


def test_the_meta_device():
    student = torch.zeros(B, S, V, device="meta", requires_grad=True)
    teacher = torch.zeros(B, T, W, device="meta")
    per_pair = torch.zeros(len(PAIRS), 2, device="meta", requires_grad=True)
    values, parts = map_row_pairs_to_parts(
        DenseLogits(student),
        DenseLogits(teacher),
        PAIRS.to("meta"),
        three_parts,
        parts=3,
        per_pair=per_pair,
    )
    assert values.shape == (len(PAIRS),) and parts.shape == (len(PAIRS), 3)
    for _ in range(2):
        gradients = torch.autograd.grad(values.sum(), (student, per_pair), retain_graph=True)
        assert [gradient.shape for gradient in gradients] == [student.shape, per_pair.shape]
        assert {gradient.device.type for gradient in gradients} == {"meta"}
