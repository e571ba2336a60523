"""Conversations: messages as OpenAI, TRL and ShareGPT lay them out."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctkd.distill.data.rows import kind_of
from ctkd.errors import DataError

__all__ = [
    "COLUMNS",
    "Message",
    "RefusedRow",
    "are_messages",
    "has_calls",
    "messages_of",
    "shortened",
    "transcript",
]

COLUMNS = ("messages", "conversations")
"""Columns that hold conversations: of OpenAI and TRL, and of ShareGPT."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RefusedRow(DataError):
    """A conversation that cannot be trained on, and is left out and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: Its text; that of an assistant without white space at its ends.
        scored: Whether it is an answer to train on.
    """

    role: str
    content: str
    scored: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The message as `messages_of` reads it."""
        return {"role": self.role, "content": self.content, "weight": int(self.scored)}


def messages_of(value: object, where: str) -> tuple[Message, ...]:
    r"""Read a conversation, up to the last message of an assistant that holds text.

    A message is an object with ``role`` and ``content``, or with ``from`` and ``value``. Roles are
    called as OpenAI, TRL or ShareGPT call them. Content may be a list of parts, of which the texts
    are joined. Tool calls of an assistant are text, a line of JSON each, behind its content. An
    assistant's messages are scored unless they are empty, or have the ``weight`` 0, which is how
    OpenAI leaves one out. White space at their ends is taken away: templates differ in keeping it.

    Args:
        value: A list of messages.
        where: What an error message calls the row.

    Raises:
        RefusedRow: If no message is an answer to train on, or one holds something other than text.
        DataError: If this is no list of messages, or a role is unknown.

    Example:
        >>> found = messages_of(
        ...     [
        ...         {"from": "human", "value": "Where is Oslo?"},
        ...         {"from": "gpt", "value": "In Norway.\n"},
        ...         {"from": "human", "value": "Thanks."},
        ...     ],
        ...     "row 1",
        ... )
        >>> [(one.role, one.content, one.scored) for one in found]
        [('user', 'Where is Oslo?', False), ('assistant', 'In Norway.', True)]
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: expected a list of messages, got {kind_of(value)}")
    read = [_message(one, f"{where}, message {number}") for number, one in enumerate(value, 1)]
    last = max((number for number, one in enumerate(read, 1) if one.scored), default=0)
    if not last:
        raise RefusedRow(f"{where} has no answer of an assistant to train on")
    return tuple(read[:last])


def are_messages(value: object) -> bool:
    """True if a cell looks like a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def transcript(messages: Sequence[Message]) -> str:
    r"""A conversation as plain text, for people to read.

    Example:
        >>> transcript([Message(role="user", content="Where is Oslo?")])
        'user: Where is Oslo?\n'
    """
    return "".join(f"{one.role}: {one.content}\n" for one in messages)


def shortened(reasons: Sequence[str]) -> str:
    """The first three of some reasons.

    Example:
        >>> shortened(["row 1 is empty", "row 2 is empty"])
        'row 1 is empty; row 2 is empty'
    """
    return "; ".join([*reasons[:3], *(["..."] if len(reasons) > 3 else [])])


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is {kind_of(value)}; expected an object with role and content, or with from "
            "and value"
        )
    named = _first(value, "role", "from")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        near = difflib.get_close_matches(str(named), _ROLES, n=1, cutoff=0.5)
        raise DataError(
            f"{where} has the role {named!r}{f', did you mean {near[0]!r}?' if near else ''}; "
            f"known roles: {', '.join(_ROLES)}"
        )
    content = _text(_first(value, "content", "value"), where)
    if role == "assistant":
        content = "\n".join(filter(None, (content.strip(), *_calls(value, where))))
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RefusedRow(
            f"{where} is not valid Unicode (half a surrogate pair at character {error.start + 1})"
        ) from error
    scored = role == "assistant" and bool(content) and value.get("weight") != 0
    return Message(role=role, content=content, scored=scored)


def _first(value: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that is there: tables have all fields of all rows."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(f"{where} holds {kind_of(content)}; expected text or a list of parts")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            text = part.get("text")
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise RefusedRow(f"{where} holds a part that is no text ({kind})")
        texts.append(text)
    return "".join(texts)


def has_calls(value: object) -> bool:
    """True if a message in this list calls a tool."""
    return isinstance(value, list) and any(
        isinstance(one, Mapping) and (one.get("tool_calls") or one.get("function_call"))
        for one in value
    )


def _calls(message: Mapping[str, Any], where: str) -> list[str]:
    """The tool calls of a message, each as a line of JSON."""
    calls = message.get("tool_calls") or []
    if message.get("function_call") is not None:
        calls = [*calls, message["function_call"]]
    lines = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise DataError(f"{where} has a tool call without the name of a function")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                pass  # kept as the text that it is
        written = {"name": function["name"], "arguments": arguments}
        lines.append(json.dumps(written, ensure_ascii=False))
    return lines
