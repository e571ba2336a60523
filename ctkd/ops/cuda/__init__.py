"""Operations on float32, bfloat16 and float16 rows on a CUDA device, by Triton kernels.

Rows are read and written where they lie, in a launch or two for each operation. Importing this
package imports no triton: tensors on the meta device are told what would be made, and cost what it
would cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from ctkd.ops import reference
from ctkd.ops.cuda import operators, row_loss_operators
from ctkd.ops.cuda.operators import DEVICES
from ctkd.ops.rows import Packed, RowLoss, Rows, RowValues, SoftmaxTerm

__all__ = [
    "DEVICES",
    "DTYPES",
    "OPERATIONS",
    "add_column_distance_",
    "chosen_log_probs",
    "clear_rows",
    "column_mass",
    "greedy_partners",
    "log_normalizers",
    "pack_scored",
    "row_loss",
    "softmax_backward",
    "top_k",
]

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
OPERATIONS = {
    *("add_column_distance_", "chosen_log_probs", "clear_rows", "column_mass"),
    *("greedy_partners", "log_normalizers"),
    *("softmax_backward", "top_k"),
    *("uld", "gold", "shared_kl", "bpm"),
}
"""What `ctkd.ops` may send here; row losses by the names of their kernels."""

# More ids of a row than this are compared with each other for too long, and do not fit registers.
_MOST_IDS = 1024
_MOST_TERMS = 4


def log_normalizers(
    rows: Rows,
    temperatures: Sequence[float],
    *,
    standardize: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    """See `ctkd.ops.reference.log_normalizers`."""
    every = list(map(float, temperatures))
    answers: Tensor = operators.row_statistics(
        rows.tensor, rows.index, rows.width, every, standardize, columns
    )
    return answers


def chosen_log_probs(
    rows: Rows,
    ids: Tensor,
    positions: int,
    normalizers: Tensor,
    temperatures: Sequence[float],
) -> list[Tensor]:
    """See `ctkd.ops.chosen_log_probs`."""
    every = list(map(float, temperatures))
    answers: list[Tensor] = operators.chosen_entries(
        rows.tensor, rows.index, ids, positions, normalizers, every
    )
    return answers


def pack_scored(
    targets: Tensor, ignored: int, size: int, length: int, chunk_ids: Tensor | None = None
) -> Packed:
    """See `ctkd.ops.reference.pack_scored`."""
    rows, mask, ids, chunks, *flat = operators.pack_scored(
        targets, chunk_ids, size, length, ignored
    )
    return Packed(rows, mask, ids, None if chunk_ids is None else chunks, *flat)


def column_mass(
    rows: Rows,
    sequence: Tensor,
    sequences: int,
    temperatures: Sequence[float],
    *,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `ctkd.ops.reference.column_mass`."""
    every = list(map(float, temperatures))
    answers: Tensor = operators.row_statistics(
        rows.tensor, rows.index, rows.width, every, standardize, None
    )
    normalizer, deviation = answers[0, :2] if standardize else (answers[0], None)
    mass: Tensor = operators.mass_of_columns(
        rows.tensor,
        rows.index,
        rows.width,
        sequence,
        sequences,
        normalizer,
        deviation,
        every[0],
    )
    return mass, answers


def add_column_distance_(
    distance: Tensor,
    rows: Rows,
    sequence: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    temperature: float,
) -> None:
    """See `ctkd.ops.reference.add_column_distance_`."""
    operators.column_distances(
        rows.tensor,
        rows.index,
        rows.width,
        sequence,
        targets,
        normalizers,
        float(temperature),
        distance,
    )


def greedy_partners(distance: Tensor) -> tuple[Tensor, Tensor]:
    """See `ctkd.ops.reference.greedy_partners`."""
    columns, has_partner = operators.greedy_partners(distance)
    return columns, has_partner


def top_k(rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """See `ctkd.ops.reference.top_k`."""
    if k > _MOST_IDS:
        return reference.top_k(rows, k)
    ids, values = operators.row_top(rows.tensor, rows.index, rows.width, k)
    return ids, values


def softmax_backward(
    rows: Rows,
    terms: Sequence[SoftmaxTerm],
    out: Rows,
    known: Rows | None = None,
    weights: Tensor | None = None,
) -> None:
    """See `ctkd.ops.reference.softmax_backward`."""
    ids, widths, standardize, own = 0, set(), [], True
    for term in terms:
        ids += term.ids.shape[1]
        standardize.append(term.log_normalizers.ndim == 2)
        if standardize[-1]:
            widths.add(term.width)
            # Statistics of the reference lack what the kernel needs.
            own &= term.log_normalizers.shape[0] == operators.STANDARDIZED
    if not own or len(terms) > _MOST_TERMS or ids > _MOST_IDS or len(widths) > 1:
        reference.softmax_backward(rows, terms, out, known, weights)
        return
    operators.row_gradients(
        rows.tensor,
        rows.index,
        out.tensor,
        out.index,
        out.width,
        known=None if known is None else known.tensor,
        known_index=None if known is None else known.index,
        known_width=0 if known is None else known.width,
        known_weights=weights,
        temperatures=list(map(attrgetter("temperature"), terms)),
        standardize=standardize,
        widths=list(map(attrgetter("width"), terms)),
        columns=list(map(attrgetter("columns"), terms)),
        normalizers=list(map(attrgetter("log_normalizers"), terms)),
        totals=list(map(attrgetter("totals"), terms)),
        ids=list(map(attrgetter("ids"), terms)),
        weights=list(map(attrgetter("weights"), terms)),
    )


def row_loss(
    loss: RowLoss,
    student: Rows,
    teacher: Rows,
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """See `ctkd.ops.reference.row_loss`."""
    if row_loss_operators.serves(loss, student, teacher):
        return row_loss_operators.row_loss(loss, student, teacher, per_row, out, differentiate)
    return reference.row_loss(loss, student, teacher, per_row, out, differentiate)


def clear_rows(tensor: Tensor, index: Tensor) -> None:
    """Write zeros to the rows of a (R, V') tensor that an index does not name."""
    operators.clear_rows(tensor, index)
