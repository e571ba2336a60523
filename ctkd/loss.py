"""The one interface of a loss, and the one place that masks and averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ctkd.batch import Batch
from ctkd.errors import SettingError
from ctkd.masked_columns import refuse_masked_columns
from ctkd.tracing import not_traced

__all__ = [
    "Loss",
    "LossOutput",
    "Need",
    "Paper",
    "TeacherNeed",
    "Unit",
    "Weights",
    "average",
    "check_choice",
    "check_count",
    "check_positive",
    "check_weight",
    "masked_sum",
]

Need = Literal["chunks", "hidden", "pair"]
TeacherNeed = Literal["rows", "top_k", "observed"]
Unit = Literal["position", "chunk", "sequence"]


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a loss comes from, to the equation."""

    title: str
    arxiv: str
    equation: str


class Weights(NamedTuple):
    """How a paper balances cross-entropy and distillation: ``ce * CE + kd * loss``."""

    ce: float
    kd: float


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A loss value that can be averaged over micro-batches without bias.

    The mean over several batches is ``sum(value * count) / sum(count)``.

    Args:
        value: () differentiable, a mean over ``count`` units. float64 for float64 logits,
            else float32.
        count: () int64, the units averaged over.
        parts: () detached, weighted as in the value: they sum to it.
    """

    value: Tensor
    count: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(nn.Module, ABC):
    """A cross-tokenizer distillation loss, without any cross-entropy on labels.

    What changes from step to step is in the batch. Settings are keyword-only arguments of
    ``__init__`` and are stored under their own names. Facts about the method are on the class:

    Attributes:
        paper: Where the method comes from.
        matches: What is compared with what, in a few words, for tables.
        unit: What ``count`` counts.
        needs: What the loss must be given besides logits and ids: "chunks" and "hidden" in the
            batch, a "pair" of tokenizers when it is built. A setting may change it.
        teacher_needs: What of a teacher's logits the loss must know, so that a stored teacher can
            serve it: whole "rows", the "top_k" of each (what is left is spread evenly), or the
            log-probabilities of the "observed" tokens alone. A setting may change it.
        default_weights: The paper's weights of cross-entropy and of this loss.
    """

    paper: ClassVar[Paper]
    matches: ClassVar[str]
    unit: ClassVar[Unit]
    needs: frozenset[Need] = frozenset()
    teacher_needs: TeacherNeed = "rows"
    default_weights: ClassVar[Weights]

    @abstractmethod
    def forward(self, batch: Batch) -> LossOutput:
        """Compare the student with the teacher on one batch."""

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """Say what ``count`` will be, () int64, from masks, ids and chunks alone."""

    @not_traced
    def __call__(self, batch: Batch) -> LossOutput:
        """Run `forward`, and refuse minus infinity among the logits where it has no value there.

        Raises:
            BatchError: See `ctkd.masked_columns.refuse_masked_columns`.
        """
        output: LossOutput = super().__call__(batch)
        refuse_masked_columns(batch, output.value)
        return output


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum ``values`` over all but the first dimension where ``mask`` is True.

    Masked entries are replaced, not multiplied, so that an infinity behind the mask does no harm.
    """
    kept = values.masked_fill(~mask, 0.0)
    return kept.flatten(1).sum(1) if kept.ndim > 1 else kept


def average(parts: Mapping[str, Tensor], count: Tensor) -> LossOutput:
    """Turn weighted sums per sequence into a loss: their total divided by the count.

    With nothing scored the value is a zero that can still be differentiated.

    Args:
        parts: (B,) each, a weighted sum over the units of every sequence.
        count: () int64, the units of the whole batch.

    Example:
        >>> average({"a": torch.tensor([1.0, 2.0])}, torch.tensor(6)).value
        tensor(0.5000)
    """
    divisor = count.clamp_min(1)
    means = {
        name: sums.sum(dtype=torch.promote_types(sums.dtype, torch.float32)) / divisor
        for name, sums in parts.items()
    }
    value = torch.stack(list(means.values())).sum()
    return LossOutput(value, count, {name: mean.detach() for name, mean in means.items()})


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number above 0."""
    if not (_is_number(value) and 0 < value < float("inf")):
        raise SettingError(f"{name} must be a finite number above 0, got {value!r}")


def check_weight(name: str, value: float) -> None:
    """Refuse a weight that is not a finite number of at least 0."""
    if not (_is_number(value) and 0 <= value < float("inf")):
        raise SettingError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_count(name: str, value: int) -> None:
    """Refuse a setting that is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is not one of the choices."""
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
