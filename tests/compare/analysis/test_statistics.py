import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ctkd.compare.analysis import statistics
from ctkd.compare.analysis.statistics import (
    Bootstrap,
    cluster_bootstrap,
    crossed_mean,
    holm,
    holm_levels,
    resampled_means,
    seed_interval,
    smallest_detectable_difference,
)
from ctkd.errors import DataError, SettingError

SIZES = (3, 1, 7, 4, 2)
GROUPS = [f"story {place}" for place, size in enumerate(SIZES) for _ in range(size)]


def normal_means(shift, clusters=16, resamples=999, seed=0):
    """A bootstrap with made-up resampled means around a shift, of spread 1."""
    means = np.sort(np.random.default_rng(seed).normal(shift, 1.0, resamples))
    return Bootstrap(mean=shift, means=means, clusters=clusters)


def is_excluded(boot, level):
    interval = boot.interval(level)
    return interval is not None and interval.excludes_zero


def test_resamples_are_those_of_a_loop_over_drawn_examples():
    values = np.random.default_rng(3).normal(size=len(GROUPS))
    chances = [1 / len(SIZES)] * len(SIZES)
    draws = np.random.default_rng(11).multinomial(len(SIZES), chances, size=200)
    # Bits per byte of texts of some bytes each: all bits over all bytes.
    sizes = np.random.default_rng(4).integers(5, 900, size=len(GROUPS)).astype(float)
    for weights in (None, sizes):
        sized = np.ones(len(GROUPS)) if weights is None else weights
        expected = []
        for drawn in draws:
            examples = []
            for value, size, group in zip(values, sized, GROUPS, strict=True):
                examples += [(value * size, size)] * int(drawn[int(group.split()[1])])
            expected.append(sum(one for one, _ in examples) / sum(size for _, size in examples))
        found = cluster_bootstrap(values, GROUPS, weights=weights, resamples=200, seed=11)
        np.testing.assert_allclose(found.means, sorted(expected), rtol=0, atol=1e-12)
        assert found.mean == pytest.approx(sum(values * sized) / sum(sized), abs=1e-12)
        assert found.clusters == 5
    for wrong in (sizes[1:], sizes * 0, sizes * math.nan):
        with pytest.raises(DataError, match="expected 17 weights above 0, got"):
            cluster_bootstrap(values, GROUPS, weights=wrong)


def test_large_draws_are_split_without_changing_them(monkeypatch):
    values = np.random.default_rng(3).normal(size=len(GROUPS))
    whole = cluster_bootstrap(values, GROUPS, resamples=203).means
    monkeypatch.setattr(statistics, "_WEIGHTS_AT_ONCE", 50)
    np.testing.assert_array_equal(cluster_bootstrap(values, GROUPS, resamples=203).means, whole)


def test_order_of_examples_within_groups_does_not_matter():
    values = np.arange(6.0)
    mixed = cluster_bootstrap(values[[0, 3, 1, 4, 2, 5]], [*"abcabc"], resamples=300)
    sorted_ = cluster_bootstrap(values[[0, 4, 3, 2, 1, 5]], [*"aabbcc"], resamples=300)
    np.testing.assert_allclose(mixed.means, sorted_.means, atol=1e-12)


def test_interval_by_hand():
    # 16 groups: t = 2.13145 at 15 degrees, times sqrt(16/15) = 2.20135, tail 0.013856.
    boot = Bootstrap(mean=5000.0, means=np.arange(1.0, 10_000.0), clusters=16)
    assert boot.interval(0.95) == (138.0, 9862.0)
    # Very many groups: 1.96, the ordinary percentiles.
    many = Bootstrap(mean=5000.0, means=np.arange(1.0, 10_000.0), clusters=10**6)
    assert many.interval(0.95) == (249.0, 9751.0)
    assert many.interval(0.8) == (999.0, 9001.0)


