"""Approximate likelihood matching (arXiv 2503.20083): the oracle.

Section 3: with a chunk's log-likelihoods a (teacher) and b (student), each the sum over its tokens,
and e(x) = exp(x / temperature - epsilon), the loss is the mean over chunks of

    -(e(a) log e(b) + (1 - e(a)) log(1 - e(b)))

less the same with b = a, which the student has no part in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6


def _by_chunk(chunk_ids: Sequence[int]) -> dict[int, list[int]]:
    """Positions of each chunk; negative numbers are no chunk."""
    positions: dict[int, list[int]] = {}
    for position, chunk in enumerate(chunk_ids):
        if chunk >= 0:
            positions.setdefault(chunk, []).append(position)
    return positions


def _log_likelihood(rows: Tensor, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for position in positions:
        total = total + torch.log_softmax(rows[position].double(), dim=0)[ids[position]]
    return total


def _log_boundary(row: Tensor, starts: Sequence[int]) -> Tensor:
    """Log of the probability of all tokens that begin a word."""
    return torch.softmax(row.double(), dim=0)[list(starts)].sum().log()


def _coin_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    a = teacher / temperature - EPSILON
    b = student / temperature - EPSILON
    against_student = -(a.exp() * b - torch.expm1(a) * torch.log(-torch.expm1(b)))
    against_itself = -(a.exp() * a - torch.expm1(a) * torch.log(-torch.expm1(a)))
    return against_student - against_itself


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_ids: Sequence[Sequence[int]],
    teacher_ids: Sequence[Sequence[int]],
    student_chunks: Sequence[Sequence[int]],
    teacher_chunks: Sequence[Sequence[int]],
    *,
    temperature: float = 100.0,
    student_starts: Sequence[int] | None = None,
    teacher_starts: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """Mean over the chunks that both sides have, and their number.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        student_ids: the token that each row predicts.
        teacher_ids: likewise.
        student_chunks: the chunk of each of these tokens, negative for none.
        teacher_chunks: likewise.
        temperature: divides the log-likelihoods.
        student_starts: tokens that begin a word. With both lists given, a chunk that is followed by
            a row on both sides has the log-probability of a word's beginning there added on both.
        teacher_starts: likewise.
    """
    total = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    count = 0
    for b in range(len(student)):
        ours, theirs = _by_chunk(student_chunks[b]), _by_chunk(teacher_chunks[b])
        for chunk in sorted(set(ours) & set(theirs)):
            log_student = _log_likelihood(student[b], student_ids[b], ours[chunk])
            log_teacher = _log_likelihood(teacher[b], teacher_ids[b], theirs[chunk])
            after = ours[chunk][-1] + 1, theirs[chunk][-1] + 1
            followed = after[0] < len(student[b]) and after[1] < len(teacher[b])
            if student_starts is not None and teacher_starts is not None and followed:
                log_student = log_student + _log_boundary(student[b][after[0]], student_starts)
                log_teacher = log_teacher + _log_boundary(teacher[b][after[1]], teacher_starts)
            total = total + _coin_kl(log_teacher.detach(), log_student, temperature)
            count += 1
    return total / max(count, 1), count
