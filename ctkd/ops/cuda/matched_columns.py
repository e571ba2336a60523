"""Terms of matched columns at aligned positions, a launch each way: operators of torch, in Triton.

The operators are there whether triton is or not: on the meta device they have shapes and costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.cuda.operators import kernel_cost, kernels, nbytes, operator, power_of_two

__all__ = ["sums_at_positions"]

_TILE, _MOST_COLUMNS = 16, 64


def sums_at_positions(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    missing: Tensor,
    student_at: Tensor,
    teacher_at: Tensor,
    valid: Tensor,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Weighted sums over a sequence of ``sum |t - s|`` and of ``-sum t log s``, (B,) each.

    Args:
        student: Log-probabilities (B, S, K) for each of the two; one tensor may be both.
        teacher: Likewise, (B, T, K).
        missing: (B, 1, K) bool, columns without a partner: s is 0, and the second sum skips them.
        student_at: (B, P) int64, no position twice where valid.
        teacher_at: (B, P) int64.
        valid: (B, P) bool.
        weights: Of the two sums.
    """
    ours, theirs = (
        (first, None if second is first else second) for first, second in (student, teacher)
    )
    sums: tuple[Tensor, Tensor] = _Sums.apply(
        *ours, *theirs, missing, student_at, teacher_at, valid, *weights
    )
    return sums


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*given[:8])
        ctx.weights = given[8:]
        ctx.set_materialize_grads(False)
        sums: tuple[Tensor, Tensor] = torch.ops.ctkd.matched_columns(*given)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        if gradients == (None, None):
            return (None,) * 10
        answer = torch.ops.ctkd.matched_columns_backward(*given, *ctx.weights, *gradients)
        return answer[0], None if given[1] is None else answer[1], *(None,) * 8


def _sums(
    student: Tensor,
    log_student: Tensor | None,
    teacher: Tensor,
    log_teacher: Tensor | None,
    missing: Tensor,
    student_at: Tensor,
    teacher_at: Tensor,
    valid: Tensor,
    weight: float,
    log_weight: float,
) -> tuple[Tensor, Tensor]:
    batch = student.shape[0]
    return student.new_empty(batch), student.new_empty(batch)


@operator("matched_columns", _sums)
def _matched_columns(
    student: Tensor,
    log_student: Tensor | None,
    teacher: Tensor,
    log_teacher: Tensor | None,
    missing: Tensor,
    student_at: Tensor,
    teacher_at: Tensor,
    valid: Tensor,
    weight: float,
    log_weight: float,
) -> tuple[Tensor, Tensor]:
    """Sums (B,) of both terms."""
    batch, student_length, width = student.shape
    sums = student.new_empty(batch), student.new_empty(batch)
    student, teacher = student.contiguous(), teacher.contiguous()
    if batch:
        kernels("matched_columns_kernels").matched_columns[(batch,)](
            student,
            teacher,
            student if log_student is None else log_student.contiguous(),
            teacher if log_teacher is None else log_teacher.contiguous(),
            missing.contiguous().view(torch.uint8),
            student_at,
            *student_at.stride(),
            teacher_at,
            *teacher_at.stride(),
            valid.contiguous().view(torch.uint8),
            *sums,
            weight,
            log_weight,
            valid.shape[1],
            student_length,
            teacher.shape[1],
            width,
            TILE=_TILE,
            COLUMNS=_columns(width),
            num_warps=4,
        )
    return sums


def _gradients(
    student: Tensor,
    log_student: Tensor | None,
    teacher: Tensor,
    log_teacher: Tensor | None,
    missing: Tensor,
    student_at: Tensor,
    teacher_at: Tensor,
    valid: Tensor,
    weight: float,
    log_weight: float,
    difference_grad: Tensor | None,
    log_loss_grad: Tensor | None,
) -> Tensor:
    return student.new_empty(1 if log_student is None else 2, *student.shape)


@operator("matched_columns_backward", _gradients)
def _matched_columns_backward(
    student: Tensor,
    log_student: Tensor | None,
    teacher: Tensor,
    log_teacher: Tensor | None,
    missing: Tensor,
    student_at: Tensor,
    teacher_at: Tensor,
    valid: Tensor,
    weight: float,
    log_weight: float,
    difference_grad: Tensor | None,
    log_loss_grad: Tensor | None,
) -> Tensor:
    """Gradients of the student's log-probabilities, (1 or 2, B, S, K)."""
    batch, student_length, width = student.shape
    answer = student.new_zeros(1 if log_student is None else 2, *student.shape)
    student, teacher = student.contiguous(), teacher.contiguous()
    count, columns = valid.shape[1], _columns(width)
    if batch and count:
        kernels("matched_columns_kernels").matched_columns_backward[
            (batch, math.ceil(count / _TILE), math.ceil(width / columns))
        ](
            student,
            teacher,
            teacher if log_teacher is None else log_teacher.contiguous(),
            missing.contiguous().view(torch.uint8),
            student_at,
            *student_at.stride(),
            teacher_at,
            *teacher_at.stride(),
            valid.contiguous().view(torch.uint8),
            student if difference_grad is None else difference_grad,
            0 if difference_grad is None else difference_grad.stride(0),
            student if log_loss_grad is None else log_loss_grad,
            0 if log_loss_grad is None else log_loss_grad.stride(0),
            answer[0],
            answer[-1],
            weight,
            log_weight,
            count,
            student_length,
            teacher.shape[1],
            width,
            WITH_DIFFERENCE=difference_grad is not None,
            WITH_LOG_LOSS=log_loss_grad is not None,
            APART=log_student is not None,
            TILE=_TILE,
            COLUMNS=columns,
            num_warps=4,
        )
    return answer


def _columns(width: int) -> int:
    return min(max(power_of_two(width), 16), _MOST_COLUMNS)


def _cost_of_sums(*given: Any) -> Cost:
    tensors = given[:8]
    return kernel_cost(nbytes(*tensors) + 8 * len(given[0]), *tensors[:5], tensors[7])


def _cost_of_gradients(*given: Any) -> Cost:
    # All is cleared, and what is compared is written again.
    student, log_student, *others = given[:8]
    written = 2 * nbytes(student, None if log_student is None else student)
    moved = nbytes(student, *others, *given[10:]) + written
    cost = kernel_cost(moved, student, *others[:3], others[5])
    return cost._replace(launches=cost.launches + 1)


DECLARED.update(
    matched_columns=_cost_of_sums,
    matched_columns_backward=_cost_of_gradients,
)
