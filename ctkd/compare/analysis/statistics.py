"""Statistics of mean scores: intervals, p values, Holm, detectable differences.

Plain functions of numbers; what they are applied to is in `ctkd.compare.analysis.analyze`. Only
`seed_interval` and `crossed_mean` know that trained models differ from seed to seed: a bootstrap
over examples takes the trained models as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctkd.errors import DataError, SettingError

__all__ = [
    "Bootstrap",
    "CrossedMean",
    "Interval",
    "cluster_bootstrap",
    "crossed_mean",
    "holm",
    "holm_levels",
    "resampled_means",
    "seed_interval",
    "smallest_detectable_difference",
]

_WEIGHTS_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """A two-sided confidence interval, from its lower to its upper end."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if 0 lies outside; an end that is 0 counts as inside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bootstrap:
    r"""A mean over examples and what resampling whole groups says about it.

    The interval is the percentile interval, expanded for few groups. Plain percentiles are too
    narrow with :math:`G` groups: by :math:`\sqrt{(G-1)/G}` in scale, and by taking a normal
    quantile where Student's is due. So an interval of level :math:`1-\alpha` runs between the
    quantiles :math:`q` and :math:`1-q` of the resampled means, with

    .. math:: q = \Phi\left(-\sqrt{G/(G-1)}\; t_{1-\alpha/2,\,G-1}\right),

    which tends to :math:`\alpha/2` as :math:`G` grows. The p value inverts this: it is the smallest
    :math:`\alpha` whose interval excludes 0, so that the two never contradict each other.

    No tail below :math:`1/(\text{resamples}+1)` or :math:`G^{-G}` (one group drawn every time) is
    resolved. An interval that needs a smaller one is None, and no p value lies below
    `smallest_p_value`.

    Args:
        mean: Over all examples.
        means: The resampled means, ascending; empty with one group.
        clusters: Number of groups.

    References:
        T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician
        69 (2015), on the expanded percentile interval.
    """

    mean: float
    means: NDArray[np.float64]
    clusters: int

    @property
    def reason(self) -> str | None:
        """Why there is neither an interval nor a p value; None if there are."""
        return "all examples belong to one group" if self.clusters < 2 else None

    @property
    def standard_error(self) -> float | None:
        """Spread of the resampled means, times sqrt(G/(G-1)); None with one group."""
        if self.reason:
            return None
        return float(self.means.std() * self._expansion)

    @property
    def p_value(self) -> float | None:
        """Two-sided, for a mean of 0; None with one group."""
        if self.reason:
            return None
        fewer = min(np.count_nonzero(self.means <= 0), np.count_nonzero(self.means >= 0))
        return self._p_of_tail((int(fewer) + 1) / (self.means.size + 1))

    @property
    def smallest_p_value(self) -> float | None:
        """The `p_value` when every resampled mean lies on one side of 0."""
        return None if self.reason else self._p_of_tail(0.0)

    def interval(self, level: float = 0.95) -> Interval | None:
        """The interval of any level, from the same resamples.

        Args:
            level: Between 0 and 1.

        Returns:
            None with one group, or with too few groups or resamples for this level.

        Raises:
            SettingError: If `level` is not between 0 and 1.
        """
        from scipy import stats

        _check_fraction("level", level)
        if self.reason:
            return None
        quantile = stats.t.isf((1 - level) / 2, self.clusters - 1)
        tail = float(stats.norm.sf(self._expansion * quantile))
        # Rank 1 is the smallest mean; as in `p_value`, a tail of rank / (resamples + 1).
        rank = math.floor(tail * (self.means.size + 1))
        if rank < 1 or tail < self._finest_tail:
            return None
        return Interval(float(self.means[rank - 1]), float(self.means[-rank]))

    @property
    def _expansion(self) -> float:
        return math.sqrt(self.clusters / (self.clusters - 1))

    @property
    def _finest_tail(self) -> float:
        return max(1 / (self.means.size + 1), float(self.clusters) ** -min(self.clusters, 100))

    def _p_of_tail(self, tail: float) -> float:
        from scipy import stats

        tail = min(max(tail, self._finest_tail), 0.5)
        quantile = stats.norm.isf(tail) / self._expansion
        return min(1.0, float(2 * stats.t.sf(quantile, self.clusters - 1)))


def resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], times: NDArray[np.int64]
) -> NDArray[np.float64]:
    r"""Mean over the examples of each resample, :math:`\sum_g t_g S_g / \sum_g t_g n_g`.

    Shape:
        (G,), (G,), (R, G) -> (R,).

    Args:
        sums: Of each group's values, by weight.
        sizes: Sums of each group's weights, above 0.
        times: How often each resample holds each group.

    Example:
        >>> resampled_means(np.array([2.0, 9.0]), np.array([2, 1]), np.array([[1, 1], [2, 0]]))
        array([3.66666667, 1.        ])
    """
    return np.asarray((times @ sums) / (times @ sizes), dtype=np.float64)


def cluster_bootstrap(
    values: NDArray[np.float64],
    groups: Sequence[str],
    *,
    weights: NDArray[np.float64] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Bootstrap:
    """Bootstrap a mean over examples by drawing whole groups with replacement.

    Examples of a group, such as the questions about one passage, succeed and fail together. Drawing
    examples one by one would take them for independent and give intervals that are too narrow. For
    a paired comparison pass differences: method minus baseline, example by example.

    The same groups in the same order with the same seed are drawn the same way whatever the values.

    Shape:
        values: (N,), with one of `groups` per value. weights: (N,).

    Args:
        values: One per example.
        groups: The group that each example belongs to.
        weights: Of the examples, such as the bytes of texts, in every mean; above 0. They are drawn
            with their examples. Default all 1.
        resamples: At least 100.
        seed: Of the draw.

    Raises:
        DataError: If there are no values, another number of groups, or a value that is not finite.
        SettingError: If `resamples` is below 100.

    Example:
        >>> found = cluster_bootstrap(np.array([1.0, 3.0, 2.0] * 6), [*"abcdefabcdefabcdef"])
        >>> found.mean, found.clusters, found.interval().excludes_zero
        (2.0, 6, True)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or values.size != len(groups):
        raise DataError(
            f"expected one group per value and at least one value, got values of shape "
            f"{values.shape} and {len(groups)} groups; pass one score and one group per example"
        )
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(
            f"expected finite values, got {values[at]} at place {at}; score that example again"
        )
    sized = _checked_weights(weights, values.size)
    if resamples < 100:
        raise SettingError(f"resamples must be at least 100, got {resamples}; 10000 is usual")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    of_value = np.array([places[group] for group in groups])
    sums: NDArray[np.float64] = np.bincount(of_value, weights=sized * values).astype(np.float64)
    sizes: NDArray[np.float64] = np.bincount(of_value, weights=sized).astype(np.float64)
    means = np.empty(resamples if len(places) > 1 else 0)
    generator = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS_AT_ONCE // len(places))
    for start in range(0, means.size, rows):
        part = means[start : start + rows]
        chances = np.full(len(places), 1 / len(places))
        times = generator.multinomial(len(places), chances, size=part.size)
        part[:] = resampled_means(sums, sizes, times)
    # Scores that cancel exactly on paper leave 1e-15 in floating point, which is no difference.
    means[np.abs(means) <= 1e-12 * np.abs(values).max()] = 0.0
    mean = float(np.average(values, weights=sized))
    return Bootstrap(mean=mean, means=np.sort(means), clusters=len(places))


def seed_interval(means: Sequence[float], level: float = 0.95) -> Interval | None:
    r"""Student's interval of the mean over seeds, :math:`\bar x \pm t_{n-1}\, s / \sqrt n`.

    Args:
        means: One mean, or one difference of means, per seed.
        level: Between 0 and 1.

    Returns:
        None for a single seed, which says nothing of others.

    Raises:
        DataError: If `means` is empty.
        SettingError: If `level` is not between 0 and 1.

    Example:
        >>> found = seed_interval([1.0, 2.0, 3.0])
        >>> round(found.low, 3), round(found.high, 3)
        (-0.484, 4.484)
    """
    from scipy import stats

    _check_fraction("level", level)
    if not means:
        raise DataError("expected the mean of at least one seed, got none; pass one per seed")
    if len(means) == 1:
        return None
    middle = float(np.mean(means))
    spread = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    half = float(stats.t.isf((1 - level) / 2, len(means) - 1)) * spread
    return Interval(middle - half, middle + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossedMean:
    """A mean over seeds and groups of texts, and how far it may be off.

    Attributes:
        mean: Over all, groups by their weight.
        standard_error: Of the mean, for other seeds and other texts.
        degrees: Of freedom of Student's t.
    """

    mean: float
    standard_error: float
    degrees: float

    def interval(self, level: float = 0.95) -> Interval:
        """Student's interval of a level between 0 and 1."""
        from scipy import stats

        _check_fraction("level", level)
        half = float(stats.t.isf((1 - level) / 2, self.degrees)) * self.standard_error
        return Interval(self.mean - half, self.mean + half)

    @property
    def p_value(self) -> float:
        """Two-sided, for a mean of 0."""
        from scipy import stats

        if self.standard_error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.standard_error, self.degrees))


