"""What a loss on pairs of whole rows gives to `ctkd.row_pairs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ctkd.compiled import RowArray

__all__ = ["CompiledSolver", "PairArrays", "RowFunction", "RowSolution", "RowSolver"]

RowFunction = Callable[..., Tensor]


class RowSolution(NamedTuple):
    """What a solver says of a block of pairs.

    Attributes:
        values: (n, P), the parts of each pair's value.
        student_gradient: (n, V), of the sum over parts with respect to the raw student logits.
        per_pair_gradient: (n, E), of the same with respect to the numbers per pair.
    """

    values: Tensor
    student_gradient: Tensor | None = None
    per_pair_gradient: Tensor | None = None


RowSolver = Callable[[Tensor, Tensor, Tensor | None, bool], RowSolution]
"""Student logits (n, V), teacher logits (n, W), numbers per pair (n, E) or None, and whether the
gradients are wanted. Runs without autograd; must not write to what it is given."""


class PairArrays(NamedTuple):
    """Pairs of rows (n,) as a compiled solver takes them.

    Attributes:
        student: Raw logits.
        teacher: Raw logits.
        per_pair: (n, E).
        answers: (n, P) float64 takes the parts of each value.
        gradients: Takes the student's gradient; without values where none is wanted.
        per_pair_gradient: (n, E) float32 takes that of the numbers.
    """

    student: RowArray
    teacher: RowArray
    per_pair: npt.NDArray[np.floating[Any]]
    answers: npt.NDArray[np.float64]
    gradients: RowArray
    per_pair_gradient: npt.NDArray[np.float32]


CompiledSolver = Callable[[PairArrays, slice], None]
"""What a `RowSolver` says of some of the pairs, by compiled loops, for float32 and bfloat16."""
