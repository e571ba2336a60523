r"""Prompts: as plain text or in a model's own chat template, and shots.

Every side renders the prompt by itself, so a teacher never reads the markers of a student's
template, nor a student those of a teacher's. What a template adds besides markers (a system
prompt, the date) is left as the template has it. Text that looks like a special token is read
as one, as the tokenizer does it.
"""

import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from ctkd.distill.data.chat_templates import PROBE, ChatTemplate
from ctkd.distill.data.conversations import Message, RefusedRow
from ctkd.distill.data.exact_ids import check_unicode, tokenized
from ctkd.distill.data.tasks import Example
from ctkd.errors import DataError, ModelError, SettingError

__all__ = ["PLAIN", "PromptForm", "choose_shots", "encode_prompt", "leading_ids"]


# The one function by which templates know of today.
_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<form>.*?)(?P=quote)\s*\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    r"""The form in which one model reads a prompt.

    Args:
        template: "plain": the text as it is, behind what the tokenizer puts in front of a text.
            "chat": one turn of a user, or the conversation before an answer, in the tokenizer's own
            chat template, up to where the model's turn begins; all special tokens are the
            template's.
        day: What a template takes for today, as YYYY-MM-DD; by default it is today.
        shots: Answered examples in front of the prompt: as text, each with its answer and an empty
            line, or in a chat as earlier turns, where an answer stands without the space in front.
            A shot of the same group as the example asked is left out, so that no answer is given
            away.
        decoder_start: What the decoder of an encoder-decoder reads in front of the answer, see
            `ctkd.distill.models.loading.decoder_start`; empty for a decoder-only model. The encoder
            reads the prompt, as plain text with all special tokens that the tokenizer adds to it.

    Raises:
        SettingError: If the template is neither.

    Example:
        >>> shot = Example(id="1", prompt="2 + 2 =", answer=" 4", references=("4",), group="a")
        >>> example = Example(id="2", prompt="3 + 3 =", answer=" 6", references=("6",), group="b")
        >>> PromptForm(shots=(shot,)).plain_text(example)
        '2 + 2 = 4\n\n3 + 3 ='
    """

    template: Literal["plain", "chat"] = "plain"
    day: str | None = None
    shots: tuple[Example, ...] = ()
    decoder_start: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.template not in ("plain", "chat"):
            raise SettingError(f"template must be 'plain' or 'chat', got {self.template!r}")

    def plain_text(self, example: Example) -> str:
        """Write shots and prompt as plain text."""
        shots = [f"{shot.prompt}{shot.answer}\n\n" for shot in self.shots_for(example)]
        return "".join(shots) + example.prompt

    def chat_text(
        self, tokenizer: PreTrainedTokenizerBase, example: Example, *, side: str = "model"
    ) -> str:
        """Write shots and prompt in the tokenizer's chat template, special tokens included.

        Raises:
            ModelError: If the tokenizer has no template, or the template refuses the turns.
            RefusedRow: If it refuses those of a conversation.
        """
        return self._chat_text(self.chat_template(tokenizer, side=side), example)

    def _chat_text(self, template: ChatTemplate, example: Example) -> str:
        if example.messages:
            return template.prompt(example.messages[:-1])
        turns = []
        for shot in self.shots_for(example):
            turns.append(Message(role="user", content=shot.prompt))
            turns.append(Message(role="assistant", content=shot.answer.removeprefix(" ")))
        turns.append(Message(role="user", content=example.prompt))
        try:
            return template.prompt(turns)
        except RefusedRow as error:
            raise ModelError(f"{error}; ask the {template.side} in plain text") from error

    def chat_template(
        self, tokenizer: PreTrainedTokenizerBase, *, side: str = "model"
    ) -> ChatTemplate:
        """The tokenizer's template, with this form's day where it asks for today.

        Raises:
            ModelError: If the tokenizer has none.
        """
        text: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if text is not None and self.day is not None:
            day = datetime.fromisoformat(self.day)
            text = _TODAY.sub(lambda found: repr(day.strftime(found["form"])), text)
        return ChatTemplate(tokenizer, text, side=side)

    def writable(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, side: str
    ) -> tuple[list[Example], list[str]]:
        """Tell the examples that the chat template writes from conversations that it refuses.

        Returns:
            Those that it writes, and why others are refused.
        """
        if not any(example.messages for example in examples):
            return list(examples), []
        template = self.chat_template(tokenizer, side=side)
        written, refused = [], []
        for example in examples:
            try:
                self._chat_text(template, example)
                written.append(example)
            except RefusedRow as error:
                refused.append(f"{example.where or example.id}: {error}")
        return written, refused

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token that ends an answer: in a chat what the template writes behind a turn.

        Where a template writes no special token there, or none is asked for, it is the end of
        sequence; None if there is none.
        """
        if self.template == "chat" and tokenizer.chat_template:
            turns = [
                {"role": "user", "content": PROBE},
                {"role": "assistant", "content": PROBE},
            ]
            with suppress(jinja2.TemplateError, ValueError):
                text: str = tokenizer.apply_chat_template(turns, tokenize=False)
                (behind,) = tokenized(tokenizer, [text.rpartition(PROBE)[2]])
                special = {
                    index for index, one in tokenizer.added_tokens_decoder.items() if one.special
                }
                for token in behind:
                    if token in special:
                        return token
        end: int | None = tokenizer.eos_token_id
        return end

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Tokens at which an answer of a model that is asked in this form has ended."""
        return {end for end in (tokenizer.eos_token_id, self.end_id(tokenizer)) if end is not None}

    def writes_day(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """True if prompts of this form are others on another day."""
        return self.template == "chat" and "strftime_now" in str(tokenizer.chat_template)

    def shots_for(self, example: Example) -> tuple[Example, ...]:
        """The shots that do not belong to the example's group."""
        return tuple(shot for shot in self.shots if shot.group != example.group)

    def ids(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        side: str = "model",
    ) -> list[list[int]]:
        """Tokenize the prompts of examples, up to where the answers begin.

        Args:
            tokenizer: The model's tokenizer.
            examples: Whose prompts; their answers are not looked at.
            side: What an error message calls the model.

        Raises:
            DataError: If a prompt or shot is not valid Unicode, or there is nothing for an encoder
                to read; the message names the row.
            ModelError, RefusedRow: As `chat_text` does.
        """
        for example in (*self.shots, *examples):
            check_unicode(example.prompt, "prompt", example.where or f"example {example.id}")
        for shot in self.shots:
            check_unicode(shot.answer, "answer", shot.where or f"example {shot.id}")
        if not examples:
            return []
        if self.template == "chat":
            template = self.chat_template(tokenizer, side=side)
            texts = [self._chat_text(template, example) for example in examples]
            return tokenized(tokenizer, texts)
        texts = [self.plain_text(example) for example in examples]
        if self.decoder_start:
            for example, text in zip(examples, texts, strict=True):
                if not text:
                    raise DataError(
                        f"{example.where or f'example {example.id}'} has no prompt, which the "
                        f"{side}'s encoder would read; give data with prompts, which task lm has "
                        "none of, or a decoder-only model"
                    )
            return tokenized(tokenizer, texts, special=True)
        leading = leading_ids(tokenizer)
        prompts = [[*leading, *ids] for ids in tokenized(tokenizer, texts)]
        return [prompt or self._start(tokenizer) for prompt in prompts]

    @staticmethod
    def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What stands before a text without a prompt: models learn texts one behind the other."""
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return [index for index in starts if index is not None][:1]


PLAIN = PromptForm()
"""The prompt as it is, without shots."""


def choose_shots(examples: Sequence[Example], count: int, seed: int = 0) -> tuple[Example, ...]:
    """Draw shots for a whole run, each from another group.

    As no two are of one group, an example loses at most one of them, see `PromptForm`.

    Args:
        examples: What to draw from: the training examples, never the held-out ones.
        count: How many, at least 0.
        seed: Equal seeds and examples give equal shots.

    Raises:
        SettingError: If the count is negative.
        DataError: If the examples have fewer groups.

    Example:
        >>> found = [
        ...     Example(id=str(i), prompt="p", answer=" a", references=("a",), group=str(i % 3))
        ...     for i in range(9)
        ... ]
        >>> sorted(shot.group for shot in choose_shots(found, 3))
        ['0', '1', '2']
    """
    if count < 0:
        raise SettingError(f"the number of shots must be at least 0, got {count}")
    drawn: dict[str, Example] = {}
    for example in random.Random(seed).sample(list(examples), len(examples)):
        if len(drawn) == count:
            break
        drawn.setdefault(example.group, example)
    if len(drawn) < count:
        raise DataError(
            f"{count} shots need training examples of {count} groups, there are {len(drawn)}; ask "
            "for fewer shots, or give more data"
        )
    return tuple(drawn.values())


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer by itself puts before a text: mostly bos, or nothing."""
    (plain,) = tokenized(tokenizer, ["a"])
    (full,) = tokenized(tokenizer, ["a"], special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    leading: Sequence[int] | None = None,
    where: str = "example",
) -> list[int]:
    """Tokenize one plain prompt as training does: what a model is given to continue.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The text.
        leading: What to put in front; by default what the tokenizer itself does, see `leading_ids`.
            An end of sequence that a tokenizer adds by itself is left away.
        where: What an error message calls the prompt's example.

    Raises:
        DataError: If the prompt is not valid Unicode.
    """
    check_unicode(prompt, "prompt", where)
    (ids,) = tokenized(tokenizer, [prompt])
    return [*(leading_ids(tokenizer) if leading is None else leading), *ids]
