"""Multi-level optimal transport in the paper's form: token level, sequence level, both."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ctkd.batch import Batch
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
    paired_positions,
)
from ctkd.registry import register
from ctkd.sinkhorn import sinkhorn

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
    return torch.cdist(teacher_probs, student_probs, p=1.0)


class _MultiLevelOT(Loss):
    """Matching, and the three terms; the registered classes choose their weights."""

    paper = Paper(_TITLE, "2412.14528", "eqs. 10-20")
    unit = "position"
    default_weights = Weights(ce=1.0, kd=0.15)

    def __init__(
        self,
        *,
        k: int,
        temperature: float,
        matching: str,
        candidates: int,
        max_columns: int,
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

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    @torch.no_grad()
    def match(self, batch: Batch) -> ColumnMatch:
        """Choose the kept columns of every sequence (eqs. 9-12)."""
        k = min(self.k, batch.student.logits.shape[2], batch.teacher.logits.shape[2])
        if self.matching == "greedy":
            return match_greedily(batch, k=k, temperature=self.temperature)
        if self.matching == "assignment":
            return match_by_assignment(
                batch, k=k, temperature=self.temperature, max_columns=self.max_columns
            )
        if self.matching == "assignment_topk":
            return match_top_by_assignment(
                batch, k=k, temperature=self.temperature, candidates=self.candidates
            )
        return match_by_mass(batch, k=k, temperature=self.temperature)

    def _terms(
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
        match = self.match(batch)
        wanted = {"had": had_weight, "sl": sl_weight, "sd": sd_weight}
        temperatures = {"had": self.temperature, "sl": sl_temperature, "sd": sd_temperature}
        temperatures = {name: temperatures[name] for name, weight in wanted.items() if weight}
        student = _log_probs(batch.student.logits, match.student_ids, temperatures)
        with torch.no_grad():
            teacher = _log_probs(batch.teacher.logits, match.teacher_ids, temperatures)
        missing = ~match.found.unsqueeze(1)
        paired = paired_positions(batch)
        length = paired.shape[1]

        parts = {}
        if had_weight:
            student_probs = student["had"][:, :length].exp().masked_fill(missing, 0.0)
            had = absolute_difference(student_probs, teacher["had"][:, :length].exp())
            parts["had"] = had_weight * masked_sum(had, paired)
        if sl_weight:
            teacher_probs = teacher["sl"][:, :length].exp().masked_fill(missing, 0.0)
            sl = teacher_weighted_log_loss(student["sl"][:, :length], teacher_probs)
            parts["sl"] = sl_weight * masked_sum(sl, paired)
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


def _check_some_weight(**weights: float) -> None:
    for name, weight in weights.items():
        check_weight(name, weight)
    if not any(weights.values()):
        raise SettingError(f"at least one of {', '.join(weights)} must be above 0")


@register("multilevelot")
class MultiLevelOT(_MultiLevelOT):
    r"""Matches ranked vocabulary columns per token, and tokens per sequence by transport.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b \left(
            w_{HAD} L_{HAD} + w_{SL} L_{SL} + w_{SD} L_{SD} \right)

    .. math::
        L_{HAD} = \sum_{i \le \min(S, T)} \sum_{l \le k} |t_l(i) - s_l(i)|, \quad
        L_{SL} = -\sum_{i \le \min(S, T)} \sum_{l \le k} t_l(i) \log s_l(i), \quad
        L_{SD} = \langle P, C \rangle

    t and s are the probabilities of the k columns that carry most of the teacher's mass over the
    whole sequence and of their student partners, not renormalised. C is the L1 distance of every
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

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If ``"assignment"`` meets more than ``max_columns`` columns.

    Example:
        One token on both sides and k = 1: t = 0.75, s = 0.5. HAD is 0.25, SL is -0.75 log 0.5.

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

    Differs from the paper:
        The paper sums over tokens; this is the sum divided by the student's scored tokens, to be
        weighted against a mean cross-entropy. The paper's matching is ``"assignment"``; the
        default is the cheap rule of its authors' code, applied to each sequence alone. Unequal
        lengths are not treated in the paper.

    References:
        Cui et al., "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge
        Distillation on Language Models", AAAI 2025, arXiv:2412.14528, eqs. 9-21.
    """

    matches = "ranked columns per token, tokens per sequence by Sinkhorn transport"

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
    ) -> None:
        super().__init__(
            k=k,
            temperature=temperature,
            matching=matching,
            candidates=candidates,
            max_columns=max_columns,
        )
        _check_some_weight(had_weight=had_weight, sl_weight=sl_weight, sd_weight=sd_weight)
        check_positive("sl_temperature", sl_temperature)
        check_positive("sd_temperature", sd_temperature)
        check_positive("regularization", regularization)
        check_count("iterations", iterations)
        self.had_weight = had_weight
        self.sl_weight = sl_weight
        self.sd_weight = sd_weight
        self.sl_temperature = sl_temperature
        self.sd_temperature = sd_temperature
        self.regularization = regularization
        self.iterations = iterations

    def forward(self, batch: Batch) -> LossOutput:
        return self._terms(
            batch,
            had_weight=self.had_weight,
            sl_weight=self.sl_weight,
            sd_weight=self.sd_weight,
            sl_temperature=self.sl_temperature,
            sd_temperature=self.sd_temperature,
            regularization=self.regularization,
            iterations=self.iterations,
        )


@register("multilevelot_token")
class MultiLevelOTToken(_MultiLevelOT):
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

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If ``"assignment"`` meets more than ``max_columns`` columns.

    Example:
        t = 0.75 and s = 0.5 on the one kept column.

        >>> import ctkd
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     teacher_logits=torch.tensor([[[0.25, 0.75], [0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 1]]),
        ... )
        >>> ctkd.get_loss("multilevelot_token", k=1, sl_weight=0.0)(batch).value
        tensor(0.2500)

    References:
        arXiv:2412.14528, eqs. 9-16.
    """

    paper = Paper(_TITLE, "2412.14528", "eqs. 9-16")
    matches = "ranked columns per token"

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
    ) -> None:
        super().__init__(
            k=k,
            temperature=temperature,
            matching=matching,
            candidates=candidates,
            max_columns=max_columns,
        )
        _check_some_weight(had_weight=had_weight, sl_weight=sl_weight)
        check_positive("sl_temperature", sl_temperature)
        self.had_weight = had_weight
        self.sl_weight = sl_weight
        self.sl_temperature = sl_temperature

    def forward(self, batch: Batch) -> LossOutput:
        return self._terms(
            batch,
            had_weight=self.had_weight,
            sl_weight=self.sl_weight,
            sl_temperature=self.sl_temperature,
        )


@register("multilevelot_sequence")
class MultiLevelOTSequence(_MultiLevelOT):
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

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If ``"assignment"`` meets more than ``max_columns`` columns.

    Example:
        One token on both sides: the plan is 1, the cost |0.75 - 0.5|.

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

    References:
        arXiv:2412.14528, eqs. 17-20.
    """

    paper = Paper(_TITLE, "2412.14528", "eqs. 17-20")
    matches = "tokens per sequence by Sinkhorn transport over ranked columns"

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
    ) -> None:
        super().__init__(
            k=k,
            temperature=temperature,
            matching=matching,
            candidates=candidates,
            max_columns=max_columns,
        )
        check_positive("sd_weight", sd_weight)
        check_positive("sd_temperature", sd_temperature)
        check_positive("regularization", regularization)
        check_count("iterations", iterations)
        self.sd_weight = sd_weight
        self.sd_temperature = sd_temperature
        self.regularization = regularization
        self.iterations = iterations

    def forward(self, batch: Batch) -> LossOutput:
        return self._terms(
            batch,
            sd_weight=self.sd_weight,
            sd_temperature=self.sd_temperature,
            regularization=self.regularization,
            iterations=self.iterations,
        )
