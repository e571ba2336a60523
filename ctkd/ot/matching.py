"""Matchings: the student column of each teacher column, for a whole sequence.

MultiLevelOT ranks the teacher's vocabulary once per sequence and gives every kept teacher column
a student column. The paper's optimum (arXiv:2412.14528, eq. 11) is a linear assignment over the
whole vocabulary, which is out of reach beyond some thousand columns, so there are cheaper rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.chunks import AlignedPositions, align_positions
from ctkd.errors import BatchError
from ctkd.logits.base import Logits
from ctkd.ops import Rows, greedy_partners, top_k

__all__ = [
    "MATCHINGS",
    "ColumnMatch",
    "match_by_assignment",
    "match_by_mass",
    "match_greedily",
    "match_top_by_assignment",
]

MATCHINGS = ("mass", "greedy", "assignment", "assignment_topk")


@dataclass(frozen=True, slots=True, eq=False)
class ColumnMatch:
    """The kept columns of a batch, K of them per sequence.

    Args:
        student_ids: (B, K) int64.
        teacher_ids: (B, K) int64, in the teacher's rank order.
        matched: (B, K) bool, False where a teacher column has no student column.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    matched: Tensor


@torch.no_grad()
def match_by_mass(
    batch: Batch, *, k: int, temperature: float, prefetch: Sequence[float] = ()
) -> ColumnMatch:
    """Rank both sides by their own column mass; equal ranks are compared.

    Args:
        batch: The batch.
        k: Columns kept.
        temperature: Of the mass.
        prefetch: See `Logits.column_mass`.
    """
    student, teacher = batch.student.logits, batch.teacher.logits
    student_mass = student.column_mass(temperature=temperature, prefetch=prefetch)
    teacher_mass = teacher.column_mass(temperature=temperature, prefetch=prefetch)
    student_ids, teacher_ids = _heaviest(student_mass, k), _heaviest(teacher_mass, k)
    return ColumnMatch(student_ids, teacher_ids, _all_matched(student_ids))


@torch.no_grad()
def match_greedily(
    batch: Batch, *, k: int, temperature: float, pairing: str = "position"
) -> ColumnMatch:
    """Each teacher column, in rank order, takes the nearest student column still free.

    Distances are L1 over the paired positions of the sequence.
    """
    aligned = align_positions(batch, pairing)
    teacher_ids, targets = _ranked_teacher(batch, aligned, k=k, temperature=temperature)
    student = batch.student.logits
    impossible = student.column_mass(temperature=temperature) == 0
    valid = aligned.at_student_positions(aligned.valid, student.shape[1])
    distance = student.masked(valid).column_distance(
        aligned.at_student_positions(targets, student.shape[1]), temperature=temperature
    )
    distance.masked_fill_(impossible.unsqueeze(1), torch.inf)
    student_ids, has_partner = greedy_partners(distance)
    return ColumnMatch(student_ids, teacher_ids, has_partner)


@torch.no_grad()
def match_by_assignment(
    batch: Batch, *, k: int, temperature: float, max_columns: int, pairing: str = "position"
) -> ColumnMatch:
    r"""The paper's optimum: all columns of both sides, zero-padded to a square, then cut to k.

    .. math:: Q^* = \arg\min_Q \sum_t \sum_i |t_i(t) - (Q s(t))_i| \quad \text{(eq. 11)}

    Solved by scipy on the CPU. A teacher column matched with padding is reported as not matched.

    Raises:
        BatchError: If a vocabulary has more than ``max_columns`` columns.
    """
    columns = max(batch.student.logits.shape[2], batch.teacher.logits.shape[2])
    if columns > max_columns:
        raise BatchError(
            f"matching 'assignment' solves a {columns} x {columns} problem per sequence, "
            f"max_columns allows {max_columns}; use matching 'greedy' or 'assignment_topk', "
            "or raise max_columns"
        )
    aligned = align_positions(batch, pairing)
    teacher_ids, _ = _ranked_teacher(batch, aligned, k=k, temperature=temperature)
    student_probs = aligned.of_student(_all_probs(batch.student.logits, temperature))
    teacher_probs = aligned.of_teacher(_all_probs(batch.teacher.logits, temperature))
    width = batch.student.logits.shape[2]
    student_ids, matched = [], []
    for scored, student, teacher, kept in zip(
        aligned.valid.cpu(),
        student_probs.cpu(),
        teacher_probs.cpu(),
        teacher_ids.cpu(),
        strict=True,
    ):
        cost = _column_costs(teacher[scored], student[scored], columns)
        partner = _assign(cost)[kept.numpy()]
        student_ids.append(np.where(partner < width, partner, 0))
        matched.append(partner < width)
    return ColumnMatch(
        _stacked(student_ids, np.int64, k).to(teacher_ids.device),
        teacher_ids,
        _stacked(matched, np.bool_, k).to(teacher_ids.device),
    )


