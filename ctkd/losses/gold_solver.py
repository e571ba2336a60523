"""The two terms of `ctkd.losses.gold` for blocks of rows, and their gradient in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctkd.compiled import as_columns
from ctkd.divergences import LOG_FLOOR, divergence_terms
from ctkd.pair_solvers import CompiledSolver, PairArrays, RowSolution
from ctkd.powers import LOG_2, Workspace, powers_of_two
from ctkd.sorting import ranked_l1

__all__ = ["GoldColumns", "GoldSolver", "compiled_gold_solver"]


class GoldColumns(NamedTuple):
    """All columns of both sides: first those in M, in one order, then the others.

    Attributes:
        student: (V,).
        teacher: (W,).
        shared: How many are in M.
    """

    student: Tensor
    teacher: Tensor
    shared: int


class _Rows(NamedTuple):
    """Rows of one side with their columns rearranged; log v is ``LOG_2 * exponents + offset``.

    Attributes:
        exponents: (N, V).
        probs: (N, V), p.
        offset: (N, 1) float64, with the log scale of the pair.
    """

    exponents: Tensor
    probs: Tensor
    offset: Tensor

    @classmethod
    def of(
        cls,
        logits: Tensor,
        columns: Tensor,
        temperature: float,
        log_scale: Tensor | None,
        rooms: tuple[Tensor, Tensor],
    ) -> _Rows:
        exponents, probs = rooms
        torch.gather(logits, 1, columns.expand_as(exponents), out=exponents)
        powers = powers_of_two(exponents, temperature, exponents=exponents, powers=probs)
        probs.mul_(powers.total.reciprocal())
        offset = -powers.log_total
        return cls(exponents, probs, offset if log_scale is None else offset + log_scale)


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
        rooms = (
            self._room("exponents", student_logits, width),
            self._room("probs", student_logits, width),
        )
        # Both sides' columns lie side by side in memory: powers of rows that lie apart may round
        # otherwise, and a student that is the teacher would differ from it. The gradient is put
        # where the teacher has been.
        rows = len(student_logits)
        room = self._room("teacher", student_logits, max(teacher_width, width)).view(-1)
        teacher_rooms = (
            room[: rows * teacher_width].view(rows, teacher_width),
            self._room("teacher probs", student_logits, teacher_width),
        )
        student = _Rows.of(
            student_logits, self.columns.student, self.student_temperature, student_scale, rooms
        )
        teacher = _Rows.of(
            teacher_logits,
            self.columns.teacher,
            self.teacher_temperature,
            teacher_scale,
            teacher_rooms,
        )
        probs, teacher_probs = student.probs, teacher.probs
        if student_scale is not None and teacher_scale is not None:
            scale, teacher_scale = (one.exp() for one in (student_scale, teacher_scale))
            probs = torch.mul(probs, scale, out=self._room("scaled", probs, width))
            teacher_probs = teacher_probs.mul_(teacher_scale)
        change, shared = student.exponents, self.columns.shared
        matched = unmatched = probs.new_zeros((probs.shape[0], 1))
        if self.weights[0]:
            matched = self._matched(student, teacher, probs[:, :shared], teacher_probs[:, :shared])
        else:
            change[:, :shared] = 0.0
        if self.weights[1]:
            value, part = ranked_l1(
                probs[:, shared:], teacher_probs[:, shared:], out=change[:, shared:]
            )
            part.mul_(self.weights[1])
            unmatched = value * self.weights[1]
        else:
            change[:, shared:] = 0.0
        values = torch.cat([matched, unmatched], dim=-1)
        if not with_gradient:
            return RowSolution(values)
        total = change.sum(-1, keepdim=True)
        change.addcmul_(student.probs, total.neg())
        if self.student_temperature != 1.0:
            change.div_(self.student_temperature)
        gradient = room[: rows * width].view(rows, width)
        gradient.scatter_(1, self.columns.student.expand_as(change), change)
        if per_pair is None:
            return RowSolution(values, gradient)
        return RowSolution(values, gradient, torch.cat([total, torch.zeros_like(total)], dim=-1))

    def _matched(
        self, student: _Rows, teacher: _Rows, probs: Tensor, teacher_probs: Tensor
    ) -> Tensor:
        """Value of the shared columns; their derivative is put in place of their exponents."""
        shared = self.columns.shared
        exponents, teacher_exponents = (rows.exponents[:, :shared] for rows in (student, teacher))
        for rows, of_rows in ((student, exponents), (teacher, teacher_exponents)):
            floor = ((LOG_FLOOR - rows.offset) / LOG_2).to(of_rows.dtype)
            torch.maximum(of_rows, floor, out=of_rows)
        difference = (student.offset - teacher.offset).to(exponents.dtype)
        gap = torch.sub(exponents, teacher_exponents, out=exponents)
        gap = torch.add(difference, gap, alpha=LOG_2, out=gap)
        spare = self._room("spare", gap, shared), teacher_exponents
        term, teacher_term = divergence_terms(gap, probs, teacher_probs, self.beta, spare=spare)
        value = teacher_term.add_(term).sum(-1, keepdim=True)
        torch.mul(term, self.weights[0], out=exponents)
        return value * self.weights[0]

    def _room(self, name: str, like: Tensor, width: int) -> Tensor:
        return self.workspace.rows(name, like, width)


def compiled_gold_solver(
    columns: GoldColumns,
    beta: float,
    weights: tuple[float, float],
    student_temperature: float,
    teacher_temperature: float,
) -> CompiledSolver:
    """What `GoldSolver` does, by compiled loops."""
    ids = as_columns(columns.student), as_columns(columns.teacher)

    def solve(pairs: PairArrays, some: slice) -> None:
        from ctkd.kernels.pair_rows import put_gold

        put_gold(
            *pairs.student,
            *pairs.teacher,
            some.start,
            some.stop,
            *ids,
            columns.shared,
            float(student_temperature),
            float(teacher_temperature),
            float(beta),
            float(weights[0]),
            float(weights[1]),
            LOG_FLOOR,
            pairs.per_pair,
            pairs.answers,
            pairs.per_pair_gradient,
            *pairs.gradients,
        )

    return solve
