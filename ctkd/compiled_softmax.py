"""Statistics and gradients of softmaxes by compiled loops, shared out among threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctkd.compiled import RowArray, has_kernels, readable
from ctkd.errors import BatchError
from ctkd.powers import Workspace
from ctkd.rows import STANDARD_DEVIATION_EPSILON, log_normalisers
from ctkd.threads import over_rows

__all__ = ["SoftmaxTerm", "SoftmaxTerms", "Summed", "log_normalisers_of", "put_statistics"]

_NOT_STANDARDISED = -1.0


class Summed(NamedTuple):
    """Which probabilities are added up, and where.

    Attributes:
        sequence: (n,) int64 of each row, ascending.
        selected: (n,) bool.
        mass: (B, V), added to.
    """

    sequence: Tensor
    selected: Tensor
    mass: Tensor


def _epsilon_of(standardise: bool) -> float:
    """What compiled loops add to a deviation; negative where rows are not divided by it."""
    return STANDARD_DEVIATION_EPSILON if standardise else _NOT_STANDARDISED


def put_statistics(
    rows: RowArray,
    width: int,
    temperatures: Sequence[float],
    standardise: bool,
    answers: Tensor,
    summed: Summed | None = None,
) -> None:
    """Put log-normalisers (T, n), and add up probabilities at the first temperature.

    Args:
        rows: n of them.
        width: V, of which columns.
        temperatures: T, no two alike.
        standardise: Divide each row by its deviation first.
        answers: (T, n) float32.
        summed: What is added up; nothing by default.
    """
    from ctkd.kernels.softmax_rows import put_log_normalisers

    divisors = np.array(temperatures, np.float64)
    found = np.empty((len(divisors), len(rows.starts)), np.float32)

    def put(some: slice, mass: npt.NDArray[np.float32]) -> None:
        put_log_normalisers(
            rows.values,
            rows.starts,
            some.start,
            some.stop,
            width,
            divisors,
            _epsilon_of(standardise),
            found,
            selected,
            mass,
        )

    if summed is None:
        selected, nothing = np.zeros(len(rows.starts), bool), np.empty(0, np.float32)
        over_rows(len(rows.starts), lambda some: put(some, nothing))
    else:
        selected = summed.selected.numpy()
        parts = _parts_of_sequences(summed)

        def put_parts(some: slice) -> None:
            for one in parts[some]:
                put(one.rows, one.mass.numpy())

        over_rows(len(parts), put_parts)
        for one in parts:
            if one.is_apart:
                summed.mass[one.sequence] += one.mass
    answers[:] = torch.from_numpy(found)


def log_normalisers_of(block: Tensor, temperature: float, standardise: bool) -> Tensor:
    """Log of the softmax denominator of each row of a block (n, V), (n,)."""
    if not has_kernels(block.device, block.dtype):
        return log_normalisers(block, [temperature], standardise, Workspace())[0]
    answers = block.new_empty(1, block.shape[0])
    put_statistics(
        RowArray.of(readable(block)), block.shape[1], [temperature], standardise, answers
    )
    return answers[0]


class _Part(NamedTuple):
    """Rows of one sequence, and where their probabilities are added up."""

    sequence: int
    rows: slice
    mass: Tensor
    is_apart: bool


def _parts_of_sequences(summed: Summed) -> list[_Part]:
    """Every sequence, or halves and so on where there are fewer sequences than threads."""
    sequences, firsts, counts = np.unique(
        summed.sequence.numpy(), return_index=True, return_counts=True
    )
    pieces = max(1, -(-torch.get_num_threads() // max(len(sequences), 1)))
    parts = []
    for sequence, first, count in zip(sequences, firsts, counts, strict=True):
        bounds = np.linspace(first, first + count, min(pieces, count) + 1).astype(int)
        for piece, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            mass = summed.mass[sequence]
            if piece:
                mass = torch.zeros_like(mass)
            parts.append(_Part(int(sequence), slice(int(start), int(stop)), mass, piece > 0))
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxTerm:
    """What one softmax adds to the gradient of n rows.

    Attributes:
        width: Columns.
        temperature: Divides the logits.
        standardise: Whether rows are divided by their deviation first.
        shift: (n, 1) log-normalisers, negated, times log2 e.
        factor: (n, 1), multiplies the softmax.
        factor_of_square: (n, 1), multiplies its square, if anything does.
        ids: (n, K).
        weights: (n, K), added there; before a deviation is carried back.
    """

    width: int
    temperature: float
    standardise: bool
    shift: Tensor
    factor: Tensor
    factor_of_square: Tensor | None
    ids: Tensor
    weights: Tensor


class SoftmaxTerms:
    """Terms of n rows as compiled loops take them.

    Args:
        terms: All of them.
        count: n.
    """

    def __init__(self, terms: Sequence[SoftmaxTerm], count: int) -> None:
        self.widths = np.array([one.width for one in terms], np.int64)
        self.temperatures = np.array([one.temperature for one in terms], np.float64)
        self.epsilons = np.array([_epsilon_of(one.standardise) for one in terms], np.float64)
        self.shifts = _stacked([one.shift for one in terms], count)
        self.factors = _stacked([one.factor for one in terms], count)
        squares: list[Tensor] = []
        if any(one.factor_of_square is not None for one in terms):
            zeros = torch.zeros((count, 1), dtype=torch.float32, device="cpu")
            squares = [
                zeros if one.factor_of_square is None else one.factor_of_square for one in terms
            ]
        self.factors_of_square = _stacked(squares, count if squares else 0)
        for one in terms:
            _check_columns(one.ids, one.width)
        self.bounds = np.cumsum([0, *(one.ids.shape[1] for one in terms)])
        none = torch.empty((count, 0), dtype=torch.float32, device="cpu")
        self.ids = _side_by_side([one.ids for one in terms] or [none.long()])
        self.weights = _side_by_side([one.weights for one in terms] or [none])

    def put_gradients(
        self,
        which: slice,
        rows: RowArray,
        gradients: RowArray,
        width: int,
        known: RowArray | None = None,
        known_weights: Tensor | None = None,
    ) -> None:
        """Put the gradient of some of the n rows.

        Args:
            which: m of them.
            rows: (m,) their logits.
            gradients: (m,) where it is put. May be the rows.
            width: All columns of a row.
            known: (m,) a gradient that is added. May be the gradients.
            known_weights: (n,) what multiplies it.
        """
        from ctkd.kernels.softmax_rows import add_softmax_gradients

        known = known or gradients
        weights = np.empty(0, np.float32) if known_weights is None else known_weights.numpy()
        over_rows(
            which.stop - which.start,
            lambda some: add_softmax_gradients(
                *rows,
                some.start,
                some.stop,
                self.widths,
                self.temperatures,
                self.epsilons,
                which.start,
                self.shifts,
                self.factors,
                self.factors_of_square,
                self.bounds,
                self.ids,
                self.weights,
                *known,
                weights,
                *gradients,
                width,
            ),
        )


def _check_columns(ids: Tensor, width: int) -> None:
    """Refuse what compiled loops, which check nothing, would write elsewhere."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < width:
        raise BatchError(
            f"ids go from {int(ids.min())} to {int(ids.max())}, but the logits have {width} "
            "columns; these are another tokenizer's ids, or they were changed since"
        )


def _side_by_side(parts: list[Tensor]) -> npt.NDArray[Any]:
    """Tensors (n, any) as one array, a single one where it lies."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    found: npt.NDArray[Any] = whole.contiguous().numpy()
    return found


def _stacked(columns: Sequence[Tensor], count: int) -> npt.NDArray[np.float32]:
    """Columns (n, 1) as rows, (T, n)."""
    found: npt.NDArray[np.float32] = np.empty((len(columns), count), np.float32)
    for row, column in zip(found, columns, strict=True):
        row[:] = column.squeeze(-1).numpy()
    return found
