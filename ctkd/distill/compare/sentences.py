"""An analysis in plain English: what it shows, what it does not, and what it could not have shown.

Numbers are worked out in `ctkd.distill.compare.analysis`. No sentence ranks anything unless a test
decided it, and none does in a demonstration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ctkd.distill.compare.records import METRICS

if TYPE_CHECKING:
    from ctkd.distill.compare.analysis import Analysis, Difference

__all__ = ["listed", "sentences_of"]


def sentences_of(analysis: Analysis) -> list[str]:
    """One statement each, in the order in which they are to be read."""
    baseline = analysis.baseline
    differences = {
        found.method: found.difference for found in analysis.methods if found.difference is not None
    }
    lines = [
        f"{METRICS[analysis.metric]} over {_count(analysis.examples, 'held-out example')} in "
        f"{_count(analysis.clusters, 'cluster')} (examples about one text), "
        f"{_count(len(analysis.seeds), 'seed')}, differences taken to {baseline}."
    ]
    if analysis.is_demonstration:
        lines.append(
            "One seed only: this is a demonstration and nothing is ranked. The order of the means "
            "may change with the seed and with the examples."
        )
    if differences:
        lines.append(_detectable(analysis, list(differences.values())))
    if differences and not analysis.is_demonstration:
        lines += _verdicts(analysis, differences)
        lines += _over_seeds(analysis, differences)
        lines += _disagreements(differences)
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


def _detectable(analysis: Analysis, differences: Sequence[Difference]) -> str:
    family = _count(analysis.comparisons, "comparison")
    if not analysis.can_decide:
        return (
            f"With {_count(analysis.clusters, 'cluster')}, {analysis.resamples:,} resamples and "
            f"{family}, no difference of any size could be told from 0."
        )
    found = sorted(
        one.smallest_detectable for one in differences if one.smallest_detectable is not None
    )
    if not found:
        return (
            "What this design could detect cannot be estimated: no difference to "
            f"{analysis.baseline} varies between clusters."
        )
    low, high = f"{found[0]:.1f}", f"{found[-1]:.1f}"
    points = f"{low} points or more"
    if low != high:
        points = f"{low} to {high} points or more, depending on the method"
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
    """What the verdicts do not count: the same methods trained with other seeds."""
    found = [
        f"{name} {one.seed_interval.low:+.1f} to {one.seed_interval.high:+.1f}"
        for name, one in differences.items()
        if one.seed_interval is not None
    ]
    if not found:
        return []
    return [
        "Verdicts are about these trained models: examples were drawn again, runs were not. How "
        "far other seeds would move a difference, its interval over seeds tells, here at "
        f"{100 * (1 - analysis.alpha):g} %: {'; '.join(found)}."
    ]


def _disagreements(differences: Mapping[str, Difference]) -> list[str]:
    """Where the interval over examples and the one over seeds say different things."""
    lines = []
    for name, one in differences.items():
        spread = one.seed_interval
        if spread is None or one.verdict == "not tested":
            continue
        ends = f"over {_count(len(one.seeds), 'seed')} ({spread.low:+.1f} to {spread.high:+.1f})"
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
    seeds = {found.method: set(found.seeds) for found in analysis.methods}
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
