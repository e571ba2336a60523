"""The terms of MultiLevelOT, shared by the losses that are made of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from ctkd.batch import Batch, Side
from ctkd.chunks import PAIRINGS, pair_positions
from ctkd.errors import SettingError
from ctkd.logits import Logits
from ctkd.loss import (
    Loss,
    LossOutput,
    Paper,
    Weights,
    average,
    check_choice,
    check_count,
    check_positive,
    check_weight,
    masked_sum,
)
from ctkd.matching import (
    MATCHINGS,
    ColumnMatch,
    match_by_assignment,
    match_by_mass,
    match_greedily,
    match_top_by_assignment,
)
from ctkd.sinkhorn import sinkhorn

__all__ = [
    "TITLE",
    "MultiLevelOTTerms",
    "absolute_difference",
    "check_some_weight",
    "sequence_cost",
    "teacher_weighted_log_loss",
]

TITLE = "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation"


def absolute_difference(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    r"""Holistic absolute difference of matched columns: ``sum_i |t_i - s_i|`` (eqs. 13-14).

    Shape:
        (..., K) and (..., K) give (...).

    Example:
        >>> absolute_difference(torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.25]))
        tensor(0.2500)
    """
    return (teacher_probs - student_probs).abs().sum(-1)


def teacher_weighted_log_loss(student_log_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    r"""Sequential logarithmic cost of matched columns: ``-sum_i t_i log s_i`` (eqs. 15-16).

    A cross-entropy over the kept columns, so it is not 0 where both sides agree. Where t is 0 it
    adds 0, also against a student probability of 0; where only s is 0 it is infinite.

    Shape:
        (..., K) in nats and (..., K) give (...).

    Example:
        >>> teacher_weighted_log_loss(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25]))
        tensor(1.)
    """
    return -(teacher_probs * student_log_probs.masked_fill(teacher_probs == 0, 0.0)).sum(-1)


def sequence_cost(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    r"""L1 distance of every teacher token to every student token over the matched columns.

    .. math:: C_{ji} = \sum_l |t_l(j) - s_l(i)|

    Shape:
        (B, S, K) and (B, T, K) give (B, T, S).

    Example:
        >>> sequence_cost(torch.tensor([[[0.5], [0.0]]]), torch.tensor([[[1.0]]]))
        tensor([[[0.5000, 1.0000]]])
    """
    return torch.cdist(teacher_probs, student_probs, p=1.0)


class MultiLevelOTTerms(Loss):
    """Matching, and the three terms; the registered classes choose their weights."""

    paper = Paper(TITLE, "2412.14528", "eqs. 10-20")
    unit = "position"
    teacher_needs = "top_k"
    default_weights = Weights(ce=1.0, kd=0.15)

    def __init__(
        self,
        *,
        k: int,
        temperature: float,
        matching: str,
        candidates: int,
        max_columns: int,
        pairing: str,
    ) -> None:
        super().__init__()
        check_count("k", k)
        check_positive("temperature", temperature)
        check_choice("matching", matching, MATCHINGS)
        check_count("candidates", candidates)
        check_count("max_columns", max_columns)
        self.k = k
        self.temperature = temperature
        self.matching = matching
        self.candidates = candidates
        self.max_columns = max_columns
        check_choice("pairing", pairing, PAIRINGS)
        self.pairing = pairing
        if pairing == "chunk":
            self.needs = frozenset({"chunks"})

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    @torch.no_grad()
    def match(self, batch: Batch, asked_next: Sequence[float] = ()) -> ColumnMatch:
        """Choose the kept columns of every sequence (eqs. 9-12).

        Args:
            batch: The batch.
            asked_next: Temperatures that the terms will ask for, so that one reading serves both.
        """
        k = min(self.k, batch.student.logits.shape[2], batch.teacher.logits.shape[2])
        if self.matching == "greedy":
            return match_greedily(batch, k=k, temperature=self.temperature, pairing=self.pairing)
        if self.matching == "assignment":
            return match_by_assignment(
                batch,
                k=k,
                temperature=self.temperature,
                max_columns=self.max_columns,
                pairing=self.pairing,
            )
        if self.matching == "assignment_topk":
            return match_top_by_assignment(
                batch,
                k=k,
                temperature=self.temperature,
                candidates=self.candidates,
                pairing=self.pairing,
            )
        return match_by_mass(batch, k=k, temperature=self.temperature, asked_next=asked_next)

    def weighted_terms(
        self,
        batch: Batch,
        *,
        had_weight: float = 0.0,
        sl_weight: float = 0.0,
        sd_weight: float = 0.0,
        sl_temperature: float = 1.0,
        sd_temperature: float = 2.0,
        regularization: float = 0.1,
        iterations: int = 20,
    ) -> LossOutput:
        """Weighted terms of the sequences; a term of weight 0 is not computed."""
        wanted = {"had": had_weight, "sl": sl_weight, "sd": sd_weight}
        temperatures = {"had": self.temperature, "sl": sl_temperature, "sd": sd_temperature}
        temperatures = {name: temperatures[name] for name, weight in wanted.items() if weight}
        match = self.match(batch, sorted(set(temperatures.values())))
        student = _log_probs(batch.student.logits, match.student_ids, temperatures)
        with torch.no_grad():
            teacher = _log_probs(batch.teacher.logits, match.teacher_ids, temperatures)
        missing = ~match.found.unsqueeze(1) | _masked(batch.student, student)
        pairs = pair_positions(batch, self.pairing)

        parts = {}
        if had_weight:
            student_probs = pairs.of_student(student["had"]).exp().masked_fill(missing, 0.0)
            had = absolute_difference(student_probs, pairs.of_teacher(teacher["had"]).exp())
            parts["had"] = had_weight * masked_sum(had, pairs.valid)
        if sl_weight:
            teacher_probs = pairs.of_teacher(teacher["sl"]).exp().masked_fill(missing, 0.0)
            sl = teacher_weighted_log_loss(pairs.of_student(student["sl"]), teacher_probs)
            parts["sl"] = sl_weight * masked_sum(sl, pairs.valid)
        if sd_weight:
            student_probs = student["sd"].exp().masked_fill(missing, 0.0)
            transport = sinkhorn(
                sequence_cost(student_probs, teacher["sd"].exp()),
                regularization=regularization,
                iterations=iterations,
                row_mask=batch.teacher.mask,
                column_mask=batch.student.mask,
            )
            parts["sd"] = sd_weight * transport.cost
        return average(parts, self.units(batch))

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _log_probs(logits: Logits, ids: Tensor, temperatures: dict[str, float]) -> dict[str, Tensor]:
    """Log-probabilities of one set of columns per sequence, for each term at its temperature."""
    distinct = sorted(set(temperatures.values()))
    answers = dict(zip(distinct, logits.log_probs_at(ids.unsqueeze(1), distinct), strict=True))
    return {name: answers[temperature] for name, temperature in temperatures.items()}


def _masked(side: Side, log_probs: dict[str, Tensor]) -> Tensor:
    """Columns that are minus infinity wherever the side is scored, (B, 1, K): as if not there."""
    impossible = next(iter(log_probs.values())) == -torch.inf
    return (impossible | ~side.mask.unsqueeze(-1)).all(1, keepdim=True)


def check_some_weight(**weights: float) -> None:
    """Refuse weights below 0, and weights that are all 0."""
    for name, weight in weights.items():
        check_weight(name, weight)
    if not any(weights.values()):
        raise SettingError(f"at least one of {', '.join(weights)} must be above 0")
