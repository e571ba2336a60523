"""A picture of a training run: what was logged against the optimizer's steps."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ctkd.errors import OutputError

__all__ = ["plot_curves"]

_INK = "#1f2430"
_FAINT = "#6b7280"
_GRID = "#e5e7eb"
_ALARM = "#b42318"
_TRAIN = "#1f5fa8"
_HELD_OUT = "#d1602b"
# Told apart by color-blind readers too; the total of a panel is drawn in ink.
_PARTS = ("#2f7ec7", "#e08214", "#2a9d78", "#b0479b", "#c7a400", "#7a6fd0", "#8a5a3b")

_SMOOTHED_FROM = 40
_MARKED_UP_TO = 20
_LEGEND_COLUMNS = 3
_TICK_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class _Line:
    """One quantity of a panel: the key it is logged under, and that of its held-out values."""

    key: str
    held_out: str
    label: str
    color: str
    held_out_color: str


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    unit: str
    lines: tuple[_Line, ...]


@dataclass(frozen=True, slots=True)
class _Log:
    """Finite values by key, each in the order of steps, and how many others there were."""

    series: dict[str, list[tuple[float, float]]]
    left_out: dict[str, int]

    def holds(self, *keys: str) -> bool:
        return any(key in self.series or key in self.left_out for key in keys)


def plot_curves(
    history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str | None = None
) -> None:
    """Draw a run's logged values as a PNG.

    One panel shows cross-entropy (`ce`; without it `loss`), one the distillation loss and its parts
    (`kd`, `kd/<part>`), each with the held-out values (`eval_ce`, `eval_kd`, `eval_kd/<part>`) as
    points. Two low panels show `learning_rate` and `grad_norm`. A panel that nothing was logged for
    is left out; if nothing was logged at all, the picture says so. From 40 values on, a line is a
    centered running mean and the values themselves are faint. Values that are not finite are left
    out, and their panel says how many.

    Args:
        history: What transformers' `trainer.state.log_history` holds: one mapping per log, each
            with its `step`. Where a step has logged a key twice, the later value counts.
        path: The file to write; missing folders are made, an existing file is replaced.
        title: A line above the panels, such as which model taught which.

    Raises:
        OutputError: If the file cannot be written.
    """
    target = Path(path)
    picture = _draw(_read(history), title)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture)
    except OSError as error:
        raise OutputError(
            f"cannot write the picture of the curves to {target}: {error.strerror or error}; "
            "name a file in a folder you may write to"
        ) from error


def _read(history: Sequence[Mapping[str, Any]]) -> _Log:
    finite: dict[str, dict[float, float]] = {}
    left_out: dict[str, int] = {}
    for row in history:
        step = row.get("step")
        if not isinstance(step, Real):
            continue
        for key, value in row.items():
            if key in ("step", "epoch") or not isinstance(value, Real):
                continue
            if math.isfinite(value):
                finite.setdefault(key, {})[float(step)] = float(value)
            else:
                left_out[key] = left_out.get(key, 0) + 1
    return _Log({key: sorted(values.items()) for key, values in finite.items()}, left_out)


def _main_panels(log: _Log) -> list[_Panel]:
    panels = []
    if log.holds("ce", "eval_ce"):
        panels.append(_single("Cross-entropy", "nats per token", "ce"))
    elif log.holds("loss", "eval_loss"):
        panels.append(_single("Training loss", "loss", "loss"))
    keys = [key.removeprefix("eval_") for key in (*log.series, *log.left_out)]
    parts = list(dict.fromkeys(key for key in keys if key.startswith("kd/")))
    if len(parts) > 1:
        total = [_Line("kd", "eval_kd", "total", _INK, _INK)] if "kd" in keys else []
        lines = [
            _Line(key, f"eval_{key}", key.removeprefix("kd/"), color, color)
            for number, key in enumerate(parts)
            for color in [_PARTS[number % len(_PARTS)]]
        ]
        panels.append(_Panel("Distillation loss and its parts", "loss", (*total, *lines)))
    elif "kd" in keys or parts:
        # The only part is the whole.
        panels.append(_single("Distillation loss", "loss", "kd" if "kd" in keys else parts[0]))
    return panels


def _low_panels(log: _Log) -> list[_Panel]:
    offered = [
        _single("Learning rate", "", "learning_rate"),
        _single("Gradient norm", "before clipping", "grad_norm"),
    ]
    return [panel for panel in offered if log.holds(panel.lines[0].key)]


def _single(title: str, unit: str, key: str) -> _Panel:
    return _Panel(title, unit, (_Line(key, f"eval_{key}", "training", _TRAIN, _HELD_OUT),))


def _draw(log: _Log, title: str | None) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    main, low = _main_panels(log), _low_panels(log)
    rows = [(panels, height) for panels, height in ((main, 3.9), (low, 2.0)) if panels]
    figure = Figure(
        figsize=(11.0, sum(height for _, height in rows) or 3.0),
        dpi=120,
        facecolor="white",
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03, hspace=0.03),
    )
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, color=_INK, fontsize=13, fontweight="bold", parse_math=False)
    if rows:
        grid = figure.add_gridspec(len(rows), 2, height_ratios=[height for _, height in rows])
        for place, (panels, _) in enumerate(rows):
            for column, panel in enumerate(panels):
                cell = grid[place, column] if len(panels) > 1 else grid[place, :]
                _fill(figure.add_subplot(cell), panel, log, tall=panels is main)
        _share_steps(figure.axes)
    else:
        figure.text(0.5, 0.45, "Nothing was logged.", color=_FAINT, fontsize=15, ha="center")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; no reason to worry a user.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        # Without the version of matplotlib, equal histories give equal files.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _fill(axes: Any, panel: _Panel, log: _Log, *, tall: bool) -> None:
    entries: list[tuple[Any, str]] = []
    for number, line in enumerate(panel.lines):
        # The first line is the one to see, so it lies on top.
        entries += _draw_line(axes, line, log, zorder=20 - min(number, 10))
    if len(panel.lines) > 1:
        entries += _key_to_styles(panel, log)
    _dress(axes, panel)
    if tall and entries:
        _add_legend(axes, entries)
    left_out = sum(
        log.left_out.get(key, 0) for line in panel.lines for key in (line.key, line.held_out)
    )
    if left_out:
        note = f"not finite, left out: {left_out}"
        axes.set_title(note, loc="right", color=_ALARM, fontsize=9.5)


def _draw_line(axes: Any, line: _Line, log: _Log, zorder: int) -> list[tuple[Any, str]]:
    """Draw one quantity and return what the legend should say about it."""
    entries = []
    trained, held_out = log.series.get(line.key, []), log.series.get(line.held_out, [])
    if trained:
        steps = [step for step, _ in trained]
        values = [value for _, value in trained]
        label = line.label
        # The learning rate is set, not measured: it has no noise to average out.
        if len(values) >= _SMOOTHED_FROM and line.key != "learning_rate":
            axes.plot(steps, values, color=line.color, linewidth=0.8, alpha=0.3, zorder=zorder)
            values = _running_mean(values)
            label += ", running mean" if line.label == "training" else ""
        marker = "." if len(values) <= _MARKED_UP_TO else ""
        drawn = axes.plot(
            steps, values, color=line.color, linewidth=1.9, marker=marker, zorder=zorder
        )
        entries.append((drawn[0], label))
    if held_out:
        drawn = axes.plot(
            *zip(*held_out, strict=True),
            color=line.held_out_color,
            linewidth=1.1,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=1.0,
            zorder=zorder + 0.5,
        )
        if line.label == "training":
            entries.append((drawn[0], "held out"))
        elif not trained:
            entries.append((drawn[0], line.label))
    return entries


def _running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbors, fewer of them toward the ends."""
    reach = max(2, len(values) // 30)
    means = []
    for place in range(len(values)):
        # As many on either side, or the ends of a slope would bend.
        here = min(reach, place, len(values) - 1 - place)
        means.append(math.fsum(values[place - here : place + here + 1]) / (2 * here + 1))
    return means


def _key_to_styles(panel: _Panel, log: _Log) -> list[tuple[Any, str]]:
    """Say what a line and a point are, where color already says which quantity."""
    from matplotlib.lines import Line2D

    entries = []
    if any(line.key in log.series for line in panel.lines):
        entries.append((Line2D([], [], color=_FAINT, linewidth=1.9), "training"))
    if any(line.held_out in log.series for line in panel.lines):
        dots = Line2D([], [], color=_FAINT, linewidth=1.1, linestyle=(0, (4, 2)), marker="o")
        entries.append((dots, "held out"))
    return entries


def _dress(axes: Any, panel: _Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("white")
    axes.set_title(panel.title, loc="left", color=_INK, fontsize=11.5, fontweight="bold")
    axes.set_xlabel("optimizer step", color=_FAINT, fontsize=9.5)
    axes.set_ylabel(panel.unit, color=_FAINT, fontsize=9.5)
    axes.tick_params(colors=_FAINT, labelsize=9, length=3)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=8, steps=_TICK_STEPS, min_n_ticks=1)
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_TICK_STEPS))
    # Whole labels: no power of ten to look for at the end of the axis.
    axes.yaxis.set_major_formatter(_tick)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _tick(value: float, _: int) -> str:
    return f"{value:.6g}"


def _add_legend(axes: Any, entries: list[tuple[Any, str]]) -> None:
    # Room above the curves, so that the legend hides none of them.
    rows = math.ceil(len(entries) / _LEGEND_COLUMNS)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + (top - bottom) * (0.04 + 0.085 * rows))
    legend = axes.legend(
        [handle for handle, _ in entries],
        [label for _, label in entries],
        loc="upper right",
        ncols=min(len(entries), _LEGEND_COLUMNS),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=2.2,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _share_steps(every_axes: Sequence[Any]) -> None:
    """Give all panels the same range of steps, so that they can be read one below the other."""
    limits = [axes.get_xlim() for axes in every_axes if axes.lines]
    if limits:
        low, high = min(low for low, _ in limits), max(high for _, high in limits)
        if high - low < 1.0:
            low, high = low - 0.5, high + 0.5
        for axes in every_axes:
            axes.set_xlim(low, high)