def test_p_value_by_hand():
    # 137 of 9999 resampled means are 0 or less: tail 138/10000, as in the interval above.
    means = np.arange(1.0, 10_000.0) - 137
    boot = Bootstrap(mean=1.0, means=means, clusters=16)
    expected = 2 * stats.t.sf(stats.norm.isf(0.0138) * math.sqrt(15 / 16), 15)
    assert boot.p_value == pytest.approx(expected, rel=1e-12)
    assert 0.049 < boot.p_value < 0.05
    mirrored = Bootstrap(mean=-1.0, means=np.sort(-means), clusters=16)
    assert mirrored.p_value == boot.p_value


@given(
    shift=st.floats(-5, 5),
    alpha=st.floats(1e-4, 0.9),
    clusters=st.integers(2, 60),
    seed=st.integers(0, 9),
)
def test_interval_excludes_zero_exactly_when_p_is_at_most_alpha(shift, alpha, clusters, seed):
    boot = normal_means(shift, clusters, seed=seed)
    assert is_excluded(boot, 1 - alpha) == (boot.p_value <= alpha)
    assert boot.p_value >= boot.smallest_p_value


def test_coverage_with_cluster_effects():
    generator = np.random.default_rng(5)
    hits = {"cluster": 0, "naive": 0}
    datasets = 300
    for _ in range(datasets):
        sizes = generator.integers(4, 13, size=16)
        effects = np.repeat(generator.normal(0, 1.0, size=16), sizes)
        values = 2.0 + effects + generator.normal(0, 1.0, size=effects.size)
        stories = list(np.repeat(np.arange(16), sizes).astype(str))
        alone = list(map(str, range(values.size)))
        for name, groups, resamples in (("cluster", stories, 600), ("naive", alone, 200)):
            low, high = cluster_bootstrap(values, groups, resamples=resamples).interval(0.95)
            hits[name] += low <= 2.0 <= high
    assert 0.90 <= hits["cluster"] / datasets <= 0.98
    assert hits["naive"] / datasets < 0.75


def test_coverage_with_six_clusters_beats_plain_percentiles():
    # Plain percentiles of normal means: P(|t_5| < 1.96 sqrt(5/6)) = 0.867.
    generator = np.random.default_rng(6)
    expanded = plain = 0
    for _ in range(1000):
        boot = cluster_bootstrap(generator.normal(size=6), [*"abcdef"], resamples=999)
        low, high = boot.interval(0.95)
        expanded += low <= 0 <= high
        plain += boot.means[24] <= 0 <= boot.means[-25]
    assert plain / 1000 == pytest.approx(0.867, abs=0.03)
    assert 0.92 <= expanded / 1000 <= 0.98


def test_standard_error_is_that_of_group_means():
    values = np.random.default_rng(8).normal(size=(20, 3))
    groups = [str(place) for place in range(20) for _ in range(3)]
    expected = values.mean(axis=1).std(ddof=1) / math.sqrt(20)
    found = cluster_bootstrap(values.ravel(), groups, resamples=20_000).standard_error
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("values", [[4.0], [1.0, 2.0, 3.0]])
def test_one_group_gives_a_mean_and_a_reason(values):
    boot = cluster_bootstrap(np.array(values), ["only"] * len(values))
    assert boot.mean == np.mean(values)
    assert boot.reason == "all examples belong to one group"
    assert boot.interval() is boot.p_value is boot.standard_error is boot.smallest_p_value is None


def test_equal_scores_give_no_difference():
    boot = cluster_bootstrap(np.zeros(len(GROUPS)), GROUPS)
    assert (boot.mean, boot.standard_error, boot.p_value) == (0.0, 0.0, 1.0)
    assert boot.interval() == (0.0, 0.0)
    assert boot.reason is None


def test_rounding_errors_are_no_difference():
    values = np.array([0.1, 0.2, -0.3] * 8)
    assert values[:3].sum() > 0
    boot = cluster_bootstrap(values, [f"{place // 3}" for place in range(24)])
    assert (boot.p_value, boot.interval()) == (1.0, (0.0, 0.0))


