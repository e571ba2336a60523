"""Softmax of rows by compiled loops, against numpy in float64."""

import numpy as np
import pytest

from ctkd.ops.cpu.arrays import SoftmaxTerms
from ctkd.ops.cpu.softmax_rows import (
    column_mass,
    log_normalizers,
    softmax_gradients,
)
from tests.ops.cpu.row_arrays import (
    DTYPES,
    FILL,
    TOLERANCE,
    assert_close,
    blank,
    block_of,
    check_gaps,
    row_array,
    softmax,
)

N, V = 5, 70
WHICH = np.array([4, 0, 2])
SKIPPED = [1, 3]
EPSILON = 0.01
ALL_COLUMNS = np.empty(0, np.float32)
TEMPERATURES = np.array([1.0, 0.5, 3.0])
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_epsilon = pytest.mark.parametrize("epsilon", [-1.0, EPSILON], ids=["plain", "standardized"])


def logits(dtype: str, seed: int = 0):
    """Rows in memory, and what they hold."""
    block = 4.0 * np.random.default_rng(seed).normal(size=(N, V)) - 1.0
    rows = row_array(block, dtype)
    return rows, block_of(rows, V)


def bias_of(columns) -> np.ndarray:
    bias = np.full(V, -np.inf, np.float32)
    bias[columns] = 0.0
    return bias


def standardized(block, epsilon: float):
    return block if epsilon < 0 else block / (block.std(-1, ddof=1, keepdims=True) + epsilon)


def log_sum_exp(block):
    top = block.max(-1)
    return top + np.log(np.exp(block - top[..., None]).sum(-1))


@by_dtype
@by_epsilon
@pytest.mark.parametrize("columns", [None, range(3, 41, 2)], ids=["all", "some"])
def test_log_normalizers(dtype, epsilon, columns):
    rows, block = logits(dtype)
    bias = ALL_COLUMNS if columns is None else bias_of(columns)
    answers = np.full((len(TEMPERATURES), N), FILL, np.float32)
    deviations = np.full(N, FILL, np.float32)
    log_normalizers(WHICH, rows, V, TEMPERATURES, epsilon, bias, answers, deviations)
    kept = standardized(block, epsilon)[:, slice(None) if columns is None else list(columns)]
    for answer, temperature in zip(answers, TEMPERATURES, strict=True):
        assert_close(answer[WHICH], log_sum_exp(kept / temperature)[WHICH])
    assert (answers[:, SKIPPED] == FILL).all()
    written = WHICH if epsilon >= 0.0 else []
    assert_close(deviations[written], block.std(-1, ddof=1)[written])
    assert (np.delete(deviations, written) == FILL).all()
    check_gaps(rows, V)


@by_epsilon
def test_a_bias_that_leaves_no_column_gives_minus_infinity(epsilon):
    rows, _ = logits("float32")
    answers = np.zeros((1, N), np.float32)
    log_normalizers(WHICH, rows, V, np.ones(1), epsilon, bias_of([]), answers, answers[0].copy())
    assert (answers[0, WHICH] == -np.inf).all()


