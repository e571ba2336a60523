"""Whole rows of a teacher's logits, for `ctkd.row_pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

from ctkd.compiled import RowArray, readable
from ctkd.logits import Logits
from ctkd.powers import Workspace
from ctkd.row_logits import RowLogits
from ctkd.rows import block_rows

__all__ = ["RowsAhead", "TeacherRows"]


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRows:
    """Whole rows of a teacher, as the loss reads them."""

    logits: Logits
    temperature: float
    spread_tail: bool

    def read(self, positions: Tensor, workspace: Workspace) -> Tensor:
        """Raw logits of flattened positions, (n, W), until more is read into the workspace."""
        return self.logits.whole_rows(
            positions // max(self.logits.shape[1], 1),
            positions % max(self.logits.shape[1], 1),
            temperature=self.temperature,
            spread_tail=self.spread_tail,
            workspace=workspace,
        )

    def array(self, positions: Tensor, workspace: Workspace) -> RowArray:
        """Do what `read` does for compiled loops."""
        if _reads_its_source(self.logits):
            return self.logits.source.array(self.logits.flat_rows[positions], workspace)
        return RowArray.of(readable(self.read(positions, workspace)))

    @property
    def rows_per_array(self) -> int:
        """How many rows `array` should be asked for at a time."""
        if _reads_its_source(self.logits):
            return self.logits.source.rows_per_array
        return self.rows_at_once

    @property
    def rows_at_once(self) -> int:
        """How many rows `read` should be asked for at a time."""
        if isinstance(self.logits, RowLogits):
            return self.logits.source.rows_at_once
        return block_rows(self.logits.shape[2], self.logits.device)


def _reads_its_source(logits: Logits) -> TypeGuard[RowLogits]:
    """Whether whole rows are those of the source, and nobody listens to who asks."""
    return isinstance(logits, RowLogits) and type(logits).whole_rows is RowLogits.whole_rows


class RowsAhead:
    """Teacher rows in the order of a pass, as many at a time as are read at once."""

    def __init__(self, teacher: TeacherRows, positions: Tensor) -> None:
        self.teacher, self.positions = teacher, positions
        self.start = self.stop = 0
        self.rows: Tensor | None = None
        self.rows_in_memory: RowArray | None = None
        self.workspace = Workspace()

    def read(self, which: slice) -> Tensor:
        """Rows of a part of the pass, (n, W)."""
        if self.rows is None or which.start < self.start or which.stop > self.stop:
            size = max(self.teacher.rows_at_once, which.stop - which.start)
            self.start, self.stop = which.start, which.start + size
            self.rows = self.teacher.read(self.positions[self.start : self.stop], self.workspace)
        return self.rows[which.start - self.start : which.stop - self.start]

    def array(self, which: slice) -> RowArray:
        """Do what `read` does for compiled loops."""
        if self.rows_in_memory is None or which.start < self.start or which.stop > self.stop:
            size = max(self.teacher.rows_per_array, which.stop - which.start)
            self.start, self.stop = which.start, which.start + size
            some = self.positions[self.start : self.stop]
            self.rows_in_memory = self.teacher.array(some, self.workspace)
        return self.rows_in_memory.some(slice(which.start - self.start, which.stop - self.start))
