"""Multi-level optimal transport in the paper's form, both levels together."""

from __future__ import annotations

from ctkd.batch import Batch
from ctkd.loss import LossOutput, check_count, check_positive
from ctkd.losses.multilevelot_terms import MultiLevelOTTerms, check_some_weight
from ctkd.registry import register

__all__ = ["MultiLevelOT"]


@register("multilevelot")
class MultiLevelOT(MultiLevelOTTerms):
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
        pairing: str = "position",
    ) -> None:
        super().__init__(
            k=k,
            temperature=temperature,
            matching=matching,
            candidates=candidates,
            max_columns=max_columns,
            pairing=pairing,
        )
        check_some_weight(had_weight=had_weight, sl_weight=sl_weight, sd_weight=sd_weight)
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
        return self.weighted_terms(
            batch,
            had_weight=self.had_weight,
            sl_weight=self.sl_weight,
            sd_weight=self.sd_weight,
            sl_temperature=self.sl_temperature,
            sd_temperature=self.sd_temperature,
            regularization=self.regularization,
            iterations=self.iterations,
        )
