"""A teacher that tells what it was asked, and one of whom little is stored, for `ctkd.testing`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from ctkd.batch import Batch
from ctkd.dense_logits import DenseLogits
from ctkd.logits import Logits
from ctkd.powers import Workspace
from ctkd.top_k import TopK
from ctkd.top_k_logits import TopKLogits

__all__ = ["OverheardLogits", "with_stored_teacher", "with_teacher"]


class OverheardLogits(DenseLogits):
    """Logits that remember what they were asked.

    Args:
        logits: The same logits; must be a `DenseLogits`.

    Attributes:
        temperatures: Those that were asked for, also through `masked`.
        counts: How many of the largest entries were asked for.

    Raises:
        TypeError: If there is no tensor behind the logits.

    Example:
        >>> import torch
        >>> heard = OverheardLogits(DenseLogits(torch.zeros(1, 1, 4)))
        >>> _ = heard.sorted_probs(3, temperature=2.0)
        >>> heard.temperatures, heard.counts
        ({2.0}, {3})
    """

    def __init__(self, logits: Logits) -> None:
        if not isinstance(logits, DenseLogits):
            raise TypeError(f"there is no tensor behind {type(logits).__name__}")
        super().__init__(
            logits.tensor, mask=logits.mask, rows=logits.rows, vocab_size=logits.shape[2]
        )
        self.temperatures: set[float] = set()
        self.counts: set[int] = set()

    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardise: bool = False
    ) -> tuple[Tensor, ...]:
        self.temperatures.update(temperatures)
        return super().log_probs_at(ids, temperatures, standardise=standardise)

    def top_ids(self, k: int) -> Tensor:
        self.counts.add(k)
        return super().top_ids(k)

    def log_mass(self, columns: Tensor, *, temperature: float = 1.0) -> Tensor:
        self.temperatures.add(temperature)
        return super().log_mass(columns, temperature=temperature)

    def column_mass(
        self,
        mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        standardise: bool = False,
        asked_next: Sequence[float] = (),
    ) -> Tensor:
        self.temperatures.update((temperature, *asked_next))
        return super().column_mass(
            mask, temperature=temperature, standardise=standardise, asked_next=asked_next
        )

    def column_distance(
        self, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        self.temperatures.add(temperature)
        return super().column_distance(targets, mask, temperature=temperature)

    def whole_rows(
        self,
        batch_index: Tensor,
        position: Tensor,
        *,
        temperature: float = 1.0,
        spread_tail: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        self.temperatures.add(temperature)
        return super().whole_rows(
            batch_index, position, temperature=temperature, workspace=workspace
        )


def with_teacher(batch: Batch, logits: Logits) -> Batch:
    """The same batch with other logits of the teacher; they take over its mask."""
    return replace(batch, teacher=replace(batch.teacher, logits=logits))


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
    return with_teacher(batch, TopKLogits(kept, mask=batch.teacher.mask))
