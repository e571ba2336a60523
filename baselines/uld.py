"""Universal Logit Distillation (arXiv 2402.12030): oracles, and the loss as published.

The oracles sum over tokens and divide by the number of student tokens. The published file averages
over the tokens of each sequence and then over the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _descending(probs: Tensor, width: int, top_k: int | None) -> Tensor:
    """Entries of one distribution, largest first (ties: lower id), zeros up to ``width``."""
    values = probs.tolist()
    order = sorted(range(len(values)), key=lambda entry: -values[entry])
    ranked = probs[order[:top_k]]
    return torch.cat([ranked, ranked.new_zeros(width - len(ranked))])


def _check_lengths(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student sequences against {len(teacher)} of the teacher")


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    top_k: int | None = None,
) -> tuple[Tensor, int]:
    """L1 distance between the sorted distributions, per student token, and that token count.

    Equation (5) of arXiv 2412.14528: sum over sequences b, over the first min(S_b, T_b) tokens and
    over ranks i of |t_i - s_i|, both distributions sorted descending and zero-padded to one width.
    The sum is divided by the total number of student tokens, also those past the teacher's length.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        top_k: keep only this many of the largest entries on either side, all if None.
    """
    _check_lengths(student, teacher)
    total = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    for student_rows, teacher_rows in zip(student, teacher, strict=True):
        width = max(student_rows.shape[1], teacher_rows.shape[1])
        if top_k is not None:
            width = min(width, top_k)
        for position in range(min(len(student_rows), len(teacher_rows))):
            student_probs = F.softmax(student_rows[position].double() / student_temperature, dim=0)
            teacher_probs = F.softmax(teacher_rows[position].double() / teacher_temperature, dim=0)
            student_ranked = _descending(student_probs, width, top_k)
            teacher_ranked = _descending(teacher_probs, width, top_k)
            total = total + (teacher_ranked - student_ranked).abs().sum()
    count = sum(len(rows) for rows in student)
    return total / max(count, 1), count


def loss_by_transport(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> tuple[Tensor, int]:
    """What :func:`loss` computes without ``top_k``, with no sorting: the least-cost matching.

    Equations (2) to (4) of arXiv 2412.14528: cost |t_i - s_j| between the entries, the narrower
    vocabulary zero-padded, unit row and column sums. Cubic in the vocabulary.
    """
    # What is published is measured where there is no POT, too.
    from baselines import sinkhorn

    _check_lengths(student, teacher)
    total = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    for student_rows, teacher_rows in zip(student, teacher, strict=True):
        width = max(student_rows.shape[1], teacher_rows.shape[1])
        ones = torch.ones(width, dtype=torch.float64)
        for position in range(min(len(student_rows), len(teacher_rows))):
            student_probs = F.softmax(student_rows[position].double() / student_temperature, dim=0)
            teacher_probs = F.softmax(teacher_rows[position].double() / teacher_temperature, dim=0)
            student_padded = F.pad(student_probs, (0, width - len(student_probs)))
            teacher_padded = F.pad(teacher_probs, (0, width - len(teacher_probs)))
            cost = (teacher_padded[:, None] - student_padded[None, :]).abs()
            total = total + sinkhorn.emd(cost, ones, ones)
    count = sum(len(rows) for rows in student)
    return total / max(count, 1), count


def answer_spans(labels: Tensor, *, skip_eos: bool = False) -> tuple[list[int], list[int]]:
    """First logit row and number of rows of each answer, as the published files find them.

    The size counts every label that is not -100, holes included. The first row is the last -100 of
    the leading run, whose logits predict the first answer token; 0 where there is no such run.
    """
    starts, sizes = [], []
    for row in labels.tolist():
        leading = 0
        while leading < len(row) and row[leading] == -100:
            leading += 1
        starts.append(max(leading - 1, 0))
        sizes.append(sum(label != -100 for label in row) - int(skip_eos))
    return starts, sizes


def answer_probs_(
    logits: Tensor, starts: list[int], sizes: list[int], temperature: float
) -> Tensor:
    """Overwrites each row of (B, L, V): answer probabilities moved to the front, zeros behind."""
    for b, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        answer = torch.softmax(logits[b, start : start + size] / temperature, dim=-1)
        logits[b, : len(answer)] = answer
        logits[b, len(answer) :] = 0.0
    return logits


def as_published(
    student_logits: Tensor,
    student_labels: Tensor,
    teacher_logits: Tensor,
    teacher_labels: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_student_eos: bool = False,
    skip_teacher_eos: bool = False,
) -> Tensor:
    """The distillation term of Nicolas-BZRD/llm-recipes at ab6e798, divided by its weight (1.5).

    Mean over the batch of the mean over the first min(size) rows of the sorted L1 distance. The
    original overwrites the logits it is given; this one does not. As there, an answer of no rows
    makes the result nan.

    Args:
        student_logits: (B, S, V).
        student_labels: (B, S), -100 where ignored, not shifted.
        teacher_logits: (B, T, W).
        teacher_labels: (B, T), as the student's.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        skip_student_eos: leave out the last student token; the authors' training passes True.
        skip_teacher_eos: leave out the last teacher token.
    """
    student_starts, student_sizes = answer_spans(student_labels, skip_eos=skip_student_eos)
    teacher_starts, teacher_sizes = answer_spans(teacher_labels, skip_eos=skip_teacher_eos)
    longest = max(student_sizes + teacher_sizes)
    student_probs = answer_probs_(
        student_logits.clone(), student_starts, student_sizes, student_temperature
    )[:, :longest]
    teacher_probs = answer_probs_(
        teacher_logits.clone(), teacher_starts, teacher_sizes, teacher_temperature
    )[:, :longest]
    student_ranked = student_probs.sort(dim=-1, descending=True).values
    teacher_ranked = teacher_probs.sort(dim=-1, descending=True).values
    width = max(student_ranked.shape[-1], teacher_ranked.shape[-1])
    student_ranked = F.pad(student_ranked, (0, width - student_ranked.shape[-1]))
    teacher_ranked = F.pad(teacher_ranked, (0, width - teacher_ranked.shape[-1]))
    distances = []
    for b, size in enumerate(map(min, student_sizes, teacher_sizes)):
        difference = student_ranked[b, :size] - teacher_ranked[b, :size]
        distances.append(difference.abs().sum(-1).mean())
    return torch.stack(distances).mean()
