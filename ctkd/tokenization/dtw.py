"""Dynamic time warping of two token sequences: which tokens of one go with which of the other.

This is how FuseLLM and MinED (arXiv 2401.10491) pair the tokens of two tokenizers. It looks at
spellings, not at places in the text, so it always pairs every token with at least one, also where
the two texts differ. `ctkd.tokenization.alignment` pairs by place in the text instead.
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from ctkd.errors import DataError

__all__ = ["accumulated_cost", "dtw", "token_costs"]


def accumulated_cost(cost: np.ndarray) -> np.ndarray:
    """Sum the cost along the cheapest path from the first pair of tokens to each pair.

    ``M[i, j] = cost[i, j] + min(M[i-1, j], M[i, j-1], M[i-1, j-1])``, infinite outside.

    Shape:
        cost: (T, S), teacher tokens by student tokens. Returns (T, S) float64.

    Raises:
        DataError: If `cost` is not a matrix.

    Example:
        >>> accumulated_cost(np.array([[0, 1], [1, 1], [1, 0]])).tolist()
        [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    """
    if cost.ndim != 2:
        raise DataError(
            f"the cost of pairing tokens has shape {cost.shape}; expected (teacher tokens, "
            "student tokens)"
        )
    rows, columns = cost.shape
    width = columns + 1
    bordered = np.full((rows + 1, width), np.inf)
    bordered[0, 0] = 0.0
    flat = bordered.reshape(-1)
    flat_cost = np.zeros((rows, width))
    flat_cost[:, :columns] = cost
    flat_cost = flat_cost.reshape(-1)
    # All cells of an anti-diagonal depend on earlier ones only. In a matrix laid out row by row
    # they lie `columns` apart: one row down is `width` cells on, one column left one cell back.
    for diagonal in range(rows + columns - 1 if rows and columns else 0):
        top = max(0, diagonal - columns + 1)
        count = min(rows - 1, diagonal) - top + 1
        start = top * width + diagonal - top
        span = (count - 1) * columns + 1
        corner, up, left, here = (
            slice(start + shift, start + shift + span, columns)
            for shift in (0, 1, width, width + 1)
        )
        cheapest = np.minimum(np.minimum(flat[up], flat[left]), flat[corner])
        flat[here] = flat_cost[corner] + cheapest
    return bordered[1:, 1:]


def dtw(cost: np.ndarray) -> list[tuple[int, int]]:
    """Pair two sequences so that the summed cost is least, in order and leaving out no token.

    Ties go to the diagonal step, then to the teacher's token before, then to the student's.

    Shape:
        cost: (T, S), teacher tokens by student tokens.

    Returns:
        Pairs (teacher position, student position) in order; none if a side is empty.

    Raises:
        DataError: If `cost` is not a matrix.

    Example:
        >>> dtw(np.array([[0, 1], [1, 1], [1, 0]]))
        [(0, 0), (1, 0), (2, 1)]
    """
    total = accumulated_cost(cost)
    row, column = total.shape[0] - 1, total.shape[1] - 1
    if row < 0 or column < 0:
        return []
    path = [(row, column)]
    while row or column:
        if not row or not column:
            row, column = max(row - 1, 0), max(column - 1, 0)
        else:
            corner, up, left = (
                total[row - 1, column - 1],
                total[row - 1, column],
                total[row, column - 1],
            )
            if corner <= up and corner <= left:
                row, column = row - 1, column - 1
            elif up <= left:
                row -= 1
            else:
                column -= 1
        path.append((row, column))
    return path[::-1]


def token_costs(student_texts: Sequence[str], teacher_texts: Sequence[str]) -> np.ndarray:
    """Levenshtein distances between the texts of tokens, one leading space of each left out.

    Shape:
        Returns (T, S): teacher tokens by student tokens.

    Example:
        >>> token_costs([" cat", "s"], [" cats"]).tolist()
        [[1, 3]]
    """
    return cdist(
        [text.removeprefix(" ") for text in teacher_texts],
        [text.removeprefix(" ") for text in student_texts],
        scorer=Levenshtein.distance,
        dtype=np.uint16,
    )
