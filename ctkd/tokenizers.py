"""Two tokenizers as a loss sees them.

Losses never import `ctkd.tokenization`; they see its `TokenizerPair` through this protocol. Maps
are CPU tensors; a loss keeps them as buffers that are not saved.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.errors import BatchError

__all__ = ["Continuations", "Pair", "PlaceholderPair", "check_sizes"]


class Continuations(NamedTuple):
    """Teacher tokens that go on after the bytes that a student has read of one.

    Teacher tokens are named by their rank, see `Pair.teacher_ranks`.

    Attributes:
        ranges: (B, S, 3) int64: the first rank, the last plus one, and what is added to a rank for
            its place in ``student_ids``. 0 where there are none.
        student_ids: (L,) int64, the longest student token that begins what is left, or -1.
    """

    ranges: Tensor
    student_ids: Tensor

    @classmethod
    def none(cls, positions: Tensor) -> Continuations:
        """None at any position, (B, S)."""
        return cls(positions.new_zeros(*positions.shape, 3), positions.new_zeros(0))


class Pair(Protocol):
    """Two tokenizers: vocabularies of V (student) and W (teacher) tokens."""

    @property
    def student_size(self) -> int:
        """V, the length of the student's tokenizer."""

    @property
    def teacher_size(self) -> int:
        """W, the length of the teacher's tokenizer."""

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        """Student ids and teacher ids of the tokens that both have, (M,) and (M,) int64.

        Equal bytes or, for special tokens, an equal role. No id occurs twice on its side.
        """

    def nearest_student_ids(self) -> Tensor:
        """For each teacher token the student token with the same or the nearest text, (W,)."""

    def prefix_student_ids(self) -> Tensor:
        """For each teacher token the longest student token that begins its bytes, (W,), or -1."""

    def teacher_ranks(self) -> Tensor:
        """Place of each teacher token in the order of bytes, special tokens first, (W,) int64."""

    def continuations(
        self, student_ids: Tensor, chunk_ids: Tensor, teacher_ids: Tensor
    ) -> Continuations:
        """What may follow where the student is inside a teacher token that begins its chunk.

        Computed on the CPU; the answer lies on the device of ``student_ids``.

        Args:
            student_ids: (B, S).
            chunk_ids: (B, S), negative for none.
            teacher_ids: (B, S), the first teacher token of each position's chunk.
        """

    def match_positions(
        self, student_ids: Tensor, teacher_ids: Tensor, student_mask: Tensor, teacher_mask: Tensor
    ) -> Tensor:
        """For each student position the one teacher position that edit distance aligns with it.

        Shape:
            (B, S), (B, T) and their masks give (B, S) int64, -1 where there is none or more than
            one. Computed on the CPU; the answer lies on the device of ``student_ids``.
        """

    def word_starts(self) -> tuple[Tensor, Tensor]:
        """Tokens that begin a new word or end the text, (V,) and (W,) bool."""


class PlaceholderPair(Pair):
    """Two vocabularies of one token, to try out a loss's settings before tokenizers are loaded."""

    student_size = 1
    teacher_size = 1

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def nearest_student_ids(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)

    def prefix_student_ids(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)

    def teacher_ranks(self) -> Tensor:
        return torch.arange(self.teacher_size)

    def continuations(
        self, student_ids: Tensor, chunk_ids: Tensor, teacher_ids: Tensor
    ) -> Continuations:
        return Continuations.none(student_ids)

    def match_positions(
        self, student_ids: Tensor, teacher_ids: Tensor, student_mask: Tensor, teacher_mask: Tensor
    ) -> Tensor:
        return torch.full_like(student_ids, -1)

    def word_starts(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)


def check_sizes(batch: Batch, student_size: int, teacher_size: int) -> None:
    """Refuse logits whose columns are not the tokens of the two tokenizers.

    Raises:
        BatchError: If a side has more or fewer columns than its tokenizer has tokens.
    """
    for name, side, size in (
        ("student", batch.student, student_size),
        ("teacher", batch.teacher, teacher_size),
    ):
        if side.logits.shape[2] != size:
            raise BatchError(
                f"the {name}'s logits have {side.logits.shape[2]} columns, but its tokenizer has "
                f"{size} tokens; pass {name}_vocab_size={size} to Batch.from_causal_lm, or the "
                "pair of tokenizers that belongs to these models"
            )
