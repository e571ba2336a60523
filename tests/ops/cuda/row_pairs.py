"""Pairs of rows for tests of row losses, and the comparison with the reference."""

import functools

import torch

from ctkd.divergences import LOG_FLOOR
from ctkd.losses.bpm import BPM
from ctkd.losses.gold import GOLD
from ctkd.losses.shared_kl import _BETAS, _LOWEST_LOGIT, SharedKL
from ctkd.losses.uld import ULD
from ctkd.ops import RowLoss, Rows, reference
from ctkd.tokenizers import PlaceholderPair

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILL = 7.0
# Rounding of what is written. The interpreter cuts off what bfloat16 has no digits for.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
# The spacing of the smallest numbers.
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}


class Tokens(PlaceholderPair):
    """Vocabularies that share some tokens, in no order."""

    def __init__(self, student_size: int, teacher_size: int, shared: int) -> None:
        self.student_size, self.teacher_size, self.shared = student_size, teacher_size, shared

    def shared_ids(self):
        generator = torch.Generator().manual_seed(self.shared)
        return (
            torch.randperm(self.student_size, generator=generator)[: self.shared],
            torch.randperm(self.teacher_size, generator=generator)[: self.shared],
        )


def row_loss_of(loss, teacher_width: int = 0) -> RowLoss:
    """What a loss hands to its backend."""
    if isinstance(loss, ULD):
        settings = {
            "student_temperature": loss.student_temperature,
            "teacher_temperature": loss.teacher_temperature,
        }
        function = functools.partial(loss._distance, teacher_width=teacher_width)
        return RowLoss("uld", function, settings=settings)
    if isinstance(loss, GOLD):
        settings = {
            "student_columns": loss.student_columns,
            "teacher_columns": loss.teacher_columns,
            "shared": loss.shared,
            "student_temperature": float(loss.student_temperature),
            "teacher_temperature": float(loss.teacher_temperature),
            "beta": float(loss.beta),
            "matched_weight": float(loss._weights[0]),
            "unmatched_weight": float(loss._weights[1]),
            "log_floor": LOG_FLOOR,
        }
        return RowLoss("gold", loss._terms, parts=2, settings=settings)
    if isinstance(loss, BPM):
        return loss._row_loss()
    assert isinstance(loss, SharedKL)
    student_others, teacher_others = loss._others()
    settings = {
        "student_ids": loss.student_ids,
        "teacher_ids": loss.teacher_ids,
        "student_others": student_others,
        "teacher_others": teacher_others,
        "temperature": float(loss.temperature),
        "beta": _BETAS[loss.direction],
        "lowest_logit": _LOWEST_LOGIT,
        "log_floor": LOG_FLOOR,
    }
    return RowLoss("shared_kl", loss._divergence, settings=settings)


def logits_of(dtype: torch.dtype, count: int, width: int, seed: int, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, width, generator=generator)).to(dtype)


def scattered(block: torch.Tensor, backwards: bool = False) -> Rows:
    """Rows of a block (n, V) with a -1 among them, last to first in sequences of two with gaps."""
    count, width = block.shape
    tensor = block.new_full(((count + 3) // 2, 2, width + 3), FILL)[:, :, : width + 1]
    numbers = torch.arange(count, 0, -1) if backwards else torch.arange(count)
    tensor[numbers // 2, numbers % 2, :width] = block
    index = torch.cat([numbers[:1], torch.tensor([-1]), numbers[1:]])
    return Rows(tensor, index, width)


def check(operation, loss, student_block, teacher_block, per_row=None, differentiate=False):
    """Hold values and gradients against the reference in float64; return the values."""
    student, teacher = scattered(student_block, backwards=True), scattered(teacher_block)
    dtype, width = student_block.dtype, student_block.shape[1]
    if per_row is not None:
        nothing = torch.nan if per_row.is_floating_point() else 0
        per_row = torch.cat([per_row[:1], torch.full_like(per_row[:1], nothing), per_row[1:]])
    size = student.tensor.shape[:2].numel() + 1, width + 2
    target = Rows(torch.full(size, FILL, dtype=dtype), student.index, size[1])
    answer = operation(student, teacher, loss.settings, per_row, target, differentiate)
    exact_target = Rows(target.tensor.new_empty(size, dtype=torch.float64), target.index, size[1])
    sides = [Rows(one.tensor.double(), one.index, one.width) for one in (student, teacher)]
    numbers = per_row
    if per_row is not None and per_row.is_floating_point():
        numbers = per_row.double()
    exact = reference.row_loss(loss, *sides, numbers, exact_target, differentiate)
    torch.testing.assert_close(
        answer.values.double(), exact.values, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert (answer.values[1] == 0).all()
    rows = student.index[student.index >= 0]
    gradient, exact_gradient = target.tensor[rows].double(), exact_target.tensor[rows]
    bound = exact_gradient.nan_to_num().abs().amax(1, keepdim=True)
    error = (gradient - exact_gradient).abs()
    # Sums of all of a row's terms, which may cancel, are right to a few units of float32.
    allowed = ROUNDOFF[dtype] * exact_gradient.abs() + 1e-5 * bound + 2.0**-23 + SMALLEST[dtype]
    is_wrong = (error > allowed) | (gradient.isnan() != exact_gradient.isnan())
    assert not is_wrong.any(), (error.max(), bound, is_wrong.nonzero()[:8])
    untouched = torch.ones(size[0] - 1, dtype=torch.bool).index_fill_(0, rows, False)
    assert (target.tensor[:-1][untouched] == FILL).all()
    if differentiate:
        torch.testing.assert_close(
            answer.per_row_gradient[:, 0].double(),
            exact.per_row_gradient[:, 0],
            rtol=1e-5,
            atol=1e-5,
        )
    return answer.values[student.index >= 0]


def check_without_gradient(operation, loss, student_block, teacher_block, per_row=None) -> None:
    """Values do not depend on whether a gradient is wanted."""
    student, teacher = Rows(student_block, None, student_block.shape[1]), scattered(teacher_block)
    teacher = teacher[teacher.index >= 0]
    out = Rows(torch.empty_like(student_block), None, student.width)
    values = operation(student, teacher, loss.settings, per_row, out).values
    without = operation(student, teacher, loss.settings, per_row).values
    torch.testing.assert_close(without, values, rtol=1e-6, atol=1e-7)
