"""Multi-level optimal transport in the paper's form: both levels, and each alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctkd.batch import Batch, Side
from ctkd.chunks import PAIRINGS, AlignedPositions, align_positions
from ctkd.loss import Loss, LossOutput, Measured, Paper, Weights, average, masked_sum
from ctkd.ops import kernels_for
from ctkd.ot.matching import (
    MATCHINGS,
    ColumnMatch,
    match_by_assignment,
    match_by_mass,
    match_greedily,
    match_top_by_assignment,
)
from ctkd.ot.sinkhorn import l1_cost, sinkhorn
from ctkd.registry import register
from ctkd.settings import check_choice, check_count, check_positive, check_some_weight

__all__ = [
    "MultiLevelOT",
    "MultiLevelOTSequence",
    "MultiLevelOTToken",
    "absolute_difference",
    "sequence_cost",
    "teacher_weighted_log_loss",
]

_TITLE = "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation"


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
    return l1_cost(teacher_probs, student_probs)


@register("multilevelot")
class MultiLevelOT(Loss):
    r"""Matches ranked vocabulary columns per token, and tokens per sequence by transport.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b \left(
            w_{HAD} L_{HAD} + w_{SL} L_{SL} + w_{SD} L_{SD} \right)

    .. math::
        L_{HAD} = \sum_{i \le \min(S, T)} \sum_{l \le k} |t_l(i) - s_l(i)|, \quad
        L_{SL} = -\sum_{i \le \min(S, T)} \sum_{l \le k} t_l(i) \log s_l(i), \quad
        L_{SD} = \langle P, C \rangle

    t and s are the probabilities of the k columns that carry most of the teacher's mass over the
    whole sequence and of their student partners, not renormalized. C is the L1 distance of every
    teacher token (rows) to every student token (columns); P comes from ``iterations`` rounds of
    scaling exp(-C / regularization) to unit rows, then unit columns. Columns are ranked by the
    mass over all scored positions of their own side. L_SL and L_SD are not 0 at equality.

    Shape:
        Student (B, S, V), teacher (B, T, W). With S and T unequal, HAD and SL run over the first
        min(S, T) positions, and SD is rectangular; its total mass is S.

    Args:
        had_weight: Weight of L_HAD, at least 0.
        sl_weight: Weight of L_SL, beta in the paper.
        sd_weight: Weight of L_SD, gamma in the paper.
        k: Columns kept per sequence; cut to the smaller vocabulary.
        temperature: Of the probabilities in L_HAD and in the ranking, above 0.
        sl_temperature: Of those in L_SL.
        sd_temperature: Of those in L_SD.
        regularization: Entropic regularization of P, lambda in the paper, in units of C.
        iterations: Sinkhorn rounds, N in the paper.
        matching: How teacher columns get student columns. ``"mass"``: equal ranks by each side's
            own mass. ``"greedy"``: in rank order, the nearest free student column.
            ``"assignment"``: eq. 11, all columns, by scipy; among equal optima, scipy's choice.
            ``"assignment_topk"``: the k teacher columns against the heaviest student columns, by
            scipy, which is a different optimum.
        candidates: Student columns that ``"assignment_topk"`` chooses from.
        max_columns: Largest vocabulary that ``"assignment"`` accepts.
        pairing: What HAD, SL and the matchings that compare positions pair. ``"position"``: the
            k-th scored positions, as in the paper. ``"chunk"``: the positions at which both
            models have read the same bytes. SD takes all positions either way.

    Minus infinity:
        A student column that is minus infinity at all scored positions counts as not there: a
        teacher column that would get it has no partner, so its whole mass is its difference in
        L_HAD and C, and L_SL leaves it out. Minus infinity at some positions only makes L_SL
        infinite where t is above 0; on a CPU that is refused.

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If ``"assignment"`` meets more than ``max_columns`` columns, chunks are to be
            paired and the batch has none, or a student's logit of minus infinity makes L_SL
            infinite.

    Example:
        One token on both sides and k = 1: t = 0.75, s = 0.5. HAD is 0.25, SL is -0.75 log 0.5.

        >>> import torch
        >>> import ctkd
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     teacher_logits=torch.tensor([[[0.0, 0.25, 0.75], [0.0, 0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 2]]),
        ... )
        >>> parts = ctkd.get_loss("multilevelot", k=1, sl_weight=1.0, sd_weight=0.0)(batch).parts
        >>> [round(float(parts[name]), 4) for name in ("had", "sl")]
        [0.25, 0.5199]

    Stored teacher:
        Needs the largest entries of each row. The ranking of columns and the terms take stored
        entries as they were; every other column has an even share of what is left of its row,
        which is off by at most the smallest of the k stored probabilities.
        `benchmarks/teacher_cache.py` prints the error as a function of k.

    Differs from the paper:
        The paper sums over tokens; this is the sum divided by the student's scored tokens, to be
        weighted against a mean cross-entropy. The paper's matching is ``"assignment"``; the
        default is the cheap rule of its authors' code, applied to each sequence alone. Unequal
        lengths are not treated in the paper.

    References:
        Cui et al., "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge
        Distillation on Language Models", AAAI 2025, arXiv:2412.14528, eqs. 9-21.
    """

    paper = Paper(_TITLE, "2412.14528", "eqs. 9-21")
    matches = "ranked columns per token, tokens per sequence by Sinkhorn transport"
    unit = "position"
    teacher_needs = "top_k"
    default_weights = Weights(ce=1.0, kd=0.15)
    measured = Measured(
        kd=0.15, difference=-0.0041, low=-0.0129, high=0.0048, share=0.005, at_default=-0.0163
    )

    def __init__(
        self,
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
        max_columns: int = 4096,
        pairing: str = "position",
    ) -> None:
        super().__init__()
        check_some_weight(had_weight=had_weight, sl_weight=sl_weight, sd_weight=sd_weight)
        check_count("k", k)
        check_positive("temperature", temperature)
        check_positive("sl_temperature", sl_temperature)
        check_positive("sd_temperature", sd_temperature)
        check_positive("regularization", regularization)
        check_count("iterations", iterations)
        check_choice("matching", matching, MATCHINGS)
        check_count("candidates", candidates)
        check_count("max_columns", max_columns)
        check_choice("pairing", pairing, PAIRINGS)
        self.had_weight = had_weight
        self.sl_weight = sl_weight
        self.sd_weight = sd_weight
        self.k = k
        self.temperature = temperature
        self.sl_temperature = sl_temperature
        self.sd_temperature = sd_temperature
        self.regularization = regularization
        self.iterations = iterations
        self.matching = matching
        self.candidates = candidates
        self.max_columns = max_columns
        self.pairing = pairing
        if pairing == "chunk":
            self.needs = frozenset({"chunks"})
        # Several terms may be of one temperature, and are answered together.
        self._term_temperatures = sorted(
            {
                term_temperature
                for weight, term_temperature in (
                    (had_weight, temperature),
                    (sl_weight, sl_temperature),
                    (sd_weight, sd_temperature),
                )
                if weight
            }
        )
        self.teacher_temperatures = tuple(sorted({temperature, *self._term_temperatures}))

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    @torch.no_grad()
    def match(self, batch: Batch, prefetch: Sequence[float] = ()) -> ColumnMatch:
        """Choose the kept columns of every sequence (eqs. 9-12).

        Args:
            batch: The batch.
            prefetch: Temperatures that the terms will ask for, so that one reading serves both.
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
        return match_by_mass(batch, k=k, temperature=self.temperature, prefetch=prefetch)

    def forward(self, batch: Batch) -> LossOutput:
        temperatures = self._term_temperatures
        match = self.match(batch, temperatures)
        student_ids, teacher_ids = match.student_ids.unsqueeze(1), match.teacher_ids.unsqueeze(1)
        answers = batch.student.logits.log_probs_at(student_ids, temperatures)
        student = dict(zip(temperatures, answers, strict=True))
        with torch.no_grad():
            teacher_answers = batch.teacher.logits.log_probs_at(teacher_ids, temperatures)
            teacher = dict(zip(temperatures, teacher_answers, strict=True))
        missing = ~(match.matched.unsqueeze(1) & _possible(batch.student, answers[0]))
        aligned = align_positions(batch, self.pairing)

        parts = self._token_terms(student, teacher, missing, aligned)
        if self.sd_weight:
            student_probs = student[self.sd_temperature].exp().masked_fill(missing, 0.0)
            transport = sinkhorn(
                sequence_cost(student_probs, teacher[self.sd_temperature].exp()),
                regularization=self.regularization,
                iterations=self.iterations,
                row_mask=batch.teacher.mask,
                column_mask=batch.student.mask,
            )
            parts["sd"] = self.sd_weight * transport.cost
        return average(parts, self.units(batch))

    def _token_terms(
        self,
        student: dict[float, Tensor],
        teacher: dict[float, Tensor],
        missing: Tensor,
        aligned: AlignedPositions,
    ) -> dict[str, Tensor]:
        """Weighted HAD and SL of each sequence, (B,), from answers by temperature."""
        weights = {"had": self.had_weight, "sl": self.sl_weight}
        if not any(weights.values()):
            return {}
        kernels: Any = kernels_for("matched_columns", *student.values(), *teacher.values())
        if kernels is not None:
            temperatures = self.temperature, self.sl_temperature
            sums = kernels.sums_at_positions(
                *(
                    [answers.get(one, next(iter(answers.values()))) for one in temperatures]
                    for answers in (student, teacher)
                ),
                missing,
                aligned.student,
                aligned.teacher,
                aligned.valid,
                tuple(weights.values()),
            )
            both = dict(zip(weights, sums, strict=True))
            return {name: both[name] for name, weight in weights.items() if weight}
        parts = {}
        if self.had_weight:
            ours = aligned.of_student(student[self.temperature]).exp().masked_fill(missing, 0.0)
            theirs = aligned.of_teacher(teacher[self.temperature]).exp()
            had = absolute_difference(ours, theirs)
            parts["had"] = self.had_weight * masked_sum(had, aligned.valid)
        if self.sl_weight:
            ours = aligned.of_student(student[self.sl_temperature])
            theirs = aligned.of_teacher(teacher[self.sl_temperature]).exp()
            sl = teacher_weighted_log_loss(ours, theirs.masked_fill(missing, 0.0))
            parts["sl"] = self.sl_weight * masked_sum(sl, aligned.valid)
        return parts

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


