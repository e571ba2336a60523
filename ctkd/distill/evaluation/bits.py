"""Bits of text under a model, which compare models whatever their tokenizers are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ctkd.batch import IGNORE_INDEX, Side
from ctkd.distill.data.collator import StoredTeacher, padded_sides, padding_id, stored_side
from ctkd.distill.data.encoding import EncodedSide
from ctkd.distill.data.tasks import Example
from ctkd.distill.evaluation.metrics import BITS_PER_BYTE
from ctkd.distill.models.loading import evaluating, head_width
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.errors import ModelError

__all__ = ["TextBits", "text_bits"]


@dataclass(frozen=True, slots=True)
class TextBits:
    r"""Bits of texts under a model.

    .. math:: \frac{-\sum_i \log_2 p(x_i \mid x_{<i})}{\sum_i |x_i|}

    with tokens :math:`x_i` of :math:`|x_i|` bytes of UTF-8, the end of sequence not among them: all
    bits over all bytes, so that long texts count as much as they are long.

    Attributes:
        ids: The texts' names.
        bits: Of each text.
        bytes: Of each text.

    Example:
        >>> TextBits(("1", "2"), (12.0, 4.0), (4, 4)).summary()
        {'bits_per_byte': 2.0, 'n': 2, 'bytes': 8}
    """

    ids: tuple[str, ...]
    bits: tuple[float, ...]
    bytes: tuple[int, ...]

    def summary(self) -> dict[str, float]:
        """Bits per byte, and the numbers of texts and bytes."""
        total = sum(self.bytes)
        return {BITS_PER_BYTE: math.fsum(self.bits) / total, "n": len(self.ids), "bytes": total}

    def write(self, path: Path) -> None:
        """Write a line of JSON per text."""
        lines = (
            json.dumps({"id": one, "bits": bits, "bytes": size}, ensure_ascii=False)
            for one, bits, size in zip(self.ids, self.bits, self.bytes, strict=True)
        )
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def text_bits(
    asked: ModelLogits | StoredTeacher,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    sides: Sequence[EncodedSide],
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> TextBits:
    """Measure the bits of the examples' answers, each after its prompt.

    Of a conversation those of all its answers.

    Args:
        asked: The model, of whose head columns past the tokenizer's vocabulary do not count; or
            what is stored of it.
        tokenizer: The model's.
        examples: The texts.
        sides: The same in the model's ids, none of them cut.
        batch_size: Texts read together.
        progress: The text of a bar, if one is to be shown.

    Raises:
        ModelError: If a probability is no number.
    """
    bits: list[float] = []
    starts = range(0, len(sides), batch_size)
    silent = True if progress is None else None
    for start in tqdm(starts, desc=progress, leave=False, disable=silent):
        rows = sides[start : start + batch_size]
        inputs, labels = padded_sides(rows, padding_id(tokenizer), with_eos=False)
        bits += _bits(asked, rows, inputs, labels, len(tokenizer)).tolist()
    lost = [one.id for one, found in zip(examples, bits, strict=True) if not math.isfinite(found)]
    if lost:
        raise ModelError(
            f"the model gives text {lost[0]} no probability that is a number; look for nan or "
            "infinite values in its weights"
        )
    sizes = tuple(side.text_bytes for side in sides)
    return TextBits(tuple(example.id for example in examples), tuple(bits), sizes)


@torch.no_grad()
def _bits(
    asked: ModelLogits | StoredTeacher,
    rows: Sequence[EncodedSide],
    inputs: dict[str, Tensor],
    labels: Tensor,
    vocab_size: int,
) -> Tensor:
    if isinstance(asked, ModelLogits):
        model = asked.model
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        labels = labels.to(model.device)
        with evaluating(model):
            read = asked.read(model, inputs, labels.shape[1])
        width = min(vocab_size, head_width(model))
        side = Side.from_causal_lm(read, labels, vocab_size=width)
    else:
        positions = int((labels != IGNORE_INDEX).sum(1).max())
        kept = asked.batch(rows, positions, with_eos=False)
        if asked.device is not None:
            kept = {name: one.to(asked.device) for name, one in kept.items()}
            labels = labels.to(asked.device)
        side = stored_side(asked, kept, labels)
    nats = side.logits.log_probs(side.token_ids.unsqueeze(-1)).squeeze(-1).double()
    return -nats.masked_fill(~side.mask, 0.0).sum(-1) / math.log(2)
