"""The token level of multi-level optimal transport."""

from __future__ import annotations

from ctkd.batch import Batch
from ctkd.loss import LossOutput, Paper, check_positive
from ctkd.losses.multilevelot_terms import TITLE, MultiLevelOTTerms, check_some_weight
from ctkd.registry import register

__all__ = ["MultiLevelOTToken"]


@register("multilevelot_token")
class MultiLevelOTToken(MultiLevelOTTerms):
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

    paper = Paper(TITLE, "2412.14528", "eqs. 9-16")
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
        check_some_weight(had_weight=had_weight, sl_weight=sl_weight)
        check_positive("sl_temperature", sl_temperature)
        self.had_weight = had_weight
        self.sl_weight = sl_weight
        self.sl_temperature = sl_temperature

    def forward(self, batch: Batch) -> LossOutput:
        return self.weighted_terms(
            batch,
            had_weight=self.had_weight,
            sl_weight=self.sl_weight,
            sl_temperature=self.sl_temperature,
        )
