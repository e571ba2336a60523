"""MultiLevelOT as the authors' released code computes it, defects included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch, Side
from ctkd.loss import Loss, LossOutput, Measured, Paper, Weights, average
from ctkd.ops import Rows, top_k
from ctkd.ot.sinkhorn import l1_cost, sinkhorn
from ctkd.registry import register
from ctkd.settings import check_positive

__all__ = ["MultiLevelOTReleased"]

# Constants of the released file; its command line reaches none of them.
_KEPT_COLUMNS = 50
_LOG_WEIGHT = 0.1
_SINKHORN_WEIGHT = 0.1 * 0.001
_SINKHORN_TEMPERATURE = 2.0
_SINKHORN_REGULARIZATION = 0.1
_SINKHORN_ITERATIONS = 10


@register("multilevelot_released")
class MultiLevelOTReleased(Loss):
    r"""Computes the distillation term of the authors' file (712cfb4, ``f=1``) over its weight.

    .. math::
        L = \frac1B \sum_b \frac{1}{n_b} \sum_{i \le n_b} \sum_{l \le 50} |t_l - s_l|
            + 0.1\, L_{KL} + 0.1 \cdot 0.001 \sum_b \langle P_b, C_b \rangle

    .. math::
        L_{KL} = -\frac{1}{B M} \sum_{b, i \le M} \sum_l
            \mathrm{softmax}(s)_l \log \mathrm{softmax}(t)_l

    n is min(S, T) of a sequence and M the longest answer of the batch on either side. Rows past
    an answer's end are zero. For comparison with published runs, not for use.

    Differs from the paper:
        - each row of logits is divided by its standard deviation over the vocabulary;
        - one ranking of columns for the whole batch, so a sample's loss depends on its batch;
        - L_KL and the transport cost take a second softmax, of probabilities;
        - L_KL has student and teacher exchanged, and counts padding rows;
        - the transport runs over padding rows too, with 10 rounds instead of 20, is scaled by
          0.001 and summed over the batch;
        - HAD is a mean over tokens and sequences.

        As a result the second and third term hardly have a gradient.

    Differs from the released file:
        A sequence without scored tokens on one side adds 0 to HAD, where the file gives NaN, and
        rows of zeros to the other terms; a teacher
        answer longer than the student's logits works, where the file stops with an error. A row
        with a logit of minus infinity, which has no standard deviation, is refused on a CPU; on
        other devices, and with one logit only, it gives NaN, as in the file.

    Shape:
        Student (B, S, V), teacher (B, T, W). ``count`` is B.

    Args:
        student_temperature: Divides the student's standardized logits, above 0.
        teacher_temperature: Divides the teacher's standardized logits, above 0.

    Raises:
        SettingError: If a temperature is not above 0.
        BatchError: If a scored position has a logit of minus infinity.

    Example:
        >>> import ctkd
        >>> logits = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        >>> labels = torch.tensor([[-100, 1]])
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=logits,
        ...     student_labels=labels,
        ...     teacher_logits=logits,
        ...     teacher_labels=labels,
        ... )
        >>> output = ctkd.get_loss("multilevelot_released")(batch)
        >>> round(float(output.parts["had"]), 4), float(output.parts["kl"]) > 0
        (0.0, True)

    Stored teacher:
        Needs the largest entries of each row. Stored entries are taken as they were, also after
        the standardization; every other column has an even share of what is left of its row,
        which is off by at most the smallest of the k stored probabilities.
        `benchmarks/teacher_cache.py` prints the error as a function of k.

    References:
        arXiv:2412.14528 and its code, 2018cx/Multi-Level-OT, models/distillation_model.py.
    """

    paper = Paper(
        "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation",
        "2412.14528",
        "released code, not the paper's equations",
    )
    matches = "what the authors' code computes, defects included"
    unit = "sequence"
    teacher_needs = "top_k"
    default_weights = Weights(ce=1.0, kd=1.5)
    measured = Measured(
        kd=5.0, difference=-0.0544, low=-0.0641, high=-0.0447, share=0.064, at_default=-0.0501
    )

    def __init__(
        self, *, student_temperature: float = 1.0, teacher_temperature: float = 1.0
    ) -> None:
        super().__init__()
        check_positive("student_temperature", student_temperature)
        check_positive("teacher_temperature", teacher_temperature)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_temperatures = (teacher_temperature,)

    def units(self, batch: Batch) -> Tensor:
        return torch.full(
            (), batch.student.mask.shape[0], dtype=torch.int64, device=batch.student.mask.device
        )

    def forward(self, batch: Batch) -> LossOutput:
        student = _kept_probs(batch.student, self.student_temperature)
        with torch.no_grad():
            teacher = _kept_probs(batch.teacher, self.teacher_temperature)
        width = max(student.shape[-1], teacher.shape[-1])
        rows = max(student.shape[1], teacher.shape[1])
        student, teacher = (
            F.pad(probs, (0, width - probs.shape[-1], 0, rows - probs.shape[1]))
            if probs.shape[1:] != (rows, width)
            else probs
            for probs in (student, teacher)
        )
        masks = [
            F.pad(mask, (0, rows - mask.shape[1])) if mask.shape[1] < rows else mask
            for mask in (batch.student.mask, batch.teacher.mask)
        ]
        paired = masks[0] & masks[1]
        # Answers come first in their rows: where the last one ends, the longest does.
        used = (masks[0] | masks[1]).any(0).repeat(student.shape[0], 1)
        counted = torch.stack([paired, used]).unsqueeze(-1)
        of_pairs, of_used = counted / counted.sum(2, True, dtype=student.dtype).clamp_min(1)

        # All is finite: a row that does not count may be multiplied by 0.
        had = torch.linalg.vector_norm((student - teacher) * of_pairs, ord=1, dim=(1, 2))
        kl = (student.softmax(-1) * (teacher.log_softmax(-1) * of_used)).sum((1, 2))
        transport = sinkhorn(
            l1_cost(
                (teacher / _SINKHORN_TEMPERATURE).softmax(-1),
                (student / _SINKHORN_TEMPERATURE).softmax(-1),
            ),
            regularization=_SINKHORN_REGULARIZATION,
            iterations=_SINKHORN_ITERATIONS,
            row_mask=used,
            column_mask=used,
        )
        return average(
            {
                "had": had,
                "kl": -_LOG_WEIGHT * kl,
                "sd": _SINKHORN_WEIGHT * student.shape[0] * transport.cost,
            },
            self.units(batch),
        )

    def extra_repr(self) -> str:
        return (
            f"student_temperature={self.student_temperature}, "
            f"teacher_temperature={self.teacher_temperature}"
        )


def _kept_probs(side: Side, temperature: float) -> Tensor:
    """Probabilities of the batch's 50 heaviest columns, (B, S, 50), zero past each answer."""
    mass = side.logits.column_mass(temperature=temperature, standardize=True).sum(0, keepdim=True)
    ids = top_k(Rows(mass, None, mass.shape[1]), min(_KEPT_COLUMNS, mass.shape[1]))[0]
    ids = ids.expand(side.logits.shape[0], -1).unsqueeze(1)
    probs = side.logits.log_probs(ids, temperature=temperature, standardize=True).exp()
    return probs * side.mask.unsqueeze(-1)
