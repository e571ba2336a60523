"""From examples to token ids on both sides, and from those to batches.

Prompt and answer are tokenized apart, so that the scored part begins at the same character for
student and teacher, and the answer's ids must spell exactly the answer's bytes. No chat template
is applied, and nothing is truncated: an example that is too long on one side is left out on both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctkd.batch import IGNORE_INDEX
from ctkd.distill.exact_ids import exact_ids, tokenized
from ctkd.distill.tasks import Example
from ctkd.errors import BatchError, DataError, SettingError
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = [
    "Collator",
    "EncodedExamples",
    "EncodedPair",
    "EncodedSide",
    "encode_pair",
    "encode_prompt",
    "encode_side",
    "leading_ids",
    "padding_id",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSide:
    """One example in one tokenizer's ids.

    Args:
        prompt_ids: The prompt, with what the tokenizer puts in front of a text; at least one id.
        answer_ids: The answer, without an end of sequence.
        eos_id: The end of sequence, None if the tokenizer has none.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    eos_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """One example in the ids of the student and, if there is one, of the teacher."""

    id: str
    student: EncodedSide
    teacher: EncodedSide | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExamples:
    """What `encode_pair` made of some examples.

    Args:
        rows: The encoded examples, in their order.
        too_long: The ids of the examples left out, each with its lengths.
        max_length: The most tokens a side may have.
    """

    rows: list[EncodedPair]
    too_long: tuple[str, ...]
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    def report(self) -> str:
        """Say in one line what was left out; empty if nothing was.

        Example:
            >>> EncodedExamples(rows=[], too_long=("7 (student 90)",), max_length=64).report()
            'left out 1 of 1 examples as longer than 64 tokens: 7 (student 90)'
        """
        if not self.too_long:
            return ""
        more = ", ..." if len(self.too_long) > 3 else ""
        return (
            f"left out {len(self.too_long)} of {len(self.rows) + len(self.too_long)} examples as "
            f"longer than {self.max_length} tokens: {', '.join(self.too_long[:3])}{more}"
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with: pad, else eos, else 0. Padding is masked, so any id would do."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if index is not None:
            return int(index)
    return 0


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer by itself puts before a text: mostly bos, or nothing."""
    (plain,) = tokenized(tokenizer, ["a"])
    (full,) = tokenized(tokenizer, ["a"], special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, leading: Sequence[int] | None = None
) -> list[int]:
    """Tokenize a prompt as training does: what a model is given to continue.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The text.
        leading: What to put in front; by default what the tokenizer itself does, see `leading_ids`.
            An end of sequence that a tokenizer adds by itself is left away.
    """
    (ids,) = tokenized(tokenizer, [prompt])
    return [*(leading_ids(tokenizer) if leading is None else leading), *ids]


def encode_side(
    tokenizer: PreTrainedTokenizerBase,
    token_bytes: TokenBytes,
    prompt: str,
    answer: str,
    *,
    leading: Sequence[int] | None = None,
    where: str = "example",
    side: str = "student",
) -> EncodedSide:
    """Tokenize prompt and answer apart, the answer to ids that spell exactly its bytes.

    Tokenizers that put a space in front of every text are dealt with, see `exact_ids`.

    Args:
        tokenizer: The model's tokenizer.
        token_bytes: Its byte table.
        prompt: What stands before the answer.
        answer: The text to score, at least one character.
        leading: As in `encode_prompt`.
        where: What an error message calls the example.
        side: What an error message calls the model.

    Raises:
        DataError: If the ids cannot spell the answer (the tokenizer changes the text, lacks a
            character, or takes a part of it for a special token), or the prompt has no ids.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, leading=leading)
    (answer_ids,) = tokenized(tokenizer, [answer])
    return _checked(tokenizer, token_bytes, prompt_ids, answer_ids, answer, where, side)


