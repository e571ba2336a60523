"""The pictures of a comparison, each as the text of an SVG file."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctkd.compare.records import TEACHER, Comparison, Record
from ctkd.compare.report.drawing import (
    FAINT,
    GRID,
    INK,
    PAPER,
    Label,
    colors_of,
    dress,
    label_at_right,
    new_figure,
    short_names,
    svg_text,
    tell,
)
from ctkd.compare.report.tables import decimal, metric_value
from ctkd.distill.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from ctkd.compare.analysis.analyze import Analysis, MethodResult

__all__ = [
    "Curve",
    "Points",
    "Run",
    "by_seconds",
    "by_steps",
    "costs",
    "equal_effort",
    "last_common",
    "learning_curves",
    "mean_at",
    "mean_points",
    "metric_intervals",
    "read_run",
    "smoothed",
]

_PANEL = 2.9
_EMPTY = 1.2
# Of a panel's height, what is left for the curves below titles and above labels.
_CURVES = 0.72
_MOST_BEYOND = 1.3
_EARLY = 0.15
_ROW = 0.52
_GIB = 1 << 30


def learning_curves(comparison: Comparison) -> str:
    """Cross-entropy while training and on held-out examples, against optimizer steps.

    Thin lines are runs, thick ones their mean over seeds. Training values are a running mean.
    """
    figure = new_figure(2 * _PANEL)
    panels = (
        ("ce", "Cross-entropy while training, running mean", True),
        ("eval_ce", "Held-out cross-entropy", False),
    )
    logged = [
        panel
        for panel in panels
        if any(read_run(record, panel[0]).points for record in comparison.finals)
    ]
    if len(logged) < len(panels):
        figure.set_figheight(_PANEL if logged else _EMPTY)
    if not logged:
        tell(figure, "No finite cross-entropy was logged.")
    all_axes = figure.subplots(len(logged), 1, sharex=True, squeeze=False)[:, 0] if logged else ()
    for axes, (key, title, noisy) in zip(all_axes, logged, strict=True):
        lines = _read_all(comparison, key, smooth=noisy)
        drawn = _draw_lines(axes, comparison, lines, by_steps)
        points = [run.points for runs in lines.values() for run in runs]
        heights = [value for one in points for _, value in one.values()]
        hidden = _limit(axes, heights)
        dress(axes, title, **_note(lines, hidden), across="optimizer step", up="nats per token")
        axes.tick_params(labelbottom=True)
        axes.margins(x=0)
        ends = {method: line.up[-1] for method, line in drawn.items() if line.up}
        _label(axes, comparison, ends)
    return svg_text(figure, "learning-curves")


def equal_effort(comparison: Comparison) -> str:
    """Held-out cross-entropy against steps and against training seconds.

    A line marks the last step, and the last second, that every run has reached; beside each panel
    stands each method's mean over seeds at that place.
    """
    lines = _read_all(comparison, "eval_ce", smooth=False)
    if not any(run.points for runs in lines.values() for run in runs):
        figure = new_figure(_EMPTY)
        tell(figure, "No finite held-out cross-entropy was logged.")
        return svg_text(figure, "equal-effort")
    figure = new_figure(2 * _PANEL)
    ways = (
        (by_steps, "At equal steps", "optimizer step", "step"),
        (by_seconds, "At equal training time", "training seconds, without evaluation", "second"),
    )
    for axes, (way, title, across, unit) in zip(figure.subplots(2, 1), ways, strict=True):
        curves = {method: [way(run.points) for run in runs] for method, runs in lines.items()}
        mark = last_common(_unbroken(lines, way))
        drawn = _draw_lines(axes, comparison, lines, way)
        common = "no place in common" if mark is None else f"values at {unit} {_rounded(mark)}"
        every = [curve for one in curves.values() for curve in one] + list(drawn.values())
        later = [
            up
            for curve in every
            for place, up in zip(curve.across, curve.up, strict=True)
            if mark is None or _EARLY * mark <= place <= mark * _MOST_BEYOND
        ]
        values = {method: mean_at(one, mark) for method, one in curves.items()}
        later += [value for value in values.values() if value is not None]
        hidden = _limit(axes, later, [up for curve in drawn.values() for up in curve.up])
        if mark is not None:
            _mark(axes, mark, values, drawn, colors_of(comparison.methods))
        dress(
            axes, f"{title}: {common}", **_note(lines, hidden), across=across, up="nats per token"
        )
        _label(axes, comparison, {m: line.up[-1] for m, line in drawn.items() if line.up}, values)
    return svg_text(figure, "equal-effort")


def _unbroken(lines: dict[str, list[Run]], way: Callable[[Points], Curve]) -> list[Curve]:
    """Curves of runs whose values were always finite; of all runs if there is no such run.

    A run that broke down early would else end the comparison of all others there.
    """
    runs = [run for one in lines.values() for run in one]
    return [way(run.points) for run in runs if not run.left_out] or [
        way(run.points) for run in runs
    ]


def _rounded(place: float) -> str:
    return f"{place:,.0f}" if place >= 100 else f"{place:.3g}"


def _read_all(comparison: Comparison, key: str, *, smooth: bool) -> dict[str, list[Run]]:
    by_method = {}
    for method in comparison.methods:
        runs = [read_run(record, key) for record in comparison.of(method)]
        if smooth:
            runs = [Run(smoothed(run.points), run.left_out) for run in runs]
        by_method[method] = runs
    return by_method


def _draw_lines(
    axes: Any,
    comparison: Comparison,
    lines: dict[str, list[Run]],
    way: Callable[[Points], Curve],
) -> dict[str, Curve]:
    """Draw runs thin and means thick; returns the means."""
    colors = colors_of(comparison.methods)
    means = {}
    for method, runs in lines.items():
        if len(runs) > 1:
            for run in runs:
                line = way(run.points)
                axes.plot(line.across, line.up, color=colors[method], linewidth=0.8, alpha=0.4)
        mean = way(mean_points(runs))
        marker = "o" if len(mean.across) == 1 else ""
        axes.plot(mean.across, mean.up, color=colors[method], linewidth=2.0, marker=marker)
        means[method] = mean
    return means


def _limit(axes: Any, wanted: Sequence[float], every: Sequence[float] = ()) -> bool:
    """Set the vertical limits so that a diverging run flattens no other; True if it hides one."""
    if not wanted:
        return False
    low, high = min(wanted), max(wanted)
    upper = statistics.quantiles(wanted, n=4)[2] if len(wanted) > 1 else high
    if high > upper + 4 * (upper - low) > low:
        high = upper + 4 * (upper - low)
    margin = 0.06 * (high - low) or max(0.02 * abs(high), 0.02)
    axes.set_ylim(low - margin, high + margin)
    return any(value > high + margin for value in (*wanted, *every))


def _note(lines: dict[str, list[Run]], hidden: bool) -> dict[str, Any]:
    left_out = sum(run.left_out for runs in lines.values() for run in runs)
    empty = sum(not run.points for runs in lines.values() for run in runs)
    silent = [method for method, runs in lines.items() if not any(run.points for run in runs)]
    notes = [f"not finite, left out: {left_out}"] if left_out else []
    notes += [f"no values: {', '.join(short_names(silent).values())}"] if silent else []
    notes += [f"runs without values: {empty}"] if empty and not silent else []
    notes += ["higher values are cut off"] if hidden else []
    return {"note": "; ".join(notes), "alarm": left_out > 0}


def _label(
    axes: Any,
    comparison: Comparison,
    ends: dict[str, float],
    values: dict[str, float | None] | None = None,
) -> None:
    """Name the lines beside the panel; with values, at their heights and with their numbers."""
    colors, names = colors_of(comparison.methods), short_names(comparison.methods)
    labels = []
    for method, end in ends.items():
        value = None if values is None else values[method]
        number = "" if values is None else f" {decimal(value, 3)}"
        height = end if value is None else value
        labels.append(Label(height, names[method] + number, colors[method]))
    label_at_right(axes, labels, inches=_PANEL * _CURVES)


def _mark(
    axes: Any,
    mark: float,
    values: dict[str, float | None],
    drawn: dict[str, Curve],
    colors: dict[str, str],
) -> None:
    furthest = max((line.across[-1] for line in drawn.values() if line.across), default=mark)
    end = min(furthest, mark * _MOST_BEYOND)
    axes.set_xlim(0 if mark > 0 else -1, end if end > 0 else 1)
    axes.axvline(mark, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    if end > mark:
        # What lies beyond cannot be compared.
        axes.axvspan(mark, end, facecolor=PAPER, alpha=0.7, zorder=3)
    for method, value in values.items():
        if value is not None:
            axes.plot(
                [mark, end], [value, value], color=colors[method], linewidth=0.8,
                linestyle=(0, (1, 2)), zorder=4,
            )  # fmt: skip
            axes.plot(
                [mark], [value], marker="o", markersize=6, color=colors[method],
                markeredgecolor=PAPER, clip_on=False, zorder=5,
            )  # fmt: skip


def metric_intervals(comparison: Comparison, analysis: Analysis) -> str:
    """The metric per method: its mean, its interval, and one point per seed.

    Lines mark the untrained student and the teacher.
    """
    results = list(analysis.methods)
    colors = colors_of(comparison.methods)
    figure = new_figure(1.5 + _ROW * len(results))
    axes = figure.subplots()
    for row, result in enumerate(results):
        color = colors[result.method]
        if result.interval is not None:
            axes.plot(
                (result.interval.low, result.interval.high), (row, row), color=color, linewidth=6,
                alpha=0.4, solid_capstyle="butt",
            )  # fmt: skip
        axes.plot(
            [result.mean], [row], marker="D", markersize=8, color=color, markeredgecolor=PAPER,
            zorder=5,
        )  # fmt: skip
        seeds = list(result.seed_means)
        axes.plot(
            seeds, [row + 0.3] * len(seeds), linestyle="", marker="o", markersize=4.5,
            markerfacecolor="none", color=color,
        )  # fmt: skip
    metric = METRICS[comparison.metric]
    dress(axes, "", across=f"{metric.heading} on the held-out test split")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    _name_rows(axes, comparison, results)
    for row, result in enumerate(results):
        _value_beside(axes, row, result, comparison.metric)
    _draw_references(axes, analysis.references, comparison.metric)
    bars = "" if all(one.interval is None for one in results) else ", 95 % interval (bar)"
    heading = f"{metric.title}: mean (diamond){bars}, seeds (circles)"
    axes.set_title(heading, loc="left", color=INK, fontsize=11, fontweight="bold", pad=36)
    return svg_text(figure, "metric")


def _name_rows(axes: Any, comparison: Comparison, results: Sequence[MethodResult]) -> None:
    names = short_names(comparison.methods)
    axes.set_yticks(range(len(results)), [names[result.method] for result in results])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
        text.set_color(INK)
        text.set_fontsize(9.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(results) - 0.4, -0.6)


def _value_beside(axes: Any, row: int, result: MethodResult, metric: str) -> None:
    text = metric_value(result.mean, metric)
    if result.interval is not None:
        low, high = result.interval.low, result.interval.high
        text += f" [{metric_value(low, metric)}, {metric_value(high, metric)}]"
    axes.text(
        1.02, row, text, transform=axes.get_yaxis_transform(), color=INK, fontsize=9,
        fontweight="bold", va="center",
    )  # fmt: skip


def _draw_references(axes: Any, references: Sequence[MethodResult], metric: str) -> None:
    low, high = axes.get_xlim()
    values = [one.mean for one in references if math.isfinite(one.mean)]
    low, high = min([low, *values]), max([high, *values])
    margin = 0.03 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    for line, result in enumerate(references):
        if not math.isfinite(result.mean):
            continue
        color = INK if result.method == TEACHER else FAINT
        style = (0, (6, 2)) if result.method == TEACHER else (0, (2, 2))
        axes.axvline(result.mean, color=color, linewidth=1.3, linestyle=style, zorder=1)
        right_half = result.mean > (low + high) / 2
        axes.annotate(
            f"{result.method} {metric_value(result.mean, metric)}",
            (result.mean, 1),
            # One line of text for each, as their values may be close.
            (3 if not right_half else -3, 4 + 13 * line),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if right_half else "left",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )


def costs(comparison: Comparison, analysis: Analysis) -> str:
    """Seconds per step and peak memory of each method."""
    results = list(analysis.methods)
    figure = new_figure(1.1 + 0.42 * len(results))
    sized = [(r.peak_memory / _GIB if r.peak_memory is not None else None) for r in results]
    timed = [result.seconds_per_step for result in results]
    panels = (("Seconds per step (median)", "s", timed), ("Peak memory", "GiB", sized))
    colors = colors_of(comparison.methods)
    for axes, (title, unit, values) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        dress(axes, title, across=unit)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        longest = max([value for value in values if value is not None], default=0.0)
        for row, (result, value) in enumerate(zip(results, values, strict=True)):
            axes.barh(row, value or 0.0, height=0.62, color=colors[result.method])
            text = "not measured" if value is None else f"{value:.2f}"
            axes.annotate(
                text, (value or 0.0, row), (4, 0), textcoords="offset points", va="center",
                color=INK if value is not None else FAINT, fontsize=9,
            )  # fmt: skip
        axes.set_xlim(0, longest * 1.25 or 1)
        _name_rows(axes, comparison, results)
    return svg_text(figure, "costs")


Points = dict[float, tuple[float, float]]
"""By step, ascending: training seconds so far, and a value."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run's finite values of one quantity, and how many others there were."""

    points: Points
    left_out: int


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one line in a panel."""

    across: list[float]
    up: list[float]

    def at(self, place: float) -> float | None:
        """The height at a place, between the two points around it; None outside them."""
        points = list(zip(self.across, self.up, strict=True))
        for (low, start), (high, end) in itertools.pairwise(points):
            if low <= place <= high:
                share = (place - low) / (high - low) if high > low else 1.0
                return start + share * (end - start)
        return self.up[0] if self.across == [place] else None


def read_run(record: Record, key: str) -> Run:
    """Read a run's finite values of one key; a later value at a step counts."""
    points, left_out = {}, 0
    for row in record.history:
        step, value = row.get("step"), row.get(key)
        if step is None or value is None:
            continue
        if math.isfinite(value):
            points[float(step)] = (float(row.get("seconds", math.nan)), float(value))
        else:
            left_out += 1
    return Run(dict(sorted(points.items())), left_out)


