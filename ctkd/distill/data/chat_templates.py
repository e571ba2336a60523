"""Text that a tokenizer's chat template makes of messages, whatever roles it knows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

import jinja2
from transformers import PreTrainedTokenizerBase

from ctkd.distill.data.conversations import Message, RefusedRow
from ctkd.errors import ModelError

__all__ = ["PROBE", "ChatTemplate"]

PROBE = "ctkd"
"""A word that no template changes."""


class ChatTemplate:
    """A chat template, and what it does with messages of a system and of tools.

    Where it refuses or drops a system's message, as Gemma's did, that stands in front of the next
    user's, with an empty line between. Where it does so with a tool's, that is a user's.

    Args:
        tokenizer: The tokenizer.
        text: Its template; by default as it has it.
        side: What an error message calls the model.

    Raises:
        ModelError: If the tokenizer has no template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str | None = None, *, side: str = "model"
    ) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the {side}'s tokenizer ({type(tokenizer).__name__}) has no chat template; ask "
                f"the {side} in plain text (no conversations), choose a model made for chatting, "
                "or set the tokenizer's chat_template"
            )
        self.tokenizer, self.text, self.side = tokenizer, text, side

    def prompt(self, messages: Sequence[Message]) -> str:
        """Write messages up to where the model's turn begins, special tokens included.

        Raises:
            RefusedRow: If the template refuses them.
        """
        try:
            return self._rendered(self._adapted(messages))
        except (jinja2.TemplateError, ValueError) as error:
            raise RefusedRow(
                f"the {self.side}'s chat template cannot write this prompt "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error

    def turns(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """Write a conversation as pairs of what is read and the answer that is scored behind it.

        All of them in one line are what the model reads: the `prompt` of the last answer, in which
        earlier ones stand as the template writes them, and that answer. Where they stand is told
        by a second rendering with other words in their places.

        Args:
            messages: The last of them is an answer.

        Raises:
            RefusedRow: If the template refuses the messages, or writes earlier answers in another
                way than they are: without their thoughts, say, or two as one.
        """
        *earlier, last = [number for number, one in enumerate(messages) if one.scored]
        answers = [messages[number].content for number in (*earlier, last)]
        probe = PROBE
        while any(probe in message.content for message in messages):
            probe += PROBE
        probed = list(messages[:last])
        for number in earlier:
            probed[number] = replace(probed[number], content=f"{probe}{number}{probe}")
        rest = self.prompt(probed)
        read = []
        for number in earlier:
            before, _, rest = rest.partition(probed[number].content)
            read.append(before)
        read.append(rest)
        turns = list(zip(read, answers, strict=True))
        if not all(read) or "".join(chain(*turns)) != self.prompt(messages[:last]) + answers[-1]:
            raise RefusedRow(
                f"the {self.side}'s chat template changes, drops or merges what the assistant said "
                "before its last answer"
            )
        return turns

    @cached_property
    def knows_systems(self) -> bool:
        """Whether it writes what a system says."""
        return self._writes(["system", "user"], 0)

    @cached_property
    def knows_tools(self) -> bool:
        """Whether it writes what a tool says."""
        return self._writes(["user", "assistant", "tool"], 2)

    def _writes(self, roles: Sequence[str], which: int) -> bool:
        turns = [
            {"role": role, "content": PROBE if number == which else "a"}
            for number, role in enumerate(roles)
        ]
        try:
            return PROBE in self._rendered(turns)
        except (jinja2.TemplateError, ValueError):
            return False

    def _adapted(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        adapted: list[dict[str, str]] = []
        said = ""  # by a system, in front of the message that comes next
        for number, message in enumerate(messages):
            role, content = message.role, message.content
            if role == "tool" and not self.knows_tools:
                role = "user"
            if role == "system" and not self.knows_systems:
                following = messages[number + 1 : number + 2]
                if following and following[0].role in ("system", "user"):
                    said += f"{content}\n\n"
                    continue
                role = "user"
            adapted.append({"role": role, "content": said + content})
            said = ""
        return adapted

    def _rendered(self, turns: list[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            turns, chat_template=self.text, add_generation_prompt=True, tokenize=False
        )
        return text
