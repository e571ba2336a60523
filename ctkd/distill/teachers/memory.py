"""A teacher that reads each row once and is remembered: its hidden states, in main memory.

They are what its head makes whole rows of logits from, a block at a time, so that every loss is
served exactly. Where rows are read in several epochs, a teacher costs a pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ctkd.distill.data.collator import padded_sides
from ctkd.distill.data.encoding import EncodedSide
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.logits import Logits

__all__ = ["KnownStates", "TeacherMemory", "memory_bytes"]

KnownStates: TypeAlias = dict[tuple[Any, ...], dict[tuple[int, ...], Tensor]]
"""Hidden states by row, of the rows and batches that were read last."""


def memory_bytes(model: PreTrainedModel, sides: Sequence[EncodedSide], *, score_eos: bool) -> int:
    """What it takes to remember rows."""
    positions = sum(_positions(side, score_eos) for side in sides)
    weight: Tensor = model.get_output_embeddings().weight
    return positions * weight.shape[1] * weight.element_size()


class TeacherMemory:
    """The hidden states of a teacher at every position that predicts a token of an answer.

    The teacher is frozen.

    Args:
        logits: Of the teacher, whose head can be taken apart.
        sides: The rows; read here, always in the same batches, so that a run that goes on after a
            stop has the same states.
        pad_id: What to pad with.
        score_eos: Whether distillation scores the end of sequence.
        vocab_size: Columns to keep of the head's.
        batch_size: Rows that are read together.
        known: States that an earlier memory of the same teacher has read, where the rows and
            batches were the same; else they give way to these. None to share nothing.
    """

    def __init__(
        self,
        logits: ModelLogits,
        sides: Sequence[EncodedSide],
        *,
        pad_id: int,
        score_eos: bool = False,
        vocab_size: int | None = None,
        batch_size: int = 4,
        known: KnownStates | None = None,
    ) -> None:
        self._logits = logits
        self._score_eos = score_eos
        self._vocab_size = vocab_size
        self._states: dict[tuple[int, ...], Tensor] = {}
        model = logits.model.requires_grad_(False)
        # Read in other batches, states differ in their last digits.
        read = model.dtype, batch_size, score_eos, tuple(map(_key, sides))
        if known is not None and read in known:
            self._states = known[read]
            return
        batches = [sides[start : start + batch_size] for start in range(0, len(sides), batch_size)]
        for batch in tqdm(batches, desc="teacher: reading", leave=False, disable=None):
            inputs, labels = padded_sides(batch, pad_id, with_eos=score_eos)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            with torch.no_grad():
                hidden = logits.hidden(model, inputs, labels.shape[1])
            for side, states in zip(batch, hidden.cpu(), strict=True):
                self._states[_key(side)] = states[: _positions(side, score_eos)].clone()
        if known is not None:
            known.clear()
            known[read] = self._states

    @property
    def device(self) -> torch.device:
        device: torch.device = self._logits.model.device
        return device

    def batch(self, sides: Sequence[EncodedSide], positions: int) -> dict[str, Tensor]:
        """The states of a batch of rows, padded with zeros to so many positions."""
        found = [self._states[_key(side)] for side in sides]
        hidden = found[0].new_zeros((len(found), positions, found[0].shape[-1]))
        for row, states in zip(hidden, found, strict=True):
            row[: len(states)] = states[:positions]
        return {"hidden": hidden}

    def logits(self, kept: dict[str, Tensor], mask: Tensor) -> Logits:
        """The teacher's logits at the positions of `batch`."""
        return self._logits.from_hidden(kept["hidden"], mask=mask, vocab_size=self._vocab_size)


def _positions(side: EncodedSide, score_eos: bool) -> int:
    return len(side.answer_ids) + (score_eos and side.eos_id is not None)


def _key(side: EncodedSide) -> tuple[int, ...]:
    return (*side.prompt_ids, -1, *side.answer_ids, -1, -1 if side.eos_id is None else side.eos_id)
