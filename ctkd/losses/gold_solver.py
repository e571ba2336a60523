"""The two terms of `ctkd.losses.gold` for blocks of rows, and their gradient in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctkd.divergences import LOG_FLOOR, divergence_terms
from ctkd.powers import LOG_2, Powers, Workspace, powers_of_two
from ctkd.row_pairs import RowSolution
from ctkd.sorting import ranked_l1

__all__ = ["GoldColumns", "GoldSolver"]


class GoldColumns(NamedTuple):
    """M on both sides, in one order, and the columns outside it."""

    student: Tensor
    teacher: Tensor
    student_others: Tensor
    teacher_others: Tensor


class _Rows(NamedTuple):
    """Rows of one side: log v is ``LOG_2 * exponent + offset``.

    Attributes:
        logits: (N, V).
        powers: Of all columns.
        exponent_scale: What a logit is multiplied by.
        offset: (N, 1) float64, with the log scale of the pair.
        factor: (N, 1), v is this times a power.
    """

    logits: Tensor
    powers: Powers
    exponent_scale: float
    offset: Tensor
    factor: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, temperature: float, log_scale: Tensor | None, room: Tensor
    ) -> _Rows:
        powers = powers_of_two(logits, temperature, exponents=room, powers=room)
        offset = -powers.log_total
        if log_scale is not None:
            offset = offset + log_scale
        factor = offset.exp().to(logits.dtype)
        return cls(logits, powers, 1.0 / (temperature * LOG_2), offset, factor)

    def take(self, columns: Tensor, room: Tensor) -> Tensor:
        """Logits of some columns, (N, M)."""
        return torch.gather(self.logits, 1, columns.expand_as(room), out=room)

    def exponents_of(self, logits: Tensor, room: Tensor) -> Tensor:
        shift = self.powers.shift.neg()
        return torch.add(shift, logits, alpha=self.exponent_scale, out=room)

    def probs_of(self, logits: Tensor, room: Tensor) -> Tensor:
        """The v of some logits of these rows."""
        return self.exponents_of(logits, room).exp2_().mul_(self.factor)


@dataclass(frozen=True, slots=True, eq=False)
class GoldSolver:
    r"""Both terms of pairs of rows, weighted, and their gradient.

    With h the derivatives with respect to log v, which is the log-probability plus the log scale,
    the gradient is :math:`(h_v - p_v \sum_u h_u) / \tau` for a logit, and :math:`\sum_u h_u` for
    the student's log scale.
    """

    columns: GoldColumns
    beta: float
    weights: tuple[float, float]
    student_temperature: float
    teacher_temperature: float
    workspace: Workspace

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        per_pair: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        width, teacher_width = student_logits.shape[1], teacher_logits.shape[1]
        student_scale = teacher_scale = None
        if per_pair is not None:
            student_scale, teacher_scale = per_pair[:, :1], per_pair[:, 1:]
        student = _Rows.of(
            student_logits,
            self.student_temperature,
            student_scale,
            self._room("student", student_logits, width),
        )
        teacher = _Rows.of(
            teacher_logits,
            self.teacher_temperature,
            teacher_scale,
            # Only their sum is of use, and the room is free again.
            self._room("first", student_logits, teacher_width),
        )
        change = self._room("change", student_logits, width).zero_()
        matched = unmatched = student.factor.new_zeros(student.factor.shape)
        if self.weights[0]:
            matched = self._matched(student, teacher, change)
        if self.weights[1]:
            unmatched = self._unmatched(student, teacher, change, with_gradient)
        values = torch.cat([matched, unmatched], dim=-1)
        if not with_gradient:
            return RowSolution(values)
        total = change.sum(-1, keepdim=True)
        gradient = change.addcmul_(student.powers.powers, total / -student.powers.total)
        if self.student_temperature != 1.0:
            gradient.div_(self.student_temperature)
        if per_pair is None:
            return RowSolution(values, gradient)
        return RowSolution(values, gradient, torch.cat([total, torch.zeros_like(total)], dim=-1))

    def _matched(self, student: _Rows, teacher: _Rows, change: Tensor) -> Tensor:
        columns = self.columns.student
        first, second, third, fourth, fifth = (
            self._room(name, change, columns.shape[0])
            for name in ("first", "second", "third", "fourth", "fifth")
        )
        exponents, teacher_exponents = (
            rows.exponents_of(rows.take(ids, room), room)
            for rows, ids, room in (
                (student, columns, second),
                (teacher, self.columns.teacher, third),
            )
        )
        probs = torch.exp2(exponents, out=first).mul_(student.factor)
        teacher_probs = torch.exp2(teacher_exponents, out=fourth).mul_(teacher.factor)
        for rows, of_rows in ((student, exponents), (teacher, teacher_exponents)):
            floor = ((LOG_FLOOR - rows.offset) / LOG_2).to(of_rows.dtype)
            torch.maximum(of_rows, floor, out=of_rows)
        difference = (student.offset - teacher.offset).to(exponents.dtype)
        gap = exponents.sub_(teacher_exponents)
        gap = torch.add(difference, gap, alpha=LOG_2, out=gap)
        term, teacher_term = divergence_terms(
            gap, probs, teacher_probs, self.beta, spare=(third, fifth)
        )
        value = teacher_term.add_(term).sum(-1, keepdim=True)
        change.scatter_(1, columns.expand_as(term), term.mul_(self.weights[0]))
        return value * self.weights[0]

    def _unmatched(
        self, student: _Rows, teacher: _Rows, change: Tensor, with_gradient: bool
    ) -> Tensor:
        columns, teacher_columns = self.columns.student_others, self.columns.teacher_others
        width, teacher_width = columns.shape[0], teacher_columns.shape[0]
        probs, teacher_probs = (
            rows.probs_of(rows.take(ids, room), room)
            for rows, ids, room in (
                (student, columns, self._room("first", change, width)),
                (teacher, teacher_columns, self._room("second", change, teacher_width)),
            )
        )
        room = self._room("third", change, width)
        value, part = ranked_l1(probs, teacher_probs, self.workspace, out=room)
        if with_gradient:
            part.mul_(self.weights[1])
            change.scatter_(1, columns.expand_as(part), part)
        return value * self.weights[1]

    def _room(self, name: str, like: Tensor, width: int) -> Tensor:
        return self.workspace.rows(name, like, width)
