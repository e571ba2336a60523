"""Layouts in which data sets are published, brought to the columns of a task.

What is made of another layout is said, so that no column is taken for another in silence.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ctkd.distill.data.conversations import RefusedRow, has_calls, messages_of, shortened
from ctkd.distill.data.rows import NothingLeft, Rows, Source, joined, kind_of, load_parts
from ctkd.distill.data.tasks import Task, get_task
from ctkd.errors import DataError

__all__ = ["brought", "read_rows"]

Say = Callable[[str], None]
_Row = Mapping[str, Any]

_LIST_OF_TEXTS = re.compile(r"[\[{]\s*['\"]")
# Python joins such texts to one; numpy writes arrays so.
_NO_COMMA = re.compile(r"['\"]\s+['\"]")


def read_rows(
    source: Source,
    task: Task | str,
    columns: Mapping[str, str] | None = None,
    *,
    say: Say,
    held_out: bool = False,
) -> Rows:
    """Load rows and bring what is laid out otherwise to the columns of a task.

    - qa: files of SQuAD become one row per question. Questions that SQuAD 2.0 marks as unanswerable
      are left out.
    - qa and summarization: a cell of CSV that holds a list or an object as text becomes that.
    - text, where neither prompt nor answer is there or mapped: ``instruction``, ``input`` and
      ``output`` become "Instruction: ...", "Input: ..." (unless it is blank) and "Response:";
      rows with a blank output are left out. ``text`` becomes the answer to an empty prompt. Where
      only the answer is missing, it is ``completion``.
    - chat, where there is no ``messages``, nor a column is mapped: ``conversations``, or ``prompt``
      and ``completion`` as two lists of messages, of which only the completion is scored. Rows
      without an answer of an assistant, or with images, are left out.

    Args:
        source: As in `load_rows`.
        task: The task or its name.
        columns: Where the data calls a field by another name, as in `examples`.
        say: Prints one line on every layout that was found, and on what was left out.
        held_out: As in `load_rows`.

    Raises:
        SettingError: If the task is unknown.
        DataError: As `load_rows` does; if a layout is broken, or no row has an answer.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "pairs.jsonl")
        ...     _ = path.write_text('{"prompt": "1 + 1 =", "completion": " 2"}')
        ...     rows = read_rows(str(path), "text", say=print)
        pairs.jsonl: answers are its column 'completion'
        >>> next(iter(rows))["answer"]
        ' 2'
    """
    task = get_task(task) if isinstance(task, str) else task
    columns = columns or {}
    return joined(
        [brought(part, task, columns, say) for part in load_parts(source, held_out=held_out)]
    )


def brought(rows: Rows, task: Task, columns: Mapping[str, str], say: Say) -> Rows:
    """Rows that are read already, brought to the columns of a task as `read_rows` does it."""
    if task.name == "text":
        return _text(rows, columns, say)
    if task.is_chat:
        return _conversations(rows, columns, task.target, say)
    target = columns.get(task.target, task.target)
    if task.name == "qa" and "paragraphs" in rows.columns:
        rows = _questions(rows)
    if rows.all_text and target in rows.columns:
        rows = _with_lists(rows, target)
    if task.name == "qa" and any(_is_unanswerable(row, target) for row in rows):
        answered = [None if _is_unanswerable(row, target) else row for row in rows]
        return _kept(rows, answered, "questions as unanswerable", say)
    return rows


def _text(rows: Rows, columns: Mapping[str, str], say: Say) -> Rows:
    there = {"prompt", "answer"}.intersection([*columns, *rows.columns])
    present = set(rows.columns)
    if "answer" not in there and "completion" in present and "prompt" in there:
        say(f"{rows.name}: answers are its column 'completion'")
        return _changed(rows, [{**row, "answer": row.get("completion")} for row in rows])
    if there:
        return rows
    if {"instruction", "output"} <= present:
        say(f"{rows.name}: prompts are made of instruction and input, answers are its outputs")
        made = [_answered_instruction(row, rows.place(n)) for n, row in enumerate(rows, 1)]
        return _kept(rows, made, "rows without an output", say)
    if "text" in present:
        say(f"{rows.name}: its column 'text' is trained on as a whole, without a prompt")
        return _changed(rows, [{**row, "prompt": "", "answer": row.get("text")} for row in rows])
    return rows


def _answered_instruction(row: _Row, place: str) -> _Row | None:
    texts: dict[str, Any] = {name: row.get(name) for name in ("instruction", "input", "output")}
    texts["input"] = texts["input"] or ""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{place}: column {name!r} is {kind_of(text)}; expected text")
    if not texts["output"].strip():
        return None
    given = f"Input: {texts['input']}\n" if texts["input"].strip() else ""
    prompt = f"Instruction: {texts['instruction']}\n{given}Response:"
    return {**row, "prompt": prompt, "answer": f" {texts['output']}"}


def _conversations(rows: Rows, columns: Mapping[str, str], target: str, say: Say) -> Rows:
    column, present = columns.get(target, target), set(rows.columns)
    if rows.all_text:
        for name in {column, "conversations", "prompt", "completion"} & present:
            rows = _with_lists(rows, name)
    if column not in present and target not in columns:
        if "conversations" in present:
            say(f"{rows.name}: messages are its column 'conversations'")
            rows = _changed(rows, [{**row, target: row.get("conversations")} for row in rows])
        elif {"prompt", "completion"} <= present:
            say(f"{rows.name}: messages are its prompts and completions, which alone are scored")
            made = [_completed(row, target, rows.place(n)) for n, row in enumerate(rows, 1)]
            rows = _changed(rows, made)
        else:
            return rows
    if "tools" in present:
        say(f"{rows.name}: its column 'tools' is not read; describe tools in a system message")
    if any(has_calls(row.get(column)) for row in rows):
        say(f"{rows.name}: tool calls are written as JSON, not in the templates' own forms")
    kept: list[_Row | None] = []
    refused: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            messages_of(row.get(column), rows.place(number))
            kept.append(row)
        except RefusedRow as error:
            kept.append(None)
            refused.append(str(error))
    if len(refused) == len(rows):
        raise NothingLeft(f"no conversation of {rows.name} can be trained on; {refused[0]}")
    return _kept(rows, kept, f"conversations: {shortened(refused)}", say)


def _completed(row: _Row, target: str, place: str) -> _Row:
    """A row whose messages are its prompt, of which nothing is scored, and its completion."""
    prompt: Any = row.get("prompt")
    completion: Any = row.get("completion")
    for name, part in (("prompt", prompt), ("completion", completion)):
        if not isinstance(part, list) or not all(isinstance(one, Mapping) for one in part):
            raise DataError(
                f"{place}: column {name!r} is {kind_of(part)}; expected a list of messages, or "
                "--task text for plain text"
            )
    return {**row, target: [*({**one, "weight": 0} for one in prompt), *completion]}


def _questions(rows: Rows) -> Rows:
    """One row per question of SQuAD's articles, whose paragraphs hold a context and questions."""
    found: list[_Row] = []
    places: list[str] = []
    for number, article in enumerate(rows, 1):
        where = rows.place(number)
        for paragraph in _objects(article, "paragraphs", where):
            for question in _objects(paragraph, "qas", where):
                row = {**article, **paragraph, **question}
                found.append({n: one for n, one in row.items() if n not in ("paragraphs", "qas")})
                places.append(f"{where}, question {question.get('id', len(places) + 1)}")
    if not found:
        raise DataError(f"{rows.name} has no questions; expected at least one")
    return Rows(rows.name, found, places)


