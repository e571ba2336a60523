"""The analysis of a comparison: means, intervals, tests and sentences.

Every difference is taken to the baseline, example by example, between the same seeds. A method is
called better or worse only if the interval of its seed-averaged difference, from a bootstrap over
whole groups of examples and adjusted by Holm, excludes 0, and if there are at least two seeds. That
speaks of these trained models alone: how far other seeds would move a difference, the interval over
seeds beside it tells. Methods are not compared with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctkd.compare.analysis.statistics import (
    Bootstrap,
    Interval,
    cluster_bootstrap,
    holm,
    holm_levels,
    seed_interval,
    smallest_detectable_difference,
)
from ctkd.compare.records import TEACHER, Comparison, Record
from ctkd.distill.evaluation.metrics import METRICS, Metric
from ctkd.errors import DataError, SettingError

__all__ = ["Analysis", "Difference", "MethodResult", "analyze", "listed", "sentences_of"]

POWER = 0.8
_ROUNDING = 1e-6

Scores = NDArray[np.float64]
Verdict = Literal["better", "worse", "undecided", "not tested"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A method minus the baseline, over the seeds that both have.

    Args:
        mean: Of the seed-averaged differences over all examples, in the metric's unit.
        seeds: Those that both have, ascending.
        seed_means: Mean over examples for each of `seeds`.
        interval: From the bootstrap over groups, not adjusted; None if it cannot be given. It
            takes the trained models as they are.
        standard_error: From the same bootstrap.
        seed_interval: Student's interval of `seed_means`; None for one seed.
        smallest_detectable: The true difference that a test like this one finds four times
            in five; None if no difference would be found or all examples differ by 0.
        p_value: For a difference of 0; None if not tested.
        adjusted_p_value: By Holm over all tested methods.
        adjusted_interval: The interval of level `adjusted_level`; it excludes 0 exactly if Holm
            rejects.
        adjusted_level: The one that belongs to Holm's decision, from `holm_levels`.
        verdict: "not tested" in a demonstration, with one shared seed, or with one group.
        gap_share: Of the gap between the baseline, with the same seeds, and the teacher, what the
            method closes, :math:`(b - m) / (b - t)`; None where the teacher is no better.
    """

    mean: float
    seeds: tuple[int, ...]
    seed_means: tuple[float, ...]
    interval: Interval | None
    standard_error: float | None
    seed_interval: Interval | None
    smallest_detectable: float | None = None
    p_value: float | None = None
    adjusted_p_value: float | None = None
    adjusted_interval: Interval | None = None
    adjusted_level: float | None = None
    verdict: Verdict = "not tested"
    gap_share: float | None = None

    @property
    def is_borne_out(self) -> bool | None:
        """Whether the interval over seeds excludes 0 as the verdict does; None without either."""
        if self.verdict not in ("better", "worse") or self.seed_interval is None:
            return None
        return self.seed_interval.excludes_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodResult:
    """One method over its seeds, or one reference.

    Args:
        method: As in the records.
        mean: Of the comparison's metric, over examples and seeds.
        means: The same of every metric.
        seeds: Ascending; empty for a reference.
        seed_means: Of the comparison's metric, for each of `seeds`.
        interval: Of `mean`, from the bootstrap over groups; None if it cannot be given.
        seed_interval: Of `mean`, from `seed_means`; None for one seed and for a reference.
        losses: Held-out losses that every run has, averaged over seeds.
        steps: Optimizer steps, the most of any run.
        seconds: Mean training time of a run.
        seconds_per_step: Median over runs; None if no run has it.
        peak_memory: Bytes, the largest of any run; None if no run has it.
        difference: To the baseline; None for the baseline and for a reference.
        is_one_run: Whether all seeds gave one and the same student, by its held-out cross-entropy.
    """

    method: str
    mean: float
    means: dict[str, float]
    seeds: tuple[int, ...]
    seed_means: tuple[float, ...]
    interval: Interval | None
    seed_interval: Interval | None
    losses: dict[str, float]
    steps: int
    seconds: float
    seconds_per_step: float | None
    peak_memory: int | None
    difference: Difference | None = None
    is_one_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The numbers of a report.

    Args:
        heading: "demonstration, no ranking", or over how many seeds this is.
        is_demonstration: Whether nothing is tested, for want of a second seed.
        metric: What is compared, of `METRICS`.
        baseline: The method that differences are taken to.
        seeds: Of all methods together.
        methods: In the comparison's order.
        references: Untrained student and teacher: not tested, and not in Holm's family.
        examples: Held-out examples.
        clusters: Groups of examples, such as passages or stories.
        comparisons: Methods in Holm's family; in a demonstration, those that would be.
        can_decide: Whether any difference, however large, could pass with so few clusters.
        resamples: Of each bootstrap.
        alpha: Chance of any false claim about these trained models, from the choice of examples.
        power: What `smallest_detectable` is taken at.
    """

    heading: str
    is_demonstration: bool
    metric: str
    baseline: str
    seeds: tuple[int, ...]
    methods: tuple[MethodResult, ...]
    references: tuple[MethodResult, ...]
    examples: int
    clusters: int
    comparisons: int
    can_decide: bool
    resamples: int
    alpha: float
    power: float = POWER

    def sentences(self) -> list[str]:
        """The analysis in plain English, one statement each."""
        return sentences_of(self)


def analyze(
    comparison: Comparison, *, alpha: float = 0.05, resamples: int = 10_000, seed: int = 0
) -> Analysis:
    """Work out what a comparison shows.

    Args:
        comparison: With at least one run of its baseline.
        alpha: Chance of any false claim about these trained models, from the choice of examples;
            between 0 and 1.
        resamples: Of each bootstrap, at least 100.
        seed: Of the bootstraps.

    Raises:
        DataError: If the baseline has no runs, a run has no seed or repeats another's, a method
            shares no seed with the baseline, records differ in their examples, or a score is
            missing.
        SettingError: If `alpha` or `resamples` is out of range.
    """
    if not 0 < alpha < 1:
        raise SettingError(f"alpha must lie between 0 and 1, got {alpha}; 5 % is 0.05")
    metric, baseline = comparison.metric, comparison.baseline
    _check_runs(comparison)
    _check_answers(comparison)
    answers = comparison.finals[0].answers
    groups, weights = [one.group for one in answers], _weights(comparison.finals[0], metric)

    def bootstrap(values: Scores) -> Bootstrap:
        return cluster_bootstrap(values, groups, weights=weights, resamples=resamples, seed=seed)

    boots, differences = {}, {}
    for method in comparison.methods:
        if method != baseline:
            shared, each = _paired(comparison, method)
            boots[method] = bootstrap(each.mean(axis=0))
            means = tuple(np.average(each, axis=1, weights=weights).tolist())
            differences[method] = _untested(boots[method], shared, means, 1 - alpha)
    tested = [
        method
        for method, one in differences.items()
        if not comparison.is_demonstration and len(one.seeds) > 1 and boots[method].p_value
    ]
    comparisons = max(1, len(tested) or len(differences))
    of_baseline = bootstrap(_scores(comparison.of(baseline)[0], metric))
    can_decide = (of_baseline.smallest_p_value or 1.0) <= alpha / comparisons
    for method, one in differences.items():
        detectable = _detectable(boots[method], alpha, comparisons) if can_decide else None
        share = _gap_share(comparison, one)
        differences[method] = replace(one, smallest_detectable=detectable, gap_share=share)
    family = {name: (boots[name], differences[name]) for name in tested}
    differences |= _tested(family, alpha, METRICS[metric].sign)

    def result(runs: Sequence[Record], difference: Difference | None = None) -> MethodResult:
        interval = bootstrap(_seed_averaged(runs, metric)).interval(1 - alpha)
        return _result(runs, metric, interval, difference, 1 - alpha)

    seeds = tuple(comparison.seeds)
    heading = f"comparison over {len(seeds)} seeds"
    return Analysis(
        heading="demonstration, no ranking" if comparison.is_demonstration else heading,
        is_demonstration=comparison.is_demonstration,
        metric=metric,
        baseline=baseline,
        seeds=seeds,
        methods=tuple(
            result(comparison.of(name), differences.get(name)) for name in comparison.methods
        ),
        references=tuple(result([record]) for record in comparison.references),
        examples=len(groups),
        clusters=of_baseline.clusters,
        comparisons=comparisons,
        can_decide=can_decide,
        resamples=resamples,
        alpha=alpha,
    )


def _paired(comparison: Comparison, method: str) -> tuple[tuple[int, ...], Scores]:
    """Seeds that a method shares with the baseline, and its differences, (seeds, examples)."""
    of_method, of_baseline = (
        {run.seed: _scores(run, comparison.metric) for run in comparison.of(name)}
        for name in (method, comparison.baseline)
    )
    shared = tuple(seed for seed in of_method if seed is not None and seed in of_baseline)
    if not shared:
        raise DataError(
            f"{method!r} has runs of seed {listed(list(of_method))}, the baseline "
            f"{comparison.baseline!r} of {listed(list(of_baseline))}: expected a seed that both "
            "have; run both with the same seeds"
        )
    return shared, np.stack([of_method[seed] - of_baseline[seed] for seed in shared])


def _gap_share(comparison: Comparison, difference: Difference) -> float | None:
    metric = comparison.metric
    teachers = [record for record in comparison.references if record.method == TEACHER]
    if not teachers:
        return None
    baseline = [run for run in comparison.of(comparison.baseline) if run.seed in difference.seeds]
    apart = _seed_averaged(teachers, metric) - _seed_averaged(baseline, metric)
    gap = float(np.average(apart, weights=_weights(teachers[0], metric)))
    return difference.mean / gap if METRICS[metric].sign * gap > 0 else None


def _untested(
    boot: Bootstrap, seeds: tuple[int, ...], seed_means: tuple[float, ...], level: float
) -> Difference:
    return Difference(
        mean=boot.mean,
        seeds=seeds,
        seed_means=seed_means,
        interval=boot.interval(level),
        standard_error=boot.standard_error,
        seed_interval=seed_interval(seed_means, level),
    )


def _tested(
    family: dict[str, tuple[Bootstrap, Difference]], alpha: float, sign: int
) -> dict[str, Difference]:
    """Differences with Holm's decision over all of them."""
    p_values = [boot.p_value or 1.0 for boot, _ in family.values()]
    decided = {}
    for (name, (boot, one)), p_value, adjusted, level in zip(
        family.items(), p_values, holm(p_values), holm_levels(p_values, alpha), strict=True
    ):
        interval = boot.interval(level)
        verdict: Verdict = "undecided"
        if interval is not None and interval.excludes_zero:
            verdict = "better" if sign * interval.low > 0 else "worse"
        decided[name] = replace(
            one,
            p_value=p_value,
            adjusted_p_value=adjusted,
            adjusted_interval=interval,
            adjusted_level=level,
            verdict=verdict,
        )
    return decided


