"""Terms of a divergence between two rows, as `ctkd.divergences.divergence_terms`, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctkd.ops.cpu.compiling import compiled
from ctkd.ops.cpu.numbers import LOG2_E, exp2_minus_1, log1p

__all__ = ["divergence_terms"]

_ZERO = np.float32(0.0)


@compiled
def divergence_terms(
    gaps: Any, student_probs: Any, teacher_probs: Any, beta: Any, student_terms: Any
) -> None:
    """Compute the terms of a divergence: the derivatives by the log-probs of either side.

    Args:
        gaps: log s - log t, finite; overwritten by the sums of both sides' terms.
        student_probs: s.
        teacher_probs: t.
        beta: float32 from 0 to 1.
        student_terms: Output, the derivatives by log s.
    """
    one = np.float32(1.0)
    if beta == _ZERO:
        for column in range(gaps.size):
            student, teacher, gap = student_probs[column], teacher_probs[column], gaps[column]
            term = student - teacher
            gaps[column] = term - gap * teacher
            student_terms[column] = term
    elif beta == one:
        for column in range(gaps.size):
            student, teacher, gap = student_probs[column], teacher_probs[column], gaps[column]
            term = gap * student
            gaps[column] = term + (teacher - student)
            student_terms[column] = term
    else:
        for column in range(gaps.size):
            student, teacher, gap = student_probs[column], teacher_probs[column], gaps[column]
            # The weight of the smaller of the two in the mixture.
            weight = beta if gap > _ZERO else one - beta
            # log m = max(log s, log t) + mixed: nothing overflows, and equal rows give exactly 0.
            below = gap if gap < _ZERO else _ZERO
            above = gap - below
            mixed = log1p(weight * exp2_minus_1((below - above) * LOG2_E))
            term = (mixed - below) * student * (beta - one)
            gaps[column] = term - (above + mixed) * teacher * beta
            student_terms[column] = term
