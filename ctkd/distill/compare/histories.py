"""What runs logged while they trained, as curves over steps and over seconds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ctkd.distill.compare.records import Record

__all__ = [
    "Curve",
    "Points",
    "Run",
    "by_seconds",
    "by_steps",
    "last_common",
    "mean_at",
    "mean_points",
    "read_run",
    "smoothed",
]

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
    found = [run.points for run in runs if run.points]
    if not found:
        return {}
    steps = [step for step in found[0] if all(step in points for points in found)]
    return {
        step: (
            statistics.fmean(points[step][0] for points in found),
            statistics.fmean(points[step][1] for points in found),
        )
        for step in steps
    }


def smoothed(points: Points) -> Points:
    """Average each value with its neighbours, fewer of them towards the ends."""
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
    found = [curve.across for curve in curves if curve.across]
    if not found:
        return None
    last = min(across[-1] for across in found)
    return last if last >= max(across[0] for across in found) else None


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
