"""The report of a comparison: a page, the same as Markdown, as JSON, and for the terminal."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctkd.compare.records import Answer, Comparison, Record
from ctkd.compare.report import pictures, tables
from ctkd.compare.report.document import (
    Block,
    Bullets,
    Folded,
    Heading,
    Picture,
    Text,
    html_page,
    markdown,
)
from ctkd.compare.report.tables import NOTHING, Column, Table, metric_value
from ctkd.distill.data.rows import names_of
from ctkd.distill.evaluation.metrics import ANSWER_METRICS, METRICS
from ctkd.distill.printable import printable
from ctkd.errors import OutputError

if TYPE_CHECKING:
    from ctkd.compare.analysis.analyze import Analysis
    from ctkd.compare.report.published import PublishedTable

__all__ = [
    "Shown",
    "as_json",
    "choose_examples",
    "generation_blocks",
    "question_tail",
    "terminal",
    "write_report",
]

PAGE = "report.html"
PICTURES = "pictures"


def write_report(
    comparison: Comparison,
    analysis: Analysis,
    folder: Path,
    *,
    published: Sequence[PublishedTable] = (),
) -> Path:
    """Write ``report.html``, ``report.md`` and ``pictures/*.svg`` into a folder.

    Each file is there whole or as it was before. The page needs none of the others.

    Args:
        comparison: What was run.
        analysis: Of this comparison.
        folder: Made if it is missing; older reports in it are replaced.
        published: Tables of papers; `tables.published_numbers` picks what is about this data.

    Returns:
        The path of ``report.html``.

    Raises:
        OutputError: If something cannot be written.
    """
    drawn = _pictures(comparison, analysis)
    title = _title(comparison)
    blocks = list(_blocks(comparison, analysis, drawn, published))
    files = {f"{PICTURES}/{one.name}.svg": one.svg for one in drawn}
    files["report.md"] = markdown(title, blocks)
    files[PAGE] = html_page(title, blocks)
    for name, text in files.items():
        _write(folder / name, text)
    return folder / PAGE


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"cannot write the report to {path}: {error.strerror or error}; "
            "name a folder you may write to"
        ) from error


def terminal(comparison: Comparison, analysis: Analysis) -> str:
    """The summary for the terminal: heading, table and sentences."""
    sentences = [f"- {printable(sentence)}" for sentence in analysis.sentences()]
    heading = printable(analysis.heading)
    table = tables.results(comparison, analysis)
    spent = [f"{name} {seconds:.0f} s" for name, seconds in comparison.preparation.items()]
    apart = ["", f"Before any run: {printable(', '.join(spent))}."] if spent else []
    return "\n".join([heading, "", table.plain(), "", *sentences, *apart])


def as_json(comparison: Comparison, analysis: Analysis) -> dict[str, Any]:
    """Everything that the tables and sentences say, as plain values; no answers, no history.

    A number that is not finite becomes None, so that the result is JSON by the letter.
    """
    content = {
        "heading": analysis.heading,
        "settings": comparison.settings,
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "seeds": comparison.seeds,
        "analysis": dataclasses.asdict(analysis),
        "sentences": analysis.sentences(),
        "runs": [_run_facts(record) for record in comparison.finals],
        "trials": [_run_facts(record) for record in comparison.trials],
        "preparation": comparison.preparation,
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def _run_facts(record: Record) -> dict[str, Any]:
    left_out = ("answers", "history")
    return {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in left_out
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _title(comparison: Comparison) -> str:
    names = comparison.methods
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    data = names_of(comparison.settings.get("data") or "")
    return f"{listed} on {data}" if data else listed


def _pictures(comparison: Comparison, analysis: Analysis) -> list[Picture]:
    metric = METRICS[comparison.metric].title
    held_out = _curve_rows(comparison)
    has_bars = any(one.interval is not None for one in analysis.methods)
    bars = " bars their 95 % intervals over groups of examples," if has_bars else ""
    return [
        Picture(
            name="metric",
            title=f"{metric} of each method",
            caption=f"Diamonds are means over seeds and held-out examples,{bars} circles single "
            "seeds. Vertical lines are the untrained student and the teacher. Differences are "
            "tested in the table, not here.",
            svg=pictures.metric_intervals(comparison, analysis),
        ),
        Picture(
            name="learning-curves",
            title="Learning curves",
            caption=f"Thin lines are single seeds, thick ones their means.{held_out} Lower is "
            "better.",
            svg=pictures.learning_curves(comparison),
        ),
        Picture(
            name="equal-effort",
            title="Quality at equal steps and at equal time",
            caption="The dashed line is the last step, or second, that every run has reached; the "
            "numbers are each method's mean held-out cross-entropy there. What lies beyond is "
            f"faint: not all methods got so far.{held_out} Lower is better.",
            svg=pictures.equal_effort(comparison),
        ),
        Picture(
            name="costs",
            title="Cost of a step",
            caption="Median seconds per optimizer step, and peak memory: of the process as a "
            "whole, or on a CUDA device what torch held there. On the machine of this comparison.",
            svg=pictures.costs(comparison, analysis),
        ),
    ]


def _curve_rows(comparison: Comparison) -> str:
    """A sentence on what held-out curves rest on, with a space before it; empty if not known."""
    rows = comparison.settings.get("curve rows")
    if not isinstance(rows, int) or rows < 1:
        return ""
    split = "development" if comparison.settings.get("development rows") else "test"
    which = f"first {rows:,} {split} rows" if rows > 1 else f"first {split} row"
    return f" Held-out cross-entropy is over the {which}."


def _blocks(
    comparison: Comparison,
    analysis: Analysis,
    drawn: Sequence[Picture],
    published: Sequence[PublishedTable],
) -> Iterator[Block]:
    yield Text(analysis.heading, kind="loud" if analysis.is_demonstration else "lead")
    models = [
        f"{name} {names_of(comparison.settings[name])}"
        for name in ("student", "teacher", "data")
        if comparison.settings.get(name)
    ]
    if models:
        yield Text(f"{', '.join(models)}.")
    yield Heading("Results on the held-out test split")
    yield tables.results(comparison, analysis)
    yield Heading("What this shows")
    yield Bullets(analysis.sentences())
    yield from drawn
    if comparison.metric in ANSWER_METRICS:
        yield Heading("Answers side by side")
        yield from generation_blocks(comparison)
    shown = tables.trials(comparison)
    yield Heading("Chosen settings and trials")
    yield shown or Text("No settings were tried: every method ran with the settings below.")
    yield Heading("Exact settings")
    for table in (tables.common_settings(comparison), tables.own_settings(comparison)):
        if table is not None:
            yield Heading(table.title, level=3)
            yield table
    yield Heading("Costs before any run")
    yield tables.preparation_costs(comparison) or Text("Nothing was prepared.")
    if published:
        yield Heading("Published numbers beside")
        yield from _published(comparison, analysis, published)
    yield Heading("How to read this")
    yield Bullets(list(_how_to_read(comparison, analysis)))


def _published(
    comparison: Comparison, analysis: Analysis, published: Sequence[PublishedTable]
) -> Iterator[Block]:
    shown = tables.published_numbers(published, comparison, analysis)
    for table in shown:
        yield Heading(table.title, level=3)
        yield table
    names = {table.title for table in shown}
    left_out = [table.name for table in published if table.name not in names]
    if left_out:
        task = comparison.settings.get("published task")
        yield Text(f"Without a number about {task}, and left out: {'; '.join(left_out)}.")


def _how_to_read(comparison: Comparison, analysis: Analysis) -> Iterator[str]:
    baseline = comparison.baseline
    yield (
        "All runs make as many steps; those of one seed see the same rows in one order. Another "
        "seed varies the order, which rows are seen where the steps do not reach all of them, and "
        "dropout if the student has any. "
        + (
            "It is another initialization as well: all runs of one seed start from the same random "
            "weights."
            if "initial weights" in comparison.settings
            else "It is no other initialization: every run starts from the same student."
        )
    )
    yield (
        "The interval beside a mean tells how far it might move had other texts been asked about: "
        f"the {analysis.clusters} groups of examples (a passage or story each) are drawn again "
        f"and again, {analysis.resamples:,} times. It takes the trained models as they are: "
        "another seed could move the mean further, which is what the circles show."
    )
    yield (
        f"A difference is a method minus {baseline} on the same examples and seeds, so that easy "
        "and hard examples cancel. Two intervals of means that overlap do not contradict a "
        "difference whose interval excludes 0."
    )
    if analysis.is_demonstration:
        yield (
            "With one seed, what a method gains and what chance gave that run cannot be told "
            "apart, so differences get no interval and no verdict here."
        )
    else:
        yield (
            "Who compares many methods finds one that looks better by chance. So the intervals of "
            "differences are widened after Holm: for these trained models, the chance of any false "
            f"claim from the choice of examples is kept at {analysis.alpha:.0%}. How far other "
            "seeds would move a difference, its interval over seeds tells. A method is called "
            "better or worse only where the interval over examples excludes 0. “Undecided” does "
            "not mean equal: a difference below what this design could detect is likely to be "
            "missed."
        )
    yield (
        "Cross-entropy (CE) is in nats per token of the student's tokenizer. The teacher cuts text "
        "into other tokens, so its number would not be comparable and is left out."
    )
    yield (
        "Equal steps compare what a step teaches; equal seconds also count what it costs on this "
        "machine. Seconds are training time only."
    )


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
    scores: dict[str, list[float]] = {}
    for record in records:
        for answer in record.answers:
            scores.setdefault(answer.id, []).append(answer.scores[metric])
    return scores


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
        answer = next(by_id[shown.id] for by_id in answers if shown.id in by_id)
        yield Heading(question_tail(answer.prompt) or "(an empty prompt)", level=3)
        yield Text(f"{shown.id}, {shown.why}. Accepted: {' | '.join(answer.references)}")
        yield _answers(comparison, records, [by_id.get(shown.id) for by_id in answers])
        yield Folded("the whole prompt", answer.prompt)


def _answers(
    comparison: Comparison, records: Sequence[Record], answers: Sequence[Answer | None]
) -> Table:
    columns = (
        Column("model", words=True),
        Column("answer", words=True),
        Column(METRICS[comparison.metric].title),
    )
    rows, name = [], comparison.metric
    for record, answer in zip(records, answers, strict=True):
        if answer is None:
            rows.append((record.method, NOTHING, NOTHING))
            continue
        text = answer.prediction.strip() or "(nothing)"
        rows.append((record.method, text, metric_value(answer.scores.get(name), name)))
    return Table(title="Answers", columns=columns, rows=tuple(rows))
