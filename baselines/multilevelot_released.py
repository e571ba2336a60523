"""MultiLevelOT as the authors released it (2018cx/Multi-Level-OT at 712cfb4, option f=1).

It differs from the paper: logits are divided by their own deviation, columns are ranked over the
whole batch, the log term has its arguments swapped and softmaxes probabilities again, and the
sequence term softmaxes again too, uses 10 rounds and is scaled by 0.001. All of it is kept here,
with the type of the logits, because this is what there is to compare with, in values and in speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.uld import answer_probs_, answer_spans

KEPT_COLUMNS = 50
SINKHORN_ROUNDS = 10
SINKHORN_REGULARIZATION = 0.1
SINKHORN_TEMPERATURE = 2.0
SINKHORN_SCALE = 0.001
KL_WEIGHT = 0.1
SD_WEIGHT = 0.1


def normalize(logits: Tensor) -> Tensor:
    """Logits of (B, L, V) divided by their standard deviation over V, plus 1e-4; no mean taken."""
    return logits / (logits.std(dim=-1, keepdim=True) + 1e-4)


def order_by_batch_mass(probs: Tensor) -> Tensor:
    """Column ids of (B, L, V) by their sum over batch and rows, largest first."""
    return probs.sum(dim=(0, 1)).argsort(descending=True)


def kl_without_entropy(first_probs: Tensor, second_probs: Tensor) -> Tensor:
    """Minus the mean over rows of softmax(second) . log_softmax(first), of probabilities."""
    products = torch.softmax(second_probs, dim=-1) * torch.log_softmax(first_probs, dim=-1)
    return -products.sum(-1).mean()


def sinkhorn_plan(cost: Tensor, rounds: int) -> Tensor:
    """Kernel exp(-cost / 0.1), its rows and then its columns scaled to sum 1, ``rounds`` times."""
    kernel = torch.exp(-cost / SINKHORN_REGULARIZATION)
    for _ in range(rounds):
        kernel = kernel / kernel.sum(dim=1, keepdim=True)
        kernel = kernel / kernel.sum(dim=0, keepdim=True)
    return kernel


def sinkhorn_sequences(teacher_probs: Tensor, student_probs: Tensor) -> Tensor:
    """0.001 times the sum over the batch of the transport cost between the rows of (B, L, K)."""
    teacher_soft = torch.softmax(teacher_probs / SINKHORN_TEMPERATURE, dim=-1)
    student_soft = torch.softmax(student_probs / SINKHORN_TEMPERATURE, dim=-1)
    total = teacher_probs.new_zeros(())
    for teacher_rows, student_rows in zip(teacher_soft, student_soft, strict=True):
        cost = torch.cdist(teacher_rows, student_rows, p=1)
        total = total + SINKHORN_SCALE * (sinkhorn_plan(cost, SINKHORN_ROUNDS) * cost).sum()
    return total


def terms(
    student_logits: Tensor,
    student_labels: Tensor,
    teacher_logits: Tensor,
    teacher_labels: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_student_eos: bool = False,
    skip_teacher_eos: bool = False,
) -> dict[str, Tensor]:
    """The terms of the released loss, and their sum as its distillation term before the weight 1.5.

    As in the release, an answer longer than the other side's row count is an error of torch, and an
    answer of no rows makes the result nan. The caller's logits are not written to.

    Args:
        student_logits: (B, S, V).
        student_labels: (B, S), -100 where ignored, not shifted.
        teacher_logits: (B, T, W).
        teacher_labels: (B, T), as the student's.
        student_temperature: divides the student's normalized logits.
        teacher_temperature: divides the teacher's normalized logits.
        skip_student_eos: leave out the last student token; the authors' training passes True.
        skip_teacher_eos: leave out the last teacher token.

    Returns:
        ``"had"``, the mean over the batch; ``"kl"``; ``"sd"``, with its factor 0.001; ``"value"`` =
        had + 0.1 kl + 0.1 sd. Each of shape ().
    """
    student_starts, student_sizes = answer_spans(student_labels, skip_eos=skip_student_eos)
    teacher_starts, teacher_sizes = answer_spans(teacher_labels, skip_eos=skip_teacher_eos)
    longest = max(student_sizes + teacher_sizes)
    student_probs = answer_probs_(
        normalize(student_logits), student_starts, student_sizes, student_temperature
    )[:, :longest]
    teacher_probs = answer_probs_(
        normalize(teacher_logits), teacher_starts, teacher_sizes, teacher_temperature
    )[:, :longest]
    student_kept = student_probs[:, :, order_by_batch_mass(student_probs)[:KEPT_COLUMNS]]
    teacher_kept = teacher_probs[:, :, order_by_batch_mass(teacher_probs)[:KEPT_COLUMNS]]
    width = max(student_kept.shape[-1], teacher_kept.shape[-1])
    student_kept = F.pad(student_kept, (0, width - student_kept.shape[-1]))
    teacher_kept = F.pad(teacher_kept, (0, width - teacher_kept.shape[-1]))
    distances = []
    for b, size in enumerate(map(min, student_sizes, teacher_sizes)):
        difference = student_kept[b, :size] - teacher_kept[b, :size]
        distances.append(difference.abs().sum(-1).mean())
    had = torch.stack(distances).mean()
    kl = kl_without_entropy(teacher_kept, student_kept)
    sd = sinkhorn_sequences(teacher_kept, student_kept)
    return {"had": had, "kl": kl, "sd": sd, "value": had + KL_WEIGHT * kl + SD_WEIGHT * sd}
