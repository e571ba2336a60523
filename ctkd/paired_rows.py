"""Pairs of whole rows of both models, read a block at a time, and what is done with a block."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctkd.block_sizes import least_rows
from ctkd.compiled import RowArray, readable
from ctkd.pair_solvers import CompiledSolver, PairArrays, RowSolution, RowSolver
from ctkd.powers import Workspace
from ctkd.row_logits import RowLogits
from ctkd.row_requests import Places
from ctkd.rows import block_rows, skips_padding
from ctkd.teacher_rows import TeacherRows
from ctkd.threads import over_rows

__all__ = ["PairedRows"]


@dataclass(frozen=True, slots=True, eq=False)
class PairedRows:
    """Pairs of whole rows and what is to be done with them."""

    student: RowLogits
    teacher: TeacherRows
    rows: Tensor
    solver: RowSolver
    compiled: CompiledSolver | None
    parts: int

    @property
    def block_size(self) -> int:
        columns = max(self.student.shape[2], self.teacher.logits.shape[2])
        rows, for_all_threads = block_rows(columns, self.rows.device), least_rows(self.rows.device)
        # Sorting gives whole rows to threads; one row over would keep a single one busy.
        return rows if rows < for_all_threads else rows // for_all_threads * for_all_threads

    @property
    def valid(self) -> Tensor:
        return (self.rows >= 0).all(-1)

    def places(self) -> Places:
        """Which pair stands in which row of the student's source."""
        source = self.student.source
        if not self.student.flat_rows.shape[0]:
            none = torch.full(self.valid.shape, source.num_rows, device=self.rows.device)
            return Places.of(none, self.valid, source.num_rows, self.student.shape[2])
        rows = self.student.flat_rows[self.rows[:, 0].clamp_min(0)]
        return Places.of(rows, self.valid, source.num_rows, self.student.shape[2])

    def blocks(self, places: Places) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield pairs (n,), student rows (n, V) and teacher rows (n, W)."""
        pairs = torch.arange(self.rows.shape[0], device=self.rows.device)
        if skips_padding(self.rows.device):
            pairs = pairs[self.valid]
        # A head computes more rows at a time than fit into a block.
        chunk = max(
            self.block_size,
            *(
                one
                for one in (self.student.source.rows_at_once, self.teacher.rows_at_once)
                if one > self.block_size * 4
            ),
            1,
        )
        workspace, teacher_workspace = Workspace(), Workspace()
        for start in range(0, pairs.shape[0], chunk):
            some = pairs[start : start + chunk]
            student = self.student.source.read(places.rows[some], workspace)
            student = student[:, : self.student.shape[2]]
            teacher = self.teacher.read(self.rows[some, 1].clamp_min(0), teacher_workspace)
            for inner in range(0, some.shape[0], self.block_size):
                which = slice(inner, inner + self.block_size)
                yield some[which], student[which], teacher[which]

    def arrays(self, places: Places) -> Iterator[tuple[Tensor, RowArray, RowArray]]:
        """Yield pairs (n,), student rows (n, V) and teacher rows (n, W) for compiled loops."""
        pairs = self.valid.nonzero().squeeze(-1)
        source, workspace, teacher_workspace = self.student.source, Workspace(), Workspace()
        size, teacher_size = max(source.rows_per_array, 1), max(self.teacher.rows_per_array, 1)
        for start in range(0, pairs.shape[0], size):
            some = pairs[start : start + size]
            student = source.array(places.rows[some], workspace)
            for inner in range(0, some.shape[0], teacher_size):
                which = slice(inner, inner + teacher_size)
                teacher = self.teacher.array(self.rows[some[which], 1], teacher_workspace)
                yield some[which], student.some(which), teacher

    def solve_block(
        self,
        student_block: Tensor,
        teacher_block: Tensor,
        numbers: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        """What the solver says of a block, by whichever way is the faster one."""
        if self.compiled is None:
            return self.solver(student_block, teacher_block, numbers, with_gradient)
        count = student_block.shape[0]
        gradient = torch.empty_like(student_block, memory_format=torch.contiguous_format)
        found = np.empty((count, self.parts))
        numbers = gradient[:, :0] if numbers is None else numbers
        arrays = PairArrays(
            RowArray.of(readable(student_block)),
            RowArray.of(readable(teacher_block)),
            numbers.numpy(),
            found,
            RowArray.of(gradient if with_gradient else gradient[:0]),
            np.zeros((count, numbers.shape[1]), np.float32),
        )
        over_rows(count, functools.partial(self.compiled, arrays))
        return RowSolution(
            torch.from_numpy(found),
            gradient if with_gradient else None,
            torch.from_numpy(arrays.per_pair_gradient) if numbers.shape[1] else None,
        )
