"""The tables of a comparison: rows and columns once, written for a terminal, Markdown or HTML.

Nothing is computed here but text; what a number means is decided in the analysis.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ctkd.compare.plan.methods import SEQKD
from ctkd.compare.records import UNTRAINED, Comparison, Record
from ctkd.compare.report.published import beside
from ctkd.distill.config import SFT
from ctkd.distill.evaluation.metrics import METRICS
from ctkd.distill.printable import printable

if TYPE_CHECKING:
    from ctkd.compare.analysis.analyze import Analysis, Difference, MethodResult
    from ctkd.compare.analysis.statistics import Interval
    from ctkd.compare.report.published import PublishedCell, PublishedTable

__all__ = [
    "NOTHING",
    "Column",
    "Table",
    "common_settings",
    "decimal",
    "markdown_text",
    "metric_value",
    "own_settings",
    "preparation_costs",
    "published_numbers",
    "results",
    "trials",
]

NOTHING = "–"
"""Shown where there is no number."""

_GIB = 1 << 30
# An underscore inside a word is only itself; so are signs of lists except at the start.
_SIGNS = re.compile(r"[\\`*\[\]<>|~&@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.|^[-+#=](?=\s|$|#|=|-)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
# They tell runs apart, not methods.
_PER_RUN = ("seed", "output")
_SAME_DATA = "Other models, rows or settings than here: not comparable number by number."
_OTHER_DATA = "Other data than here (no published task is set): no own numbers stand beside."


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title and whether its cells are words rather than numbers.

    A line break in a title keeps a column narrow in the terminal; elsewhere it is a space.
    """

    title: str
    words: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    r"""Cells as text, and how to write them down.

    Args:
        title: What the table shows.
        columns: At least one.
        rows: As many cells as columns in each; the first names the row.
        note: A sentence that belongs to the table; may be empty.

    Example:
        >>> table = Table(title="Speed", columns=(Column("method", words=True), Column("s")),
        ...     rows=(("uld|1", "0.5"), ("sft", "12.5")))
        >>> print(table.plain())
        method       s
        --------  ----
        uld|1      0.5
        sft       12.5
        >>> print(table.markdown())
        | method   |    s |
        |:---------|-----:|
        | uld\|1   |  0.5 |
        | sft      | 12.5 |
        >>> "<th scope=\"row\">uld|1</th><td>0.5</td>" in table.html()
        True
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def plain(self) -> str:
        """For a terminal; what does not print is escaped."""
        return self._tabulate("simple", _printable_lines)

    def markdown(self) -> str:
        """As a pipe table; what Markdown would take for a sign of its own is escaped."""
        return self._tabulate("pipe", lambda text: markdown_text(text.replace("\n", " ")))

    def html(self) -> str:
        """As a ``<table>`` with scopes; everything is escaped."""
        head = "".join(
            f'<th scope="col"{_words(column)}>{_html_text(column.title)}</th>'
            for column in self.columns
        )
        body = "\n".join(f"<tr>{''.join(self._html_cells(row))}</tr>" for row in self.rows)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def _html_cells(self, row: Sequence[str]) -> Iterable[str]:
        for place, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
            text = _html_text(cell)
            if place == 0:
                yield f'<th scope="row">{text}</th>'
            else:
                yield f"<td{_words(column)}>{text}</td>"

    def _tabulate(self, form: str, escape: Any) -> str:
        return tabulate(
            [[escape(cell) for cell in row] for row in self.rows],
            headers=[escape(column.title) for column in self.columns],
            tablefmt=form,
            colalign=["left" if column.words else "right" for column in self.columns],
            # Cells are text already: "1e-05" and "nan" stay as they are.
            disable_numparse=True,
        )


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _html_text(text: str) -> str:
    return html.escape(printable(text.replace("\n", " ")))


def _words(column: Column) -> str:
    return ' class="words"' if column.words else ""


def markdown_text(text: str) -> str:
    r"""Escape what Markdown, HTML in it, or a search for addresses would act on.

    Example:
        >>> print(markdown_text("a|b <i> *c* https://d kd_weight"))
        a\|b \<i\> \*c\* https\://d kd_weight
    """
    escaped = _SIGNS.sub(r"\\\g<0>", printable(text))
    return _NUMBERED.sub(r"\1\\\2", escaped)


def results(comparison: Comparison, analysis: Analysis) -> Table:
    """Quality, difference to the baseline, and cost of each method; the two references first."""
    measured = {name for result in analysis.methods for name in result.means}
    others = [name for name in METRICS if name in measured and name != comparison.metric]
    baseline = comparison.baseline
    heading = METRICS[comparison.metric].heading.replace(" (", "\n(").splitlines()
    shown = (*analysis.references, *analysis.methods)
    has_gap = any(one.difference and one.difference.gap_share is not None for one in shown)
    has_intervals = any(result.interval is not None for result in shown)
    columns = (
        Column("method", words=True),
        Column("\n".join([*heading, "[95 % interval]"] if has_intervals else heading)),
        *(Column(METRICS[name].title.replace(" ", "\n")) for name in others),
        Column("held-out\nCE"),
        Column(f"difference to {baseline}\n[Holm-adjusted]"),
        *([Column("of the gap\nto the teacher")] * has_gap),
        Column("verdict", words=True),
        Column("s/step"),
        Column("peak\nGiB"),
    )
    rows = []
    for result in shown:
        is_reference = any(result is one for one in analysis.references)
        # Per token of its own tokenizer: the teacher's is no number to stand beside the others.
        comparable = not is_reference or result.method == UNTRAINED
        ce = result.losses.get("ce") if comparable else None
        rows.append(
            (
                result.method,
                _with_interval(comparison.metric, result.mean, result.interval),
                *(metric_value(result.means.get(name), name) for name in others),
                decimal(ce, 3),
                _difference(result.difference, comparison.metric),
                *([_gap(result.difference)] * has_gap),
                _verdict(
                    result.difference, is_baseline=not is_reference and result.method == baseline
                ),
                decimal(result.seconds_per_step, 2),
                _gib(result.peak_memory),
            )
        )
    return Table(title="Results on the held-out test split", columns=columns, rows=tuple(rows))


def _difference(difference: Difference | None, metric: str) -> str:
    if difference is None:
        return NOTHING
    return _with_interval(metric, difference.mean, difference.adjusted_interval, signed=True)


def _gap(difference: Difference | None) -> str:
    if difference is None or difference.gap_share is None:
        return NOTHING
    return f"{decimal(100 * difference.gap_share, 1, signed=True)} %"


def _verdict(difference: Difference | None, *, is_baseline: bool) -> str:
    if difference is None:
        return "baseline" if is_baseline else NOTHING
    # Other seeds might not bear it out.
    return f"{difference.verdict}{' (these runs)' if difference.is_borne_out is False else ''}"


def trials(comparison: Comparison) -> Table | None:
    """Every trial on the development split, and which settings the reported runs used."""
    if not comparison.trials:
        return None
    metric = comparison.metric
    chosen = {record.method: record.varied for record in comparison.finals}
    rows = tuple(
        (
            trial.method,
            _settings_text(trial.varied),
            NOTHING if trial.seed is None else str(trial.seed),
            metric_value(trial.metrics.get(metric), metric),
            decimal(trial.losses.get("ce"), 3),
            "chosen" if chosen.get(trial.method) == trial.varied else "",
        )
        for trial in sorted(comparison.trials, key=_by_method(comparison))
    )
    columns = (
        Column("method", words=True),
        Column("tried", words=True),
        Column("seed"),
        Column(f"{METRICS[metric].title}\n(development)"),
        Column("CE\n(development)"),
        Column("", words=True),
    )
    note = "Settings were chosen on the development split only, never on the test split."
    return Table(title="Chosen settings and trials", columns=columns, rows=rows, note=note)


def _by_method(comparison: Comparison) -> Any:
    places = {method: place for place, method in enumerate(comparison.methods)}
    return lambda record: places.get(record.method, len(places))


def common_settings(comparison: Comparison) -> Table | None:
    """Settings that all runs share, by name."""
    shared = dict(comparison.settings)
    for name in _setting_names(comparison.finals):
        values = [record.settings.get(name) for record in comparison.finals]
        if name not in _PER_RUN and all(value == values[0] for value in values):
            shared.setdefault(name, values[0])
    if not shared:
        return None
    rows = tuple((name, _value_text(value)) for name, value in shared.items())
    columns = (Column("setting", words=True), Column("value", words=True))
    return Table(title="Settings that all runs share", columns=columns, rows=rows)


def own_settings(comparison: Comparison) -> Table | None:
    """Settings in which the methods differ, one row per method."""
    first = [comparison.of(method)[0] for method in comparison.methods]
    names = [
        name
        for name in _setting_names(first)
        if name not in _PER_RUN
        and any(one.settings.get(name) != first[0].settings.get(name) for one in first)
    ]
    if not names:
        return None
    rows = tuple(
        (one.method, *(_value_text(one.settings.get(name)) for name in names)) for one in first
    )
    columns = (Column("method", words=True), *(Column(name, words=True) for name in names))
    return Table(title="Settings in which methods differ", columns=columns, rows=rows)


def _setting_names(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.settings))


def preparation_costs(comparison: Comparison) -> Table | None:
    """Work done once, before any run."""
    if not comparison.preparation:
        return None
    rows = tuple((name, decimal(spent, 1)) for name, spent in comparison.preparation.items())
    columns = (Column("done once, before any run", words=True), Column("seconds"))
    note = "No run's seconds hold any of this."
    return Table(title="Preparation", columns=columns, rows=rows, note=note)


def published_numbers(
    published: Sequence[PublishedTable], comparison: Comparison, analysis: Analysis
) -> list[Table]:
    """Published numbers about this comparison's data, one table for each published one.

    Beside it stand this comparison's means of the same metrics. Which of their data sets this is,
    ``settings["published task"]`` says: tables about others are left out. Without it tables are
    whole, and nothing of this comparison stands in them.
    """
    task = comparison.settings.get("published task")
    if not task:
        return [_published(table, table.cells, {}, _OTHER_DATA) for table in published]
    here = _results_by_loss(comparison, analysis)
    chosen = [(one, [placed.cell for placed in beside([one], task_data=task)]) for one in published]
    return [_published(table, cells, here, _SAME_DATA) for table, cells in chosen if cells]


def _published(
    table: PublishedTable,
    cells: Sequence[PublishedCell],
    here: Mapping[str, Sequence[MethodResult]],
    warning: str,
) -> Table:
    values = {}
    for cell in cells:
        setting = (cell.teacher, cell.student, cell.task, cell.metric)
        values[(cell.method, cell.label), setting] = f"{cell.value:g}"
    methods = list(dict.fromkeys(row for row, _ in values))
    settings = list(dict.fromkeys(setting for _, setting in values))
    measured = {name for results in here.values() for one in results for name in one.means}
    metrics = [name for name in dict.fromkeys(cell.metric for cell in cells) if name in measured]
    columns = [Column("published as", words=True)]
    columns += [Column(_setting_title(*setting)) for setting in settings]
    columns += [Column(f"this comparison, {METRICS[name].title}") for name in metrics]
    rows = tuple(
        (
            label,
            *(values.get(((method, label), setting), NOTHING) for setting in settings),
            *(_means(here.get(method, ()), name) for name in metrics),
        )
        for method, label in methods
    )
    where = [table.source, *([f"arXiv {table.arxiv}"] if table.arxiv else [])]
    where += [f"table {table.table}"] if table.table else []
    runs = "unknown" if table.seeds is None else str(table.seeds)
    notes = [f"{', '.join(where)}. {table.measured}; runs behind each number: {runs}."]
    notes += [table.note, warning] if table.note else [warning]
    return Table(title=table.name, columns=tuple(columns), rows=rows, note=" ".join(notes))


def _means(results: Sequence[MethodResult], metric: str) -> str:
    return " / ".join(metric_value(one.means.get(metric), metric) for one in results) or NOTHING


def _results_by_loss(comparison: Comparison, analysis: Analysis) -> dict[str, list[MethodResult]]:
    """Results by the name that published tables have; several if a loss ran more than once."""
    by_loss = {result.method: [result] for result in analysis.references}
    for result in analysis.methods:
        settings = comparison.of(result.method)[0].settings
        loss = settings.get("loss", result.method.split()[0])
        # Such a run has the loss "sft", but published as "sft" is training on the data's answers.
        name = SEQKD if loss == SFT and settings.get("answers") == "teacher" else loss
        by_loss.setdefault(name, []).append(result)
    return by_loss


def _setting_title(teacher: str | None, student: str | None, task: str, metric: str) -> str:
    models = " → ".join(name for name in (teacher, student) if name)
    title = METRICS[metric].title if metric in METRICS else metric
    return ", ".join(part for part in (models, task, title) if part)


def decimal(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Write a number, or `NOTHING` where there is none.

    Example:
        >>> decimal(1.25, 2), decimal(1.25, 2, signed=True), decimal(None, 2)
        ('1.25', '+1.25', '–')
    """
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    # A rounded zero has no sign to be read as a direction.
    return text.lstrip("+-") if not text.strip("+-0.") else text


def metric_value(value: float | None, metric: str, *, signed: bool = False) -> str:
    """Write a metric's value, or `NOTHING` where there is none.

    Example:
        >>> metric_value(81.25, "f1"), metric_value(2.25, "bits_per_byte")
        ('81.2', '2.2500')
    """
    return decimal(value, METRICS[metric].digits, signed=signed)


def _with_interval(
    metric: str, mean: float, interval: Interval | None, *, signed: bool = False
) -> str:
    text = metric_value(mean, metric, signed=signed)
    if interval is None:
        return text
    ends = (metric_value(end, metric, signed=signed) for end in (interval.low, interval.high))
    return f"{text} [{', '.join(ends)}]"


def _gib(size: int | None) -> str:
    return NOTHING if size is None else f"{size / _GIB:.2f}"


def _settings_text(settings: dict[str, Any]) -> str:
    texts = [f"{name}={_value_text(value)}" for name, value in settings.items()]
    return ", ".join(texts) or "defaults"


def _value_text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_value_text(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value_text, value)) or "none"
    return str(value)
