"""Columns of minus infinity, where a loss has no finite value."""

from __future__ import annotations

import torch

from ctkd.batch import Batch, Side
from ctkd.errors import BatchError
from ctkd.logits import RowLogits

__all__ = ["refuse_masked_columns"]


@torch.no_grad()
def refuse_masked_columns(batch: Batch) -> None:
    """Refuse a batch whose loss is infinite or nan because logits are minus infinity.

    Values that come from logits which are nan or infinite themselves are let pass: a trainer looks
    for those.

    Raises:
        BatchError: If a scored position has a logit of minus infinity.
    """
    masked = []
    for name, side in (("student", batch.student), ("teacher", batch.teacher)):
        if isinstance(side.logits, RowLogits):
            finite, where = _masked_column(side, side.logits)
            if not finite:
                return
            if where:
                sequence, position, column = where
                masked.append(
                    f"the {name}'s logits are minus infinity in column {column} "
                    f"(sequence {sequence}, position {position})"
                )
    if masked:
        raise BatchError(
            f"{' and '.join(masked)}, and this loss has no finite value there; mask no column that "
            "a scored token or the other side needs, cut off padded ones with student_vocab_size "
            "or teacher_vocab_size, or use a loss that takes probabilities of 0, such as uld"
        )


def _masked_column(side: Side, logits: RowLogits) -> tuple[bool, tuple[int, int, int] | None]:
    """True if no logit is nan or infinity, and the place of one that is minus infinity.

    That of a scored token comes first: no likelihood of a text survives it.
    """
    scored, labels = side.mask.flatten(), side.token_ids.flatten()
    first: tuple[int, int, int] | None = None
    for position, block in logits.blocks():
        kept = scored[position]
        position, block = position[kept], block[kept]
        if not bool((block < torch.inf).all()):
            return False, None
        masked = block == -torch.inf
        of_labels = masked.gather(1, labels[position].unsqueeze(1))
        for which, columns in ((of_labels, labels[position].unsqueeze(1)), (masked, None)):
            if not which.any() or (first and columns is None):
                continue
            row, column = which.nonzero()[0].tolist()
            if columns is not None:
                column = int(columns[row])
            entry = *divmod(int(position[row]), logits.shape[1]), column
            if columns is not None:
                return True, entry
            first = entry
    return True, first
