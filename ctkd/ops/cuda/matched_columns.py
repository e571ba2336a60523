"""Matched columns at aligned positions, a launch each way: operators of torch, in Triton.

The operators are there whether triton is or not: on the meta device they have shapes and costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.ops.costs import Cost
from ctkd.ops.cuda.operators import Matrix, kernel_cost, kernels, nbytes, operator, power_of_two

__all__ = [
    "Matched",
    "Side",
    "Term",
    "fused_target",
    "serves_target",
    "sums_at_positions",
]

_TILE, _MOST_COLUMNS = 16, 64
# Each entry of a target is compared with each.
_MOST_ENTRIES = 64


def sums_at_positions(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    missing: Tensor,
    student_at: Tensor,
    teacher_at: Tensor,
    valid: Tensor,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Weighted sums over a sequence of ``sum |t - s|`` and of ``-sum t log s``, (B,) each.

    Args:
        student: Log-probabilities (B, S, K) for each of the two; one tensor may be both.
        teacher: Likewise, (B, T, K).
        missing: (B, 1, K) bool, columns without a partner: s is 0, and the second sum skips them.
        student_at: (B, P) int64, no position twice where valid.
        teacher_at: (B, P) int64.
        valid: (B, P) bool.
        weights: Of the two sums.
    """
    (ours, others), (theirs, their_others) = student, teacher
    sums: tuple[Tensor, Tensor] = _Sums.apply(
        weights,
        ours,
        None if others is ours else others,
        theirs,
        None if their_others is theirs else their_others,
        missing,
        student_at,
        teacher_at,
        valid,
    )
    return sums


def serves_target(teacher_ids: Tensor) -> bool:
    """True if `fused_target` serves so many entries, (B, T, K)."""
    return 0 < teacher_ids.shape[2] <= _MOST_ENTRIES


def fused_target(
    teacher_ids: Tensor, log_probs: Tensor, names: Tensor, teacher_of: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """See `ctkd.losses.mined.fused_target`."""
    ids, probs = _fused_target(teacher_ids, log_probs, names, teacher_of, labels)
    return ids, probs


class Side(NamedTuple):
    """Log-probabilities of a side, as kernels are given them.

    Attributes:
        log_probs: (B, S, K) of the first term.
        others: (B, S, K) of the second term.
        at: (B, P) positions that are compared.
        outer: Entries from a sequence's to the next's.
        inner: Entries from a position to the next.
        length: S.
    """

    log_probs: Tensor
    others: Tensor
    at: Tensor
    outer: int
    inner: int
    length: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], at: Tensor) -> Side:
        """A side of one or two tensors."""
        first, *others = (one.contiguous() for one in tensors)
        outer, inner = at.stride()
        return cls(first, others[0] if others else first, at, outer, inner, first.shape[1])


class Matched(NamedTuple):
    """What is compared.

    Attributes:
        valid: (B, P) whether a position is.
        positions: P.
        missing: (B, K) whether a column has no partner.
        width: K.
    """

    valid: Tensor
    positions: int
    missing: Tensor
    width: int


class Term(NamedTuple):
    """A term in a backward pass.

    Attributes:
        weight: Of the term.
        upstream: (B,) gradient of its sum, or None.
        stride: Of that.
        gradient: What is written; None where that of the first term takes it.
    """

    weight: float
    upstream: Tensor | None
    stride: int
    gradient: Tensor | None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: tuple[float, float], *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.weights = weights
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        sums: tuple[Tensor, Tensor] = _matched_columns(*_grouped(*given), weights)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        if upstream == (None, None):
            return (None,) * 9
        answer = _matched_columns_backward(*_grouped(*given), ctx.weights, upstream)
        return None, answer[0], None if given[1] is None else answer[1], *(None,) * 6


def _grouped(*given: Tensor | None) -> tuple[Any, ...]:
    """Arguments of the operators, of which those that may be missing are in lists."""
    sides = [[one for one in given[start : start + 2] if one is not None] for start in (0, 2)]
    missing, *at, valid = given[4:]
    return *sides, missing, at, valid


