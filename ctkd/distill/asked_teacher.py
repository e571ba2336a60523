"""A teacher that is asked about rows of token ids, for a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.batch import IGNORE_INDEX
from ctkd.dense_logits import DenseLogits
from ctkd.distill.collator import padded_sides, padding_id
from ctkd.distill.config import TrainConfig
from ctkd.distill.encoded import EncodedSide
from ctkd.distill.models import check_token_ids, last_logits, load_model
from ctkd.distill.preparing import teacher_dtype
from ctkd.top_k import TopK

__all__ = ["AskedTeacher"]


class AskedTeacher:
    """The teacher, loaded when it is first asked.

    Args:
        config: Names it, its dtype and the size of a batch.
        tokenizer: Its tokenizer.
        device: Where it is put.
        say: Prints one line of progress.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.tokenizer, self.device, self.say = config, tokenizer, device, say
        self._model: PreTrainedModel | None = None

    def model(self) -> PreTrainedModel:
        """The model itself."""
        if self._model is None:
            self.say(f"loading the teacher: {self.config.teacher}")
            dtype = teacher_dtype(self.config)
            self._model = load_model(self.config.teacher, dtype=dtype, device=self.device)
            check_token_ids(self._model, self.tokenizer)
        return self._model

    def with_tokenizer(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, as `TeacherTexts.complete` takes them."""
        return self.model(), self.tokenizer

    @torch.no_grad()
    def top_k(self, sides: Sequence[EncodedSide], record: dict[str, Any]) -> dict[str, Tensor]:
        """Ask about a batch of rows.

        Args:
            sides: The rows.
            record: What is asked: ``vocab_size``, ``k`` and ``temperatures``.

        Shape:
            As `TopK`, with (N,) in front: all positions, one row after another.
        """
        model = self.model()
        inputs, labels = padded_sides(sides, padding_id(self.tokenizer), with_eos=False)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        logits = last_logits(model, model, inputs, labels.shape[1])
        # Behind the last answer token the model says how likely the text ends: nothing more need
        # be read for it.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        for row, side in enumerate(sides):
            if side.eos_id is not None:
                targets[row, len(side.answer_ids)] = side.eos_id
        targets = targets.to(self.device)
        mask = targets != IGNORE_INDEX
        kept = TopK.of(
            DenseLogits(logits, mask=mask, vocab_size=record["vocab_size"]),
            targets,
            record["k"],
            record["temperatures"],
        )
        return {name: value[mask].cpu() for name, value in kept.tensors().items()}
