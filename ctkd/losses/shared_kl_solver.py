"""The comparison of `ctkd.losses.shared_kl` for blocks of rows, and its gradient in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctkd.compiled import as_columns
from ctkd.divergences import LOG_FLOOR, divergence_terms
from ctkd.pair_solvers import CompiledSolver, PairArrays, RowSolution
from ctkd.powers import LOG_2, Powers, Workspace, powers_of_two

__all__ = [
    "LOWEST_LOGIT",
    "NO_CLASS",
    "SharedColumns",
    "SharedSolver",
    "compiled_shared_solver",
    "take_columns",
]

# The log of a sum of nothing but zeros has no gradient. This is as good as minus infinity; being a
# power of two, it is scaled without rounding, so that rows of nothing else are still even.
LOWEST_LOGIT = -(2.0**100)

# Far below that: stands in columns that are no class, so that they take no part in a softmax.
NO_CLASS = -3e38


def take_columns(rows: Tensor, ids: Tensor) -> Tensor:
    """Columns (N, M) of rows (N, V), the same for every row."""
    return rows.gather(1, ids.expand(rows.shape[0], -1))


class SharedColumns(NamedTuple):
    """Where the classes of both sides are; the student's order of columns is that of both.

    Attributes:
        sources: Teacher column of each student column, (V,), any where it is no shared token.
        lowest: Least logit in each student column, (V,).
        highest: Largest logit in each student column, (V,).
        student_others: Columns of the class of the rest, if there is one.
        teacher_others: The same on the other side.
    """

    sources: Tensor
    lowest: Tensor
    highest: Tensor
    student_others: Tensor | None
    teacher_others: Tensor | None


class _Classes(NamedTuple):
    """Probabilities of one side: of shared tokens in their columns, and of the rest.

    Attributes:
        exponents: (N, V), so that log p = ``LOG_2 * exponents + offset``.
        offset: (N, 1) float64.
        probs: (N, V), 0 in columns that are no class.
        log_rest: (N, 1) float64.
        rest: Powers of the columns of the rest.
    """

    exponents: Tensor
    offset: Tensor
    probs: Tensor
    log_rest: Tensor | None
    rest: Powers | None


def _classes(
    logits: Tensor,
    others: Tensor | None,
    columns: SharedColumns,
    temperature: float,
    room: tuple[Tensor, Tensor],
) -> _Classes:
    # One pass; a mask would take many times as long on a CPU.
    logits = torch.clamp(logits, columns.lowest, columns.highest, out=room[0])
    shared = powers_of_two(logits, temperature, exponents=logits, powers=room[1])
    offset = -shared.log_total
    log_rest = rest = None
    if others is not None:
        others = others.clamp_min_(LOWEST_LOGIT)
        rest = powers_of_two(others, temperature, exponents=others)
        log_shared, log_rest = shared.log_normaliser, rest.log_normaliser
        normaliser = torch.logaddexp(log_shared, log_rest)
        # Low enough for `LOG_FLOOR` to have the last word, high enough not to swamp exponents.
        offset += (log_shared - normaliser).clamp_min_(2 * LOG_FLOOR)
        log_rest = (log_rest - normaliser).clamp_min_(LOG_FLOOR)
    probs = shared.powers.mul_(offset.exp().to(logits.dtype))
    floor = ((LOG_FLOOR - offset) / LOG_2).to(logits.dtype)
    exponents = torch.maximum(shared.exponents, floor, out=shared.exponents)
    return _Classes(exponents, offset, probs, log_rest, rest)


@dataclass(frozen=True, slots=True, eq=False)
class SharedSolver:
    """`jsd` between `shared_log_probs` of both sides, and its gradient."""

    columns: SharedColumns
    beta: float
    temperature: float
    workspace: Workspace

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        per_pair: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        student, teacher = self._sides(student_logits, teacher_logits)
        difference = (student.offset - teacher.offset).to(student_logits.dtype)
        gap = student.exponents.sub_(teacher.exponents)
        gap = torch.add(difference, gap, alpha=LOG_2, out=gap)
        spare = None
        if 0 < self.beta < 1:
            spare = teacher.exponents, self._room("term", student_logits)
        term, other_term = divergence_terms(
            gap, student.probs, teacher.probs, self.beta, spare=spare
        )
        total = term.sum(-1, keepdim=True).double()
        values = total + other_term.sum(-1, keepdim=True)
        rest_change = None
        if student.log_rest is not None and teacher.log_rest is not None:
            rest_prob = student.log_rest.exp()
            rest_term, other_term = divergence_terms(
                student.log_rest - teacher.log_rest, rest_prob, teacher.log_rest.exp(), self.beta
            )
            total, values = total + rest_term, values + rest_term + other_term
            rest_change = rest_term - rest_prob * total
        if not with_gradient:
            return RowSolution(values)
        # The terms are derivatives with respect to log-probabilities, of which the sum is fixed.
        gradient = term.addcmul_(student.probs, -total.to(term.dtype))
        if rest_change is not None:
            self._add_rest_(gradient, student, rest_change)
        if self.temperature != 1.0:
            gradient.div_(self.temperature)
        # Where a logit was cut off it has no influence.
        if gradient.device.type != "cpu" or bool(student_logits.amin() < LOWEST_LOGIT):
            gradient.masked_fill_(student_logits < LOWEST_LOGIT, 0.0)
        return RowSolution(values, gradient)

    def _sides(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[_Classes, _Classes]:
        columns = self.columns
        carried = self._room("teacher", student_logits)
        index = columns.sources.expand(teacher_logits.shape[0], -1)
        torch.gather(teacher_logits, 1, index, out=carried)
        student, teacher = (
            _classes(
                logits,
                None if others is None else take_columns(raw, others),
                columns,
                self.temperature,
                (room, self._room(f"{side} probs", student_logits)),
            )
            for side, logits, raw, others, room in (
                (
                    "student",
                    student_logits,
                    student_logits,
                    columns.student_others,
                    self._room("student", student_logits),
                ),
                ("teacher", carried, teacher_logits, columns.teacher_others, carried),
            )
        )
        return student, teacher

    def _add_rest_(self, gradient: Tensor, student: _Classes, change: Tensor) -> None:
        if student.rest is not None and self.columns.student_others is not None:
            share = (change / student.rest.total).to(gradient.dtype)
            within = student.rest.powers.mul_(share)
            gradient.scatter_(1, self.columns.student_others.expand_as(within), within)

    def _room(self, name: str, block: Tensor) -> Tensor:
        return self.workspace.rows(name, block, block.shape[1])


def compiled_shared_solver(
    columns: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    student_size: int,
    beta: float,
    temperature: float,
) -> CompiledSolver:
    """What `SharedSolver` does, by compiled loops.

    Args:
        columns: Shared tokens of student and teacher, and those of the class of the rest, if any.
        student_size: V.
        beta: Of `ctkd.divergences.divergence_terms`.
        temperature: Divides both models' logits.
    """
    # Made once for all parts of the rows.
    student_ids, teacher_ids, student_others, teacher_others = (
        as_columns(columns[0][:0] if one is None else one) for one in columns
    )

    def solve(pairs: PairArrays, some: slice) -> None:
        from ctkd.kernels.pair_rows import put_shared_kl

        put_shared_kl(
            *pairs.student,
            *pairs.teacher,
            some.start,
            some.stop,
            student_ids,
            teacher_ids,
            student_others,
            teacher_others,
            float(temperature),
            beta,
            LOWEST_LOGIT,
            LOG_FLOOR,
            pairs.answers,
            *pairs.gradients,
            student_size,
        )

    return solve