@dataclass(frozen=True)
class _Compared:
    """Arguments of both operators.

    Args:
        student: Log-probabilities for both terms; one tensor serves both.
        teacher: Likewise.
        missing: As of `sums_at_positions`.
        at: Positions of the student and of the teacher.
        valid: As of `sums_at_positions`.
        weights: As of `sums_at_positions`.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    missing: Tensor
    at: Sequence[Tensor]
    valid: Tensor
    weights: Sequence[float]

    def given(self, student: Sequence[Tensor]) -> tuple[Side, Side, Matched]:
        """First arguments of the kernels, with what is read of the student."""
        valid, missing = (one.contiguous().view(torch.uint8) for one in (self.valid, self.missing))
        return (
            Side.of(student, self.at[0]),
            Side.of(self.teacher, self.at[1]),
            Matched(valid, valid.shape[1], missing, missing.shape[-1]),
        )

    @property
    def tile(self) -> tuple[int, int]:
        """Positions and columns of a tile."""
        return _TILE, min(max(power_of_two(self.missing.shape[-1]), 16), _MOST_COLUMNS)


@dataclass(frozen=True)
class _Forward(_Compared):
    """Sums (B,) of both terms."""

    def answers(self) -> tuple[Tensor, Tensor]:
        batch = self.student[0].shape[0]
        return self.student[0].new_empty(batch), self.student[0].new_empty(batch)

    def start(self, answers: tuple[Tensor, Tensor]) -> None:
        if len(answers[0]):
            kernels("matched_columns_kernels").matched_columns[(len(answers[0]),)](
                *self.given(self.student),
                answers,
                tuple(self.weights),
                TILE=self.tile,
                num_warps=4,
            )

    def cost(self) -> Cost:
        given = *self.student, *self.teacher, self.missing, self.valid
        return kernel_cost(nbytes(*given, *self.at) + 8 * len(self.student[0]), *given)


@dataclass(frozen=True)
class _Backward(_Compared):
    """Gradients of the student's log-probabilities, (1 or 2, B, S, K), from those of the sums."""

    upstream: Sequence[Tensor | None]

    def answers(self) -> Tensor:
        return self.student[0].new_zeros(len(self.student), *self.student[0].shape)

    def start(self, answers: Tensor) -> None:
        batch, count = self.valid.shape
        if batch and count:
            tiles = math.ceil(count / self.tile[0]), math.ceil(answers.shape[-1] / self.tile[1])
            gradients = answers[0], answers[1] if len(answers) > 1 else None
            kernels("matched_columns_kernels").matched_columns_backward[(batch, *tiles)](
                *self.given(self.student[:1]),
                tuple(
                    Term(weight, one, 0 if one is None else one.stride(0), gradient)
                    for weight, one, gradient in zip(
                        self.weights, self.upstream, gradients, strict=True
                    )
                ),
                TILE=self.tile,
                num_warps=4,
            )

    def cost(self) -> Cost:
        # All is cleared, and what is compared is written again.
        student = self.student[0]
        given = student, *self.teacher, self.missing, self.valid
        moved = nbytes(*given, *self.at, *self.upstream) + 2 * len(self.student) * nbytes(student)
        cost = kernel_cost(moved, *given)
        return cost._replace(launches=cost.launches + 1)


@dataclass(frozen=True)
class _Target:
    """Arguments as of `fused_target`: ids and probabilities, (B, S, K) each."""

    teacher_ids: Tensor
    log_probs: Tensor
    names: Tensor
    teacher_of: Tensor
    labels: Tensor

    def answers(self) -> tuple[Tensor, Tensor]:
        size = *self.labels.shape, self.teacher_ids.shape[2]
        return self.labels.new_empty(size), self.log_probs.new_empty(size)

    def start(self, answers: tuple[Tensor, Tensor]) -> None:
        if answers[0].numel():
            kernels("matched_columns_kernels").fused_target[(self.labels.numel(),)](
                (
                    self.teacher_ids.contiguous(),
                    self.log_probs.contiguous(),
                    *self.teacher_ids.shape[1:],
                ),
                self.names.contiguous(),
                Matrix.of(self.teacher_of),
                self.labels.contiguous(),
                answers,
                self.labels.shape[1],
                WIDTH=max(power_of_two(self.teacher_ids.shape[2]), 2),
                num_warps=1,
            )

    def cost(self) -> Cost:
        # A name for each entry; of each position the entries are read and written.
        entries = self.labels.numel() * self.teacher_ids.shape[2]
        moved = entries * (8 + 2 * (8 + self.log_probs.element_size()))
        given = self.teacher_ids, self.log_probs, self.names, self.labels
        return kernel_cost(moved + nbytes(self.teacher_of, self.labels), *given)


_fused_target = operator("fused_target", _Target)
_matched_columns = operator("matched_columns", _Forward)
_matched_columns_backward = operator("matched_columns_backward", _Backward)