@register("multilevelot_token")
class MultiLevelOTToken(MultiLevelOT):
    r"""Matches ranked vocabulary columns at every token: the token level of MultiLevelOT.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b \left( w_{HAD} L_{HAD} + w_{SL} L_{SL} \right)

    The terms, arguments and conventions are those of `MultiLevelOT`. Added to
    `MultiLevelOTSequence` it gives `MultiLevelOT`.

    Shape:
        Student (B, S, V), teacher (B, T, W); the first min(S, T) positions are compared.

    Args:
        had_weight: Weight of L_HAD, at least 0.
        sl_weight: Weight of L_SL, beta in the paper.
        k: Columns kept per sequence.
        temperature: Of the probabilities in L_HAD and in the ranking, above 0.
        sl_temperature: Of those in L_SL.
        matching: As in `MultiLevelOT`.
        candidates: As in `MultiLevelOT`.
        max_columns: As in `MultiLevelOT`.
        pairing: As in `MultiLevelOT`.

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If ``"assignment"`` meets more than ``max_columns`` columns.

    Example:
        t = 0.75 and s = 0.5 on the one kept column.

        >>> import torch
        >>> import ctkd
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     teacher_logits=torch.tensor([[[0.25, 0.75], [0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 1]]),
        ... )
        >>> ctkd.get_loss("multilevelot_token", k=1, sl_weight=0.0)(batch).value
        tensor(0.2500)

    Stored teacher:
        Needs the largest entries of each row; what is lost is said at `MultiLevelOT`.
        `benchmarks/teacher_cache.py` prints the error as a function of k.

    References:
        arXiv:2412.14528, eqs. 9-16.
    """

    paper = Paper(_TITLE, "2412.14528", "eqs. 9-16")
    matches = "ranked columns per token"
    measured = Measured(
        kd=0.045, difference=-0.0035, low=-0.0094, high=0.0024, share=0.004, at_default=-0.0082
    )

    def __init__(
        self,
        *,
        had_weight: float = 1.0,
        sl_weight: float = 0.1,
        k: int = 50,
        temperature: float = 1.0,
        sl_temperature: float = 1.0,
        matching: str = "mass",
        candidates: int = 256,
        max_columns: int = 4096,
        pairing: str = "position",
    ) -> None:
        check_some_weight(had_weight=had_weight, sl_weight=sl_weight)
        super().__init__(
            had_weight=had_weight,
            sl_weight=sl_weight,
            sd_weight=0.0,
            k=k,
            temperature=temperature,
            sl_temperature=sl_temperature,
            matching=matching,
            candidates=candidates,
            max_columns=max_columns,
            pairing=pairing,
        )


