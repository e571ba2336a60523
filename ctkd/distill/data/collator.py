"""From encoded examples to a batch of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ctkd.batch import IGNORE_INDEX, Side
from ctkd.distill.data.encoding import EncodedExample, EncodedSide
from ctkd.errors import BatchError
from ctkd.logits import Logits
from ctkd.ops import pack_scored

__all__ = ["KEPT", "Collator", "StoredTeacher", "padded_sides", "padding_id", "stored_side"]

KEPT = "teacher_kept_"
"""In front of the names of what a cached teacher said."""


class StoredTeacher(Protocol):
    """A teacher whose answers about rows are kept, on disk or in memory."""

    @property
    def device(self) -> torch.device | None:
        """Where its logits are made, None for where the answers lie."""

    def batch(
        self, sides: Sequence[EncodedSide], positions: int, *, with_eos: bool = True
    ) -> dict[str, Tensor]:
        """Read the answers about a batch of rows, padded or cut to so many positions.

        They are those of `EncodedSide.places`, one behind the other.
        """

    def logits(self, kept: dict[str, Tensor], mask: Tensor) -> Logits:
        """Make logits of what `batch` read, on whatever device it lies now."""


def stored_side(
    teacher: StoredTeacher,
    kept: dict[str, Tensor],
    labels: Tensor,
    chunk_ids: Tensor | None = None,
) -> Side:
    """The side of a stored teacher.

    Args:
        teacher: Whose `batch` returned `kept`, for as many positions as are scored in a row.
        kept: What it returned, on the device of the labels.
        labels: The batch's labels of that side.
        chunk_ids: Laid out as the labels.
    """
    positions = next(iter(kept.values())).shape[1]
    packed = pack_scored(
        labels[:, 1:],
        IGNORE_INDEX,
        positions,
        positions,
        None if chunk_ids is None else chunk_ids[:, 1:],
    )
    return Side(
        logits=teacher.logits(kept, packed.mask),
        token_ids=packed.ids,
        mask=packed.mask,
        chunk_ids=packed.chunk_ids,
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with: pad, else eos, else 0. Padding is masked, so any id would do."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if index is not None:
            return int(index)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Pads encoded examples to a batch of tensors on the CPU, prompts left and answers right.

    In every sequence the answer starts at one column, so that the scored rows are the last ones and
    a model that takes ``logits_to_keep`` computes no others: ``logits_to_keep=labels.shape[1]``.
    The labels belong to these last positions, in Hugging Face's convention: ``logits[:, i]``
    predicts ``labels[:, i + 1]``, and -100 is not scored. So do those of an encoder-decoder, whose
    decoder reads what it begins with in front of the answer; its prompts are padded right.

    Cross-entropy (``labels``) scores the end of sequence, padding with the same id or not.
    Distillation (``distill_labels``, ``teacher_distill_labels``) scores it on both sides or on
    neither; if on neither, the teacher does not read it. Where it is scored, the two ends are a
    chunk of their own, the row's last. A row whose answer was cut has no end on either side.

    Of a conversation, ends of earlier answers are scored as the last one is, and what stands
    between the answers is -100. Chunks of ends are numbered behind all others.

    Shape:
        With P and A the longest prompt and answer of the batch, end of sequence included:
        ``input_ids``, ``attention_mask``, ``position_ids`` (B, P + A), ``labels``,
        ``distill_labels`` (B, A + 1). With a teacher the same with ``teacher_`` in front, and its
        own P and A, without ``teacher_labels``; and ``distill_chunk_ids``,
        ``teacher_distill_chunk_ids``, laid out as the labels of the same name, -1 where there is
        no label or no chunk. All int64. The side of an encoder-decoder has ``input_ids`` and
        ``attention_mask`` (B, P) and no ``position_ids``, but ``decoder_input_ids`` (B, D + A),
        with D tokens that its decoder begins with.

    Args:
        student_pad_id: What to pad the student's ids with, see `padding_id`.
        teacher_pad_id: The teacher's; None to make no teacher's tensors.
        score_eos: Whether distillation scores the end of sequence.
        teacher_cache: Stands for the teacher: its inputs are left out, and what it said is added
            with ``teacher_kept_`` in front, as its `batch` gives it.

    Example:
        >>> rows = [
        ...     EncodedExample(id=i, student=EncodedSide(prompt_ids=p, answer_ids=a, eos_id=2))
        ...     for i, p, a in [("1", [5, 6, 7], [8]), ("2", [5], [9, 9])]
        ... ]
        >>> batch = Collator(student_pad_id=2)(rows)
        >>> batch["input_ids"]
        tensor([[5, 6, 7, 8, 2, 2],
                [2, 2, 5, 9, 9, 2]])
        >>> batch["labels"]
        tensor([[-100,    8,    2, -100],
                [-100,    9,    9,    2]])
        >>> batch["distill_labels"]
        tensor([[-100,    8, -100, -100],
                [-100,    9,    9, -100]])
    """

    student_pad_id: int
    teacher_pad_id: int | None = None
    score_eos: bool = False
    teacher_cache: StoredTeacher | None = None

    def __call__(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Make the batch.

        Raises:
            BatchError: If there are no rows, a teacher's side is missing, `score_eos` meets an
                uncut side without an end of sequence or unequal numbers of ends of turns, or a side
                has not one chunk number per token.
        """
        if not rows:
            raise BatchError("a batch needs at least one example")
        for row in rows:
            self._check_end(row)
        student = [row.student for row in rows]
        batch, labels = padded_sides(student, self.student_pad_id, with_eos=True)
        batch["labels"] = labels
        batch["distill_labels"] = self._distilled(student, labels)
        if self.teacher_pad_id is None:
            return batch
        teacher = [row.teacher for row in rows if row.teacher is not None]
        if len(teacher) < len(rows):
            raise BatchError(
                "a teacher's padding was given, but an example has no teacher's side; encode with "
                "the teacher's tokenizer"
            )
        inputs, labels = padded_sides(teacher, self.teacher_pad_id, with_eos=self.score_eos)
        if self.teacher_cache is None:
            batch.update({f"teacher_{name}": value for name, value in inputs.items()})
        else:
            most = max(len(side.places(with_eos=self.score_eos)) for side in teacher)
            kept = self.teacher_cache.batch(teacher, most, with_eos=self.score_eos)
            batch.update({f"{KEPT}{name}": value for name, value in kept.items()})
        batch["teacher_distill_labels"] = self._distilled(teacher, labels)
        # The number of an end must be the same on both sides, also where one side's last token has
        # no chunk.
        ends = [
            1 + max([*ours.chunk_ids, *theirs.chunk_ids, -1])
            for ours, theirs in zip(student, teacher, strict=True)
        ]
        for prefix, sides in (("", student), ("teacher_", teacher)):
            labels = batch[f"{prefix}distill_labels"]
            batch[f"{prefix}distill_chunk_ids"] = self._chunks(sides, labels, ends)
        return batch

    def _check_end(self, row: EncodedExample) -> None:
        sides = [row.student] if row.teacher is None else [row.student, row.teacher]
        if row.cut and any(side.eos_id is not None for side in sides):
            raise BatchError(
                f"example {row.id} was cut, so that it does not end, but has an end of sequence"
            )
        if self.score_eos and not row.cut and any(side.eos_id is None for side in sides):
            raise BatchError(
                f"score_eos needs an end of sequence on every side, example {row.id} lacks one; "
                "leave it off"
            )
        if self.score_eos and len({side.kinds.count("e") for side in sides}) > 1:
            raise BatchError(
                f"score_eos needs an end of every turn on both sides, example {row.id} has more of "
                "them on one; leave it off"
            )

    def _distilled(self, sides: Sequence[EncodedSide], labels: Tensor) -> Tensor:
        if self.score_eos:
            return labels
        distilled = torch.full_like(labels, IGNORE_INDEX)
        for row, side in enumerate(sides):
            places = 1 + torch.tensor(side.places(with_eos=False))
            distilled[row, places] = labels[row, places]
        return distilled

    def _chunks(self, sides: Sequence[EncodedSide], labels: Tensor, ends: Sequence[int]) -> Tensor:
        chunks = torch.full_like(labels, -1)
        for row, (side, end) in enumerate(zip(sides, ends, strict=True)):
            if not side.chunk_ids:
                continue
            count = len(side.answer_ids)
            if len(side.chunk_ids) != count:
                raise BatchError(
                    f"expected one chunk number for each of an answer's {count} tokens, got "
                    f"{len(side.chunk_ids)}; encode with encode_examples"
                )
            chunks[row, 1 : 1 + count] = torch.tensor(side.chunk_ids)
            if self.score_eos:
                kinds = enumerate(side.kinds_with_end, 1)
                places = [place for place, kind in kinds if kind == "e"]
                chunks[row, places] = end + torch.arange(len(places))
        return chunks


def padded_sides(
    sides: Sequence[EncodedSide], pad_id: int, *, with_eos: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Pad one side of some rows: a model's inputs, and the labels of their last positions.

    Args:
        sides: The rows.
        pad_id: What to pad with.
        with_eos: Whether the end of sequence is read and is a label. Ends of earlier answers are
            always read.
    """
    answers = [_answer(side, with_eos=with_eos) for side in sides]
    after = max(map(len, answers))
    labels = torch.full((len(sides), after + 1), IGNORE_INDEX, dtype=torch.int64)
    for row, side, answer in zip(labels, sides, answers, strict=True):
        places = torch.tensor(side.places(with_eos=with_eos))
        row[1 + places] = torch.tensor(answer)[places]
    if sides[0].decoder_start:
        return _encoder_decoder_inputs(sides, answers, pad_id), labels
    before = max(len(side.prompt_ids) for side in sides)
    ids = torch.full((len(sides), before + after), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (side, answer) in enumerate(zip(sides, answers, strict=True)):
        start, end = before - len(side.prompt_ids), before + len(answer)
        ids[row, start:end] = torch.tensor([*side.prompt_ids, *answer])
        mask[row, start:end] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels


def _encoder_decoder_inputs(
    sides: Sequence[EncodedSide], answers: Sequence[list[int]], pad_id: int
) -> dict[str, Tensor]:
    """Inputs of encoder and decoder; what pads an answer needs no mask, as no answer reads it."""
    prompts = [torch.tensor(side.prompt_ids) for side in sides]
    read = [
        torch.tensor([*side.decoder_start, *answer])
        for side, answer in zip(sides, answers, strict=True)
    ]
    return {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True),
        "decoder_input_ids": pad_sequence(read, batch_first=True, padding_value=pad_id),
    }


def _answer(side: EncodedSide, *, with_eos: bool) -> list[int]:
    if with_eos and side.eos_id is not None:
        return [*side.answer_ids, side.eos_id]
    return side.answer_ids