def _objects(holder: _Row, name: str, where: str) -> Sequence[_Row]:
    value = holder.get(name)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(
            f"{where} is not laid out as in SQuAD: expected a list of objects as {name!r}, got "
            f"{kind_of(value)}; repair it, or write one row per question"
        )
    return value


def _is_unanswerable(row: _Row, target: str) -> bool:
    answers: Any = row.get(target)
    if isinstance(answers, Mapping) and "answer_start" in answers and not answers.get("text"):
        return True
    return row.get("is_impossible") is True


def _with_lists(rows: Rows, column: str) -> Rows:
    return _changed(
        rows,
        [
            {**row, column: _listed(row[column], column, rows.place(number))}
            for number, row in enumerate(rows, 1)
        ],
    )


def _listed(cell: str, column: str, place: str) -> Any:
    """The list or object that a cell of CSV holds as text, or the text that it is."""
    text = cell.strip()
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return cell
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not _LIST_OF_TEXTS.match(text) and text != "[]":
        return cell
    try:
        if not _NO_COMMA.search(text):
            with warnings.catch_warnings(action="ignore"):
                return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise DataError(
        f"{place}: column {column!r} looks like a list of answers, but is neither JSON nor Python: "
        f"{shown}; write the list as JSON, or the answer without brackets"
    )


def _changed(rows: Rows, changed: Sequence[_Row]) -> Rows:
    return Rows(rows.name, changed, rows.places, rows.all_text)


def _kept(rows: Rows, changed: Sequence[_Row | None], what: str, say: Say) -> Rows:
    """The rows that are not None, with their numbers as they were; the others are counted."""
    kept = [(row, rows.place(n)) for n, row in enumerate(changed, 1) if row is not None]
    if not kept:
        raise NothingLeft(f"{rows.name} has no answers; all of its {len(rows)} rows lack one")
    if len(kept) < len(changed):
        say(f"{rows.name}: left out {len(changed) - len(kept)} of {len(changed)} {what}")
    return Rows(rows.name, [row for row, _ in kept], [place for _, place in kept])