def encode_pair(
    examples: Sequence[Example],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int,
    score_eos: bool = False,
    on_long: Literal["drop", "refuse"] = "drop",
) -> EncodedExamples:
    """Tokenize examples for the student and, if there is one, for the teacher.

    Args:
        examples: What to encode, at least one.
        student_tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's; None to train without a teacher.
        max_length: The most tokens a side may have: prompt, answer and, where it is read, the end
            of sequence.
        score_eos: Whether distillation scores the end of sequence, on both sides.
        on_long: What becomes of an example that is too long on either side: left out on both and
            reported, or refused.

    Raises:
        SettingError: If `max_length` is too small to be meant, or `score_eos` is asked of a
            tokenizer without an end of sequence.
        DataError: If an answer cannot be tokenized exactly (see `encode_side`), an example is too
            long and `on_long` is "refuse", or no example is left.
    """
    if max_length < 2:
        raise SettingError(f"max_length must be at least 2 tokens, got {max_length}")
    if on_long not in ("drop", "refuse"):
        raise SettingError(f"on_long must be 'drop' or 'refuse', got {on_long!r}")
    if not examples:
        raise DataError("there are no examples to encode; expected at least one")
    tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}
    sides: dict[str, list[EncodedSide]] = {}
    for side, tokenizer in tokenizers.items():
        if tokenizer is None:
            continue
        if score_eos and tokenizer.eos_token_id is None:
            raise SettingError(
                f"score_eos needs an end of sequence on both sides, but the {side}'s tokenizer has "
                "none; leave score_eos off, or set the tokenizer's eos_token"
            )
        sides[side] = _encode_all(examples, tokenizer, side)
    rows: list[EncodedPair] = []
    too_long: list[str] = []
    for index, example in enumerate(examples):
        encoded = {side: found[index] for side, found in sides.items()}
        lengths = {
            side: _length(one, with_eos=side == "student" or score_eos)
            for side, one in encoded.items()
        }
        if max(lengths.values()) <= max_length:
            rows.append(EncodedPair(id=example.id, **encoded))
            continue
        shown = ", ".join(f"{side} {length}" for side, length in lengths.items())
        if on_long == "refuse":
            raise DataError(
                f"{_name(example)} is longer than {max_length} tokens ({shown}); raise max_length, "
                "or shorten the row"
            )
        too_long.append(f"{example.id} ({shown})")
    if not rows:
        raise DataError(
            f"all {len(examples)} examples are longer than {max_length} tokens, the first is "
            f"{too_long[0]}; raise max_length"
        )
    return EncodedExamples(rows=rows, too_long=tuple(too_long), max_length=max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Pads encoded examples to a batch of tensors on the CPU, prompts left and answers right.

    In every sequence the answer starts at one column, so that the scored rows are the last ones and
    a model that takes ``logits_to_keep`` computes no others: ``logits_to_keep=labels.shape[1]``.
    The labels belong to these last positions, in Hugging Face's convention: ``logits[:, i]``
    predicts ``labels[:, i + 1]``, and -100 is not scored.

    Cross-entropy (``labels``) scores the end of sequence, padding with the same id or not.
    Distillation (``distill_labels``, ``teacher_distill_labels``) scores it on both sides or on
    neither; if on neither, the teacher does not read it.

    Shape:
        With P and A the longest prompt and answer of the batch, end of sequence included:
        ``input_ids``, ``attention_mask``, ``position_ids`` (B, P + A), ``labels``,
        ``distill_labels`` (B, A + 1). With a teacher the same with ``teacher_`` in front, and its
        own P and A, without ``teacher_labels``. All int64.

    Args:
        student_pad_id: What to pad the student's ids with, see `padding_id`.
        teacher_pad_id: The teacher's; None to make no teacher's tensors.
        score_eos: Whether distillation scores the end of sequence.

    Example:
        >>> rows = [
        ...     EncodedPair(id=i, student=EncodedSide(prompt_ids=p, answer_ids=a, eos_id=2))
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

    def __call__(self, rows: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """Make the batch.

        Raises:
            BatchError: If there are no rows, a teacher's side is missing, or `score_eos` meets a
                side without an end of sequence.
        """
        if not rows:
            raise BatchError("a batch needs at least one example")
        student = [row.student for row in rows]
        batch, labels = _padded(student, self.student_pad_id, with_eos=True)
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
        inputs, labels = _padded(teacher, self.teacher_pad_id, with_eos=self.score_eos)
        batch.update({f"teacher_{name}": value for name, value in inputs.items()})
        batch["teacher_distill_labels"] = self._distilled(teacher, labels)
        return batch

    def _distilled(self, sides: Sequence[EncodedSide], labels: Tensor) -> Tensor:
        if self.score_eos:
            if any(side.eos_id is None for side in sides):
                raise BatchError("score_eos needs an end of sequence on every side; leave it off")
            return labels
        lengths = torch.tensor([len(side.answer_ids) for side in sides])
        beyond = torch.arange(labels.shape[1]) > lengths.unsqueeze(1)
        return labels.masked_fill(beyond, IGNORE_INDEX)


def _padded(
    sides: Sequence[EncodedSide], pad_id: int, *, with_eos: bool
) -> tuple[dict[str, Tensor], Tensor]:
    answers = [_answer(side, with_eos=with_eos) for side in sides]
    before = max(len(side.prompt_ids) for side in sides)
    after = max(map(len, answers))
    ids = torch.full((len(sides), before + after), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(sides), after + 1), IGNORE_INDEX, dtype=torch.int64)
    for row, (side, answer) in enumerate(zip(sides, answers, strict=True)):
        start, end = before - len(side.prompt_ids), before + len(answer)
        ids[row, start:end] = torch.tensor([*side.prompt_ids, *answer])
        mask[row, start:end] = 1
        labels[row, 1 : 1 + len(answer)] = torch.tensor(answer, dtype=torch.int64)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels


def _answer(side: EncodedSide, *, with_eos: bool) -> list[int]:
    if with_eos and side.eos_id is not None:
        return [*side.answer_ids, side.eos_id]
    return side.answer_ids


def _length(side: EncodedSide, *, with_eos: bool) -> int:
    return len(side.prompt_ids) + len(_answer(side, with_eos=with_eos))


def _encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, side: str
) -> list[EncodedSide]:
    """Do what `encode_side` does, for many examples in one call of the tokenizer."""
    token_bytes = TokenBytes.from_tokenizer(tokenizer)
    leading = leading_ids(tokenizer)
    prompts = tokenized(tokenizer, [example.prompt for example in examples])
    answers = tokenized(tokenizer, [example.answer for example in examples])
    return [
        _checked(
            tokenizer,
            token_bytes,
            [*leading, *prompt_ids],
            answer_ids,
            example.answer,
            _name(example),
            side,
        )
        for example, prompt_ids, answer_ids in zip(examples, prompts, answers, strict=True)
    ]


def _name(example: Example) -> str:
    return example.where or f"example {example.id}"


def _checked(
    tokenizer: PreTrainedTokenizerBase,
    token_bytes: TokenBytes,
    prompt_ids: list[int],
    answer_ids: list[int],
    answer: str,
    where: str,
    side: str,
) -> EncodedSide:
    if not prompt_ids:
        raise DataError(
            f"{where}: the prompt is empty and the {side}'s tokenizer puts nothing in front of it, "
            "so that nothing predicts the answer's first token; write a prompt"
        )
    wanted = answer.encode()
    if not wanted:
        raise DataError(f"{where}: the answer is empty; expected at least one character")
    exact = exact_ids(tokenizer, token_bytes, answer, answer_ids)
    if exact is None:
        raise DataError(
            f"{where}: the {side}'s tokenizer ({type(tokenizer).__name__}) cannot spell the answer "
            f"exactly: expected {_short(wanted)}, its ids spell "
            f"{_short(token_bytes.decode(answer_ids))}; rewrite the answer or remove the row"
        )
    return EncodedSide(prompt_ids=prompt_ids, answer_ids=exact, eos_id=tokenizer.eos_token_id)


def _short(spelled: bytes, limit: int = 60) -> str:
    text = repr(spelled.decode(errors="backslashreplace"))
    return text if len(text) <= limit else text[: limit - 3] + "..."