def test_a_temperature_beside_another_changes_nothing():
    rows, _ = logits("float32")
    together, alone = np.zeros((3, N), np.float32), np.zeros((1, N), np.float32)
    nowhere = np.empty(0, np.float32)
    log_normalizers(WHICH, rows, V, TEMPERATURES, -1.0, ALL_COLUMNS, together, nowhere)
    log_normalizers(WHICH, rows, V, TEMPERATURES[2:], -1.0, ALL_COLUMNS, alone, nowhere)
    assert np.array_equal(together[2], alone[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_log_normalizers_of_rows_that_are_not_finite(value):
    block = np.zeros((2, V))
    block[0, 3] = value
    answers = np.zeros((1, 2), np.float32)
    rows = row_array(block, "float32")
    settings = V, np.ones(1), -1.0, ALL_COLUMNS
    log_normalizers(np.arange(2), rows, *settings, answers, np.empty(0, np.float32))
    assert np.isnan(answers[0, 0])
    assert_close(answers[0, 1], np.log(V))


@by_dtype
@by_epsilon
def test_column_mass(dtype, epsilon):
    rows, block = logits(dtype)
    answers, mass = np.zeros((2, N), np.float32), np.ones(V, np.float32)
    deviations = np.zeros((2, N), np.float32)
    column_mass(WHICH, rows, V, TEMPERATURES[1:], epsilon, answers, deviations[0], mass)
    scaled = standardized(block, epsilon) / TEMPERATURES[1]
    assert_close(mass, 1.0 + softmax(scaled)[WHICH].sum(0))
    expected = np.zeros_like(answers)
    settings = V, TEMPERATURES[1:], epsilon, ALL_COLUMNS
    log_normalizers(WHICH, rows, *settings, expected, deviations[1])
    assert_close(answers, expected)
    assert np.array_equal(*deviations)


def terms_of(block, widths, temperatures, epsilons, biases, bias_of_terms, has_squares, seed=1):
    """Terms with random factors and additions, and the gradient of the rows by numpy."""
    generator = np.random.default_rng(seed)
    count, per_term = len(widths), 2
    factors = generator.normal(size=(count, N)).astype(np.float32)
    squares = generator.normal(size=(count if has_squares else 0, N)).astype(np.float32)
    ids = np.concatenate(
        [generator.integers(0, width, (N, per_term)) for width in widths], axis=1
    ).astype(np.int64)
    weights = generator.normal(size=ids.shape).astype(np.float32)
    normalizers, expected = np.empty((count, N), np.float32), np.zeros((N, V))
    for term, (width, temperature, epsilon) in enumerate(
        zip(widths, temperatures, epsilons, strict=True)
    ):
        raw = block[:, :width]
        scaled = standardized(raw, epsilon)
        if bias_of_terms[term] >= 0:
            scaled = scaled + biases[bias_of_terms[term], :width]
        normalizers[term] = log_sum_exp(scaled / temperature)
        probs = softmax(scaled / temperature)
        change = probs * factors[term][:, None]
        if has_squares and epsilon < 0:
            change += probs**2 * squares[term][:, None]
        for entry in range(per_term * term, per_term * (term + 1)):
            change[np.arange(N), ids[:, entry]] += weights[:, entry]
        if epsilon >= 0:
            change = np.stack(
                [
                    jacobian(row, epsilon).T @ of_row / temperature
                    for row, of_row in zip(raw, change, strict=True)
                ]
            )
        expected[:, :width] += change
    terms = SoftmaxTerms(
        np.array(widths),
        np.array(temperatures),
        np.array(epsilons),
        biases,
        np.array(bias_of_terms),
        normalizers,
        factors,
        squares if has_squares else np.empty((count, 0), np.float32),
        np.arange(count + 1) * per_term,
        ids,
        weights,
    )
    return terms, expected


def jacobian(row, epsilon: float):
    """Derivatives of ``row / (deviation + epsilon)``: entry i, j is that of i by j."""
    deviation = row.std(ddof=1)
    divisor = deviation + epsilon
    slope = (row - row.mean()) / ((row.size - 1) * deviation)
    return np.eye(row.size) / divisor - np.outer(row, slope) / divisor**2


NO_BIAS = np.empty((0, V), np.float32)
SOME_BIASES = np.stack([bias_of(range(5, 50, 3)), bias_of(range(20))])
CASES = {
    "one term": ([V], [1.5], [-1.0], NO_BIAS, [-1], False),
    "squares": ([V, V], [2.0, 0.5], [-1.0, -1.0], NO_BIAS, [-1, -1], True),
    "standardized": ([V], [0.7], [EPSILON], NO_BIAS, [-1], False),
    "narrower": ([V - 9, V], [1.0, 2.0], [-1.0, EPSILON], NO_BIAS, [-1, -1], False),
    "restricted": ([V, V], [1.0, 2.0], [-1.0, -1.0], SOME_BIASES, [1, 0], False),
    "restricted squares": ([V, V], [1.0, 2.0], [-1.0, -1.0], SOME_BIASES, [-1, 0], True),
    "restricted and standardized": ([V], [1.0], [EPSILON], SOME_BIASES, [1], False),
    "nothing": ([], [], [], NO_BIAS, [], False),
}
NOTHING_KNOWN = np.empty(0, np.float32)


def terms_of_case(case: str, block):
    if case != "nothing":
        return terms_of(block, *CASES[case])
    none = np.empty((0, N), np.float32)
    terms = SoftmaxTerms(
        np.empty(0, np.int64),
        np.empty(0),
        np.empty(0),
        NO_BIAS,
        np.empty(0, np.int64),
        none,
        none,
        none[:, :0],
        np.zeros(1, np.int64),
        np.empty((N, 0), np.int64),
        np.empty((N, 0), np.float32),
    )
    return terms, np.zeros((N, V))


@by_dtype
@pytest.mark.parametrize("case", CASES)
def test_softmax_gradients(case, dtype):
    rows, block = logits(dtype)
    terms, expected = terms_of_case(case, block)
    out = blank(N, V, dtype)
    softmax_gradients(WHICH, rows, terms, out, NOTHING_KNOWN, out, V)
    gradient = block_of(out, V)
    assert_close(gradient[WHICH], expected[WHICH], dtype)
    assert (gradient[SKIPPED] == FILL).all()
    check_gaps(out, V)


@by_dtype
def test_a_known_gradient_is_added_but_for_weights_of_0(dtype):
    rows, block = logits(dtype)
    terms, expected = terms_of_case("one term", block)
    known_block = np.random.default_rng(2).normal(size=(N, V))
    known_block[0] = np.nan
    out = row_array(known_block, dtype)
    weights = np.array([0.0, 1.0, -2.0, 1.0, 0.5], np.float32)
    known = np.nan_to_num(block_of(out, V))
    softmax_gradients(WHICH, rows, terms, out, weights, out, V)
    expected += weights[:, None] * known
    assert_close(block_of(out, V)[WHICH], expected[WHICH], dtype, scale=4.0)


@by_dtype
def test_the_gradient_may_overwrite_the_rows(dtype):
    rows, block = logits(dtype)
    terms, expected = terms_of_case("narrower", block)
    softmax_gradients(WHICH, rows, terms, rows, NOTHING_KNOWN, rows, V)
    assert_close(block_of(rows, V)[WHICH], expected[WHICH], dtype)
    assert np.array_equal(block_of(rows, V)[SKIPPED], block[SKIPPED])


@pytest.mark.parametrize("epsilon", [-1.0, EPSILON])
@pytest.mark.parametrize("has_squares", [False, True])
def test_a_softmax_of_no_column_has_no_gradient(epsilon, has_squares):
    rows, block = logits("float32")
    biases = bias_of([])[None]
    terms, _ = terms_of(block, [V], [1.0], [epsilon], NO_BIAS, [-1], has_squares)
    answers = np.zeros((1, N), np.float32)
    log_normalizers(WHICH, rows, V, np.ones(1), epsilon, biases[0], answers, answers[0].copy())
    terms = terms._replace(
        biases=biases,
        bias_of=np.zeros(1, np.int64),
        log_normalizers=answers,
        weights=terms.weights * 0,
    )
    out = blank(N, V, "float32")
    softmax_gradients(WHICH, rows, terms, out, NOTHING_KNOWN, out, V)
    assert (block_of(out, V)[WHICH] == 0.0).all()


def test_a_constant_row_has_a_finite_standardized_gradient():
    block = np.full((N, V), 2.5)
    rows = row_array(block, "float32")
    terms, _ = terms_of(block, [V], [1.0], [-1.0], NO_BIAS, [-1], False)
    answers = np.zeros((1, N), np.float32)
    log_normalizers(WHICH, rows, V, np.ones(1), EPSILON, ALL_COLUMNS, answers, answers[0].copy())
    terms = terms._replace(
        epsilons=np.array([EPSILON]),
        log_normalizers=answers,
        weights=terms.weights * 0,
    )
    out = blank(N, V, "float32")
    softmax_gradients(WHICH, rows, terms, out, NOTHING_KNOWN, out, V)
    expected = terms.factors[0, :, None] / V / EPSILON * np.ones(V)
    # The logits are 250 here, and so is the exponents' rounding larger.
    np.testing.assert_allclose(block_of(out, V)[WHICH], expected[WHICH], rtol=250 * TOLERANCE)
