"""What the rows of an arena say: intervals over texts and seeds, in tables."""

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
import numpy as np
from tabulate import tabulate

from benchmarks.arena.runs import (
    Arena,
    Documents,
    Method,
    Plan,
    Run,
    bits_per_byte,
    chosen_weights,
    read_runs,
    tried_weights,
)
from benchmarks.measuring import draw_intervals
from ctkd.compare.analysis.statistics import (
    CrossedMean,
    crossed_mean,
    holm,
    smallest_detectable_difference,
)
from ctkd.distill.config import SFT
from ctkd.errors import DataError


def paired(method: Iterable[Run], other: Iterable[Run]) -> CrossedMean | None:
    """Mean difference of bits per byte on test texts, of runs of equal seeds but 0.

    None with fewer than two seeds.

    Raises:
        DataError: If the runs were not measured on the same texts.
    """
    ours, theirs = ({run.seed: run for run in some if run.seed} for some in (method, other))
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    texts = {story: size for story, (_, size) in ours[seeds[0]].test.items()}
    for some, seed in itertools.product((ours, theirs), seeds):
        if {story: size for story, (_, size) in some[seed].test.items()} != texts:
            raise DataError(
                f"expected runs on the same texts, got others of {some[seed].method} with seed "
                f"{seed}; remove its rows"
            )
    sizes = np.array(list(texts.values()), float)
    bits = np.array(
        [
            [ours[seed].test[story][0] - theirs[seed].test[story][0] for story in texts]
            for seed in seeds
        ]
    )
    return crossed_mean(bits / sizes, sizes)


class Report:
    """What the rows of an arena say.

    Args:
        methods: Those compared.
        runs: All of them.
        models: Test texts of the teacher, and perhaps of the student as it starts.
        metric: Of the score of answers.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        runs: Sequence[Run],
        models: Mapping[str, Documents],
        metric: str | None = None,
    ) -> None:
        self.metric = metric
        self.weights = chosen_weights(methods, runs)
        self.runs = runs
        self.models = {name: bits_per_byte(texts) for name, texts in models.items()}
        self.methods = [one.label for one in methods if self.weights[one.label] is not None]
        sft = self.of(SFT)
        self.against_sft = {
            label: found
            for label in self.methods
            if label != SFT and (found := paired(self.of(label), sft)) is not None
        }
        adjusted = holm([found.p_value for found in self.against_sft.values()])
        self.p_values = dict(zip(self.against_sft, adjusted, strict=True))

    def of(self, label: str) -> list[Run]:
        """Runs at the method's chosen weight."""
        chosen = self.weights.get(label)
        return [run for run in self.runs if (run.method, run.weight) == (label, chosen)]

    def mean(self, label: str) -> float:
        """Bits per byte of test texts over seeds; of a method, sft's plus its paired difference.

        Methods have unlike numbers of seeds, so that means of their own seeds could not be compared
        with each other.
        """
        sft = statistics.fmean(bits_per_byte(run.test) for run in self._compared(SFT))
        return sft if label == SFT else sft + self.against_sft[label].mean

    def _compared(self, label: str) -> list[Run]:
        """Those that chose no weight."""
        return [run for run in self.of(label) if run.seed]

    def table(self) -> str:
        """A row for each method, those that help most first, and sft."""
        has_start = "start" in self.models
        heads = ["method", "weight", "seeds", "bits per byte", "to sft", "95 %", "p (Holm)"]
        heads += ["of the gap", "detectable", *["recovered"] * has_start]
        heads += [] if self.metric is None else [self.metric]
        rows = []
        for label, found in sorted(self.against_sft.items(), key=lambda one: one[1].mean):
            detectable = smallest_detectable_difference(
                found.standard_error, comparisons=len(self.against_sft), degrees=found.degrees
            )
            contrast = [
                f"{found.mean:+.4f}",
                _brackets(found),
                f"{self.p_values[label]:.2g}",
                self._share(self.mean(SFT), label),
                f"{detectable:.4f}",
            ]
            rows.append((label, contrast))
        rows.append((SFT, [""] * 5))
        table = []
        for label, contrast in rows:
            row = [label, f"{self.weights[label]:g}", str(len(self._compared(label)))]
            row += [f"{self.mean(label):.4f}", *contrast]
            if has_start:
                row.append(self._share(self.models["start"], label))
            if self.metric is not None:
                row.append(self._score(label))
            table.append(row)
        return tabulate(table, heads, tablefmt="github", disable_numparse=True)

    def _score(self, label: str) -> str:
        """Mean and standard deviation over seeds."""
        values = [run.score for run in self._compared(label) if run.score is not None]
        spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}" if values else ""

    def _share(self, worst: float, label: str) -> str:
        """Of the gap between something and the teacher, what a method closes."""
        teacher = self.models.get("teacher")
        # A teacher that is no better leaves no gap to close.
        if teacher is None or worst <= teacher:
            return ""
        return f"{100 * (worst - self.mean(label)) / (worst - teacher):+.1f} %"

    def contrasts(self) -> dict[str, CrossedMean]:
        """MultiLevelOT to ULD, in each pairing and form, as far as they were measured."""
        found = {}
        for ours in ("multilevelot", "multilevelot_released"):
            for pairing in ("position", "chunk"):
                label = ours if ours in self.weights else f"{ours}, {pairing}"
                other = f"uld, {pairing}"
                if (difference := paired(self.of(label), self.of(other))) is not None:
                    found[f"{label} - {other}"] = difference
        return found

    def contrast_table(self) -> str:
        """A row for each of them."""
        rows = [
            [label, f"{found.mean:+.4f}", _brackets(found)]
            for label, found in self.contrasts().items()
        ]
        heads = ["methods", "difference", "95 %"]
        table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        return table if rows else "Not measured yet."

    def trials(self) -> str:
        """Development bits per byte of every weight that was tried with seed 0."""
        rows = [
            [label, "; ".join(f"{one:g}: {tried[one]:.4f}" for one in sorted(tried))]
            for label, tried in tried_weights(self.runs).items()
        ]
        return tabulate(rows, ["method", "weight: bits per byte"], tablefmt="github")


