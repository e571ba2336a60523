"""Tasks: prompts, answers and references from the columns of a data set.

Prompt bodies are those of the MultiLevelOT paper's code. There is no instruction, no example and
no chat template in them: a prompt reads the same for student and teacher. Conversations have no
body: each side writes them in its chat template.
"""

import difflib
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ctkd.distill.data.conversations import (
    COLUMNS,
    Message,
    are_messages,
    messages_of,
    transcript,
)
from ctkd.distill.data.rows import Rows
from ctkd.errors import DataError, SettingError

__all__ = ["TASKS", "Example", "Task", "examples", "get_task", "split_off"]

_EXTRA_FIELDS = ("id", "group", "title", "ends")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt, the answer to train on, and every answer that counts as right.

    Args:
        id: What ties a prediction to this example; unique among the examples read together.
        prompt: What both models read before the answer.
        answer: The training target, with the space in front that the task asks for.
        references: The accepted answers, without that space, at least one.
        group: Equal for examples about one passage; a split never parts them.
        where: File and row, for error messages.
        ends: Whether the answer is whole. One that was cut is no example of where to stop.
        messages: A conversation, of which the last message is the answer and those before are the
            prompt, that is a transcript then; empty for any other example.
    """

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    group: str
    where: str = ""
    ends: bool = True
    messages: tuple[Message, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that are scored: the answer, and those earlier in the conversation."""
        return tuple(one.content for one in self.messages if one.scored) or (self.answer,)

    def with_answer(self, text: str, *, ends: bool = True) -> "Example":
        """The same example with what a model wrote, behind the spaces in front of its answer."""
        answer = self.answer[: len(self.answer) - len(self.answer.lstrip(" "))] + text
        messages = self.messages
        if messages:
            messages = (*messages[:-1], replace(messages[-1], content=answer))
        return replace(self, answer=answer, ends=ends, messages=messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The columns of a row that make an example, and the prompt made from them.

    Args:
        name: What ``--task`` calls it.
        bodies: Prompt bodies by the fields they need; the first body whose fields are all there
            is used. The first of its fields tells which rows are about one passage.
        target: The field that holds the answer or answers.
        answer_prefix: What stands in front of the answer; where it is empty, answers are taken as
            they are, else without white space at their ends.
        metrics: What models are measured by, the main one first; names of
            `ctkd.distill.evaluation.metrics.METRICS`.
        one_line: Whether what a model writes ends at its first line break.
        window: If above 0, rows are documents, which are cut into examples of up to so many bytes.
        is_chat: Whether rows are conversations, which the target holds.
    """

    name: str
    bodies: Mapping[tuple[str, ...], str]
    target: str
    answer_prefix: str
    metrics: tuple[str, ...] = ("rouge_lsum", "f1", "exact_match", "given_bits_per_byte")
    one_line: bool = False
    window: int = 0
    is_chat: bool = False

    @property
    def answered(self) -> bool:
        """Whether models are measured by what they answer, or else by the bits of given text."""
        return not self.window

    @property
    def unit(self) -> str:
        """What one example is, for a count."""
        return "pieces of documents" if self.window else "rows"

    @property
    def columns(self) -> tuple[str, ...]:
        """Every field of the task that `columns` can map; those of all tasks are optional."""
        fields = dict.fromkeys(field for needed in self.bodies for field in needed)
        return (*fields, self.target, *_EXTRA_FIELDS)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "qa": Task(
            name="qa",
            bodies={("context", "question"): "Context: {context}\nQuestion: {question}\nAnswer:"},
            target="answers",
            answer_prefix=" ",
            metrics=("f1", "exact_match", "rouge_lsum", "given_bits_per_byte"),
            # Models that were not made for chatting go on with questions of their own.
            one_line=True,
        ),
        "summarization": Task(
            name="summarization",
            bodies={
                ("dialogue",): "Dialogue: {dialogue}\nSummary:",
                ("document",): "Document: {document}\nSummary:",
            },
            target="summaries",
            answer_prefix=" ",
        ),
        "text": Task(
            name="text", bodies={("prompt",): "{prompt}"}, target="answer", answer_prefix=""
        ),
        "chat": Task(
            name="chat", bodies={(): ""}, target="messages", answer_prefix="", is_chat=True
        ),
        "lm": Task(
            name="lm",
            bodies={(): ""},
            target="text",
            answer_prefix="",
            metrics=("bits_per_byte",),
            window=400,
        ),
    }
)
"""The tasks by name."""


def get_task(name: str) -> Task:
    """Look a task up.

    Raises:
        SettingError: If no task has that name.

    Example:
        >>> get_task("qa").columns
        ('context', 'question', 'answers', 'id', 'group', 'title', 'ends')
    """
    if name not in TASKS:
        raise SettingError(f"unknown task {name!r}{_suggest(name, TASKS)}; tasks: {_list(TASKS)}")
    return TASKS[name]


def examples(
    rows: Rows,
    task: Task | str,
    columns: Mapping[str, str] | None = None,
    *,
    use_title: bool = False,
) -> list[Example]:
    r"""Turn rows into examples.

    The answers of a row may be text, a list of texts, a list of objects with "text" or "string"
    (as QED has them), or an object with a list "text" (as SQuAD has them). The first that is not
    blank is the training target, all of them are references. A row's id is its column "id" where
    all rows have one and no two the same, else its number.

    Args:
        rows: The rows, as `load_rows` returns them.
        task: The task or its name.
        columns: Where the data calls a field by another name: field to column. The optional fields
            are "id", "group" (rows of equal value stay on one side of a split; by default those
            with the same context, dialogue, document, prompt or first message of a user do; where
            that is blank, those with the same question or answer), "title", and "ends" (read only
            if it is named here: false where the answer was cut, and its end is not to be learned).
        use_title: Put ``Title: ...`` in front of each prompt, but of conversations. Without it
            titles are not read.

    Raises:
        SettingError: If the task is unknown.
        DataError: If a mapping names a field or column that is not there, a needed column is
            missing, or a row lacks an answer or holds something other than text; the message names
            the row, counted from 1.

    Example:
        >>> rows = Rows("capitals", [{"passage": "Oslo is in Norway.", "question": "Where is Oslo?",
        ...                           "answers": ["Norway", "in Norway"]}])
        >>> example = examples(rows, "qa", {"context": "passage"})[0]
        >>> example.prompt
        'Context: Oslo is in Norway.\nQuestion: Where is Oslo?\nAnswer:'
        >>> example.answer, example.references
        (' Norway', ('Norway', 'in Norway'))
    """
    if isinstance(task, str):
        task = get_task(task)
    reader = _Reader.prepare(rows, task, columns or {}, use_title)
    read = [reader.read(row, number, rows.place(number)) for number, row in enumerate(rows, 1)]
    read = reader.with_ids(read, rows)
    if task.window:
        return [window for document in read for window in _windows(document, task.window)]
    return read


def _windows(document: Example, size: int) -> list[Example]:
    """The text of a document in pieces of up to so many bytes, which end at a space if they can.

    Nothing is left out: one after the other they are the document. Only the last one ends as it
    does.
    """
    text = document.answer.encode()
    pieces: list[str] = []
    start = 0
    while start < len(text):
        stop = min(start + size, len(text))
        if stop < len(text):
            spaces = [text.rfind(space, start + size // 2, stop) + 1 for space in (b"\n", b" ")]
            stop = next((end for end in spaces if end), stop)
            while text[stop] & 0xC0 == 0x80:  # within a character
                stop -= 1
        pieces.append(text[start:stop].decode())
        start = stop
    return [
        replace(
            document,
            id=f"{document.id}.{number}",
            answer=piece,
            references=(piece,),
            where=f"{document.where}, part {number}",
            ends=document.ends and number == len(pieces),
        )
        for number, piece in enumerate(pieces, 1)
    ]


def split_off(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Cut a held-out part off, whole groups at a time, so that no passage is on both sides.

    Groups are drawn in an order that depends on `seed` and on the order of the examples, until the
    held-out part has at least `fraction` of the examples; one group always stays behind. Both parts
    keep the order of the examples.

    Args:
        examples: What to split.
        fraction: The share to hold out, above 0 and below 1.
        seed: Seed of the draw.

    Returns:
        The examples to train on, and those held out.

    Raises:
        SettingError: If `fraction` is out of range.
        DataError: If all examples belong to one group.
    """
    if not 0 < fraction < 1:
        raise SettingError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    groups = list(dict.fromkeys(example.group for example in examples))
    if len(groups) < 2:
        raise DataError(
            f"cannot hold out a part of {len(examples)} examples that all belong to one passage; "
            "name evaluation data of its own"
        )
    random.Random(seed).shuffle(groups)
    sizes = dict.fromkeys(groups, 0)
    for example in examples:
        sizes[example.group] += 1
    held: set[str] = set()
    count = 0
    for group in groups[:-1]:
        if count >= fraction * len(examples):
            break
        held.add(group)
        count += sizes[group]
    return (
        [example for example in examples if example.group not in held],
        [example for example in examples if example.group in held],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """The columns of one task in one data set."""

    task: Task
    fields: tuple[str, ...]  # of the body in use
    body: str
    column: Mapping[str, str]  # field to column
    use_title: bool
    grouped: bool
    id_named: bool
    end_named: bool

    @classmethod
    def prepare(
        cls, rows: Rows, task: Task, mapping: Mapping[str, str], use_title: bool
    ) -> "_Reader":
        present = rows.columns
        for field, name in mapping.items():
            if field not in task.columns:
                raise DataError(
                    f"task {task.name} has no field {field!r}{_suggest(field, task.columns)}; "
                    f"its fields: {_list(task.columns)}"
                )
            if name not in present:
                raise DataError(
                    f"{rows.name} has no column {name!r} for {field!r}{_suggest(name, present)}; "
                    f"its columns: {_list(present)}"
                )
        column = {field: mapping.get(field, field) for field in task.columns}
        bodies = {
            fields: body
            for fields, body in task.bodies.items()
            if all(column[field] in present for field in fields)
        }
        # A field mapped by hand says which body is meant, where the data would serve several.
        fields = max(bodies, key=lambda names: any(n in mapping for n in names), default=None)
        if fields is None:
            wanted = [field for names in task.bodies for field in names]
            missing = [field for field in wanted if column[field] not in present]
            joint = " or " if len(task.bodies) > 1 else " and "
            raise cls.missing(rows, task, missing, joint)
        needed = [task.target, *(["title"] if use_title else [])]
        missing = [field for field in needed if column[field] not in present]
        if missing:
            raise cls.missing(rows, task, missing, " and ")
        return cls(
            task=task,
            fields=fields,
            body=bodies[fields],
            column=column,
            use_title=use_title,
            grouped="group" in mapping,
            id_named="id" in mapping,
            end_named="ends" in mapping,
        )

    @staticmethod
    def missing(rows: Rows, task: Task, fields: Sequence[str], joint: str) -> DataError:
        chats = [name for name in COLUMNS if name in rows.columns and name not in fields]
        if chats:
            return DataError(
                f"{rows.name} has no column {joint.join(map(repr, fields))}, which task "
                f"{task.name} needs; conversations, as in its column {chats[0]!r}, are read with "
                "--task chat"
            )
        near = difflib.get_close_matches(fields[0], rows.columns, n=1, cutoff=0.5)
        return DataError(
            f"{rows.name} has no column {joint.join(map(repr, fields))}, which task {task.name} "
            f"needs; its columns: {_list(rows.columns)}; map one: --column "
            f"{fields[0]}={near[0] if near else 'COLUMN'}"
        )

    def read(self, row: Mapping[str, Any], number: int, where: str) -> Example:
        if self.task.is_chat:
            return self.conversation(row, number, where)
        texts = {field: self.text(row, field, where) for field in self.fields}
        prompt = self.body.format_map(texts)
        if self.use_title:
            prompt = f"Title: {self.text(row, 'title', where)}\n{prompt}"
        references = self.references(row, where)
        if self.grouped:
            group = self.label(row, "group", where)
        else:
            # Rows whose first field is blank are not about one passage.
            about = next(text for text in (*texts.values(), references[0]) if text.strip())
            group = _group(about)
        return Example(
            id=str(number),
            prompt=prompt,
            answer=self.task.answer_prefix + references[0],
            references=references,
            group=group,
            where=where,
            ends=not self.end_named or self.end(row, where),
        )

    def conversation(self, row: Mapping[str, Any], number: int, where: str) -> Example:
        messages = messages_of(row.get(self.column[self.task.target]), where)
        answer = messages[-1].content
        asked = (one.content for one in messages if one.role == "user" and one.content.strip())
        return Example(
            id=str(number),
            prompt=transcript(messages[:-1]),
            answer=answer,
            references=(answer,),
            group=self.label(row, "group", where) if self.grouped else _group(next(asked, answer)),
            where=where,
            ends=not self.end_named or self.end(row, where),
            messages=messages,
        )

    def end(self, row: Mapping[str, Any], where: str) -> bool:
        value = row.get(self.column["ends"])
        if not isinstance(value, bool):
            raise DataError(
                f"{where}: column {self.column['ends']!r} holds {_what(value)}; expected true or "
                "false"
            )
        return value

    def text(self, row: Mapping[str, Any], field: str, where: str) -> str:
        value = row.get(self.column[field])
        if not isinstance(value, str):
            chat = "; conversations are read with --task chat" if are_messages(value) else ""
            raise DataError(
                f"{where}: column {self.column[field]!r} holds {_what(value)}; expected text{chat}"
            )
        self.check_unicode(value, self.column[field], where)
        return value

    @staticmethod
    def check_unicode(text: str, column: str, where: str) -> None:
        """Refuse half a surrogate pair, which JSON can hold and no tokenizer can read."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: column {column!r} holds text that is not valid Unicode (half a "
                f"surrogate pair at character {error.start + 1}); repair it or remove the row"
            ) from error

    def label(self, row: Mapping[str, Any], field: str, where: str) -> str:
        value = row.get(self.column[field])
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(
                f"{where}: column {self.column[field]!r} holds {_what(value)}; expected text or "
                "a whole number"
            )
        return str(value)

    def references(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        column = self.column[self.task.target]
        value = row.get(column)
        if self.task.window:
            value = self.text(row, self.task.target, where)
        if isinstance(value, Mapping):
            value = value.get("text")
        answers = list(value) if isinstance(value, list | tuple) else [value]
        texts = []
        for answer in answers:
            if isinstance(answer, Mapping):
                answer = answer.get("text", answer.get("string"))
            if answer is None:
                continue
            if not isinstance(answer, str):
                raise DataError(
                    f"{where}: column {column!r} holds {_what(answer)} as an answer; expected "
                    "text; write numbers in quotes"
                )
            self.check_unicode(answer, column, where)
            texts.append(answer.strip() if self.task.answer_prefix else answer)
        usable = tuple(dict.fromkeys(text for text in texts if text.strip()))
        if not usable:
            raise DataError(
                f"{where} has no answer in column {column!r}; write one there, or remove the row"
            )
        return usable

    def with_ids(self, examples: list[Example], rows: Rows) -> list[Example]:
        """Replace row numbers by the ids of the data, if these are distinct."""
        if self.column["id"] not in rows.columns:
            return examples
        seen: dict[str, Example] = {}
        for row, example in zip(rows, examples, strict=True):
            if not self.id_named and not isinstance(row.get("id"), str | int):
                return examples
            name = self.label(row, "id", example.where)
            if name in seen:
                if not self.id_named:
                    return examples
                raise DataError(
                    f"{example.where} has the id {name!r}, as {seen[name].where} has; map id "
                    "to a column that tells rows apart, or do not map it"
                )
            seen[name] = replace(example, id=name)
        return list(seen.values())


def _group(about: str) -> str:
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _what(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _list(names: Iterable[str], limit: int = 12) -> str:
    shown = list(names)
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")
