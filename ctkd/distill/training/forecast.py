"""What a run would be and cost, from two of its micro-batches, before it is begun."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ctkd.distill.config import TrainConfig
from ctkd.distill.data.encoding import EncodedExample, EncodedExamples, EncodedSide
from ctkd.distill.devices import PeakMemory, now
from ctkd.distill.models.adapters import is_adapted
from ctkd.distill.preparing import Models
from ctkd.distill.printable import duration
from ctkd.distill.training.card import model_facts, model_in_words
from ctkd.distill.training.checkpoints import MOST_KEPT
from ctkd.distill.training.trainer import CrossTokenizerTrainer

__all__ = ["Costs", "Sample", "free_bytes", "forecast", "measure_costs", "teacher_tokens"]

# What AdamW keeps, in sizes of the weights that are trained.
_STATES = 2
_TIMED_WEIGHTS = 1 << 22
_MOST_BATCHES = 1000

_Rows = Sequence[EncodedExample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Two micro-batches of a run, and how long its micro-batches are.

    Attributes:
        typical: One of median length among those drawn.
        longest: The longest rows together.
        mean: Padded tokens of a micro-batch, both sides together, on average.
    """

    typical: _Rows
    longest: _Rows
    mean: float

    @classmethod
    def of(cls, config: TrainConfig, rows: _Rows) -> Sample:
        """Draw micro-batches as training does, from its seed."""
        drawn = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(rows), generator=drawn).tolist()
        size = config.batch_size
        starts = range(0, min(len(order), size * _MOST_BATCHES), size)
        batches = [[rows[place] for place in order[start : start + size]] for start in starts]
        batches.sort(key=_padded_tokens)
        longest = sorted(rows, key=lambda row: sum(map(_length, _sides(row))))[-size:]
        mean = sum(map(_padded_tokens, batches)) / len(batches)
        return cls(typical=batches[len(batches) // 2], longest=longest, mean=mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What training costs, as far as two micro-batches and the sizes of weights tell it.

    Attributes:
        step: Seconds of an optimizer step, on average.
        memory: Most bytes held: of the process on a CPU, of torch on a GPU; None if not known.
        saved: Bytes of the weights that are saved in the end.
        checkpoint: Bytes of a checkpoint.
    """

    step: float
    memory: int | None
    saved: int
    checkpoint: int

    def disk(self, config: TrainConfig, steps: int) -> int:
        """Most bytes on disk at a time, those of the control included."""
        count = math.ceil(steps / config.save_steps)
        # A new one is whole before an old one is deleted.
        at_most = min(count, MOST_KEPT + 1) * self.checkpoint
        left = min(count, MOST_KEPT) * self.checkpoint + self.saved
        most = max(at_most, left)
        return left + most if config.control else most


def measure_costs(config: TrainConfig, trainer: CrossTokenizerTrainer, sample: Sample) -> Costs:
    """Run two micro-batches forward and backward; no weight is changed.

    Seconds of other micro-batches are interpolated by their padded tokens, those of the optimizer
    measured on some weights. Memory is the most that the longest micro-batch held, and what the
    optimizer keeps.
    """
    # Kernels are compiled, and memory is taken, at the first use.
    _seconds(trainer, sample.typical)
    short = _seconds(trainer, sample.typical)
    peak = PeakMemory(trainer.args.device)
    long = _seconds(trainer, sample.longest)
    held = peak.read()
    few, many = _padded_tokens(sample.typical), _padded_tokens(sample.longest)
    slope = max(0.0, (long - short) / (many - few)) if many > few else 0.0
    batch = short + slope * (sample.mean - few)
    model = trainer.model
    trained = [one for one in model.parameters() if one.requires_grad]
    bytes_trained = sum(one.nbytes for one in trained)
    kept = bytes_trained if is_adapted(model) else sum(one.nbytes for one in model.parameters())
    whole = sum(one.nbytes for one in model.parameters())
    return Costs(
        step=config.grad_accumulation * batch + _update_seconds(trainer, trained),
        memory=None if held is None else held + _STATES * bytes_trained,
        saved=whole if config.lora_merge else kept,
        checkpoint=kept + _STATES * bytes_trained,
    )


def _seconds(trainer: CrossTokenizerTrainer, rows: _Rows) -> float:
    trainer.model.zero_grad(set_to_none=True)
    started = now()
    trainer.training_step(trainer.model, trainer.data_collator(rows))
    return now() - started


def _update_seconds(trainer: CrossTokenizerTrainer, trained: Sequence[Tensor]) -> float:
    """Seconds of clipping and of the optimizer, from some weights of random gradients."""
    every = sum(one.numel() for one in trained)
    weight = nn.Parameter(torch.zeros(min(every, _TIMED_WEIGHTS)).to(trained[0]))
    weight.grad = torch.rand_like(weight)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    optimizer = kind([weight], **settings)
    # It makes what it keeps at its first step.
    optimizer.step()
    started = now()
    nn.utils.clip_grad_norm_([weight], trainer.args.max_grad_norm)
    optimizer.step()
    return (now() - started) * every / weight.numel()


def _sides(row: EncodedExample) -> list[EncodedSide]:
    return [row.student] if row.teacher is None else [row.student, row.teacher]


def _length(side: EncodedSide) -> int:
    return len(side.prompt_ids) + len(side.answer_ids)


def teacher_tokens(rows: _Rows) -> int:
    """How many tokens of its own a teacher reads in rows."""
    return sum(_length(row.teacher) for row in rows if row.teacher is not None)


def _padded_tokens(rows: _Rows) -> int:
    sides = zip(*map(_sides, rows), strict=True)
    return sum(
        len(one)
        * (max(len(side.prompt_ids) for side in one) + max(len(side.answer_ids) for side in one))
        for one in sides
    )


def forecast(
    config: TrainConfig,
    models: Models,
    encoded: EncodedExamples,
    costs: Costs,
    *,
    steps: int,
    reading: float | None = None,
    output: str = "new",
) -> str:
    """The run, and what it would cost, as a table.

    Args:
        config: The settings.
        models: Its models.
        encoded: Its training rows; the first block of them if they are streamed.
        costs: What it costs.
        steps: Its optimizer steps.
        reading: Seconds in which a teacher that is remembered reads all rows; None without one.
        output: What becomes of its folder.
    """
    rows = encoded.rows
    per_step = config.batch_size * config.grad_accumulation
    an_epoch = math.ceil(math.ceil(len(rows) / config.batch_size) / config.grad_accumulation)
    epochs = "" if config.streaming else f", {steps / an_epoch:.2f} epochs"
    counted = "streamed; this is of the first " if config.streaming else ""
    table = [("student", f"{config.student}, {_model(models.student, models.student_tokenizer)}")]
    if models.teacher_tokenizer is not None:
        which = f" from {config.teacher_cache}" if models.teacher is None else ""
        words = _model(models.teacher, models.teacher_tokenizer)
        table.append(("teacher", f"{config.teacher}{which}, {words}"))
    table += [
        ("training rows", "; ".join(filter(None, (f"{counted}{len(rows):,}", encoded.report())))),
        ("tokens", "; ".join(_tokens(rows, side) for side in ("student", "teacher"))),
        ("coverage", encoded.coverage.report()),
        ("steps", f"{steps:,} of {per_step} rows{epochs}"),
    ]
    time = f"about {duration(steps * costs.step + (reading or 0.0))}, {costs.step:.2f} s per step"
    if reading is not None:
        time += f", {reading:.0f} s for the teacher to read all rows once"
    table.append(("time", f"{time}; without what is measured before and after"))
    if config.control:
        table.append(("control", f"the same steps again, without {config.loss}; not in this time"))
    memory = "not known here" if costs.memory is None else f"about {_size(costs.memory)} at most"
    free = free_bytes(config.folder)
    disk = f"about {_size(costs.disk(config, steps))} of {_size(free)} that are free"
    table += [("memory", memory), ("disk", disk), ("output", f"{config.folder}, {output}")]
    return tabulate(table, tablefmt="plain", disable_numparse=True)


def _model(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> str:
    if model is None:
        return f"{len(tokenizer):,} tokens"
    return model_in_words(model_facts(model, tokenizer))


def _tokens(rows: _Rows, name: str) -> str:
    sides = [side for row in rows if (side := getattr(row, name)) is not None]
    if not sides:
        return f"none of the {name}"
    every, answers = sum(map(_length, sides)), sum(len(side.answer_ids) for side in sides)
    return f"{name} {every:,}, {answers:,} of answers"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
