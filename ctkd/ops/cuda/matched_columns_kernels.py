# mypy: ignore-errors
"""Kernels of the terms of matched columns, for `ctkd.ops.cuda.matched_columns`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["matched_columns", "matched_columns_backward"]


@triton.jit
def _probs(log_probs, places, here):
    return tl.exp(tl.load(log_probs + places, mask=here, other=float("-inf")).to(tl.float32))


@triton.jit
def matched_columns(
    student,
    teacher,
    log_student,
    log_teacher,
    missing,
    student_at,
    student_outer,
    student_inner,
    teacher_at,
    teacher_outer,
    teacher_inner,
    valid,
    difference,
    log_loss,
    weight,
    log_weight,
    count,
    student_length,
    teacher_length,
    width,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Weighted sums over the aligned positions of a sequence: |t - s| and -t log s."""
    problem = tl.program_id(0).to(tl.int64)
    differences = tl.zeros((TILE,), tl.float32)
    log_losses = tl.zeros((TILE,), tl.float32)
    for start in range(0, count, TILE):
        numbers = start + tl.arange(0, TILE)
        scored = tl.load(valid + problem * count + numbers, mask=numbers < count, other=0) != 0
        ours = student_at + problem * student_outer + numbers * student_inner
        ours = problem * student_length + tl.load(ours, mask=scored, other=0)
        theirs = teacher_at + problem * teacher_outer + numbers * teacher_inner
        theirs = problem * teacher_length + tl.load(theirs, mask=scored, other=0)
        for first in range(0, width, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = scored[:, None] & (columns < width)[None, :]
            gone = tl.load(missing + problem * width + columns, mask=columns < width, other=1) != 0
            at_student = ours[:, None] * width + columns[None, :]
            at_teacher = theirs[:, None] * width + columns[None, :]
            s = tl.where(gone[None, :], 0.0, _probs(student, at_student, here))
            differences += tl.sum(tl.abs(_probs(teacher, at_teacher, here) - s), 1)
            t = tl.where(gone[None, :], 0.0, _probs(log_teacher, at_teacher, here))
            log_s = tl.load(log_student + at_student, mask=here, other=0.0).to(tl.float32)
            log_losses -= tl.sum(t * tl.where(t == 0.0, 0.0, log_s), 1)
    tl.store(difference + problem, weight * tl.sum(differences, 0))
    tl.store(log_loss + problem, log_weight * tl.sum(log_losses, 0))


@triton.jit
def matched_columns_backward(
    student,
    teacher,
    log_teacher,
    missing,
    student_at,
    student_outer,
    student_inner,
    teacher_at,
    teacher_outer,
    teacher_inner,
    valid,
    difference_grad,
    difference_stride,
    log_loss_grad,
    log_loss_stride,
    gradient,
    log_gradient,
    weight,
    log_weight,
    count,
    student_length,
    teacher_length,
    width,
    WITH_DIFFERENCE: tl.constexpr,
    WITH_LOG_LOSS: tl.constexpr,
    APART: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of the student's log-probabilities at aligned positions; others are 0 already.

    With ``APART`` those of the second term go to ``log_gradient``.
    """
    problem = tl.program_id(0).to(tl.int64)
    of_difference = tl.zeros((), tl.float32)
    if WITH_DIFFERENCE:
        of_difference = tl.load(difference_grad + problem * difference_stride).to(tl.float32)
        of_difference *= weight
    of_log_loss = tl.zeros((), tl.float32)
    if WITH_LOG_LOSS:
        of_log_loss = tl.load(log_loss_grad + problem * log_loss_stride).to(tl.float32)
        of_log_loss *= log_weight
    numbers = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    scored = tl.load(valid + problem * count + numbers, mask=numbers < count, other=0) != 0
    ours = student_at + problem * student_outer + numbers * student_inner
    ours = problem * student_length + tl.load(ours, mask=scored, other=0)
    theirs = teacher_at + problem * teacher_outer + numbers * teacher_inner
    theirs = problem * teacher_length + tl.load(theirs, mask=scored, other=0)
    here = scored[:, None] & (columns < width)[None, :]
    gone = tl.load(missing + problem * width + columns, mask=columns < width, other=1) != 0
    at_student = ours[:, None] * width + columns[None, :]
    at_teacher = theirs[:, None] * width + columns[None, :]
    s = tl.where(gone[None, :], 0.0, _probs(student, at_student, here))
    t = _probs(teacher, at_teacher, here)
    first = tl.where(s > t, s, tl.where(s < t, -s, 0.0)) * of_difference
    t = tl.where(gone[None, :], 0.0, _probs(log_teacher, at_teacher, here))
    second = -t * of_log_loss
    if APART:
        tl.store(gradient + at_student, first, mask=here)
        tl.store(log_gradient + at_student, second, mask=here)
    else:
        tl.store(gradient + at_student, first + second, mask=here)
