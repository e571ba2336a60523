"""Cross-entropy and a loss as sums over a batch, so that any split of it adds up to the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import IGNORE_INDEX, Batch, Side
from ctkd.errors import BatchError, TrainingError
from ctkd.logits import RowLogits
from ctkd.loss import Loss, Weights

__all__ = ["Counts", "Sums", "causal_side", "scored", "sums_of"]


class Counts(NamedTuple):
    """What is averaged over: tokens of cross-entropy and units of the loss, () int64 each."""

    ce: Tensor
    kd: Tensor


@dataclass(slots=True)
class Sums:
    """Sums over the scored units of a batch.

    Args:
        ce: () differentiable, cross-entropy over the student's labels.
        ce_count: () int64, how many.
        kd: () differentiable, the loss over its units; None without one.
        kd_count: () int64, how many.
        parts: () each, the parts of `kd`.
    """

    ce: Tensor
    ce_count: Tensor
    kd: Tensor | None = None
    kd_count: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self) -> Tensor:
        """All of them in a row, detached, for adding up over batches and ranks."""
        entries = [self.ce, self.ce_count]
        if self.kd is not None and self.kd_count is not None:
            entries += [self.kd, self.kd_count, *self.parts.values()]
        return torch.stack([entry.detach().double() for entry in entries])

    def counts(self) -> Counts:
        """Of this batch."""
        none = torch.zeros_like(self.ce_count)
        return Counts(self.ce_count, none if self.kd_count is None else self.kd_count)

    def means(self, counts: Counts) -> dict[str, Tensor]:
        """``ce``, ``kd`` and ``kd/<part>``: the sums, divided by these counts."""
        means = {"ce": self.ce / counts.ce.clamp_min(1)}
        if self.kd is not None:
            of_loss = {"kd": self.kd, **{f"kd/{name}": part for name, part in self.parts.items()}}
            means |= {name: entry / counts.kd.clamp_min(1) for name, entry in of_loss.items()}
        return means

    def value(self, weights: Weights, counts: Counts) -> Tensor:
        """What is trained on: the weighted means."""
        means = self.means(counts)
        value = weights.ce * means["ce"]
        return value + weights.kd * means["kd"] if "kd" in means else value


def sums_of(
    logits: RowLogits,
    inputs: Mapping[str, Tensor],
    loss: Loss | None,
    teacher: Side | None,
    *,
    student_vocab_size: int | None = None,
) -> Sums:
    """Cross-entropy, and the loss if there is one, of a collated batch.

    Args:
        logits: The student's, at the last positions of the batch.
        inputs: The batch, as `ctkd.distill.data.collator.Collator` makes it.
        loss: What to distil with.
        teacher: The teacher's side, where there is a loss.
        student_vocab_size: Columns of the student's logits that the loss reads; default all.

    Raises:
        TrainingError: If the logits have a gradient and the loss has none.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if loss is None or teacher is None:
            return _cross_entropy(logits, inputs["labels"])
        student = causal_side(
            logits,
            inputs["distill_labels"],
            chunk_ids=inputs.get("distill_chunk_ids"),
            vocab_size=student_vocab_size,
        )
        output = loss(Batch(student=student, teacher=teacher))
        # Last: statistics of the rows that the loss computed serve cross-entropy too.
        sums = _cross_entropy(logits, inputs["labels"])
    if sums.ce.requires_grad and not output.value.requires_grad and output.count:
        raise TrainingError(
            f"the value of the loss {type(loss).__name__} has no gradient, so nothing would be "
            "learned of it; compute it of batch.student.logits, without detach() or no_grad()"
        )
    sums.kd = output.value * output.count
    sums.kd_count = output.count
    sums.parts = {name: part * output.count for name, part in output.parts.items()}
    return sums


def causal_side(
    logits: RowLogits,
    labels: Tensor,
    *,
    chunk_ids: Tensor | None = None,
    vocab_size: int | None = None,
) -> Side:
    """A side whose labels belong to the last of its logits.

    Shape:
        ``logits`` (B, L, V), ``labels`` and ``chunk_ids`` (B, A + 1) with A + 1 of at most L.

    Raises:
        BatchError: If there are fewer logits than labels, or as `Side.from_causal_lm`.
    """
    before = logits.shape[1] - labels.shape[1]
    if before < 0:
        raise BatchError(
            f"logits of {logits.shape[1]} positions came for {labels.shape[1]} labels; call both "
            "models with what student_inputs and teacher_inputs return for this batch"
        )
    most = labels.shape[1] - 1
    if before:
        labels = F.pad(labels, (before, 0), value=IGNORE_INDEX)
        chunk_ids = None if chunk_ids is None else F.pad(chunk_ids, (before, 0), value=-1)
    return Side.from_causal_lm(
        logits, labels, chunk_ids=chunk_ids, vocab_size=vocab_size, max_scored=most
    )


def scored(inputs: Mapping[str, Tensor], loss: Loss | None) -> Counts:
    """What a collated batch scores, known before the models have read it."""
    ce_count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
    if loss is None:
        return Counts(ce_count, torch.zeros_like(ce_count))
    return Counts(ce_count, loss.units(_without_logits(inputs)))


def _cross_entropy(logits: RowLogits, labels: Tensor) -> Sums:
    side = causal_side(logits, labels)
    log_likelihood = side.logits.log_probs(side.token_ids.unsqueeze(-1))
    return Sums(ce=-log_likelihood.sum(), ce_count=side.mask.sum())


def _without_logits(inputs: Mapping[str, Tensor]) -> Batch:
    """A batch that knows masks and ids; its logits are one zero seen from everywhere."""
    labels, teacher_labels = inputs["distill_labels"], inputs["teacher_distill_labels"]
    return Batch.from_causal_lm(
        student_logits=torch.zeros((), device=labels.device).expand(*labels.shape, 1),
        student_labels=labels,
        student_chunk_ids=inputs.get("distill_chunk_ids"),
        teacher_logits=torch.zeros((), device=labels.device).expand(*teacher_labels.shape, 1),
        teacher_labels=teacher_labels,
        teacher_chunk_ids=inputs.get("teacher_distill_chunk_ids"),
    )
