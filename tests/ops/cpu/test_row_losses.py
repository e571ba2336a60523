"""Losses on pairs of rows by compiled loops, against numpy in float64.

Gradients are held against central differences of the formulas.
"""

import numpy as np
import pytest

from ctkd.ops.cpu.arrays import GoldSettings, SharedKLSettings, UldSettings
from ctkd.ops.cpu.row_losses import gold, shared_kl, uld
from tests.ops.cpu.row_arrays import (
    DTYPES,
    FILL,
    TOLERANCE,
    assert_close,
    blank,
    block_of,
    check_gaps,
    empty,
    row_array,
    softmax,
)

N, V, W = 4, 23, 19
WHICH = np.array([3, 0, 2])
SKIPPED = 1
LOG_FLOOR = -1e4
NOTHING = np.empty((N, 0), np.float32)
LOWEST_LOGIT = -1e30
STEP = 1e-6
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def ids(columns) -> np.ndarray:
    return np.array(columns, np.uint32)


def sides(dtype: str):
    """Rows of the student and of the teacher, and what they hold."""
    generator = np.random.default_rng(0)
    student = row_array(2.0 * generator.normal(size=(N, V)), dtype)
    teacher = row_array(2.0 * generator.normal(size=(N, W)), dtype)
    return student, teacher, block_of(student, V), block_of(teacher, W)


def ranked_l1(probs, others) -> float:
    width = max(probs.size, others.size)
    padded = [
        np.pad(np.sort(one)[::-1], (0, width - one.size)) for one in (probs, np.array(others))
    ]
    return np.abs(padded[0] - padded[1]).sum()


def divergence(log_probs, teacher_log_probs, beta: float) -> float:
    probs, teacher_probs = np.exp(log_probs), np.exp(teacher_log_probs)
    if beta == 0.0:
        terms = teacher_probs * (teacher_log_probs - log_probs) - teacher_probs + probs
    elif beta == 1.0:
        terms = probs * (log_probs - teacher_log_probs) - probs + teacher_probs
    else:
        mixed = np.log(beta * teacher_probs + (1.0 - beta) * probs)
        terms = beta * teacher_probs * (teacher_log_probs - mixed)
        terms += (1.0 - beta) * probs * (log_probs - mixed)
    return terms.sum()


def log_softmax(logits):
    return np.log(softmax(logits))


def differences(function, point) -> np.ndarray:
    """Central differences of a function of a row."""
    steps = STEP * np.eye(point.size)
    return np.array([(function(point + s) - function(point - s)) / (2.0 * STEP) for s in steps])


def check_gradients(gradients, function, student_block, dtype: str) -> None:
    """Hold the rows of a gradient against a function of the pair's index and the student's row."""
    block = block_of(gradients, V)
    for pair in WHICH:
        expected = differences(lambda row, pair=pair: function(pair, row), student_block[pair])
        assert_close(block[pair], expected, dtype)
    assert (block[SKIPPED] == FILL).all()
    check_gaps(gradients, V)


@by_dtype
def test_uld(dtype):
    student, teacher, student_block, teacher_block = sides(dtype)
    settings = UldSettings(ids(range(V)), ids(range(W)), 0.8, 2.0)
    values, gradients = np.full((N, 1), FILL), blank(N, V, dtype)
    no_tails = np.empty((N, 0), np.float32)
    uld(WHICH, student, teacher, settings, no_tails, values, NOTHING, gradients)

    def expected(pair, row):
        return ranked_l1(softmax(row / 0.8), softmax(teacher_block[pair] / 2.0))

    for pair in WHICH:
        assert_close(values[pair, 0], expected(pair, student_block[pair]))
    assert values[SKIPPED] == FILL
    check_gradients(gradients, expected, student_block, dtype)
    without = np.zeros((N, 1))
    uld(WHICH, student, teacher, settings, no_tails, without, NOTHING, empty(dtype))
    assert np.array_equal(without[WHICH], values[WHICH])


@by_dtype
def test_uld_with_tails(dtype):
    student, _, student_block, teacher_block = sides(dtype)
    kept = 6
    probs = row_array(-np.sort(-softmax(teacher_block))[:, :kept], dtype)
    probs_block = block_of(probs, kept)
    tails = np.array([[0.02, 5], [0.5, 2], [0.001, 0], [1e-5, 40]], np.float32)
    settings = UldSettings(ids(range(V)), ids(range(kept)), 1.0, 1.0)
    values, gradients = np.zeros((N, 1)), blank(N, V, dtype)
    uld(WHICH, student, probs, settings, tails, values, NOTHING, gradients)

    def expected(pair, row):
        tail = np.full(int(tails[pair, 1]), tails[pair, 0], np.float64)
        return ranked_l1(softmax(row), np.concatenate([probs_block[pair], tail]))

    for pair in WHICH:
        assert_close(values[pair, 0], expected(pair, student_block[pair]))
    check_gradients(gradients, expected, student_block, dtype)


