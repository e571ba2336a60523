"""Divergences between rows of log-probabilities, one number per row.

The rows need not sum to 1: a part of a distribution is compared as it stands, and every divergence
is still at least 0, and 0 only where the two rows are equal. Logarithms come in, so that a
probability too small for its floating-point type still has a value and a finite gradient.

What this module does not do: it applies no softmax, no temperature and no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["LOG_FLOOR", "jsd", "kl", "reverse_kl", "sorted_l1"]

LOG_FLOOR = -1e4
"""Where minus infinity is cut off. exp of it is 0 in every floating-point type."""


def kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    r"""Divergence of the student from the teacher, weighted by the teacher.

    .. math:: KL(t \| s) = \sum_i t_i \log \frac{t_i}{s_i} - t_i + s_i

    The last two terms cancel between rows that both sum to 1. Between parts of distributions they
    keep the divergence above 0: it is the limit of ``jsd(beta) / beta`` as beta goes to 0.

    Shape:
        (..., V) and (..., V) give (...,), in nats.

    Args:
        student_log_probs: log s. What lies below `LOG_FLOOR`, minus infinity too, counts as that.
        teacher_log_probs: log t.

    Example:
        0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.1438.

        >>> kl(torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.1438)
    """
    return jsd(student_log_probs, teacher_log_probs, beta=0.0)


def reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    r"""Divergence of the teacher from the student, weighted by the student.

    .. math:: KL(s \| t) = \sum_i s_i \log \frac{s_i}{t_i} - s_i + t_i

    `kl` with the two sides exchanged; it is the limit of ``jsd(beta) / (1 - beta)`` as beta goes
    to 1.

    Shape:
        (..., V) and (..., V) give (...,), in nats.

    Args:
        student_log_probs: log s.
        teacher_log_probs: log t.

    Example:
        0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5) = 0.1308.

        >>> reverse_kl(torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.1308)
    """
    return kl(teacher_log_probs, student_log_probs)


def jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, *, beta: float = 0.5) -> Tensor:
    r"""Generalized Jensen-Shannon divergence.

    .. math::
        JSD_\beta = \sum_i \beta\, t_i \log \frac{t_i}{m_i} + (1 - \beta)\, s_i \log
            \frac{s_i}{m_i}, \quad m = \beta t + (1 - \beta) s

    The formula gives 0 for beta 0 and beta 1; as is the custom, `kl` and `reverse_kl` stand there.

    Shape:
        (..., V) and (..., V) give (...,), in nats, at most log 2 between distributions.

    Args:
        student_log_probs: log s. What lies below `LOG_FLOOR`, minus infinity too, counts as that.
        teacher_log_probs: log t.
        beta: Weight of the teacher in the mixture, from 0 to 1.

    Example:
        Nothing in common: log 2.

        >>> jsd(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())
        tensor(0.6931)
    """
    return _Divergence.apply(student_log_probs, teacher_log_probs, beta)  # type: ignore[no-untyped-call, no-any-return]


def sorted_l1(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    r"""Distance between the ranked entries of two rows over different vocabularies.

    .. math:: \sum_k |s_{(k)} - t_{(k)}|, \quad s_{(1)} \ge s_{(2)} \ge \dots

    The narrower row is padded with zeros. The rows need not sum to 1, and may be empty. Of equal
    entries the one in the lower column comes first.

    Shape:
        (N, V) and (N, W) give (N,); between distributions at most 2.

    Args:
        student_probs: s, at least 0, in any order.
        teacher_probs: t, at least 0, in any order.

    Example:
        >>> sorted_l1(torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5, 0.0]]))
        tensor([0.6000])
    """
    missing = teacher_probs.shape[-1] - student_probs.shape[-1]
    student = F.pad(student_probs, (0, max(missing, 0))).sort(dim=-1, descending=True, stable=True)
    teacher = F.pad(teacher_probs, (0, max(-missing, 0))).sort(dim=-1, descending=True, stable=True)
    return (student.values - teacher.values).abs().sum(-1)


def _terms(gap: Tensor, student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Derivatives of `jsd` with respect to log s and log t, which add up to it.

    Args:
        gap: log s - log t, finite also where both are 0.
        student: s.
        teacher: t.
        beta: Weight of the teacher.
    """
    if beta == 0:
        return student - teacher, -gap * teacher
    if beta == 1:
        return gap * student, teacher - student
    # log m = max(log s, log t) + mixed: nothing overflows, and equal rows give exactly 0.
    # Two plain numbers would be taken for float32.
    weight_of_smaller = torch.where(gap > 0, gap.new_full((), beta), 1.0 - beta)
    mixed = (-gap.abs()).expm1_().mul_(weight_of_smaller).log1p_()
    student_term = (mixed - gap.clamp_max(0.0)).mul_(student).mul_(beta - 1.0)
    return student_term, (gap.relu() + mixed).mul_(teacher).mul_(-beta)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float
    ) -> Tensor:
        student_log = student_log_probs.clamp_min(LOG_FLOOR)
        teacher_log = teacher_log_probs.clamp_min(LOG_FLOOR)
        student, teacher = student_log.exp(), teacher_log.exp()
        student_term, teacher_term = _terms(student_log - teacher_log, student, teacher, beta)
        ctx.save_for_backward(student_term, teacher_term)
        return (student_term + teacher_term).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = (
            term * incoming.unsqueeze(-1) if needed else None
            for term, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return student, teacher, None