@register("multilevelot_sequence")
class MultiLevelOTSequence(MultiLevelOT):
    r"""Matches the tokens of both sequences by transport: the sequence level of MultiLevelOT.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b w_{SD} \langle P, C \rangle

    The term, arguments and conventions are those of `MultiLevelOT`. Added to
    `MultiLevelOTToken` it gives `MultiLevelOT`.

    Shape:
        Student (B, S, V), teacher (B, T, W), all scored positions of both.

    Args:
        sd_weight: Weight of L_SD, gamma in the paper, above 0.
        k: Columns kept per sequence.
        temperature: Of the probabilities that rank the columns, above 0.
        sd_temperature: Of those that are compared.
        regularization: Entropic regularization of the plan, in units of the cost.
        iterations: Sinkhorn rounds.
        matching: As in `MultiLevelOT`.
        candidates: As in `MultiLevelOT`.
        max_columns: As in `MultiLevelOT`.
        pairing: As in `MultiLevelOT`; here only the matching looks at it.

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If ``"assignment"`` meets more than ``max_columns`` columns.

    Example:
        One token on both sides: the plan is 1, the cost ``|0.75 - 0.5|``.

        >>> import torch
        >>> import ctkd
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     teacher_logits=torch.tensor([[[0.25, 0.75], [0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 1]]),
        ... )
        >>> settings = {"k": 1, "sd_weight": 1.0, "sd_temperature": 1.0}
        >>> ctkd.get_loss("multilevelot_sequence", **settings)(batch).value
        tensor(0.2500)

    Stored teacher:
        Needs the largest entries of each row; what is lost is said at `MultiLevelOT`.
        `benchmarks/teacher_cache.py` prints the error as a function of k.

    References:
        arXiv:2412.14528, eqs. 17-20.
    """

    paper = Paper(_TITLE, "2412.14528", "eqs. 17-20")
    matches = "tokens per sequence by Sinkhorn transport over ranked columns"
    measured = Measured(
        kd=0.045, difference=-0.0009, low=-0.0034, high=0.0017, share=0.001, at_default=0.0016
    )

    def __init__(
        self,
        *,
        sd_weight: float = 0.1,
        k: int = 50,
        temperature: float = 1.0,
        sd_temperature: float = 2.0,
        regularization: float = 0.1,
        iterations: int = 20,
        matching: str = "mass",
        candidates: int = 256,
        max_columns: int = 4096,
        pairing: str = "position",
    ) -> None:
        check_positive("sd_weight", sd_weight)
        super().__init__(
            had_weight=0.0,
            sl_weight=0.0,
            sd_weight=sd_weight,
            k=k,
            temperature=temperature,
            sd_temperature=sd_temperature,
            regularization=regularization,
            iterations=iterations,
            matching=matching,
            candidates=candidates,
            max_columns=max_columns,
            pairing=pairing,
        )


def _possible(side: Side, log_probs: Tensor) -> Tensor:
    """Columns above minus infinity at a scored position, (B, 1, K); others are as if not there."""
    possible = (log_probs != -torch.inf) & side.mask.unsqueeze(-1)
    return possible.any(1, keepdim=True)
