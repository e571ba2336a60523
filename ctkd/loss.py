"""The one interface of a loss, and the one place that masks and averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ctkd.batch import Batch
from ctkd.errors import PluginError
from ctkd.masked_columns import refuse_masked_columns
from ctkd.ops import can_inspect, not_traced

__all__ = [
    "Loss",
    "LossOutput",
    "Measured",
    "Need",
    "Paper",
    "TeacherNeed",
    "Unit",
    "Weights",
    "average",
    "masked_sum",
]

Need = Literal["chunks", "hidden", "pair"]
TeacherNeed = Literal["rows", "top_k", "observed"]
Unit = Literal["position", "chunk", "sequence"]


@dataclass(frozen=True, slots=True)
class Paper:
    """Source of a loss, down to the equation."""

    title: str
    arxiv: str
    equation: str


class Weights(NamedTuple):
    """A paper's balance of cross-entropy and distillation: ``ce * CE + kd * loss``."""

    ce: float
    kd: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a loss changed beside cross-entropy of weight 1 where all of them were compared.

    A Llama of 2 million random weights learned stories, SmolLM2-135M-Instruct taught:
    ``benchmarks/results/arena_scratch.md``.

    Args:
        kd: The best of the weights that were tried, on development texts.
        difference: To fine-tuning alone, in bits per byte of test texts; below 0 is better.
        low: Of its 95 % interval over seeds and texts.
        high: Of the same.
        share: Of the gap between fine-tuning alone and the teacher, what the loss closed.
        at_default: The difference at the default weight, of one seed on development texts.
    """

    kd: float
    difference: float
    low: float
    high: float
    share: float
    at_default: float

    @property
    def helped(self) -> bool:
        """Whether the interval excludes that nothing changed."""
        return self.high < 0


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
        paper: Source of the method.
        matches: What is compared with what, in a few words, for tables.
        unit: What ``count`` counts.
        needs: What the loss must be given besides logits and ids: "chunks" and "hidden" in the
            batch, a "pair" of tokenizers when it is built. A setting may change it.
        teacher_needs: What of a teacher's logits the loss must know, so that a stored teacher can
            serve it: whole "rows", the "top_k" of each (what is left is spread evenly), or the
            log-probabilities of the "observed" tokens alone. A setting may change it.
        teacher_temperatures: Temperatures at which the loss looks at the teacher. Settings change
            it.
        teacher_entries: Number of the teacher's largest entries it looks up by rank; 0 if none.
            Settings change it.
        default_weights: The paper's weights of cross-entropy and of this loss.
        measured: What its default settings did in the comparison of all; None if not among them.
    """

    paper: ClassVar[Paper]
    matches: ClassVar[str]
    unit: ClassVar[Unit]
    needs: frozenset[Need] = frozenset()
    teacher_needs: TeacherNeed = "rows"
    teacher_temperatures: tuple[float, ...] = (1.0,)
    teacher_entries: int = 0
    default_weights: ClassVar[Weights]
    measured: ClassVar[Measured | None] = None

    @abstractmethod
    def forward(self, batch: Batch) -> LossOutput:
        """Compare the student with the teacher on one batch."""

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """The value of ``count``, () int64, from masks, ids and chunks alone."""

    @not_traced
    def __call__(self, batch: Batch) -> LossOutput:
        """Run `forward`, and refuse minus infinity among the logits where it has no value there.

        Raises:
            BatchError: See `ctkd.masked_columns.refuse_masked_columns`.
            PluginError: If `forward` returns anything but a `LossOutput` of tensors ().
        """
        output: LossOutput = super().__call__(batch)
        is_output = isinstance(output, LossOutput)
        # A loop, not a function of its own: this is run at every step.
        for entry in (output.value, output.count, *output.parts.values()) if is_output else ():
            is_output &= isinstance(entry, Tensor) and entry.ndim == 0
        if not is_output:
            raise _no_output(type(self).__name__, output)
        value = output.value
        # Tensors of another class, such as those of functorch, may hold no values.
        if can_inspect(value) and type(value) is Tensor and not bool(value.isfinite().all()):
            refuse_masked_columns(batch)
        return output


def _no_output(name: str, output: object) -> PluginError:
    what = type(output).__name__
    if isinstance(output, LossOutput):
        entries = {"value": output.value, "count": output.count, **output.parts}
        for part, entry in entries.items():
            is_tensor = isinstance(entry, Tensor)
            if not is_tensor or entry.ndim:
                shape = f"a tensor of {tuple(entry.shape)}" if is_tensor else type(entry).__name__
                what = f"a LossOutput whose {part} is {shape}"
                break
    return PluginError(
        f"{name}.forward returned {what}; a loss returns ctkd.loss.LossOutput(value, count, parts) "
        "of tensors without dimensions: the mean, how many units it is over, and its detached "
        "parts by name, as ctkd.loss.average makes it of sums"
    )


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
    sums = list(parts.values())
    together = torch.stack(sums) if len(sums) > 1 else sums[0].unsqueeze(0)
    # Narrow ones are added in float32.
    dtype = None if together.dtype.itemsize > 2 else torch.float32
    means = together.sum(1, dtype=dtype) / count.clamp_min(1)
    detached = dict(zip(parts, means.detach().unbind(), strict=True))
    value = means.sum() if len(sums) > 1 else means.squeeze(0)
    return LossOutput(value, count, detached)