def _detectable(boot: Bootstrap, alpha: float, comparisons: int) -> float | None:
    if not boot.standard_error:
        return None
    return smallest_detectable_difference(
        boot.standard_error,
        alpha=alpha,
        power=POWER,
        comparisons=comparisons,
        degrees=boot.clusters - 1,
    )


def _result(
    runs: Sequence[Record],
    metric: str,
    interval: Interval | None,
    difference: Difference | None,
    level: float,
) -> MethodResult:
    seeds = tuple(run.seed for run in runs if run.seed is not None)
    weights = _weights(runs[0], metric)
    by_run = tuple(float(np.average(_scores(run, metric), weights=weights)) for run in runs)
    names = [name for name in METRICS if all(name in one.scores for one in runs[0].answers)]
    timed = [run.seconds_per_step for run in runs if run.seconds_per_step is not None]
    losses = [name for name in runs[0].losses if all(name in run.losses for run in runs)]
    return MethodResult(
        method=runs[0].method,
        mean=float(np.mean(by_run)),
        means={
            name: float(np.average(_seed_averaged(runs, name), weights=_weights(runs[0], name)))
            for name in names
        },
        seeds=seeds,
        seed_means=by_run if seeds else (),
        interval=interval,
        seed_interval=seed_interval(by_run, level),
        losses={name: float(np.mean([run.losses[name] for run in runs])) for name in losses},
        steps=max(run.steps for run in runs),
        seconds=float(np.mean([run.seconds for run in runs])),
        seconds_per_step=float(np.median(timed)) if timed else None,
        peak_memory=max((run.peak_memory for run in runs if run.peak_memory), default=None),
        difference=difference,
        is_one_run=len(runs) > 1 and _is_constant([run.losses.get("ce") for run in runs]),
    )


