"""Answers side by side: which held-out prompts a report shows, and what each model said."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctkd.distill.compare.document import Block, Folded, Heading, Text
from ctkd.distill.compare.records import METRICS, Answer, Comparison, Record
from ctkd.distill.compare.tables import NOTHING, Column, Table, decimal

__all__ = ["Shown", "choose_examples", "generation_blocks", "question_tail"]

_DISPUTED = 4
_TYPICAL = 3
_LEAST_TAIL = 20
_LONGEST_TAIL = 240


@dataclass(frozen=True, slots=True)
class Shown:
    """One example and why it is shown."""

    id: str
    why: str


def choose_examples(
    comparison: Comparison, *, disputed: int = _DISPUTED, typical: int = _TYPICAL
) -> list[Shown]:
    """Choose prompts to show, the same ones whenever the records are the same.

    First those on which the methods' scores differ most, by their standard deviation over the
    first seed; then those whose mean score is nearest to the mean over all examples. Groups that
    are not shown yet go first; after that, the order of the split decides.

    Args:
        comparison: With at least one reported run.
        disputed: How many of the first kind.
        typical: How many of the second.
    """
    records = first_runs(comparison)
    # One method cannot disagree with itself; then the references are what it is held against.
    voters = records if len(records) > 1 else [*comparison.references, *records]
    scores = _scores_by_id(voters, comparison.metric)
    spread = {name: statistics.pstdev(values) for name, values in scores.items()}
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    whole = statistics.fmean(means.values()) if means else 0.0
    groups = {answer.id: answer.group for record in voters for answer in record.answers}
    by_spread = sorted((name for name in spread if spread[name] > 0), key=lambda n: -spread[n])
    first = _pick(by_spread, groups, disputed, taken=[])
    by_distance = sorted(means, key=lambda name: abs(means[name] - whole))
    second = _pick(by_distance, groups, typical, taken=first)
    return [Shown(name, "among those on which the methods disagree most") for name in first] + [
        Shown(name, "typical: near the mean score") for name in second
    ]


def first_runs(comparison: Comparison) -> list[Record]:
    """Each method's run of its first seed."""
    return [comparison.of(method)[0] for method in comparison.methods]


def _scores_by_id(records: Sequence[Record], metric: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in records:
        for answer in record.answers:
            found.setdefault(answer.id, []).append(answer.scores[metric])
    return found


def _pick(
    names: Sequence[str], groups: dict[str, str], count: int, taken: Sequence[str]
) -> list[str]:
    free = [name for name in names if name not in taken]
    seen = {groups[name] for name in taken}
    picked: list[str] = []
    for name in free:
        if len(picked) < count and groups[name] not in seen:
            picked.append(name)
            seen.add(groups[name])
    rest = [name for name in free if name not in picked]
    return picked + rest[: count - len(picked)]


def question_tail(prompt: str) -> str:
    r"""The end of a prompt, where the question is: whole lines as far as they are short.

    A last line such as "Answer:" is left out.

    Example:
        >>> question_tail("Context: A long story.\nQuestion: Who went down the well?\nAnswer:")
        'Question: Who went down the well?'
    """
    lines = [line.strip() for line in prompt.split("\n") if line.strip()]
    if len(lines) > 1 and lines[-1].endswith(":") and len(lines[-1]) < _LEAST_TAIL:
        lines.pop()
    tail: list[str] = []
    while lines and sum(map(len, tail)) < _LEAST_TAIL:
        tail.insert(0, lines.pop())
    text = " ".join(tail)
    if len(text) <= _LONGEST_TAIL:
        return text
    return "…" + text[-_LONGEST_TAIL:].split(" ", 1)[-1]


def generation_blocks(comparison: Comparison) -> Iterator[Block]:
    """The chosen examples, each with everyone's answer and its score."""
    runs = first_runs(comparison)
    records = [*comparison.references, *runs]
    answers = [{answer.id: answer for answer in record.answers} for record in records]
    seeds = sorted({record.seed for record in runs if record.seed is not None})
    if seeds:
        yield Text(f"Answers of seed {' or '.join(map(str, seeds))}, by greedy decoding.")
    for shown in choose_examples(comparison):
        asked = next(found[shown.id] for found in answers if shown.id in found)
        yield Heading(question_tail(asked.prompt) or "(an empty prompt)", level=3)
        yield Text(f"{shown.id}, {shown.why}. Accepted: {' | '.join(asked.references)}")
        yield _answers(comparison, records, [found.get(shown.id) for found in answers])
        yield Folded("the whole prompt", asked.prompt)


def _answers(
    comparison: Comparison, records: Sequence[Record], answers: Sequence[Answer | None]
) -> Table:
    columns = (
        Column("model", words=True),
        Column("answer", words=True),
        Column(METRICS[comparison.metric]),
    )
    rows = []
    for record, answer in zip(records, answers, strict=True):
        if answer is None:
            rows.append((record.method, NOTHING, NOTHING))
            continue
        text = answer.prediction.strip() or "(nothing)"
        rows.append((record.method, text, decimal(answer.scores.get(comparison.metric), 1)))
    return Table(title="Answers", columns=columns, rows=tuple(rows))