def test_few_groups_cannot_resolve_a_far_tail():
    # Three groups: one resample in 27 holds one group only, however many are drawn.
    boot = cluster_bootstrap(np.array([5.0, 6.0, 7.0]), [*"abc"], resamples=50_000)
    tail = stats.norm.isf(1 / 27) * math.sqrt(2 / 3)
    assert boot.p_value == boot.smallest_p_value == pytest.approx(2 * stats.t.sf(tail, 2))
    assert boot.p_value > 0.2
    assert boot.interval(0.95) is None
    assert boot.interval(0.7) is not None


def test_few_resamples_cannot_resolve_a_far_tail():
    boot = cluster_bootstrap(np.arange(1.0, 31.0), [str(n) for n in range(30)], resamples=100)
    assert boot.interval(0.95) is not None
    assert boot.interval(0.995) is None
    assert boot.p_value == boot.smallest_p_value > 0.005


def test_same_seed_same_draw():
    values = np.random.default_rng(1).normal(size=len(GROUPS))
    first, again, other = (cluster_bootstrap(values, GROUPS, seed=seed).means for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_weights_of_empty_groups_do_not_count():
    found = resampled_means(np.array([2.0, 30.0]), np.array([2, 3]), np.array([[2, 0], [0, 2]]))
    np.testing.assert_array_equal(found, [1.0, 10.0])


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], [], "at least one value"),
        ([1.0, 2.0], ["a"], "shape \\(2,\\) and 1 groups"),
        ([1.0, math.nan], ["a", "b"], "got nan at place 1"),
    ],
)
def test_bad_values(values, groups, message):
    with pytest.raises(DataError, match=message):
        cluster_bootstrap(np.array(values), groups)


def test_seed_interval_by_hand():
    # Mean 3, s = 2, n = 4: half width 3.182446 * 2 / 2.
    low, high = seed_interval([1.0, 3.0, 3.0, 3.0 + 2.0])
    half = 3.182446305 * math.sqrt(8 / 3) / 2
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    # Two seeds, 12.7062 * |difference| / 2.
    assert seed_interval([0.0, 2.0]) == pytest.approx((1 - 12.70620474, 1 + 12.70620474))
    expected = stats.t.interval(0.9, 2, loc=2, scale=stats.sem([1, 2, 3]))
    assert seed_interval([1, 2, 3], level=0.9) == pytest.approx(expected)


def test_seed_interval_needs_two_seeds():
    assert seed_interval([7.0]) is None
    with pytest.raises(DataError, match="at least one seed"):
        seed_interval([])


def test_means_over_seeds_and_groups_cover_the_truth():
    """Other seeds on other texts; of what is peculiar to both, the interval is rather too wide."""
    generator = np.random.default_rng(0)
    weights = generator.uniform(1.0, 3.0, 20)
    for of_seed, of_group, most in (
        (1.0, 0.1, 0.92),
        (0.1, 1.0, 0.92),
        (0.5, 0.5, 0.92),
        (0, 0, 1),
    ):
        found = []
        for number in range(2000):
            values = 0.3 + 0.2 * generator.standard_normal((5, 20))
            values += of_seed * generator.standard_normal((5, 1))
            values += of_group * generator.standard_normal((1, 20))
            one = crossed_mean(values, weights)
            found.append([one.mean, one.standard_error, one.degrees])
            if number < 100:
                assert (one.p_value <= 0.1) == one.interval(0.9).excludes_zero
                half = stats.t.isf(0.05, one.degrees) * one.standard_error
                assert one.interval(0.9) == pytest.approx((one.mean - half, one.mean + half))
        means, errors, degrees = np.array(found).T
        inside = np.count_nonzero(abs(means - 0.3) <= stats.t.isf(0.05, degrees) * errors)
        assert 0.88 <= inside / 2000 <= most