def gold_settings(beta: float, matched: float, unmatched: float, shared: int = 11):
    generator = np.random.default_rng(1)
    columns, teacher_columns = generator.permutation(V), generator.permutation(W)
    columns[shared:].sort()
    teacher_columns[shared:].sort()
    return GoldSettings(
        ids(columns), ids(teacher_columns), shared, 1.3, 0.9, beta, matched, unmatched, LOG_FLOOR
    )


def gold_terms(settings: GoldSettings, row, teacher_row, log_scales=(0.0, 0.0)):
    log_probs = log_softmax(row / settings.student_temperature)[settings.student_columns]
    teacher_log_probs = log_softmax(teacher_row / settings.teacher_temperature)
    teacher_log_probs = teacher_log_probs[settings.teacher_columns]
    log_probs, teacher_log_probs = log_probs + log_scales[0], teacher_log_probs + log_scales[1]
    shared = settings.shared
    matched = divergence(log_probs[:shared], teacher_log_probs[:shared], settings.beta)
    unmatched = ranked_l1(np.exp(log_probs[shared:]), np.exp(teacher_log_probs[shared:]))
    return np.array([settings.matched_weight * matched, settings.unmatched_weight * unmatched])


# Any two of these meet in every pair of their values.
@pytest.mark.parametrize(
    ("beta", "weights", "is_scaled", "dtype"),
    [
        (beta, weights, (i + j) % 2 == 0, DTYPES[(i + j // 2) % 2])
        for i, beta in enumerate([0.0, 0.3, 1.0])
        for j, weights in enumerate([(1.0, 1.0), (0.0, 2.0), (0.5, 0.0)])
    ],
)
def test_gold(is_scaled, weights, beta, dtype):
    student, teacher, student_block, teacher_block = sides(dtype)
    settings = gold_settings(beta, *weights)
    log_scales = np.random.default_rng(2).normal(size=(N, 2 if is_scaled else 0)) - 0.5
    log_scales = log_scales.astype(np.float32)
    scales = log_scales if is_scaled else np.zeros((N, 2))
    values, gradients = np.full((N, 2), FILL), blank(N, V, dtype)
    scale_gradients = np.full((N, 2), FILL, np.float32)
    gold(WHICH, student, teacher, settings, log_scales, values, scale_gradients, gradients)

    def expected(pair, row):
        return gold_terms(settings, row, teacher_block[pair], scales[pair]).sum()

    for pair in WHICH:
        row, teacher_row = student_block[pair], teacher_block[pair]
        assert_close(values[pair], gold_terms(settings, row, teacher_row, scales[pair]))
        by_scale = differences(
            lambda scale, pair=pair: gold_terms(
                settings, student_block[pair], teacher_block[pair], (scale[0], scales[pair, 1])
            ).sum(),
            scales[pair, :1].astype(np.float64),
        )
        assert_close(scale_gradients[pair, 0], by_scale[0])
    assert (values[SKIPPED] == FILL).all() and (scale_gradients[SKIPPED] == FILL).all()
    check_gradients(gradients, expected, student_block, dtype)
    without = np.zeros((N, 2))
    none = np.empty((0, 2), np.float32)
    gold(WHICH, student, teacher, settings, log_scales, without, none, empty(dtype))
    assert np.array_equal(without[WHICH], values[WHICH])


def test_gold_takes_shared_columns_in_tiles():
    width = 2600
    generator = np.random.default_rng(3)
    student = row_array(2.0 * generator.normal(size=(1, width)), "float32")
    teacher = row_array(2.0 * generator.normal(size=(1, width)), "float32")
    columns, teacher_columns = (ids(generator.permutation(width)) for _ in range(2))
    settings = GoldSettings(columns, teacher_columns, width, 1.0, 1.0, 0.5, 1.0, 1.0, LOG_FLOOR)
    values = np.zeros((1, 2))
    none, no_scales = np.empty((0, 2), np.float32), np.empty((1, 0), np.float32)
    which = np.zeros(1, np.int64)
    gold(which, student, teacher, settings, no_scales, values, none, empty("float32"))
    rows = block_of(student, width)[0], block_of(teacher, width)[0]
    assert_close(values[0], gold_terms(settings, *rows))


def test_gold_raises_log_probabilities_to_the_floor():
    student = row_array([[0.0, -np.inf, 0.0]], "float32")
    teacher = row_array([[0.0, 0.0, -np.inf]], "float32")
    columns = ids(range(3))
    settings = GoldSettings(columns, columns, 3, 1.0, 1.0, 0.0, 1.0, 1.0, LOG_FLOOR)
    values, gradients = np.zeros((1, 2)), blank(1, 3, "float32")
    none, no_scales = np.empty((0, 2), np.float32), np.empty((1, 0), np.float32)
    gold(np.zeros(1, np.int64), student, teacher, settings, no_scales, values, none, gradients)
    # KL is 0.5 (log 0.5 - log floor) of the column that only the teacher has.
    assert_close(values[0], [0.5 * (np.log(0.5) - LOG_FLOOR), 0.0])
    assert_close(block_of(gradients, 3)[0], [0.0, -0.5, 0.5])


def shared_settings(beta: float, has_rest: bool, lowest_logit: float = LOWEST_LOGIT):
    generator = np.random.default_rng(4)
    columns, teacher_columns = ids(generator.permutation(V)), ids(generator.permutation(W))
    others, teacher_others = columns[12:], teacher_columns[12:]
    if not has_rest:
        others, teacher_others = others[:0], teacher_others[:0]
    return SharedKLSettings(
        columns[:12],
        teacher_columns[:12],
        others,
        teacher_others,
        V,
        1.4,
        beta,
        lowest_logit,
        LOG_FLOOR,
    )


def shared_log_probs(row, columns, others, settings: SharedKLSettings):
    row = np.maximum(row, settings.lowest_logit) / settings.temperature
    log_probs = log_softmax(row[np.concatenate([columns, others])])
    if not others.size:
        return log_probs
    rest = np.log(np.exp(log_probs[columns.size :]).sum())
    return np.append(log_probs[: columns.size], rest)


def shared_value(settings: SharedKLSettings, row, teacher_row) -> float:
    return divergence(
        shared_log_probs(row, settings.student_ids, settings.student_others, settings),
        shared_log_probs(teacher_row, settings.teacher_ids, settings.teacher_others, settings),
        settings.beta,
    )


@by_dtype
@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("has_rest", [False, True])
def test_shared_kl(has_rest, beta, dtype):
    student, teacher, student_block, teacher_block = sides(dtype)
    # Some of the logits lie below the lowest.
    settings = shared_settings(beta, has_rest, lowest_logit=-2.0)
    values, gradients = np.full((N, 1), FILL), blank(N, V, dtype)
    shared_kl(WHICH, student, teacher, settings, NOTHING, values, NOTHING, gradients)

    def expected(pair, row):
        return shared_value(settings, row, teacher_block[pair])

    for pair in WHICH:
        assert_close(values[pair, 0], expected(pair, student_block[pair]))
    assert values[SKIPPED] == FILL
    check_gradients(gradients, expected, student_block, dtype)
    assert (block_of(gradients, V)[WHICH][student_block[WHICH] < -2.0] == 0.0).all()
    without = np.zeros((N, 1))
    shared_kl(WHICH, student, teacher, settings, NOTHING, without, NOTHING, empty(dtype))
    assert np.array_equal(without[WHICH], values[WHICH])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_shared_kl_of_shared_tokens_without_probability_is_finite(beta):
    settings = shared_settings(beta, has_rest=True)
    block = np.zeros((1, V))
    block[0, settings.student_ids] = -np.inf
    student, teacher = row_array(block, "float32"), row_array(np.zeros((1, W)), "float32")
    values, gradients = np.zeros((1, 1)), blank(1, V, "float32")
    shared_kl(
        np.zeros(1, np.int64),
        student,
        teacher,
        settings,
        NOTHING[:1],
        values,
        NOTHING[:1],
        gradients,
    )
    share = 12 / W
    if beta == 0.0:
        # The floor stands for the logarithm of 0.
        log_ratio = np.log(1.0 / W) - LOG_FLOOR
        expected = share * log_ratio - share + (1 - share) * np.log(1 - share) + share
    else:
        mixed = np.log(0.5 * (1 - share) + 0.5)
        expected = 0.5 * (share * np.log(2.0) + (1 - share) * (np.log(1 - share) - mixed) - mixed)
    np.testing.assert_allclose(values[0, 0], expected, rtol=TOLERANCE)
    assert np.isfinite(block_of(gradients, V)).all()
