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
    """Teacher tokens that may follow where a student has read some bytes of one.

    Attributes:
        student_lengths: (V,) int64, bytes of the student's tokens.
        teacher_lengths: (W,) int64, bytes of the teacher's, 0 for special tokens.
        begins: (W,) int64: ``ranges[begins[v] + n]`` is for n bytes read of v.
        ranges: (P, 2) int64: the first entry and the last plus one. Empty where nothing is read
            yet, or all of a token.
        teacher_ids: (L,) int64, tokens that begin with the bytes that were read and go on.
        student_ids: (L,) int64, the longest token that begins what is left of each; ascending
            within a range.
    """

    student_lengths: Tensor
    teacher_lengths: Tensor
    begins: Tensor
    ranges: Tensor
    teacher_ids: Tensor
    student_ids: Tensor

    @classmethod
    def none(cls, student_size: int, teacher_size: int) -> Continuations:
        """None at any token: of a byte each."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(
            torch.ones(student_size, dtype=torch.int64),
            torch.ones(teacher_size, dtype=torch.int64),
            2 * torch.arange(teacher_size),
            torch.zeros(2 * teacher_size, 2, dtype=torch.int64),
            nothing,
            nothing,
        )


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

    def continuations(self) -> Continuations:
        """What may follow where the student is inside a teacher token, on the CPU."""

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

    def continuations(self) -> Continuations:
        return Continuations.none(self.student_size, self.teacher_size)

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
        width = side.logits.shape[2]
        if width != size:
            way_out = f"pass {name}_vocab_size={size} to Batch.from_causal_lm, or the pair of "
            way_out += "tokenizers that belongs to these models"
            if width < size:
                way_out = "give the pair as TokenizerPair(student's, teacher's), of the tokenizers "
                way_out += "that belong to these models"
            raise BatchError(
                f"the {name}'s logits have {width} columns, but its tokenizer has {size} tokens; "
                f"{way_out}"
            )
