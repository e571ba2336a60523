"""Chunks on tensors: the smallest spans of text that both tokenizers cut out whole.

Equal chunk numbers on both sides of a batch cover the same bytes. At the first token of a chunk
both models have read exactly the same text, so their next-token distributions answer one question;
and the log-likelihoods of a chunk's tokens add up to that of the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch, Side
from ctkd.errors import BatchError
from ctkd.ops import kernels_for

__all__ = [
    "PAIRINGS",
    "AlignedPositions",
    "ChunkTable",
    "align_positions",
    "chunk_positions",
    "chunk_sums",
    "chunk_table",
    "chunk_tables",
    "chunks_on_both_sides",
    "flat_positions",
    "pick",
]

PAIRINGS = ("position", "chunk")


def chunk_sums(
    side: Side, values: Tensor, num_chunks: int, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Sum a value per position over each chunk, and count its tokens.

    Shape:
        ``values`` (B, S) give (B, C), differentiable, and (B, C) int64; a chunk without a position
        gets 0.

    Args:
        side: Whose chunks they are.
        values: What is added up.
        num_chunks: C.
        dtype: Of the sums; default that of the values.
    """
    dtype = dtype or values.dtype
    kernels = side.chunk_ids is not None and kernels_for("chunks", values)
    if kernels:
        found, sizes = kernels.chunk_sums(values, side.mask, side.chunk_ids, num_chunks)
        return found.to(dtype), sizes
    chunk_ids, in_chunk = _chunk_ids(side)
    values = values.to(dtype).masked_fill(~in_chunk, 0.0)
    sums = values.new_zeros(values.shape[0], num_chunks).scatter_add(1, chunk_ids, values)
    sizes = torch.zeros_like(sums, dtype=torch.int64)
    return sums, sizes.scatter_add(1, chunk_ids, in_chunk.to(torch.int64))


class ChunkTable(NamedTuple):
    """Chunks of a side, (B, C) int64 each; 0 where it does not have one.

    Attributes:
        sizes: Tokens.
        first: Position of the first token.
        last: Position of the last token.
    """

    sizes: Tensor
    first: Tensor
    last: Tensor

    def shared_with(self, other: ChunkTable) -> Tensor:
        """Chunks that hold a scored token of both sides, (B, C) bool."""
        return (self.sizes > 0) & (other.sizes > 0)


def chunk_table(side: Side, num_chunks: int) -> ChunkTable:
    """Sizes and ends of a side's chunks."""
    kernels = side.chunk_ids is not None and kernels_for("chunks", side.chunk_ids)
    if kernels:
        return ChunkTable(*kernels.chunk_table(side.mask, side.chunk_ids, num_chunks))
    chunk_ids, in_chunk = _chunk_ids(side)
    size = chunk_ids.shape[1]
    position = torch.arange(size, device=chunk_ids.device).expand_as(chunk_ids)
    zeros = chunk_ids.new_zeros(chunk_ids.shape[0], num_chunks)
    sizes = zeros.scatter_add(1, chunk_ids, in_chunk.to(torch.int64))
    starts = torch.full_like(zeros, size)
    starts = starts.scatter_reduce(1, chunk_ids, position.masked_fill(~in_chunk, size), "amin")
    last = zeros.scatter_reduce(1, chunk_ids, position.masked_fill(~in_chunk, 0), "amax")
    return ChunkTable(sizes, starts.masked_fill(sizes == 0, 0), last)


def chunks_on_both_sides(batch: Batch) -> Tensor:
    """Chunks that hold a scored token of the student and one of the teacher, (B, C) bool."""
    student, teacher = chunk_tables(batch)
    return student.shared_with(teacher)


def chunk_tables(batch: Batch) -> tuple[ChunkTable, ChunkTable]:
    """The chunks of student and teacher."""
    return (
        chunk_table(batch.student, batch.num_chunks),
        chunk_table(batch.teacher, batch.num_chunks),
    )


def chunk_positions(batch: Batch) -> Tensor:
    """Where both sides begin the chunk of each of the student's positions.

    Shape:
        (2, B, S) int64, the student's and the teacher's first position; -1 where there is no chunk,
        or one that only the student has.
    """
    student, teacher = chunk_tables(batch)
    is_missing = student.sizes * teacher.sizes == 0
    starts = torch.stack([student.first, teacher.first]).masked_fill(is_missing, -1)
    # Positions without a chunk look behind the last.
    chunk_ids, _ = _chunk_ids(batch.student, batch.num_chunks)
    return F.pad(starts, (0, 1), value=-1).gather(2, chunk_ids.expand(2, -1, -1))


