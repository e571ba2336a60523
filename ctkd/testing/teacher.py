"""A teacher of whom little is stored, for `ctkd.testing`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ctkd.batch import Batch
from ctkd.logits import DenseLogits, TopK, TopKLogits

__all__ = ["with_stored_teacher"]


def with_stored_teacher(batch: Batch, k: int, temperatures: Iterable[float] = (1.0, 2.0)) -> Batch:
    """The same batch with what a cache would hold of the teacher: k entries of each row.

    Args:
        batch: With a live teacher.
        k: Entries kept.
        temperatures: Kept for these; for 1 if there are none.

    Raises:
        TypeError: If the teacher is no live one.

    Example:
        >>> from ctkd.testing import make_inputs
        >>> batch = with_stored_teacher(Batch.from_causal_lm(**make_inputs()), 3)
        >>> batch.teacher.logits.top_ids(3).shape
        torch.Size([3, 4, 3])
    """
    live = batch.teacher.logits
    if not isinstance(live, DenseLogits):
        raise TypeError(f"there is no tensor behind {type(live).__name__}")
    kept = TopK.of(live, batch.teacher.token_ids, k, sorted(temperatures) or [1.0])
    logits = TopKLogits(kept, mask=batch.teacher.mask)
    return replace(batch, teacher=replace(batch.teacher, logits=logits))
