"""MultiLevelOT as its paper defines it (arXiv 2412.14528, equations 9 to 20), in float64.

Conventions where the paper is silent:

* Columns are ranked by their probability summed over all positions of that side's sequence, at
  ``temperature``. Ties go to the lower id.
* With unequal lengths, the absolute difference (HAD), the log term (SL) and the distances that the
  greedy and assignment matchings minimise use the first min(S, T) positions.
* The sequence term (SD) keeps its T x S rectangle: unit masses, columns (student positions) scaled
  last, so the total mass of the plan is S.
* Kept columns: min(k, V, W). A sequence with no position on one side contributes 0.
* Rankings and matchings are computed on detached values. Gradients reach both sides.

``matching`` says how student columns are found for the teacher's ranked columns:

* ``"mass"``: the student's own columns in the order of their mass.
* ``"greedy"``: teacher columns in rank order, each takes the nearest unused student column (L1).
* ``"assignment"``: Q* of equation (11), a linear assignment on the problem zero-padded to a square,
  cut to k afterwards. A teacher column may be matched to padding: a student probability of 0. It
  counts in HAD and in the cost of SD, and not in SL, where the logarithm does not exist.
* ``"assignment_topk"``: the teacher's kept columns against the ``candidates`` heaviest student
  columns (at least as many as are kept), a rectangular assignment.

The optimum of an assignment need not be unique: two teacher columns that both exceed two student
columns at every token may swap partners at no cost. With one or two tokens this is common, and
rounding then decides which columns survive the cut, hence the values of all three terms. With ten
tokens it is rare.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from baselines import sinkhorn


def columns_by_mass(probs: Tensor) -> list[int]:
    """Equation (9): column ids by their sum over the rows of (positions, columns), largest first.

    >>> columns_by_mass(torch.tensor([[0.2, 0.5, 0.2, 0.1], [0.3, 0.1, 0.3, 0.3]]))
    [1, 0, 2, 3]
    """
    # Row by row, so that equal columns have equal sums to the last bit.
    mass = [0.0] * probs.shape[1]
    for row in probs.tolist():
        mass = [total + value for total, value in zip(mass, row, strict=True)]
    return sorted(range(len(mass)), key=lambda column: -mass[column])


def _distance(teacher_column: np.ndarray, student_column: np.ndarray) -> float:
    return float(np.abs(teacher_column - student_column).sum())


def _greedy(teacher_columns: list[int], teacher: np.ndarray, student: np.ndarray) -> list[int]:
    unused = list(range(student.shape[1]))
    taken = []
    for i in teacher_columns:
        # min returns the first of equals, and `unused` stays in ascending order.
        nearest = min(unused, key=lambda j: _distance(teacher[:, i], student[:, j]))
        unused.remove(nearest)
        taken.append(nearest)
    return taken


def _assign(
    teacher_columns: list[int],
    student_columns: list[int],
    teacher: np.ndarray,
    student: np.ndarray,
) -> list[int]:
    cost = np.zeros((len(teacher_columns), len(student_columns)))
    for row, i in enumerate(teacher_columns):
        for column, j in enumerate(student_columns):
            cost[row, column] = _distance(teacher[:, i], student[:, j])
    rows, columns = linear_sum_assignment(cost)
    partner = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [student_columns[partner[row]] for row in range(len(teacher_columns))]


def match(
    student_probs: Tensor,
    teacher_probs: Tensor,
    *,
    k: int,
    matching: str,
    candidates: int = 256,
    pairs: tuple[list[int], list[int]] | None = None,
) -> tuple[list[int], list[int | None]]:
    """Equations (9) to (12): the kept teacher columns and the student column matched to each.

    Args:
        student_probs: (S, V).
        teacher_probs: (T, W).
        k: columns to keep.
        matching: one of the four of this module.
        candidates: student columns considered by ``"assignment_topk"``.
        pairs: student positions and teacher positions whose distances count, one list each; the
            first min(S, T) of both if None.

    Returns:
        Two lists of min(k, V, W) column ids. None stands for a column of zero padding.
    """
    student_width, teacher_width = student_probs.shape[1], teacher_probs.shape[1]
    kept = min(k, student_width, teacher_width)
    if pairs is None:
        common = list(range(min(len(student_probs), len(teacher_probs))))
        pairs = common, common
    teacher_order = columns_by_mass(teacher_probs)
    student_order = columns_by_mass(student_probs)
    teacher = teacher_probs[pairs[1]].detach().numpy()
    student = student_probs[pairs[0]].detach().numpy()
    matched: list[int | None]
    if matching == "mass":
        matched = [*student_order[:kept]]
    elif matching == "greedy":
        matched = [*_greedy(teacher_order[:kept], teacher, student)]
    elif matching == "assignment":
        side = max(student_width, teacher_width)
        teacher_square = np.pad(teacher, ((0, 0), (0, side - teacher_width)))
        student_square = np.pad(student, ((0, 0), (0, side - student_width)))
        rows = teacher_order + list(range(teacher_width, side))
        partners = _assign(rows, list(range(side)), teacher_square, student_square)
        matched = [j if j < student_width else None for j in partners[:kept]]
    elif matching == "assignment_topk":
        heaviest = student_order[: max(candidates, kept)]
        matched = [*_assign(teacher_order[:kept], heaviest, teacher, student)]
    else:
        raise ValueError(
            f"matching must be mass, greedy, assignment or assignment_topk, got {matching!r}"
        )
    return teacher_order[:kept], matched


def student_kept(student_probs: Tensor, columns: list[int | None]) -> Tensor:
    """Columns of (S, V) in the given order, a column of zeros for None."""
    zeros = student_probs.new_zeros(len(student_probs))
    return torch.stack([zeros if j is None else student_probs[:, j] for j in columns], dim=1)


def absolute_difference(teacher_kept: Tensor, student_kept: Tensor) -> Tensor:
    """Equation (14): sum over the common positions and the kept columns of |t_i - s_i|."""
    total = teacher_kept.new_zeros(())
    for t in range(min(len(teacher_kept), len(student_kept))):
        total = total + (teacher_kept[t] - student_kept[t]).abs().sum()
    return total


def cross_entropy(
    teacher_kept: Tensor, student_log_probs: Tensor, student_columns: list[int | None]
) -> Tensor:
    """Equation (16): minus the sum over common positions and kept columns of t_i log s_i."""
    total = teacher_kept.new_zeros(())
    for t in range(min(len(teacher_kept), len(student_log_probs))):
        for i, j in enumerate(student_columns):
            if j is not None:
                total = total - teacher_kept[t, i] * student_log_probs[t, j]
    return total


def sequence_cost(teacher_kept: Tensor, student_kept: Tensor) -> Tensor:
    """(T, S) cost of equation (17): L1 between kept columns of teacher token i, student token j."""
    return torch.stack(
        [
            torch.stack([(teacher_row - student_row).abs().sum() for student_row in student_kept])
            for teacher_row in teacher_kept
        ]
    )


def terms(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    k: int = 50,
    temperature: float = 1.0,
    sl_temperature: float = 1.0,
    sd_temperature: float = 2.0,
    regularization: float = 0.1,
    iterations: int = 20,
    matching: str = "mass",
    candidates: int = 256,
) -> dict[str, Tensor]:
    """The three terms of the paper, summed over sequences and tokens, without weights.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        k: columns to keep.
        temperature: of the probabilities that are ranked and matched and of those in HAD.
        sl_temperature: of both sides in SL.
        sd_temperature: of both sides in SD, on the same kept columns.
        regularization: entropy strength of the Sinkhorn plan.
        iterations: Sinkhorn rounds.
        matching: ``"mass"``, ``"greedy"``, ``"assignment"`` or ``"assignment_topk"``.
        candidates: student columns considered by ``"assignment_topk"``.

    Returns:
        ``"had"`` (eq. 14), ``"sl"`` (eq. 16) and ``"sd"`` (eq. 20), each of shape ().
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student sequences against {len(teacher)} of the teacher")
    zero = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    had, sl, sd = zero, zero, zero
    for student_rows, teacher_rows in zip(student, teacher, strict=True):
        if len(student_rows) == 0 or len(teacher_rows) == 0:
            continue
        student_logits, teacher_logits = student_rows.double(), teacher_rows.double()
        student_probs = F.softmax(student_logits / temperature, dim=1)
        teacher_probs = F.softmax(teacher_logits / temperature, dim=1)
        teacher_columns, student_columns = match(
            student_probs, teacher_probs, k=k, matching=matching, candidates=candidates
        )
        had = had + absolute_difference(
            teacher_probs[:, teacher_columns], student_kept(student_probs, student_columns)
        )
        sl = sl + cross_entropy(
            F.softmax(teacher_logits / sl_temperature, dim=1)[:, teacher_columns],
            F.log_softmax(student_logits / sl_temperature, dim=1),
            student_columns,
        )
        cost = sequence_cost(
            F.softmax(teacher_logits / sd_temperature, dim=1)[:, teacher_columns],
            student_kept(F.softmax(student_logits / sd_temperature, dim=1), student_columns),
        )
        sd = sd + (sinkhorn.plan(cost, regularization, iterations) * cost).sum()
    return {"had": had, "sl": sl, "sd": sd}


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    had_weight: float = 1.0,
    sl_weight: float = 0.1,
    sd_weight: float = 0.1,
    k: int = 50,
    temperature: float = 1.0,
    sl_temperature: float = 1.0,
    sd_temperature: float = 2.0,
    regularization: float = 0.1,
    iterations: int = 20,
    matching: str = "mass",
    candidates: int = 256,
) -> tuple[Tensor, int]:
    """Weighted sum of :func:`terms` per student position, and the number of student positions.

    The sum is the bracket of equation (21). Student positions past the teacher's length count.
    """
    parts = terms(
        student,
        teacher,
        k=k,
        temperature=temperature,
        sl_temperature=sl_temperature,
        sd_temperature=sd_temperature,
        regularization=regularization,
        iterations=iterations,
        matching=matching,
        candidates=candidates,
    )
    total = had_weight * parts["had"] + sl_weight * parts["sl"] + sd_weight * parts["sd"]
    count = sum(len(rows) for rows in student)
    return total / max(count, 1), count