def test_equal_values_over_seeds_and_groups_have_no_error():
    assert crossed_mean(np.zeros((2, 3))).p_value == 1.0
    assert crossed_mean(np.ones((2, 3))).p_value == 0.0
    with pytest.raises(DataError, match="at least two seeds"):
        crossed_mean(np.ones((1, 3)))
    for weights in ([1.0, 2.0], [1.0, 0.0, 1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(DataError, match="expected 3 weights above 0, got"):
            crossed_mean(np.ones((2, 3)), np.array(weights))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    assert holm([0.02, 0.02]) == (0.04, 0.04)
    assert holm([]) == ()
    with pytest.raises(DataError, match="between 0 and 1, got nan"):
        holm([0.5, math.nan])


def test_holm_levels_by_hand():
    # 0.005 <= 0.05/4 and 0.01 <= 0.05/3 are rejected; 0.03 > 0.05/2 fails, and so does 0.04.
    found = holm_levels([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx((1 - 0.05 / 3, 0.975, 0.975, 1 - 0.05 / 4))
    # Step-down: 0.04 alone would pass 0.05/1, but 0.03 before it failed.
    assert holm_levels([0.04, 0.03]) == pytest.approx((0.975, 0.975))
    assert holm_levels([0.04, 0.02]) == pytest.approx((0.95, 0.975))


@given(
    shifts=st.lists(st.floats(-5, 5), min_size=1, max_size=7),
    alpha=st.floats(0.01, 0.3),
    clusters=st.integers(3, 40),
)
def test_adjusted_interval_excludes_zero_exactly_when_holm_rejects(shifts, alpha, clusters):
    boots = [normal_means(shift, clusters, seed=place) for place, shift in enumerate(shifts)]
    p_values = [boot.p_value for boot in boots]
    excluded = [
        is_excluded(boot, level)
        for boot, level in zip(boots, holm_levels(p_values, alpha), strict=True)
    ]
    assert excluded == [adjusted <= alpha for adjusted in holm(p_values)]


def test_step_down_matters_for_the_levels():
    """Levels by rank alone, without stopping at the first failure, would contradict Holm."""
    boots = [normal_means(shift) for shift in (2.0, 2.1)]
    p_values = [boot.p_value for boot in boots]
    assert min(holm(p_values)) > 0.05 > 0.0 and max(p_values) > 0.05 / 2
    last = int(np.argmax(p_values))
    alpha = p_values[last] * 1.0001
    assert max(holm(p_values)) > alpha
    assert is_excluded(boots[last], 1 - alpha)
    assert not is_excluded(boots[last], holm_levels(p_values, alpha)[last])


def test_detectable_difference_has_its_power():
    difference = smallest_detectable_difference(1.5, power=0.8, comparisons=4)
    assert difference == pytest.approx(1.5 * (2.497705 + 0.841621), rel=1e-5)
    estimates = np.random.default_rng(0).normal(difference, 1.5, size=200_000)
    found = np.abs(estimates / 1.5) > stats.norm.isf(0.05 / 8)
    assert found.mean() == pytest.approx(0.8, abs=0.004)


def test_detectable_difference_allows_for_few_groups():
    groups, comparisons = 10, 3
    truth = smallest_detectable_difference(
        1 / math.sqrt(groups), comparisons=comparisons, degrees=groups - 1
    )
    normal = smallest_detectable_difference(1 / math.sqrt(groups), comparisons=comparisons)
    generator = np.random.default_rng(0)

    def power(difference):
        drawn = generator.normal(difference, 1.0, size=(40_000, groups))
        error = drawn.std(axis=1, ddof=1) / math.sqrt(groups)
        limit = stats.t.isf(0.05 / (2 * comparisons), groups - 1)
        return (np.abs(drawn.mean(axis=1)) / error > limit).mean()

    assert power(truth) == pytest.approx(0.8, abs=0.03)
    assert power(normal) < 0.72


@pytest.mark.parametrize(
    "call",
    [
        lambda: cluster_bootstrap(np.ones(2), ["a", "b"], resamples=99),
        lambda: normal_means(0).interval(95),
        lambda: seed_interval([1.0], level=0.0),
        lambda: holm_levels([0.5], alpha=1.0),
        lambda: smallest_detectable_difference(1.0, power=80),
        lambda: smallest_detectable_difference(-1.0),
        lambda: smallest_detectable_difference(math.nan),
        lambda: smallest_detectable_difference(1.0, comparisons=0),
        lambda: smallest_detectable_difference(1.0, degrees=0),
    ],
)
def test_settings_out_of_range(call):
    with pytest.raises(SettingError, match="must"):
        call()
