"""Small batches and a pair of tokenizers, for the checks of `ctkd.testing`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctkd.tokenizers import Continuations, Pair

__all__ = ["STUDENT_HEAD", "STUDENT_VOCABULARY", "Inputs", "TinyPair", "make_inputs", "make_pair"]

Inputs = dict[str, Any]
"""Keyword arguments of `Batch.from_causal_lm`."""

STUDENT_VOCABULARY = 7
STUDENT_HEAD = 9
TEACHER_VOCABULARY = 5
# Chunk numbers of the labels of each sequence; None stands for a label that is not scored.
_STUDENT_CHUNKS: list[list[int | None]] = [
    [None, None, 0, 0, 1, 2],
    [None, 0, 1, 1, None, None],
    [None, None, None, 0, 1, None],
]
_TEACHER_CHUNKS: list[list[int | None]] = [
    [None, 0, 1, 1, 2],
    [None, None, 0, 1, None],
    [None, None, None, None, None],
]


def make_inputs(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    ties: bool = False,
    device: str | torch.device = "cpu",
) -> Inputs:
    """Make the two models' outputs and labels for three texts.

    Args:
        seed: Of the random logits and labels.
        dtype: Of the logits.
        ties: Round the logits to halves, so that many entries of a row are equal.
        device: Where the tensors lie.

    Example:
        >>> from ctkd import Batch
        >>> inputs = make_inputs()
        >>> batch = Batch.from_causal_lm(**inputs)
        >>> batch.student.logits.shape, batch.teacher.logits.shape
        ((3, 5, 7), (3, 4, 5))
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: Inputs = {"student_vocab_size": STUDENT_VOCABULARY, "num_chunks": 3}
    for side, chunks, vocabulary, head in (
        ("student", _STUDENT_CHUNKS, STUDENT_VOCABULARY, STUDENT_HEAD),
        ("teacher", _TEACHER_CHUNKS, TEACHER_VOCABULARY, TEACHER_VOCABULARY),
    ):
        chunk_ids = torch.tensor([[-1 if c is None else c for c in row] for row in chunks])
        size = chunk_ids.shape
        logits = 2.0 * torch.randn(*size, head, generator=generator, dtype=torch.float64)
        if ties:
            logits = (2.0 * logits).round() / 2.0
        token_ids = torch.randint(vocabulary, size, generator=generator)
        hidden = torch.randn(*size, 4, generator=generator, dtype=torch.float64)
        inputs[f"{side}_logits"] = logits.to(device, dtype)
        inputs[f"{side}_labels"] = token_ids.masked_fill(chunk_ids < 0, -100).to(device)
        inputs[f"{side}_chunk_ids"] = chunk_ids.to(device)
        inputs[f"{side}_hidden"] = hidden.to(device, dtype)
    return inputs


class TinyPair(Pair):
    """A pair of tokenizers as wide as wanted, in which most of the smaller vocabulary is shared.

    Args:
        student_size: V.
        teacher_size: W.
    """

    def __init__(self, student_size: int, teacher_size: int) -> None:
        self.sizes = student_size, teacher_size
        shared = max(1, min(self.sizes) - 1)
        self.shared = (
            torch.arange(student_size - shared, student_size),
            torch.arange(shared).roll(1),
        )

    @property
    def student_size(self) -> int:
        return self.sizes[0]

    @property
    def teacher_size(self) -> int:
        return self.sizes[1]

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        return self.shared

    def nearest_student_ids(self) -> Tensor:
        """Shared tokens have each other, all others the student's last token."""
        nearest = torch.full((self.teacher_size,), self.student_size - 1)
        nearest[self.shared[1]] = self.shared[0]
        return nearest

    def prefix_student_ids(self) -> Tensor:
        """Shared tokens have each other, of the others every other one the first shared token."""
        first = self.shared[0][0]
        prefixes = torch.where(torch.arange(self.teacher_size) % 2 == 0, -1, first)
        prefixes[self.shared[1]] = self.shared[0]
        return prefixes

    def continuations(self) -> Continuations:
        """All of the teacher's tokens but the first and the last, inside any of two bytes.

        What is left of them begins with the student's first token, its last, or none.
        """
        tokens = torch.arange(1, max(self.teacher_size - 1, 1))
        tokens = torch.cat([tokens[tokens % 3 == 0], tokens[tokens % 3 == 1]])
        ranges = torch.tensor([[0, 0], [0, tokens.shape[0]], [0, 0]])
        return Continuations(
            student_lengths=torch.ones(self.student_size, dtype=torch.int64),
            teacher_lengths=torch.full((self.teacher_size,), 2),
            begins=3 * torch.arange(self.teacher_size),
            ranges=ranges.repeat(self.teacher_size, 1),
            teacher_ids=tokens,
            student_ids=(tokens % 3) * (self.student_size - 1),
        )

    def match_positions(
        self, student_ids: Tensor, teacher_ids: Tensor, student_mask: Tensor, teacher_mask: Tensor
    ) -> Tensor:
        """Pair equal positions."""
        length = min(student_ids.shape[1], teacher_ids.shape[1])
        matched = torch.full_like(student_ids, -1)
        both = student_mask[:, :length] & teacher_mask[:, :length]
        position = torch.arange(length, device=both.device).expand_as(both)
        matched[:, :length] = position.masked_fill(~both, -1)
        return matched

    def word_starts(self) -> tuple[Tensor, Tensor]:
        """Every other token begins a word."""
        student, teacher = (torch.arange(size) % 2 == 0 for size in self.sizes)
        return student, teacher


def make_pair(
    student_size: int = STUDENT_VOCABULARY, teacher_size: int = TEACHER_VOCABULARY
) -> TinyPair:
    """Make two tokenizers; by default those that belong to the batches of `make_inputs`.

    Example:
        >>> make_pair().student_size
        7
    """
    return TinyPair(student_size, teacher_size)
