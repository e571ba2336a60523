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

__all__ = ["LOG_FLOOR", "divergence_terms", "jsd", "kl", "reverse_kl"]

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
    r"""Generalised Jensen-Shannon divergence.

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


def divergence_terms(
    gap: Tensor,
    student_probs: Tensor,
    teacher_probs: Tensor,
    beta: float,
    *,
    spare: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Derivatives of `jsd` with respect to log s and log t, which add up to it.

    Shape:
        All (..., V). ``gap``, ``teacher_probs`` and ``spare`` are written to, and the answers are
        stored in some of them.

    Args:
        gap: log s - log t, finite also where both are 0.
        student_probs: s.
        teacher_probs: t.
        beta: Weight of the teacher, from 0 to 1: 0 gives those of `kl`, 1 those of `reverse_kl`.
        spare: Room for temporaries.

    Example:
        >>> s, t = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
        >>> student_term, teacher_term = divergence_terms((s / t).log(), s, t, 0.0)
        >>> student_term, (student_term + teacher_term).sum()
        (tensor([-0.2500,  0.2500]), tensor(0.1438))
    """
    if beta == 0:
        teacher_term = gap.mul_(teacher_probs).neg_()
        return torch.sub(student_probs, teacher_probs, out=teacher_probs), teacher_term
    if beta == 1:
        return gap.mul_(student_probs), teacher_probs.sub_(student_probs)
    mixed, student_term = spare or (torch.empty_like(gap), torch.empty_like(gap))
    if beta == 0.5:
        weight_of_smaller: Tensor | float = 0.5
    else:
        # Arithmetic on signs, because comparisons and masks are slow on a CPU.
        weight_of_smaller = torch.sign(gap, out=student_term).mul_(beta - 0.5).add_(0.5)
    # log m = max(log s, log t) + mixed: nothing overflows, and equal rows give exactly 0.
    torch.abs(gap, out=mixed).neg_().expm1_().mul_(weight_of_smaller).log1p_()
    torch.clamp_max(gap, 0.0, out=student_term)
    torch.sub(mixed, student_term, out=student_term).mul_(student_probs).mul_(beta - 1.0)
    return student_term, gap.relu_().add_(mixed).mul_(teacher_probs).mul_(-beta)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float
    ) -> Tensor:
        student_log = student_log_probs.clamp_min(LOG_FLOOR)
        teacher_log = teacher_log_probs.clamp_min(LOG_FLOOR)
        student, teacher = student_log.exp(), teacher_log.exp()
        student_term, teacher_term = divergence_terms(
            student_log.sub_(teacher_log), student, teacher, beta
        )
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
