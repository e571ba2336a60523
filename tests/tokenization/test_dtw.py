import itertools

import numpy as np
import pytest

from baselines import mined_maps
from ctkd.errors import DataError
from ctkd.tokenization.dtw import accumulated_cost, dtw, token_costs
from tests.golden import golden_values

GOLDEN = golden_values.load("mined")["dtw"]


def texts(tokens: list[str]) -> list[str]:
    return [token.replace("Ġ", " ").replace("▁", " ") for token in tokens]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "+".join(case["teacher_tokens"]))
def test_agrees_with_the_released_code(case):
    cost = token_costs(texts(case["student_tokens"]), texts(case["teacher_tokens"]))
    matches = dtw(cost)
    assert matches == [tuple(pair) for pair in case["matches"]]
    total = accumulated_cost(cost)
    assert total.tolist() == case["matrix"]
    assert total[-1, -1] == case["cost"] == sum(cost[pair] for pair in matches)
    rows, columns = cost.shape
    assert case["teacher_to_student"] == [[j for i, j in matches if i == r] for r in range(rows)]
    assert case["student_to_teacher"] == [[i for i, j in matches if j == c] for c in range(columns)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3), (9, 4), (12, 30), (40, 40)])
def test_agrees_with_the_textbook(shape):
    for seed, largest in itertools.product(range(10), (1, 3, 1000)):
        cost = np.random.RandomState(seed).randint(0, largest + 1, size=shape)
        total, path = mined_maps.warp(cost.tolist())
        assert accumulated_cost(cost).tolist() == total
        assert dtw(cost) == path


@pytest.mark.parametrize(
    ("cost", "path"),
    [
        ([[0, 0], [0, 0]], [(0, 0), (1, 1)]),  # diagonal, although all ways cost the same
        ([[0, 1, 9], [1, 9, 0], [9, 0, 0]], None),
    ],
)
def test_ties_go_diagonally_then_up(cost, path):
    # At the end of the second case the ways from above and from the left cost the same.
    assert dtw(np.array(cost)) == (path or [(0, 0), (0, 1), (1, 2), (2, 2)])


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_an_empty_side_pairs_nothing(shape):
    assert dtw(np.zeros(shape)) == []
    assert accumulated_cost(np.zeros(shape)).shape == shape


def test_a_cost_that_is_no_matrix_is_refused():
    with pytest.raises(DataError, match=r"has shape \(3,\); expected \(teacher tokens, student"):
        dtw(np.zeros(3))


def test_one_leading_space_does_not_count_and_a_long_text_does_not_wrap():
    costs = token_costs([" cat", "  cat", "x" * 300], ["cat", ""])
    assert costs.tolist() == [[0, 1, 300], [3, 4, 300]]