@dataclass(frozen=True, slots=True, eq=False)
class AlignedPositions:
    """Student positions and the teacher positions they are compared with, P per sequence.

    Args:
        student: (B, P) int64, no position twice among valid ones.
        teacher: (B, P) int64.
        valid: (B, P) bool, False where nothing is compared.
    """

    student: Tensor
    teacher: Tensor
    valid: Tensor

    def of_student(self, values: Tensor) -> Tensor:
        """Pick the student's values, (B, S, K) to (B, P, K)."""
        return pick(values, self.student)

    def of_teacher(self, values: Tensor) -> Tensor:
        """Pick the teacher's values, (B, T, K) to (B, P, K)."""
        return pick(values, self.teacher)

    def at_student_positions(self, values: Tensor, size: int) -> Tensor:
        """Move values to the student's positions, (B, P, ...) to (B, S, ...)."""
        shape = (*self.student.shape, *[1] * (values.ndim - 2))
        index = self.student.masked_fill(~self.valid, size).view(shape)
        placed = values.new_zeros((values.shape[0], size + 1, *values.shape[2:]))
        return placed.scatter(1, index.expand_as(values), values)[:, :size]

    def teacher_of_student(self, size: int) -> Tensor:
        """What each of S student positions is compared with, (B, S), -1 for nothing."""
        index = self.student.masked_fill(~self.valid, size)
        places = index.new_full((index.shape[0], size + 1), -1)
        return places.scatter(1, index, self.teacher)[:, :size]

    def flattened(self, batch: Batch) -> Tensor:
        """Positions of both sides for `ctkd.logits.map_rows`, (B * P, 2), -1 where none."""
        return flat_positions(batch, self.teacher, ~self.valid, self.student)


def align_positions(batch: Batch, pairing: str = "position") -> AlignedPositions:
    """Align the positions of both sides.

    Args:
        batch: The batch.
        pairing: ``"position"`` pairs the k-th scored positions, ``"chunk"`` those at which both
            models have read the same bytes: the first positions of each chunk that both sides
            have.

    Raises:
        BatchError: If chunks are to be paired and the batch has none.
    """
    if pairing == "chunk":
        student, teacher = chunk_tables(batch)
        return AlignedPositions(student.first, teacher.first, student.shared_with(teacher))
    length = min(batch.student.mask.shape[1], batch.teacher.mask.shape[1])
    valid = batch.student.mask[:, :length] & batch.teacher.mask[:, :length]
    position = torch.arange(length, device=valid.device).expand_as(valid)
    return AlignedPositions(position, position, valid)


def flat_positions(
    batch: Batch, teacher: Tensor, left_out: Tensor, student: Tensor | None = None
) -> Tensor:
    """Aligned positions (B, P) as flattened ones, (B * P, 2), -1 where they are left out.

    Without the student's, they are all of them, in their order.
    """
    sequences, length = batch.student.mask.shape
    index = torch.arange(sequences, device=teacher.device).unsqueeze(1)
    if student is None:
        student = torch.arange(sequences * length, device=teacher.device).view(sequences, length)
    else:
        student = index * length + student
    rows = torch.stack([student, index * batch.teacher.mask.shape[1] + teacher], dim=-1)
    return rows.masked_fill(left_out.unsqueeze(-1), -1).flatten(0, 1)


def pick(values: Tensor, positions: Tensor) -> Tensor:
    """Values at positions, (B, S, K) and (B, P) give (B, P, K)."""
    if values.shape[1] == 0:  # nothing is valid then, and any value will do
        values = F.pad(values, (0, 0, 0, 1))
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _chunk_ids(side: Side, missing: int = 0) -> tuple[Tensor, Tensor]:
    """The chunk of each position, a number where it is in none; and whether it is in one."""
    if side.chunk_ids is None:
        raise BatchError(
            "this loss compares chunks, but the batch has no chunk_ids; align the two sides with "
            "ctkd.tokenization.TokenizerPair.align and pass student_chunk_ids, teacher_chunk_ids "
            "and num_chunks"
        )
    in_chunk = side.mask & (side.chunk_ids >= 0)
    return side.chunk_ids.masked_fill(~in_chunk, missing), in_chunk
