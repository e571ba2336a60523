"""Two tokenizers, and everything a loss may ask about what they have in common."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctkd.errors import BatchError, DataError
from ctkd.tokenization import vocabulary_map
from ctkd.tokenization.alignment import Aligner, Alignment
from ctkd.tokenization.dtw import dtw, token_costs
from ctkd.tokenization.token_bytes import TokenBytes
from ctkd.tokenizers import Continuations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizerPair"]

_WORD_STARTS = (b" ", b"\n", b"\t")


class TokenizerPair:
    """Two tokenizers: alignment of texts, exact, nearest and prefix vocabulary maps.

    Everything is computed when it is first asked for, and kept. The nearest map, which can take a
    minute, is also kept on disk (see `ctkd.cache_folder.cache_dir`).

    Args:
        student: the student's tokenizer, or its table of token bytes.
        teacher: the teacher's.
        progress: whether to show a bar on stderr while the nearest map is computed.

    Attributes:
        student_bytes: The student's table of token bytes.
        teacher_bytes: The teacher's.

    Raises:
        ModelError: If a tokenizer spells its tokens in a way ctkd does not know.

    Example:
        >>> student = TokenBytes((b"a", b" b", b""), ("text", "text", "eos"))
        >>> teacher = TokenBytes((b"", b" b", b"c"), ("eos", "text", "text"))
        >>> pair = TokenizerPair(student, teacher)
        >>> [ids.tolist() for ids in pair.shared_ids()]
        [[1, 2], [1, 0]]
        >>> [starts.tolist() for starts in pair.word_starts()]
        [[False, True, True], [True, True, False]]
    """

    def __init__(
        self,
        student: "PreTrainedTokenizerBase | TokenBytes",
        teacher: "PreTrainedTokenizerBase | TokenBytes",
        *,
        progress: bool = True,
    ):
        self.student_bytes = _table(student)
        self.teacher_bytes = _table(teacher)
        self.progress = progress

    @property
    def student_size(self) -> int:
        """Number of ids of the student's tokenizer, V."""
        return len(self.student_bytes)

    @property
    def teacher_size(self) -> int:
        """Number of ids of the teacher's tokenizer, W."""
        return len(self.teacher_bytes)

    def narrowed(self, student_size: int, teacher_size: int) -> "TokenizerPair":
        """Leave out ids that a model has no output for.

        Some tokenizers know a special token more than the model they come with.

        Args:
            student_size: the width of the student's head.
            teacher_size: that of the teacher's.
        """
        if student_size >= self.student_size and teacher_size >= self.teacher_size:
            return self
        student = self.student_bytes.first(student_size)
        return TokenizerPair(
            student, self.teacher_bytes.first(teacher_size), progress=self.progress
        )

    def align(
        self,
        student_ids: Tensor | Sequence[Sequence[int]],
        teacher_ids: Tensor | Sequence[Sequence[int]],
    ) -> Alignment:
        """Find which tokens cover the same bytes of a batch of texts, as `Aligner.align` does.

        Shape:
            student_ids: (B, S); teacher_ids: (B, T); negative ids are no part of the text.

        Raises:
            BatchError: If ids have another dtype or shape, or the sides have not as many rows.
            DataError: If an id is not in its tokenizer's table.
        """
        return self._aligner.align(student_ids, teacher_ids)

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        """Pair the tokens that both vocabularies have, as `vocabulary_map.shared_ids` does.

        Shape:
            Returns (M,) student ids, ascending, and (M,) teacher ids, int64 on the CPU.
        """
        return self._shared_ids

    def nearest_student_ids(self) -> Tensor:
        """Map each teacher token to the student token spelled most like it (MinED's map).

        See `vocabulary_map.nearest_student_ids`. Takes up to a minute for a pair of tokenizers
        that this machine has not seen.

        Shape:
            Returns (W,) int64 student ids on the CPU.

        Raises:
            ModelError: If the student has no text tokens, or the cache cannot be written.
        """
        return self._nearest_student_ids

    def prefix_student_ids(self) -> Tensor:
        """Map each teacher token to the longest student token that its bytes begin with.

        See `vocabulary_map.prefix_student_ids`.

        Shape:
            Returns (W,) int64 student ids on the CPU, -1 for none.
        """
        return self._prefix_student_ids

    def continuations(self) -> Continuations:
        """Find what may follow where the student is inside a teacher token.

        See `vocabulary_map.continuations`. Takes some seconds for large vocabularies.

        Shape:
            Returns tensors on the CPU.
        """
        return self._continuations

    def word_starts(self) -> tuple[Tensor, Tensor]:
        """Tell which tokens end the word before them: a space, newline or tab in front, or eos.

        Shape:
            Returns (V,) of the student's tokens and (W,) of the teacher's, bool on the CPU.
        """
        return self._word_starts

    def match_positions(
        self,
        student_ids: Tensor,
        teacher_ids: Tensor,
        student_mask: Tensor,
        teacher_mask: Tensor,
    ) -> Tensor:
        """Find the one teacher token that goes with each student token, by time warping.

        Of each sequence only the positions under the masks are paired (`dtw`, on Levenshtein
        distances between the texts of tokens without their leading space). Special tokens count
        as they are written, and cost nothing when both are bos, both eos or both pad.

        Shape:
            student_ids, student_mask: (B, S) int64 and bool; teacher_ids, teacher_mask: (B, T).
            Returns (B, S) int64 positions in the teacher's sequence, on the device of
            `student_ids`; -1 outside the mask and where no or more than one teacher token goes
            with the student token. Empty of content on the meta device.

        Raises:
            BatchError: If the shapes disagree.
            DataError: If an id under a mask is not in its tokenizer's table.

        Example:
            >>> student = TokenBytes((b" cat", b"s", b" sat"), ("text",) * 3)
            >>> teacher = TokenBytes((b" cats", b" s", b"at"), ("text",) * 3)
            >>> ids = torch.tensor([[0, 1, 2]])
            >>> scored = torch.ones_like(ids, dtype=torch.bool)
            >>> TokenizerPair(student, teacher).match_positions(ids, ids, scored, scored).tolist()
            [[0, 1, 2]]
        """
        if (
            student_ids.ndim != 2
            or teacher_ids.ndim != 2
            or len(student_ids) != len(teacher_ids)
            or student_mask.shape != student_ids.shape
            or teacher_mask.shape != teacher_ids.shape
        ):
            raise BatchError(
                "expected student ids and mask of one shape (B, S), teacher ids and mask of one "
                f"shape (B, T); got {tuple(student_ids.shape)} and {tuple(student_mask.shape)}, "
                f"{tuple(teacher_ids.shape)} and {tuple(teacher_mask.shape)}"
            )
        tensors = (student_ids, student_mask, teacher_ids, teacher_mask)
        if any(tensor.is_meta for tensor in tensors):
            return torch.empty_like(student_ids, dtype=torch.int64, device="meta")
        student, scored, teacher, teacher_scored = (tensor.cpu().numpy() for tensor in tensors)
        matches = np.full(student.shape, -1, dtype=np.int64)
        for row in range(len(matches)):
            places, teacher_places = (
                np.flatnonzero(scored[row]),
                np.flatnonzero(teacher_scored[row]),
            )
            only = self._only_match(student[row, places], teacher[row, teacher_places])
            found = only >= 0
            matches[row, places[found]] = teacher_places[only[found]]
        return torch.from_numpy(matches).to(student_ids.device)

    @cached_property
    def _aligner(self) -> Aligner:
        return Aligner(self.student_bytes, self.teacher_bytes)

    @cached_property
    def _shared_ids(self) -> tuple[Tensor, Tensor]:
        return vocabulary_map.shared_ids(self.student_bytes, self.teacher_bytes)

    @cached_property
    def _nearest_student_ids(self) -> Tensor:
        return vocabulary_map.load_or_compute(
            self.student_bytes, self.teacher_bytes, progress=self.progress
        )

    @cached_property
    def _prefix_student_ids(self) -> Tensor:
        return vocabulary_map.prefix_student_ids(self.student_bytes, self.teacher_bytes)

    @cached_property
    def _continuations(self) -> Continuations:
        return vocabulary_map.continuations(self.student_bytes, self.teacher_bytes)

    @cached_property
    def _word_starts(self) -> tuple[Tensor, Tensor]:
        return _word_starts(self.student_bytes), _word_starts(self.teacher_bytes)

    @cached_property
    def _spellings(self) -> tuple["_Spellings", "_Spellings"]:
        return _Spellings(self.student_bytes), _Spellings(self.teacher_bytes)

    def _only_match(self, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        """Find the place in `teacher` that alone goes with each of `student`, or -1."""
        only = np.full(len(student), -1, dtype=np.int64)
        if not len(student) or not len(teacher):
            return only
        student_spellings, teacher_spellings = self._spellings
        student_texts, student_roles = student_spellings.of(student)
        teacher_texts, teacher_roles = teacher_spellings.of(teacher)
        cost = token_costs(student_texts, teacher_texts)
        cost[(teacher_roles[:, None] == student_roles) & (student_roles > 0)] = 0
        pairs = np.array(dtw(cost))
        only[pairs[:, 1]] = pairs[:, 0]
        only[np.bincount(pairs[:, 1], minlength=len(student)) > 1] = -1
        return only


class _Spellings:
    """The texts of a table's tokens, and a number for each of the roles bos, eos and pad."""

    def __init__(self, table: TokenBytes):
        self.texts = vocabulary_map.token_texts(table)
        number = {"bos": 1, "eos": 2, "pad": 3}
        self.roles = np.array([number.get(role, 0) for role in table.roles], dtype=np.int8)

    def of(self, ids: np.ndarray) -> tuple[list[str], np.ndarray]:
        outside = (ids < 0) | (ids >= len(self.texts))
        if outside.any():
            raise DataError(
                f"token id {ids[outside][0]} is outside this tokenizer's 0 to "
                f"{len(self.texts) - 1}; the ids come from another tokenizer"
            )
        return [self.texts[index] for index in ids.tolist()], self.roles[ids]


def _table(tokenizer: "PreTrainedTokenizerBase | TokenBytes") -> TokenBytes:
    if isinstance(tokenizer, TokenBytes):
        return tokenizer
    return TokenBytes.from_tokenizer(tokenizer)


def _word_starts(table: TokenBytes) -> Tensor:
    return torch.tensor(
        [
            piece.startswith(_WORD_STARTS) or role == "eos"
            for piece, role in zip(table.bytes_of, table.roles, strict=True)
        ],
        dtype=torch.bool,
    )