def _brackets(found: CrossedMean) -> str:
    low, high = found.interval()
    return f"[{low:+.4f}, {high:+.4f}]"


def draw(path: Path, report: Report) -> None:
    """Draw the differences to sft, those that help most first, and of MultiLevelOT to ULD."""
    ranked = sorted(report.against_sft.items(), key=lambda one: one[1].mean)
    panels = {"To plain fine-tuning": dict(ranked)}
    if contrasts := report.contrasts():
        panels["MultiLevelOT to ULD"] = contrasts
    draw_intervals(
        path,
        {
            title: {label: (one.mean, *one.interval()) for label, one in found.items()}
            for title, found in panels.items()
        },
        across="difference in bits per byte, 95 % interval; below 0 is better",
    )


def how_to_read(plan: Plan, metric: str | None) -> str:
    """What the columns mean, and what was settled before."""
    score = f' "{metric}" has its standard deviation over seeds beside it.' if metric else ""
    chosen = (
        "Seed 0 chose each method's weight on development texts, and is compared nowhere. "
        if any(len(one.weights()) > 1 for one in plan.methods)
        else ""
    )
    return textwrap.fill(
        'Differences are means over seeds and test texts, paired by both; "bits per byte" is what '
        f"sft has plus the difference. {chosen}Each method has {plan.seeds} seeds, {plan.settled}; "
        "where there are fewer, runs are missing. Intervals and p values are Student's with "
        "Satterthwaite's degrees of freedom, for other seeds and other texts at once: the spread "
        "of seeds' means and that of texts' means are added, so that two seeds that agree can "
        'suffice where texts are many. "Detectable" is the true difference that would be found '
        'with 80 % power after the adjustment for all methods; smaller ones may be there. "Of the '
        'gap" is what is closed of that between sft and the teacher, "recovered" of that between '
        "the student as it starts and the teacher; a teacher that is no better leaves none."
        f"{score}",
        width=100,
    )


def write_report(folder: Path, arena: Arena, rows: Path, command: str) -> None:
    """Write the tables and their picture, if there is anything to compare.

    Args:
        folder: Where to.
        arena: Whose rows they are.
        rows: The file.
        command: What repeats them: the arena's name and, if there is one, its folder.
    """
    methods = arena.plan.methods
    runs, models = read_runs(rows, arena.data, methods)
    report = Report(methods, runs, models, arena.metric)
    if not report.against_sft:
        click.echo(f"{rows} has no two seeds of a method and of sft in {arena.name} yet: no report")
        return
    last = max(run.date for run in runs)
    levels = {"sft": report.mean(SFT), **report.models}
    words = [
        f"# The arena {arena.name}\n",
        f"{len(runs)} runs, the last of {last[:10]}; texts {arena.data}. Bits per "
        f"byte of test texts: {', '.join(f'{name} {one:.4f}' for name, one in levels.items())}. "
        f"Repeat with `python -m benchmarks.arena {command}`.\n",
        f"{report.table()}\n",
        f"![Differences with their intervals](arena_{arena.name}.svg)\n",
        f"{how_to_read(arena.plan, arena.metric)}\n",
        "## MultiLevelOT against ULD\n",
        f"{report.contrast_table()}\n",
    ]
    if tried_weights(runs):
        words += ["## Weights that were tried, on development texts\n", f"{report.trials()}\n"]
    words.append(f"## What this does not show\n\n{arena.limits}")
    path = folder / f"arena_{arena.name}.md"
    path.write_text("\n".join(words), "utf-8")
    click.echo(f"wrote {path}")
    draw(path.with_suffix(".svg"), report)