def crossed_mean(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> CrossedMean:
    r"""Mean of values that every seed has of every group of texts, such as paired differences.

    .. math:: \mathrm{SE}^2 = \frac{1}{S (S - 1)} \sum_s (\bar x_{s \cdot} - \bar x)^2
        + \frac{D}{D - 1} \sum_d \left( \frac{w_d}{\sum_e w_e} (\bar x_{\cdot d} - \bar x)
        \right)^2

    The first part is the spread of the seeds' means over texts, the second that of the texts' means
    over seeds. What is peculiar to a seed on a text is in both, so that the interval is rather too
    wide. Degrees of freedom are Satterthwaite's.

    Shape:
        values: (S, D), at least 2 by 2. weights: (D,).

    Args:
        values: Of S seeds and D groups.
        weights: Of the groups, such as their bytes, above 0. Default all 1.

    Raises:
        DataError: If there are fewer than two seeds or groups, a value is not finite, or a weight
            not above 0.

    Example:
        >>> found = crossed_mean(np.array([[1.0, 3.0], [2.0, 4.0]]))
        >>> found.mean, round(found.standard_error**2, 3), round(found.degrees, 3)
        (2.5, 1.25, 1.471)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise DataError(
            "expected finite values of at least two seeds (rows) and two groups (columns), got "
            f"shape {values.shape}; train another seed, or measure on more texts"
        )
    seeds, groups = values.shape
    given = _checked_weights(weights, groups)
    shares = given / given.sum()
    of_seeds, of_groups = values @ shares, values.mean(0)
    mean = float(of_seeds.mean())
    # Variances of the mean, each with its degrees of freedom.
    parts = (
        (float(of_seeds.var(ddof=1)) / seeds, seeds - 1),
        (float(((shares * (of_groups - mean)) ** 2).sum()) * groups / (groups - 1), groups - 1),
    )
    variance = math.fsum(part for part, _ in parts)
    spread = math.fsum(part**2 / degrees for part, degrees in parts)
    return CrossedMean(
        mean=mean,
        standard_error=math.sqrt(variance),
        degrees=variance**2 / spread if spread else math.inf,
    )


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    r"""Holm's adjusted p values, in the order given.

    With :math:`p_{(0)} \le p_{(1)} \le \dots` of :math:`m` comparisons, the adjusted value at rank
    :math:`r` is :math:`\min(1, \max_{i \le r} (m - i)\, p_{(i)})`. Rejecting where it is at most
    :math:`\alpha` keeps the chance of any false rejection at :math:`\alpha`.

    Args:
        p_values: Between 0 and 1.

    Raises:
        DataError: If one is not between 0 and 1.

    Example:
        >>> holm([0.25, 0.125, 0.5])
        (0.5, 0.375, 0.5)
    """
    for p_value in p_values:
        if not 0 <= p_value <= 1:
            raise DataError(f"expected p values between 0 and 1, got {p_value}; check the test")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(_by_size(p_values)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return tuple(adjusted)


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> tuple[float, ...]:
    r"""Levels at which intervals exclude 0 exactly where Holm rejects, in the order given.

    Holm goes from the smallest p value upwards and compares the one at rank :math:`r` with
    :math:`\alpha / (m - r)` until one is larger; nothing is rejected from there on. So the level is
    :math:`1 - \alpha / (m - r)` at each rank up to and including the first failure, and stays at
    the first failure's level after it: a p value behind it is no smaller, so that its interval
    includes 0 as well. This needs intervals that agree with the p values, as `Bootstrap`'s do.

    The intervals show Holm's decisions. Only those at the widest level, :math:`1 - \alpha / m`, are
    simultaneous: the others do not all cover their true values at once with chance
    :math:`1 - \alpha`.

    Args:
        p_values: Between 0 and 1.
        alpha: Chance of any false rejection, between 0 and 1.

    Raises:
        DataError: If a p value is not between 0 and 1.
        SettingError: If `alpha` is not between 0 and 1.

    Example:
        >>> holm_levels([0.5, 0.001, 0.25, 0.0625], alpha=0.12)
        (0.96, 0.97, 0.96, 0.96)
    """
    _check_fraction("alpha", alpha)
    adjusted = holm(p_values)
    levels = [0.0] * len(p_values)
    level = 1.0
    failed = False
    for rank, place in enumerate(_by_size(p_values)):
        if not failed:
            level = 1 - alpha / (len(p_values) - rank)
        failed = failed or adjusted[place] > alpha
        levels[place] = level
    return tuple(levels)


def smallest_detectable_difference(
    standard_error: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    comparisons: int = 1,
    degrees: float = math.inf,
) -> float:
    r"""The true difference that a test detects with the given chance.

    .. math:: (z_{1-\alpha/(2m)} + z_{\text{power}})\, \text{SE}

    This is an approximation: it takes the difference as normal, its standard error as known, and
    Bonferroni's level, the hardest that Holm asks for, in each of :math:`m` comparisons. With
    `degrees` both quantiles are Student's, which allows for a standard error from few groups.

    Args:
        standard_error: Of one difference, at least 0.
        alpha: Chance of any false rejection, between 0 and 1.
        power: Chance of finding the difference, between 0 and 1.
        comparisons: The number m of methods compared with the baseline, at least 1.
        degrees: Of freedom; groups minus 1, or infinite for the normal quantiles.

    Raises:
        SettingError: If a setting is out of range.

    Example:
        >>> round(smallest_detectable_difference(1.0), 3)
        2.802
    """
    from scipy import stats

    _check_fraction("alpha", alpha)
    _check_fraction("power", power)
    for name, value, least in (
        ("standard_error", standard_error, 0),
        ("comparisons", comparisons, 1),
        ("degrees", degrees, 1),
    ):
        if not value >= least:
            raise SettingError(f"{name} must be at least {least}, got {value}; pass a larger one")
    quantiles = stats.t.isf([alpha / (2 * comparisons), 1 - power], degrees)
    return float(quantiles.sum() * standard_error)


def _by_size(p_values: Sequence[float]) -> list[int]:
    return sorted(range(len(p_values)), key=lambda place: p_values[place])


def _checked_weights(weights: NDArray[np.float64] | None, count: int) -> NDArray[np.float64]:
    """Weights of so many values, all 1 where none are given."""
    if weights is None:
        return np.ones(count)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (count,) or not (np.isfinite(given) & (given > 0)).all():
        raise DataError(
            f"expected {count} weights above 0, got {given.tolist()}; pass one per value"
        )
    return given


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise SettingError(f"{name} must lie between 0 and 1, got {value}; 5 % is 0.05")