def by_steps(points: Points) -> Curve:
    """Values over optimizer steps."""
    return Curve(list(points), [value for _, value in points.values()])


def by_seconds(points: Points) -> Curve:
    """Values over training seconds; points without a time are left out."""
    timed = [(seconds, value) for seconds, value in points.values() if math.isfinite(seconds)]
    timed.sort(key=lambda point: point[0])
    return Curve([seconds for seconds, _ in timed], [value for _, value in timed])


def mean_points(runs: Sequence[Run]) -> Points:
    """Seconds and values averaged over seeds, at the steps that all of them have."""
    series = [run.points for run in runs if run.points]
    if not series:
        return {}
    steps = [step for step in series[0] if all(step in points for points in series)]
    return {
        step: (
            statistics.fmean(points[step][0] for points in series),
            statistics.fmean(points[step][1] for points in series),
        )
        for step in steps
    }


def smoothed(points: Points) -> Points:
    """Average each value with its neighbors, fewer of them toward the ends."""
    rows = list(points.items())
    reach = len(rows) // 20 + 1 if len(rows) > 8 else 0
    smooth = {}
    for place, (step, (seconds, _)) in enumerate(rows):
        # As many on either side, or the ends of a slope would bend.
        here = min(reach, place, len(rows) - 1 - place)
        near = rows[place - here : place + here + 1]
        smooth[step] = (seconds, statistics.fmean(value for _, (_, value) in near))
    return smooth


def last_common(curves: Iterable[Curve]) -> float | None:
    """The last place that all curves have reached; None if they share none.

    Example:
        >>> last_common([Curve([0.0, 10.0], [3.0, 2.0]), Curve([0.0, 8.0], [3.0, 1.0])])
        8.0
    """
    series = [curve.across for curve in curves if curve.across]
    if not series:
        return None
    last = min(across[-1] for across in series)
    return last if last >= max(across[0] for across in series) else None


def mean_at(runs: Iterable[Curve], place: float | None) -> float | None:
    """The runs' mean height at a place; None where one of them has none, and if there is no run.

    Example:
        >>> mean_at([Curve([0.0, 10.0], [3.0, 2.0]), Curve([0.0, 5.0], [3.0, 1.5])], 5.0)
        2.0
    """
    if place is None:
        return None
    heights = [line.at(place) for line in runs if line.across]
    known = [height for height in heights if height is not None]
    return statistics.fmean(known) if known and len(known) == len(heights) else None
