"""Arguments of the kernels: arrays and settings, grouped.

Rows are float32, or bfloat16 as uint16. n is the number of rows, V the student's columns, W the
teacher's. Settings that are annotated as float have to be Python floats: a kernel is compiled for
every combination of types it is called with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "BPMSettings",
    "GoldSettings",
    "RowArray",
    "SharedKLSettings",
    "SoftmaxTerms",
    "UldSettings",
]

_Ids = npt.NDArray[np.uint32]
_Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


class RowArray(NamedTuple):
    """Rows in memory.

    Attributes:
        values: float32, or bfloat16 as uint16, one dimension.
        starts: (n,) index in ``values`` of each row's first column; negative: no row.
    """

    values: npt.NDArray[Any]
    starts: _Integers


class SoftmaxTerms(NamedTuple):
    """The T terms of the gradient of n rows, each of one softmax.

    Attributes:
        widths: (T,) columns of each term.
        temperatures: (T,) divide the logits.
        epsilons: (T,) added to the standard deviation by which rows are divided first; negative:
            rows are not standardized.
        biases: (M, V) of 0 and -inf, added to the logits to restrict a softmax to some columns.
            A standard deviation is that of all columns nevertheless.
        bias_of: (T,) index of each term's row of ``biases``, or -1.
        log_normalizers: (T, n) of the rows.
        factors: (T, n) multiply the softmax.
        squares: (T, n) multiply the squares of its entries; (T, 0): no squares.
        bounds: (T + 1,) range of the columns of ``ids`` and ``weights`` that belong to each term.
        ids: (n, K) columns that get an addition.
        weights: (n, K) these additions; to the gradient of the standardized row where rows are
            standardized.
    """

    widths: _Integers
    temperatures: _Doubles
    epsilons: _Doubles
    biases: _Floats
    bias_of: _Integers
    log_normalizers: _Floats
    factors: _Floats
    squares: _Floats
    bounds: _Integers
    ids: _Integers
    weights: _Floats


class UldSettings(NamedTuple):
    """Settings of `uld`.

    Attributes:
        student_columns: (V,) 0 to V - 1.
        teacher_columns: (W,) 0 to W - 1.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.
    """

    student_columns: _Ids
    teacher_columns: _Ids
    student_temperature: float
    teacher_temperature: float


class GoldSettings(NamedTuple):
    """Settings of `gold`.

    Attributes:
        student_columns: (V,) the shared columns, in the teacher's order, then the others,
            ascending.
        teacher_columns: (W,) the shared columns, then the others, ascending.
        shared: How many columns are shared.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.
        beta: Weight of the teacher in the mixture of the divergence, from 0 to 1.
        matched_weight: Multiplies the divergence on shared columns; 0 leaves it out.
        unmatched_weight: Multiplies the distance on the other columns; 0 leaves it out.
        log_floor: Lower bound of log-probabilities.
    """

    student_columns: _Ids
    teacher_columns: _Ids
    shared: int
    student_temperature: float
    teacher_temperature: float
    beta: float
    matched_weight: float
    unmatched_weight: float
    log_floor: float


class SharedKLSettings(NamedTuple):
    """Settings of `shared_kl`.

    Attributes:
        student_ids: (M,) the student's shared columns.
        teacher_ids: (M,) the teacher's columns of the same tokens.
        student_others: Columns that make up the class of the rest; empty: no such class.
        teacher_others: The same of the teacher; empty where ``student_others`` is.
        student_width: V.
        temperature: Divides both sides' logits.
        beta: Weight of the teacher in the mixture of the divergence, from 0 to 1.
        lowest_logit: Lower bound of logits.
        log_floor: Lower bound of log-probabilities.
    """

    student_ids: _Ids
    teacher_ids: _Ids
    student_others: _Ids
    teacher_others: _Ids
    student_width: int
    temperature: float
    beta: float
    lowest_logit: float
    log_floor: float


class BPMSettings(NamedTuple):
    """Settings of `bpm`.

    Attributes:
        teacher_ids: (L,) teacher tokens of the entries.
        student_ids: (L,) classes of the entries, of which V is the rest.
        in_image: (V,) not 0 for columns that are a class where nothing was read.
        student_width: V.
        teacher_width: W.
        has_rest: Whether what is no class is one of its own.
        temperature: Divides both sides' logits.
        least_mass: Probability of a row's entries up to which it does not count.
        lowest_logit: Lower bound of logits.
        log_floor: Lower bound of log-probabilities.
    """

    teacher_ids: _Ids
    student_ids: _Ids
    in_image: _Ids
    student_width: int
    teacher_width: int
    has_rest: bool
    temperature: float
    least_mass: float
    lowest_logit: float
    log_floor: float