@torch.no_grad()
def match_top_by_assignment(
    batch: Batch, *, k: int, temperature: float, candidates: int, pairing: str = "position"
) -> ColumnMatch:
    """The teacher's k columns against the student's heaviest columns, by linear assignment.

    This is another optimum than eq. 11: columns that are cut off cannot take a partner away, and
    a student column outside the candidates cannot be chosen. Solved by scipy on the CPU.
    """
    aligned = align_positions(batch, pairing)
    teacher_ids, targets = _ranked_teacher(batch, aligned, k=k, temperature=temperature)
    student = batch.student.logits
    mass = student.column_mass(temperature=temperature)
    heaviest = _heaviest(mass, min(max(candidates, k), student.shape[2]))
    probs = student.log_probs(heaviest.unsqueeze(1), temperature=temperature).exp()
    impossible = mass.gather(1, heaviest) == 0
    rows = []
    tensors = aligned.valid, aligned.of_student(probs), targets, impossible
    for scored, student_probs, teacher_probs, left_out in zip(
        *(one.cpu() for one in tensors), strict=True
    ):
        cost = torch.cdist(teacher_probs[scored].T, student_probs[scored].T, p=1.0)
        # Farther than any two columns can be: taken only where nothing else is left.
        cost = cost + 2.0 * len(scored) * left_out
        rows.append(_assign(cost.numpy()))
    student_ids = heaviest.gather(1, _stacked(rows, np.int64, k).to(heaviest.device))
    return ColumnMatch(student_ids, teacher_ids, _all_matched(student_ids))


def _ranked_teacher(
    batch: Batch, aligned: AlignedPositions, *, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The teacher's k heaviest columns, and their probabilities at the paired positions."""
    teacher = batch.teacher.logits
    ids = _heaviest(teacher.column_mass(temperature=temperature), k)
    probs = teacher.log_probs(ids.unsqueeze(1), temperature=temperature).exp().detach()
    return ids, aligned.of_teacher(probs)


def _heaviest(mass: Tensor, k: int) -> Tensor:
    """Columns of the k largest masses of each sequence, (B, k), ties to the lower column."""
    return top_k(Rows(mass, None, mass.shape[1]), k)[0]


def _all_probs(logits: Logits, temperature: float) -> Tensor:
    ids = torch.arange(logits.shape[2], device=logits.device).expand(logits.shape[0], 1, -1)
    return logits.log_probs(ids, temperature=temperature).exp()


def _assign(cost: np.ndarray) -> np.ndarray:
    # Imported here: scipy.optimize costs a second, and the default matching does without.
    from scipy.optimize import linear_sum_assignment

    partner: np.ndarray = linear_sum_assignment(cost)[1]
    return partner


def _column_costs(teacher: Tensor, student: Tensor, columns: int) -> np.ndarray:
    teacher = torch.nn.functional.pad(teacher, (0, columns - teacher.shape[1]))
    student = torch.nn.functional.pad(student, (0, columns - student.shape[1]))
    return torch.cdist(teacher.T, student.T, p=1.0).numpy()


def _stacked(rows: list[np.ndarray], dtype: type[np.generic], k: int) -> Tensor:
    """Rows of k entries as (B, k), also where B is 0."""
    return torch.from_numpy(np.array(rows, dtype).reshape(-1, k))


def _all_matched(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)
