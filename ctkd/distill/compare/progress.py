"""What a person sees of a comparison: which run is at work, and roughly how long the rest takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ctkd.distill.compare.plan import Job

__all__ = ["RunProgress", "duration"]


class RunProgress:
    """Counts runs; several measurements of one run count once.

    Args:
        say: Prints one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = time.perf_counter()
        self._total = 0
        self._seen: set[str] = set()
        self._seconds: list[float] = []

    def expect(self, jobs: Sequence[Job]) -> None:
        """Learn how many runs there will be."""
        self._total = len({job.training.key for job in jobs})

    def skip(self, job: Job, seconds: float) -> None:
        """Count a run that is there already, and took so long to train."""
        if job.training.key not in self._seen:
            self._seen.add(job.training.key)
            self._seconds.append(seconds)

    @contextmanager
    def at(self, job: Job) -> Iterator[None]:
        """Announce a measurement, and learn how long it took."""
        if job.training.key in self._seen:
            self._say(f"{job.title}: on the {job.split} split")
            yield
            return
        before = len(self._seen)
        line = f"run {before + 1} of {self._total}: {job.title}"
        began = time.perf_counter()
        line += f"; {duration(began - self._started)} so far"
        if self._seconds:
            rest = statistics.fmean(self._seconds) * (self._total - before)
            line += f", about {duration(rest)} to go"
        self._say(line)
        yield
        self._seen.add(job.training.key)
        self._seconds.append(time.perf_counter() - began)


def duration(seconds: float) -> str:
    """Write a time span for a person.

    Example:
        >>> duration(7.4), duration(100), duration(7500)
        ('7 s', '2 min', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
