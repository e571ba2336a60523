"""What every benchmark does alike: take turns, measure peaks, name the machine, keep and draw.

Times are compared only when taken in turn in one process, so that a load on the machine hits all
alike. A peak of memory is that of a fresh process, minus that of one that only holds the inputs.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

import ctkd
from ctkd.distill.devices import PeakMemory

RESULTS = Path(__file__).with_name("results")
_ROOT = Path(__file__).parents[1]
_MAPPED_FROM = 128 * 1024
_PEAK = "peak of this process, bytes: "


def cpu_name() -> str:
    """Return the processor's name, or the architecture where the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def environment(*packages: str) -> dict[str, Any]:
    """Say on what a result was taken: date, processor, threads, load, versions.

    Args:
        packages: Distributions whose versions matter beside those of torch and ctkd.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "ctkd": ctkd.__version__,
            **{package: version(package) for package in ("torch", *packages)},
        },
    }


def time_in_turn(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    between: Callable[[], object] | None = None,
    label: str = "timing",
) -> dict[str, list[float]]:
    """Run all functions in turn, again and again, and return the seconds of each run.

    Args:
        functions: By name. Each runs once more at first, which is not counted.
        repeats: How often each is timed.
        between: Runs before every function, outside its time, such as what clears a gradient.
        label: Of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with tqdm(total=(repeats + 1) * len(functions), desc=label, unit="run") as progress:
        for turn in range(repeats + 1):
            for name, function in functions.items():
                progress.set_postfix_str(name)
                if between is not None:
                    between()
                start = time.perf_counter()
                function()
                taken = time.perf_counter() - start
                if turn:
                    seconds[name].append(taken)
                progress.update()
    return seconds


def ratios_to(seconds: Mapping[str, Sequence[float]], unit: str) -> dict[str, float]:
    """Median time of each function over that of the one that is the unit."""
    of_unit = statistics.median(seconds[unit])
    return {name: statistics.median(found) / of_unit for name, found in seconds.items()}


def print_peak(peak: PeakMemory, beyond: int = 0) -> None:
    """Print the most memory that this process has held; the last thing a measured process does.

    Args:
        peak: Begun where what is to be measured began.
        beyond: Bytes that it held anyway, and that are taken off.
    """
    held = peak.read()
    if held is None:
        raise click.ClickException(
            "the peak of a process is kept by Linux alone, which must let it write to "
            "/proc/self/clear_refs"
        )
    print(f"{_PEAK}{held - beyond}")


def peak_of(arguments: Sequence[str], repeats: int = 5) -> int:
    """Peak resident bytes of a fresh Python process, median of some runs.

    The C library is told to hand freed blocks back at once. Left alone, glibc keeps up to 64 MB of
    them, more or less of it by what was freed before: a peak of what was not held.

    Args:
        arguments: Of Python, such as ``["-m", "benchmarks.peak_process", ...]``; the process must
            end with `print_peak`.
        repeats: How often it runs.

    Raises:
        ClickException: If a run fails; with what it printed.
    """
    return int(statistics.median(_peak(arguments) for _ in range(repeats)))


def _peak(arguments: Sequence[str]) -> int:
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MAPPED_FROM)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = ran.stdout.strip().rpartition("\n")[2]
    if ran.returncode or not last.startswith(_PEAK):
        raise click.ClickException(
            f"python {' '.join(arguments)} ended with {ran.returncode}"
            f"{' (killed: too little memory?)' if ran.returncode == -9 else ''}\n"
            f"{ran.stdout[-1000:]}{ran.stderr[-2000:]}"
        )
    return int(last.removeprefix(_PEAK))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of JSON to a file of results, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line that was cut off spoils no other.
    is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_cut + json.dumps(row) + "\n")
    click.echo(f"appended a row to {path}")


