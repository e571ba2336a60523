"""The terms of `ctkd.divergences.divergence_terms`, on rows of float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctkd.kernels.compiling import compiled
from ctkd.kernels.numbers import LOG2_E, exp2_minus_1, log1p

__all__ = ["put_divergence_terms"]

_ZERO = np.float32(0.0)


@compiled
def put_divergence_terms(
    gap: Any, student_probs: Any, teacher_probs: Any, beta: Any, student_term: Any
) -> None:
    """Put the student's terms into a row, and both sides' sums in place of the gaps.

    Args:
        gap: log s - log t, finite.
        student_probs: s.
        teacher_probs: t.
        beta: float32 from 0 to 1.
        student_term: Takes the derivatives with respect to log s.
    """
    one = np.float32(1.0)
    if beta == _ZERO:
        for place in range(gap.size):
            student, teacher, distance = student_probs[place], teacher_probs[place], gap[place]
            term = student - teacher
            gap[place] = term - distance * teacher
            student_term[place] = term
    elif beta == one:
        for place in range(gap.size):
            student, teacher, distance = student_probs[place], teacher_probs[place], gap[place]
            term = distance * student
            gap[place] = term + (teacher - student)
            student_term[place] = term
    else:
        for place in range(gap.size):
            student, teacher, distance = student_probs[place], teacher_probs[place], gap[place]
            # The weight in the mixture of the smaller of the two.
            weight = beta if distance > _ZERO else one - beta
            # log m = max(log s, log t) + mixed: nothing overflows, and equal rows give exactly 0.
            below = distance if distance < _ZERO else _ZERO
            above = distance - below
            mixed = log1p(weight * exp2_minus_1((below - above) * LOG2_E))
            term = (mixed - below) * student * (beta - one)
            gap[place] = term - (above + mixed) * teacher * beta
            student_term[place] = term
