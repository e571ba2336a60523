"""Row losses by Triton kernels, against the reference in float64."""

import itertools

import numpy
import pytest
import torch

from ctkd.losses.bpm import BPM
from ctkd.losses.gold import GOLD
from ctkd.losses.shared_kl import SharedKL
from ctkd.losses.uld import ULD
from ctkd.ops import Rows
from ctkd.ops.cuda import row_losses
from ctkd.tokenizers import Continuations, PlaceholderPair
from tests.ops.cuda.row_pairs import (
    DTYPES,
    Tokens,
    check,
    check_without_gradient,
    logits_of,
    row_loss_of,
)

by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter takes as long for a small tile as for a large one."""
    monkeypatch.setattr(row_losses, "_COLUMNS", 1 << 12)
    monkeypatch.setattr(row_losses, "_CLASSES", 1 << 13)
    monkeypatch.setattr(row_losses, "_GROUP", 256)


def count_at_once(monkeypatch, dtype) -> None:
    """All classes of a row in one tile."""
    monkeypatch.setattr(row_losses, "_CLASSES", 1 << (16 if dtype == torch.float16 else 14))


def with_masked_columns(block):
    block[0, ::3] = -torch.inf
    return block


@by_dtype
def test_shared_kl(dtype):
    kinds = [("forward", "renormalize"), ("jsd", "class")]
    if dtype == torch.float32:
        kinds += [("forward", "class"), ("reverse", "class"), ("jsd", "renormalize")]
    for seed, (direction, rest) in enumerate(kinds):
        pair = Tokens(9001, 7000, 4000)
        loss = row_loss_of(SharedKL(pair=pair, rest=rest, direction=direction, temperature=1.3))
        student, teacher = logits_of(dtype, 2, 9001, seed), logits_of(dtype, 2, 7000, 10 + seed)
        with_masked_columns(student)
        with_masked_columns(teacher.flip(0))
        check(row_losses.shared_kl, loss, student, teacher)
        check_without_gradient(row_losses.shared_kl, loss, student[:1], teacher[:1])


def test_shared_kl_of_no_rows_of_one_column_and_of_large_logits():
    loss = row_loss_of(SharedKL(pair=Tokens(1, 1, 1), direction="jsd"))
    empty = Rows(torch.empty(0, 1), None, 1)
    assert row_losses.shared_kl(empty, empty, loss.settings, None, empty).values.shape == (0, 1)
    one = torch.tensor([[1e30], [-torch.inf]])
    assert (check(row_losses.shared_kl, loss, one, one.flip(0)) == 0).all()
    large = logits_of(torch.float32, 2, 50, 0, scale=1e30)
    for rest in ("renormalize", "class"):
        loss = row_loss_of(SharedKL(pair=Tokens(50, 50, 20), direction="reverse", rest=rest))
        check(row_losses.shared_kl, loss, large, large.flip(1))


def test_shared_kl_of_equal_rows_is_0():
    ids = torch.arange(300)
    for direction in ("forward", "reverse", "jsd"):
        loss = row_loss_of(SharedKL(pair=Tokens(500, 500, 300), direction=direction))
        loss.settings.update(student_ids=ids, teacher_ids=ids)
        rows = Rows(logits_of(torch.bfloat16, 2, 500, 0), None, 500)
        out = Rows(torch.empty(2, 500, dtype=torch.bfloat16), None, 500)
        values = row_losses.shared_kl(rows, rows, loss.settings, None, out).values
        assert (values == 0).all() and (out.tensor == 0).all()


class Words(PlaceholderPair):
    """A teacher of whose tokens most begin with few of the student's."""

    student_size, teacher_size = 901, 250
    # Of inner entries: many, few, one.
    ends = (0, 200, 210, 211)

    def prefix_student_ids(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 800, (self.teacher_size,), generator=generator)
        ids[: self.teacher_size // 2] = 7
        return torch.where(torch.arange(self.teacher_size) % 9 == 0, -1, ids)

    def continuations(self):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randperm(self.teacher_size, generator=generator)[: self.ends[-1]]
        ids = torch.randint(0, 30, tokens.shape, generator=generator)
        parts = [ids[a:b].sort().values for a, b in itertools.pairwise(self.ends)]
        none = Continuations.none(self.student_size, self.teacher_size)
        return none._replace(teacher_ids=tokens, student_ids=torch.cat(parts))


@by_dtype
def test_bpm(dtype, monkeypatch):
    monkeypatch.setattr(row_losses, "_ENTRIES", 64)
    pair = Words()
    whole = [[0, pair.teacher_size]]
    inner = [[pair.teacher_size + end for end in ends] for ends in itertools.pairwise(pair.ends)]
    for rest, temperature in (("class", 1.3), ("renormalize", 0.7)):
        loss = row_loss_of(BPM(pair=pair, rest=rest, temperature=temperature))
        if rest == "renormalize":
            whole[0][1] -= int((pair.prefix_student_ids() < 0).sum())
        ranges = torch.tensor(whole + inner[:1] + inner + whole)
        student, teacher = logits_of(dtype, 6, 901, 0), logits_of(dtype, 6, 250, 1)
        with_masked_columns(student)
        with_masked_columns(teacher.flip(0))
        # Of the last inner row the teacher expects nearly nothing.
        student[4, ::5] = torch.nan
        teacher[4, loss.settings["teacher_ids"][ranges[4, 0]]] = -20.0
        values = check(row_losses.bpm, loss, student, teacher, ranges)
        assert values[4] == 0 and (values[[0, 1, 2, 3, 5]] > 0).all()
        first = student[:1], teacher[:1], ranges[:1]
        check_without_gradient(row_losses.bpm, loss, *first)


@by_dtype
def test_uld(dtype, monkeypatch):
    if dtype == torch.float16:
        monkeypatch.setattr(row_losses, "_CLASSES", 1 << 15)
    loss = ULD(student_temperature=0.8, teacher_temperature=2.5)
    for seed, (width, other_width) in enumerate([(5001, 4000), (4000, 5001)]):
        student, teacher = logits_of(dtype, 2, width, seed), logits_of(dtype, 2, other_width, 9)
        with_masked_columns(student)
        with_masked_columns(teacher.flip(0))
        check(row_losses.uld, row_loss_of(loss, other_width), student, teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uld_of_stored_rows(dtype):
    loss = row_loss_of(ULD(), 3000)
    student = logits_of(dtype, 3, 3000, 0)
    probs = logits_of(torch.float32, 3, 2700, 1).softmax(-1)[:, :80]
    tails = torch.tensor([[1e-4, 2920.0], [0.5, 2.0], [0.0, 0.0]])
    check(row_losses.uld, loss, student, probs, tails)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uld_of_tied_entries(dtype, monkeypatch):
    """Of equal entries those in lower columns have the lower ranks, across tiles and groups."""
    monkeypatch.setattr(row_losses, "_COLUMNS", 256)
    monkeypatch.setattr(row_losses, "_GROUP", 128)
    count_at_once(monkeypatch, dtype)
    student = logits_of(dtype, 3, 601, 0).mul(0.5).round()
    teacher = logits_of(dtype, 3, 550, 1).mul(0.5).round()
    # All equal, against few values, and the same values in another order.
    student[1] = 0.75
    student[2, :550], student[2, 550:] = teacher[2].flip(0), -torch.inf
    loss = row_loss_of(ULD(), 550)
    values = check(row_losses.uld, loss, student, teacher)
    assert values[2] == 0
    check_without_gradient(row_losses.uld, loss, student[:1], teacher[:1])
    check(row_losses.uld, row_loss_of(ULD(), 601), teacher[:1], student[:1])


@by_dtype
def test_uld_of_no_rows_of_one_column_and_of_large_logits(dtype, monkeypatch):
    count_at_once(monkeypatch, dtype)
    loss = row_loss_of(ULD(), 1)
    empty = Rows(torch.empty(0, 1, dtype=dtype), None, 1)
    assert row_losses.uld(empty, empty, loss.settings, None, empty).values.shape == (0, 1)
    one = torch.tensor([[3e4], [-3e4]], dtype=dtype)
    assert (check(row_losses.uld, loss, one, one.flip(0)) == 0).all()
    largest = 6e4 if dtype == torch.float16 else 1e30
    student = logits_of(torch.float32, 4, 50, 0)
    student[0, :7], student[1, 3:6] = largest, -largest
    # Nothing but large negative ones, two of them the largest.
    student[2] = -largest
    student[2, 10:12] = -largest / 2
    student[3] *= largest / 10
    student = student[1:] if dtype == torch.float16 else student
    teacher = student.flip(0)[:, :40].to(dtype)
    check(row_losses.uld, row_loss_of(ULD(), 40), student.to(dtype), teacher)


def test_uld_of_rows_that_are_not_numbers(monkeypatch):
    for dtype in DTYPES:
        count_at_once(monkeypatch, dtype)
        student = logits_of(dtype, 3, 50, 0)
        student[0, 3], student[1, 4], student[2] = torch.nan, torch.inf, -torch.inf
        out = Rows(torch.empty(3, 50, dtype=dtype), None, 50)
        rows = Rows(student, None, 50), Rows(logits_of(dtype, 3, 50, 1), None, 50)
        settings = row_loss_of(ULD(), 50).settings
        with numpy.errstate(invalid="ignore"):
            values = row_losses.uld(*rows, settings, None, out).values
        assert values.isnan().all() and out.tensor.isnan().all()


def test_gold(monkeypatch):
    count_at_once(monkeypatch, torch.bfloat16)
    student, teacher = logits_of(torch.bfloat16, 2, 3001, 0), logits_of(torch.bfloat16, 2, 2500, 1)
    with_masked_columns(student)
    with_masked_columns(teacher.flip(0))
    # Ties on both sides.
    student[1], teacher[0] = student[1].round(), teacher[0].round()
    log_scales = torch.tensor([[-0.5, -1.0], [0.25, -0.125]])
    for beta, weights, scaled in (
        (0.5, (0.4, 0.6), True),
        (0.0, (1.0, 0.0), True),
        (1.0, (0.0, 2.0), False),
    ):
        loss = row_loss_of(
            GOLD(
                pair=Tokens(3001, 2500, 1200),
                beta=beta,
                student_temperature=1.3,
                matched_weight=weights[0],
                unmatched_weight=weights[1],
            )
        )
        check(row_losses.gold, loss, student, teacher, log_scales if scaled else None, scaled)


def test_gold_of_all_or_no_columns_and_of_large_logits(monkeypatch):
    count_at_once(monkeypatch, torch.bfloat16)
    student = logits_of(torch.bfloat16, 3, 60, 0)
    student[0, 5:9], student[1, ::2], student[2] = 1e30, -1e30, -1e30
    for shared in (0, 50):
        loss = row_loss_of(
            GOLD(pair=Tokens(60, 50, shared), matched_weight=0.5, unmatched_weight=0.5)
        )
        check(row_losses.gold, loss, student, student.flip(0)[:, :50])


def test_declared_costs_leave_room_for_cross_entropy():
    """2,048 rows of Qwen's and Llama's widths: what the whole loss may move, less 2.5 GB."""
    index, dtype = torch.empty(2048, dtype=torch.int64, device="meta"), torch.bfloat16
    student, teacher, out = (
        Rows(torch.empty(2048, width, dtype=dtype, device="meta"), index, width)
        for width in (151_936, 128_256, 151_936)
    )
    ids = index.new_empty(110_000)
    settings = {
        "student_temperature": 1.0,
        "teacher_temperature": 1.0,
        "student_ids": ids,
        "student_others": None,
        "beta": 0.0,
        "shared": ids.shape[0],
        "matched_weight": 0.5,
        "unmatched_weight": 0.5,
        "in_image": ids,
        "teacher_ids": ids,
    }
    for name, bound in (("uld", 3.3e9), ("shared_kl", 3.3e9), ("gold", 4.0e9), ("bpm", 4.0e9)):
        values = getattr(row_losses, name)(student, teacher, settings, None, out).values
        assert values.device.type == "meta"
        cost = getattr(row_losses, f"{name}_cost")(student, teacher, settings, None, out)
        assert cost.launches <= 8
        # Everything is read, and the gradient written.
        assert 2.3e9 < cost.bytes_moved <= bound
        assert cost.scratch <= 0.05 * out.tensor.nbytes