def draw_bars(
    path: Path,
    panels: Mapping[str, Mapping[str, float]],
    *,
    across: str,
    limits: Mapping[str, float] | None = None,
) -> None:
    """Draw one panel of horizontal bars for each mapping, with its figure at each bar.

    Args:
        path: Of the picture; its ending says the format.
        panels: Title to names to values.
        across: What the values are.
        limits: By name, what a value should not exceed; drawn as a mark, and red where exceeded.
    """
    from ctkd.compare.report import drawing

    limits = limits or {}
    count = sum(len(values) for values in panels.values())
    figure = drawing.new_figure(0.27 * count + 1.1 * len(panels))
    heights = [len(values) + 2 for values in panels.values()]
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for place, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place, 0])
        drawing.dress(axes, title, across=across)
        axes.grid(visible=False)
        rows = range(len(values))
        missed = [name in limits and value > limits[name] for name, value in values.items()]
        colours = [drawing.ALARM if one else drawing.METHOD_COLORS[5] for one in missed]
        axes.barh(rows, list(values.values()), color=colours, height=0.7)
        right = max([*values.values(), *(limits[name] for name in values if name in limits)])
        for row, (name, value) in enumerate(values.items()):
            if name in limits:
                axes.plot([limits[name]] * 2, [row - 0.45, row + 0.45], color=drawing.INK, lw=2)
            beyond = max(value, limits.get(name, 0.0))
            axes.text(beyond + 0.01 * right, row, f"{value:.3g}", va="center", fontsize=9)
        axes.set_xlim(0, right * 1.1)
        axes.set_yticks(list(rows), list(values), fontsize=9)
        axes.set_ylim(len(values) - 0.4, -0.6)
    _save(figure, path)


def draw_intervals(
    path: Path, panels: Mapping[str, Mapping[str, tuple[float, float, float]]], *, across: str
) -> None:
    """Draw one panel of values with their intervals for each mapping, and a line at 0.

    What differs from 0 is in color, the rest is grey.

    Args:
        path: Of the picture; its ending says the format.
        panels: Title to names to value, lower and upper end.
        across: What the values are.
    """
    from ctkd.compare.report import drawing

    heights = [len(values) + 2 for values in panels.values()]
    figure = drawing.new_figure(0.27 * sum(heights) + 0.4 * len(panels))
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for place, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place, 0])
        drawing.dress(axes, title, across=across)
        axes.grid(visible=False)
        axes.axvline(0, color=drawing.INK, linewidth=1)
        for row, (value, low, high) in enumerate(values.values()):
            colour = drawing.FAINT if low <= 0 <= high else drawing.METHOD_COLORS[5]
            axes.plot([low, high], [row, row], color=colour, linewidth=2.5)
            axes.plot([value], [row], color=colour, marker="D", markersize=6)
            text = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
            axes.text(
                1.02, row, text, transform=axes.get_yaxis_transform(), fontsize=9, va="center"
            )
        axes.set_yticks(range(len(values)), list(values), fontsize=9)
        axes.set_ylim(len(values) - 0.4, -0.6)
    _save(figure, path)


def draw_lines(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    across: Sequence[str],
    up: str,
    limit: float | None = None,
) -> None:
    """Draw one panel of lines for each mapping, over a logarithmic axis.

    Args:
        path: Of the picture; its ending says the format.
        panels: Title to names to points (x, y).
        across: Title of each panel's horizontal axis.
        up: Title of the vertical axes.
        limit: Height of a dashed line that the others should stay below.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    from ctkd.compare.report import drawing

    figure = drawing.new_figure(3.4 * len(panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = drawing.colors_of(names)
    for place, ((title, lines), axis_title) in enumerate(zip(panels.items(), across, strict=True)):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        drawing.dress(axes, title, across=axis_title, up=up)
        axes.set_xscale("log", base=2)
        for order, (name, points) in enumerate(lines.items()):
            style = "-" if order < len(drawing.METHOD_COLORS) else "--"
            axes.plot(*zip(*points, strict=True), style, color=colours[name], marker="o", ms=3)
        if limit is not None:
            axes.axhline(limit, color=drawing.ALARM, linestyle=":", linewidth=1.2)
        axes.set_ylim(bottom=0)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        labels = [
            drawing.Label(points[-1][1], name, colours[name]) for name, points in lines.items()
        ]
        drawing.label_at_right(axes, labels, inches=2.4)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from ctkd.compare.report import drawing

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(drawing.svg_text(figure, path.stem), encoding="utf-8")
    else:
        figure.savefig(path, dpi=150)
    click.echo(f"drew {path}")
