"""Universal logit distillation: match sorted probabilities, position by position."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch
from ctkd.chunks import PAIRINGS, AlignedPositions, align_positions
from ctkd.divergences import sorted_l1
from ctkd.logits import DenseLogits, TopKLogits, map_rows
from ctkd.loss import Loss, LossOutput, Measured, Paper, Weights, average, masked_sum
from ctkd.ops import RowLoss
from ctkd.registry import register
from ctkd.settings import check_choice, check_count, check_positive

__all__ = ["ULD"]


@register("uld")
class ULD(Loss):
    r"""Compares the k-th scored student position with the k-th scored teacher position.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b \sum_{i \le \min(S_b, T_b)} \sum_k
            |p_{b,i,(k)} - q_{b,i,(k)}|

    p and q are the two models' probabilities, each sorted in descending order, the narrower one
    padded with zeros: the optimal transport distance under a uniform cost.

    Shape:
        Student (B, S, V), teacher (B, T, W). Positions past min(S, T) add 0 and are counted.

    Args:
        student_temperature: Divides the student's logits, above 0.
        teacher_temperature: Divides the teacher's logits, above 0.
        top_k: Compare only the k largest probabilities of each side. What is left out at a
            position is at most the probability that both sides hold beyond their top k:
            (1 - top-k mass of p) + (1 - top-k mass of q). Default: the whole vocabulary.
        pairing: ``"position"`` pairs the k-th scored positions, as in the paper; ``"chunk"`` the
            positions at which both models have read the same bytes.

    Raises:
        SettingError: If a temperature is not above 0, ``top_k`` is below 1, or there is no such
            pairing.
        BatchError: If chunks are to be paired and the batch has none.

    Example:
        One position, p = (0.8, 0.2) and q = (0.5, 0.5): 0.3 + 0.3.

        >>> import ctkd, torch
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.2, 0.8], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     teacher_logits=torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 0]]),
        ... )
        >>> ctkd.get_loss("uld")(batch).value
        tensor(0.6000)

    Stored teacher:
        Needs the largest entries of each row. What a row has beside the stored ones is shared
        evenly by its other columns, which changes the sum of a pair of positions by at most twice
        that probability. With ``top_k`` nothing is lost where that many are stored, and a cache of
        fewer is refused.
        `benchmarks/teacher_cache.py` prints the error as a function of k.

    Differs from the paper:
        The authors' code averages over min(S, T) and then over sequences; here the sum is divided
        by the student's scored tokens, so that micro-batches add up.

    References:
        Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
        Loss for LLMs", arXiv:2402.12030, section 3, closed form of the Wasserstein distance.
        Restated in arXiv:2412.14528, eqs. 2-6.
    """

    paper = Paper(
        "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        "2402.12030",
        "closed form of W1, sec. 3",
    )
    matches = "sorted probabilities, position by position"
    unit = "position"
    teacher_needs = "top_k"
    default_weights = Weights(ce=1.0, kd=1.5)
    measured = Measured(
        kd=0.045, difference=-0.0045, low=-0.0104, high=0.0015, share=0.005, at_default=0.0978
    )

    def __init__(
        self,
        *,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        top_k: int | None = None,
        pairing: str = "position",
    ) -> None:
        super().__init__()
        check_positive("student_temperature", student_temperature)
        check_positive("teacher_temperature", teacher_temperature)
        if top_k is not None:
            check_count("top_k", top_k)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_temperatures = (teacher_temperature,)
        self.top_k = top_k
        self.teacher_entries = top_k or 0
        check_choice("pairing", pairing, PAIRINGS)
        self.pairing = pairing
        if pairing == "chunk":
            self.needs = frozenset({"chunks"})

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    def forward(self, batch: Batch) -> LossOutput:
        aligned = align_positions(batch, self.pairing)
        if self.top_k is None:
            distances = self._all(batch, aligned)
        else:
            distances = self._top(batch, aligned, self.top_k)
        return average({"uld": masked_sum(distances, aligned.valid)}, self.units(batch))

    def _all(self, batch: Batch, aligned: AlignedPositions) -> Tensor:
        positions, teacher, tails = aligned.flattened(batch), batch.teacher.logits, None
        distance = functools.partial(self._distance, teacher_width=teacher.shape[2])
        if isinstance(teacher, TopKLogits):
            # Whatever is not stored is one probability many times.
            probs, tails = teacher.probs_and_tail(self.teacher_temperature)
            teacher = DenseLogits(probs, mask=teacher.mask)
            tails = aligned.of_teacher(tails).flatten(0, 1)
        settings = {
            "student_temperature": self.student_temperature,
            "teacher_temperature": self.teacher_temperature,
        }
        loss = RowLoss("uld", distance, settings=settings)
        return map_rows(
            batch.student.logits,
            teacher,
            positions,
            loss,
            per_row=tails,
            teacher_temperature=self.teacher_temperature,
        ).values.view(aligned.valid.shape)

    def _distance(
        self,
        student_logits: Tensor,
        teacher_rows: Tensor,
        tails: Tensor | None = None,
        *,
        teacher_width: int,
    ) -> Tensor:
        """`sorted_l1` of rows: logits, but of a stored teacher probabilities and their tail."""
        student_probs = (student_logits / self.student_temperature).softmax(-1)
        if tails is None:
            teacher_probs = (teacher_rows / self.teacher_temperature).softmax(-1)
        else:
            prob, count = tails[:, :1], tails[:, 1:]
            column = torch.arange(teacher_width, device=tails.device)
            teacher_probs = torch.cat([teacher_rows, prob * (column < count)], dim=-1)
        return sorted_l1(student_probs, teacher_probs)

    def _top(self, batch: Batch, aligned: AlignedPositions, k: int) -> Tensor:
        """Distances of the k largest probabilities of each side."""
        student, teacher = batch.student.logits, batch.teacher.logits
        student_k, teacher_k = min(k, student.shape[2]), min(k, teacher.shape[2])
        student_probs = student.sorted_probs(student_k, temperature=self.student_temperature)
        teacher_probs = teacher.sorted_probs(teacher_k, temperature=self.teacher_temperature)
        size = max(student_k, teacher_k)
        student_probs = F.pad(aligned.of_student(student_probs), (0, size - student_k))
        teacher_probs = F.pad(aligned.of_teacher(teacher_probs).detach(), (0, size - teacher_k))
        return (student_probs - teacher_probs).abs().sum(-1)

    def extra_repr(self) -> str:
        return (
            f"student_temperature={self.student_temperature}, "
            f"teacher_temperature={self.teacher_temperature}, top_k={self.top_k}, "
            f"pairing={self.pairing!r}"
        )
