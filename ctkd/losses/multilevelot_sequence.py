"""The sequence level of multi-level optimal transport."""

from __future__ import annotations

from ctkd.batch import Batch
from ctkd.loss import LossOutput, Paper, check_count, check_positive
from ctkd.losses.multilevelot_terms import TITLE, MultiLevelOTTerms
from ctkd.registry import register

__all__ = ["MultiLevelOTSequence"]


@register("multilevelot_sequence")
class MultiLevelOTSequence(MultiLevelOTTerms):
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
        One token on both sides: the plan is 1, the cost |0.75 - 0.5|.

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

    paper = Paper(TITLE, "2412.14528", "eqs. 17-20")
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
        check_positive("sd_weight", sd_weight)
        check_positive("sd_temperature", sd_temperature)
        check_positive("regularization", regularization)
        check_count("iterations", iterations)
        self.sd_weight = sd_weight
        self.sd_temperature = sd_temperature
        self.regularization = regularization
        self.iterations = iterations

    def forward(self, batch: Batch) -> LossOutput:
        return self.weighted_terms(
            batch,
            sd_weight=self.sd_weight,
            sd_temperature=self.sd_temperature,
            regularization=self.regularization,
            iterations=self.iterations,
        )