def _is_constant(values: Sequence[float | None]) -> bool:
    """True if all are known and equal but for rounding."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return False
    return max(known) - min(known) <= _ROUNDING * max(map(abs, known))


def _seed_averaged(runs: Sequence[Record], metric: str) -> Scores:
    return np.asarray(np.mean([_scores(run, metric) for run in runs], axis=0), dtype=np.float64)


def _weights(record: Record, metric: str) -> Scores:
    return np.array([answer.weight_in(metric) for answer in record.answers], dtype=np.float64)


def _scores(record: Record, metric: str) -> Scores:
    try:
        return np.array([answer.scores[metric] for answer in record.answers], dtype=np.float64)
    except KeyError as error:
        raise DataError(
            f"an answer of {_named(record)} has no score {metric!r}; score it by every metric of "
            f"{', '.join(METRICS)}"
        ) from error


def _check_runs(comparison: Comparison) -> None:
    if comparison.metric not in METRICS:
        raise DataError(
            f"expected one of {', '.join(METRICS)} to compare by, got {comparison.metric!r}"
        )
    if comparison.baseline not in comparison.methods:
        raise DataError(
            f"the baseline {comparison.baseline!r} has no runs; there are runs of "
            f"{', '.join(comparison.methods) or 'nothing'}: take one of them or run it"
        )
    seen = set()
    for record in comparison.finals:
        if record.seed is None:
            raise DataError(f"expected a seed for {record.method!r}, got none; run it with a seed")
        if (record.method, record.seed) in seen:
            raise DataError(
                f"two runs of {_named(record)}: expected one per method and seed; give methods "
                "with other settings other names"
            )
        seen.add((record.method, record.seed))


def _check_answers(comparison: Comparison) -> None:
    """Differences are taken place by place, so every record must hold the same examples."""
    first = comparison.finals[0]
    if not first.answers:
        raise DataError(f"{_named(first)} has no answers; expected one per held-out example")
    for record in (*comparison.references, *comparison.finals):
        if len(record.answers) != len(first.answers):
            raise DataError(
                f"{_named(record)} has {len(record.answers)} answers where {_named(first)} has "
                f"{len(first.answers)}; measure both on the same examples"
            )
        for place, (expected, got) in enumerate(zip(first.answers, record.answers, strict=True)):
            if (expected.id, expected.group, expected.weight) != (got.id, got.group, got.weight):
                raise DataError(
                    f"{_named(record)} has example {got.id!r} of {got.group!r} at place {place} "
                    f"where {_named(first)} has {expected.id!r} of {expected.group!r}, or of "
                    "another weight; measure both on the same examples in one order"
                )


def _named(record: Record) -> str:
    return repr(record.method) if record.seed is None else f"{record.method!r} seed {record.seed}"


def sentences_of(analysis: Analysis) -> list[str]:
    """One statement each, in the order in which they are to be read."""
    baseline = analysis.baseline
    differences = {
        result.method: result.difference
        for result in analysis.methods
        if result.difference is not None
    }
    lines = [
        f"{METRICS[analysis.metric].title} over {_count(analysis.examples, 'held-out example')} in "
        f"{_count(analysis.clusters, 'cluster')} (examples about one text), "
        f"{_count(len(analysis.seeds), 'seed')}, differences taken to {baseline}."
    ]
    if all(one.interval is None for one in (*analysis.references, *analysis.methods)):
        lines.append(
            f"No mean has an interval: {_count(analysis.clusters, 'cluster')} of examples cannot "
            f"tell how far it might move at {100 * (1 - analysis.alpha):g} %."
        )
    if analysis.is_demonstration:
        lines.append(
            "One seed only: this is a demonstration and nothing is ranked. The order of the means "
            "may change with the seed and with the examples."
        )
    if differences:
        lines.append(_detectable_sentence(analysis, list(differences.values())))
    if differences and not analysis.is_demonstration:
        lines += _verdicts(analysis, differences)
        lines += _over_seeds(analysis, differences)
        lines += _equal_seeds(analysis)
        lines += _disagreements(differences, METRICS[analysis.metric])
    lines += _missing_seeds(analysis, differences)
    if differences and not analysis.is_demonstration:
        lines.append(
            f"Methods are compared with {baseline} only, not with each other. What is found holds "
            "for these models, this task, these settings and this many steps."
        )
    return lines


def listed(names: Sequence[object]) -> str:
    """Join names as in a sentence.

    Example:
        >>> listed([0, 1, 2])
        '0, 1 and 2'
    """
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last


def _detectable_sentence(analysis: Analysis, differences: Sequence[Difference]) -> str:
    family = _count(analysis.comparisons, "comparison")
    if not analysis.can_decide:
        return (
            f"With {_count(analysis.clusters, 'cluster')}, {analysis.resamples:,} resamples and "
            f"{family}, no difference of any size could be told from 0."
        )
    detectable = sorted(
        one.smallest_detectable for one in differences if one.smallest_detectable is not None
    )
    if not detectable:
        return (
            "What this design could detect cannot be estimated: no difference to "
            f"{analysis.baseline} varies between clusters."
        )
    metric = METRICS[analysis.metric]
    low, high = f"{detectable[0]:.{metric.digits}f}", f"{detectable[-1]:.{metric.digits}f}"
    points = f"{low} {metric.unit} or more"
    if low != high:
        points = f"{low} to {high} {metric.unit} or more, depending on the method"
    design = "Several seeds on these examples" if analysis.is_demonstration else "This design"
    return (
        f"{design} could detect true differences of about {points} "
        f"({analysis.power:.0%} power at {analysis.alpha:.3g} over {family}; an approximation that "
        "counts the choice of examples, not that of seeds). Smaller ones are likely to be missed."
    )


def _verdicts(analysis: Analysis, differences: Mapping[str, Difference]) -> list[str]:
    of_verdict: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for name, one in differences.items():
        if one.verdict != "not tested":
            of_verdict[one.verdict].append(name)
    if not any(of_verdict.values()):
        return ["No difference is tested."]
    after = (
        f"After Holm's correction over {_count(analysis.comparisons, 'comparison')} at "
        f"{analysis.alpha:.3g}, "
    )
    undecided = of_verdict.pop("undecided")
    lines = [
        f"{after}{_are(names)} {verdict} than {analysis.baseline}."
        for verdict, names in of_verdict.items()
        if names
    ]
    if not lines:
        return [
            f"{after}no method differs from {analysis.baseline}; this does not show that they are "
            "equally good."
        ]
    if undecided:
        lines.append(
            f"{_are(undecided)} undecided, which does not show that "
            f"{'it equals' if len(undecided) == 1 else 'they equal'} {analysis.baseline}."
        )
    return lines


def _over_seeds(analysis: Analysis, differences: Mapping[str, Difference]) -> list[str]:
    """Intervals over seeds, which the verdicts do not count."""
    intervals = [
        f"{name} {_ends(one.seed_interval, METRICS[analysis.metric])}"
        for name, one in differences.items()
        if one.seed_interval is not None
    ]
    if not intervals:
        return []
    return [
        "Verdicts are about these trained models: examples were drawn again, runs were not. How "
        "far other seeds would move a difference, its interval over seeds tells, here at "
        f"{100 * (1 - analysis.alpha):g} %: {'; '.join(intervals)}."
    ]


def _equal_seeds(analysis: Analysis) -> list[str]:
    """Seeds that moved nothing, so that there is one run where there seem to be several."""
    names = [result.method for result in analysis.methods if result.is_one_run]
    if not names:
        return []
    return [
        f"The seeds of {listed(names)} gave one and the same student, as where all rows fit in one "
        "step and nothing is drawn: intervals over seeds say nothing there."
    ]


def _ends(interval: Interval, metric: Metric) -> str:
    return f"{interval.low:+.{metric.digits}f} to {interval.high:+.{metric.digits}f}"


def _disagreements(differences: Mapping[str, Difference], metric: Metric) -> list[str]:
    """Where the interval over examples and the one over seeds say different things."""
    lines = []
    for name, one in differences.items():
        spread = one.seed_interval
        if spread is None or one.verdict == "not tested":
            continue
        ends = f"over {_count(len(one.seeds), 'seed')} ({_ends(spread, metric)})"
        if one.verdict == "undecided" and spread.excludes_zero:
            lines.append(
                f"{name} is undecided by the examples, although its interval {ends} excludes 0: "
                "the seeds agree, the examples are too few."
            )
        elif one.verdict != "undecided" and not spread.excludes_zero:
            lines.append(
                f"{name} is {one.verdict} as far as the examples go, but its interval {ends} "
                "includes 0: other seeds might not bear it out."
            )
    return lines


def _missing_seeds(analysis: Analysis, differences: Mapping[str, Difference]) -> list[str]:
    seeds = {result.method: set(result.seeds) for result in analysis.methods}
    lines = []
    for name, one in differences.items():
        left_out = sorted((seeds[name] | seeds[analysis.baseline]) - set(one.seeds))
        if left_out:
            lines.append(
                f"{name} and {analysis.baseline} share {_seeds(one.seeds)} only; "
                f"{_seeds(left_out)}, which one of them lacks, "
                f"{'is' if len(left_out) == 1 else 'are'} left out of their difference."
            )
        if len(one.seeds) < 2 and not analysis.is_demonstration:
            lines.append(
                f"{name} is not tested: that takes two seeds shared with {analysis.baseline}."
            )
    return lines


def _are(names: Sequence[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}"
