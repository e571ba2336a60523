"""The one input of every loss: what two models said about the same text.

Letters used for shapes everywhere in ctkd:

    B  sequences in the batch       C  chunks (aligned spans of text)
    S  student positions            T  teacher positions
    V  student vocabulary           W  teacher vocabulary
    H  student hidden size          J  teacher hidden size
    L  positions before packing     K  entries asked for per position
    N  rows, or aligned positions, flattened over sequences and positions

Shifting and packing happen here, once. No loss knows of unshifted labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, Logits, RowLogits
from ctkd.ops import can_inspect, pack_scored

__all__ = ["IGNORE_INDEX", "Batch", "Side"]

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """One model's view of the scored text: ``logits[b, i]`` predicts ``token_ids[b, i]``.

    Scored tokens come first in each row, padding after them.

    Shape:
        ``logits`` (B, S, V), ``token_ids`` (B, S) int64, ``mask`` (B, S) bool,
        ``chunk_ids`` (B, S) int64, ``hidden`` (B, S, H).

    Args:
        logits: What the model says of the next token: any `Logits`, or a tensor, which is wrapped.
        token_ids: The token that each position predicts, in this model's vocabulary.
        mask: True on scored positions, False on the padding after them.
        chunk_ids: Equal numbers cover the same bytes on both sides; -1 belongs to no chunk.
        hidden: Last hidden states at the same positions.

    Raises:
        BatchError: If shapes, dtypes or devices disagree, padding stands before scored tokens, or
            a scored token has no column (the last two are looked for on the CPU only).

    Example:
        >>> side = Side(
        ...     logits=torch.zeros(1, 2, 5),
        ...     token_ids=torch.tensor([[3, 0]]),
        ...     mask=torch.tensor([[True, False]]),
        ... )
        >>> side.logits.shape
        (1, 2, 5)
    """

    logits: Logits
    token_ids: Tensor
    mask: Tensor
    chunk_ids: Tensor | None = None
    hidden: Tensor | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            logits: Logits | Tensor,
            token_ids: Tensor,
            mask: Tensor,
            chunk_ids: Tensor | None = None,
            hidden: Tensor | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise BatchError(f"mask must be a bool tensor, got {self.mask.dtype}")
        if isinstance(self.logits, Tensor):
            object.__setattr__(self, "logits", DenseLogits(self.logits, mask=self.mask))
        else:
            object.__setattr__(self, "logits", self.logits.masked(self.mask))
        expected = self.logits.shape[:2]
        for name in ("token_ids", "mask", "chunk_ids", "hidden"):
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if value.shape[:2] != expected or value.ndim != (3 if name == "hidden" else 2):
                wanted = "(B, S, H)" if name == "hidden" else "(B, S)"
                raise BatchError(
                    f"{name} must be {wanted} with the (B, S) of the logits, {tuple(expected)}, "
                    f"got {tuple(value.shape)}"
                )
            if value.device != self.logits.device:
                raise BatchError(
                    f"{name} is on {value.device}, the logits on {self.logits.device}; "
                    "move both to one device"
                )
        for name in ("token_ids", "chunk_ids"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.int64:
                raise BatchError(f"{name} must be int64, got {value.dtype}")
        if can_inspect(self.mask) and bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise BatchError(
                "mask must be True on the first positions of each row and False after them; "
                "Side.from_causal_lm packs scored positions that way"
            )
        self._check_token_ids()

    def _check_token_ids(self) -> None:
        """Refuse ids of another tokenizer, where looking at them makes no device wait.

        Those that are not scored become 0, whatever they were.
        """
        width = self.logits.shape[2]
        # One column stands for logits that nobody will look at.
        if not can_inspect(self.mask) or width == 1 or self.mask.numel() == 0:
            return
        ids = self.token_ids.masked_fill(~self.mask, 0)
        if int(ids.min()) < 0 or int(ids.max()) >= width:
            raise BatchError(
                f"token_ids go from {int(ids.min())} to {int(ids.max())}, but the logits have "
                f"{width} columns; these labels belong to another model's tokenizer"
            )
        object.__setattr__(self, "token_ids", ids)

    @classmethod
    def from_causal_lm(
        cls,
        logits: Tensor | RowLogits,
        labels: Tensor,
        *,
        chunk_ids: Tensor | None = None,
        hidden: Tensor | None = None,
        vocab_size: int | None = None,
        max_scored: int | None = None,
    ) -> Side:
        """Shift a causal model's raw output by one and pack its scored rows to the left.

        The labels are unshifted, as in transformers: ``logits[:, i]`` predicts
        ``labels[:, i + 1]``. The logits are indexed, not copied.

        Shape:
            ``logits`` (B, L, V), ``labels`` (B, L), ``chunk_ids`` (B, L), ``hidden`` (B, L, H).

        Args:
            logits: The model's output.
            labels: Token ids, -100 where a token is not scored. Position 0 is never predicted.
            chunk_ids: Chunk numbers of the tokens, laid out as the labels.
            hidden: Last hidden states, laid out as the logits.
            vocab_size: Length of the tokenizer. Columns past it (a padded head) are cut off
                before any softmax.
            max_scored: The most tokens scored in one sequence, S of the result. Default L - 1.
                Checked where values may be inspected; elsewhere tokens beyond it are not scored.

        Raises:
            BatchError: If shapes disagree, or a sequence scores more than ``max_scored`` tokens.

        Example:
            >>> labels = torch.tensor([[-100, -100, 4, 2]])
            >>> side = Side.from_causal_lm(torch.zeros(1, 4, 5), labels, max_scored=2)
            >>> side.token_ids, side.mask
            (tensor([[4, 2]]), tensor([[True, True]]))
        """
        _check_labels(logits, labels, chunk_ids, hidden)
        return cls._packed(
            logits,
            labels[:, 1:],
            chunk_ids=None if chunk_ids is None else chunk_ids[:, 1:],
            hidden=hidden,
            vocab_size=vocab_size,
            max_scored=max_scored,
        )

    @classmethod
    def from_encoder_decoder(
        cls,
        logits: Tensor | RowLogits,
        labels: Tensor,
        *,
        chunk_ids: Tensor | None = None,
        hidden: Tensor | None = None,
        vocab_size: int | None = None,
        max_scored: int | None = None,
    ) -> Side:
        """Pack a decoder's output whose ``logits[:, i]`` predicts ``labels[:, i]``: no shift.

        Shape, Args and Raises as in `from_causal_lm`; ``max_scored`` defaults to L.

        Example:
            >>> side = Side.from_encoder_decoder(torch.zeros(1, 2, 5), torch.tensor([[4, -100]]))
            >>> side.token_ids, side.mask
            (tensor([[4, 0]]), tensor([[ True, False]]))
        """
        _check_labels(logits, labels, chunk_ids, hidden)
        return cls._packed(
            logits,
            labels,
            chunk_ids=chunk_ids,
            hidden=hidden,
            vocab_size=vocab_size,
            max_scored=max_scored,
        )

    @classmethod
    def _packed(
        cls,
        logits: Tensor | RowLogits,
        targets: Tensor,
        *,
        chunk_ids: Tensor | None,
        hidden: Tensor | None,
        vocab_size: int | None,
        max_scored: int | None,
    ) -> Side:
        if isinstance(logits, Tensor):
            logits = DenseLogits(logits)
        size = targets.shape[1] if max_scored is None else min(max_scored, targets.shape[1])
        if can_inspect(targets) and targets.numel():
            most = int((targets != IGNORE_INDEX).sum(1).max())
            if most > size:
                raise BatchError(
                    f"a sequence scores {most} tokens, max_scored is {max_scored}; "
                    "give the largest number of labels other than -100"
                )
        packed = pack_scored(targets, IGNORE_INDEX, size, logits.shape[1], chunk_ids)
        if hidden is not None:
            rows = packed.rows.unsqueeze(-1)
            hidden = hidden.gather(1, rows.expand(-1, -1, hidden.shape[-1]))
        return cls(
            logits=logits.packed_at(packed, vocab_size),
            token_ids=packed.ids,
            mask=packed.mask,
            chunk_ids=packed.chunk_ids,
            hidden=hidden,
        )


def _way_to_tensor(value: object) -> str:
    if hasattr(value, "logits"):
        return "; give its .logits"
    return "; make one with torch.as_tensor" if hasattr(value, "__len__") else ""


def _check_labels(
    logits: Tensor | RowLogits, labels: Tensor, chunk_ids: Tensor | None, hidden: Tensor | None
) -> None:
    if not isinstance(logits, Tensor | RowLogits):
        raise BatchError(
            "logits must be a torch.Tensor or ctkd.HeadLogits, got "
            f"{type(logits).__name__}{_way_to_tensor(logits)}"
        )
    for name, value in (("labels", labels), ("chunk_ids", chunk_ids), ("hidden", hidden)):
        if not isinstance(value, Tensor) and (value is not None or name == "labels"):
            raise BatchError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}{_way_to_tensor(value)}"
            )
    if isinstance(logits, RowLogits) and logits.rows is not None:
        raise BatchError(
            "these logits are packed already; give a model's whole output, one row for each label"
        )
    if len(logits.shape) != 3 or labels.ndim != 2 or logits.shape[:2] != labels.shape:
        raise BatchError(
            f"logits must be (B, L, V) and labels (B, L), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise BatchError(f"labels must be int64, got {labels.dtype}")
    for name, value in (("chunk_ids", chunk_ids), ("hidden", hidden)):
        if value is not None and value.shape[:2] != labels.shape:
            raise BatchError(
                f"{name} must be laid out as the labels, {tuple(labels.shape)}, "
                f"got {tuple(value.shape)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The same B texts as seen by a student and a teacher with different tokenizers.

    Args:
        student: S positions, V words.
        teacher: T positions, W words.
        num_chunks: The most chunks in one sequence, C. A number, so that no loss has to wait for
            the device. 0 stands for as many as there can be, max(S, T).

    Raises:
        BatchError: If the two sides hold different numbers of sequences or live on two devices.
    """

    student: Side
    teacher: Side
    num_chunks: int = 0

    def __post_init__(self) -> None:
        student, teacher = self.student.logits, self.teacher.logits
        if student.shape[0] != teacher.shape[0]:
            raise BatchError(
                f"student and teacher must hold the same sequences, got {student.shape[0]} "
                f"and {teacher.shape[0]}"
            )
        if student.device != teacher.device:
            raise BatchError(
                f"the student is on {student.device}, the teacher on {teacher.device}; "
                "move both to one device"
            )
        at_most = max(student.shape[1], teacher.shape[1])
        if self.num_chunks == 0:
            object.__setattr__(self, "num_chunks", at_most)
        for name, side in (("student", self.student), ("teacher", self.teacher)):
            chunk_ids = side.chunk_ids
            if chunk_ids is None or not can_inspect(chunk_ids) or chunk_ids.numel() == 0:
                continue
            if int(chunk_ids.max()) >= self.num_chunks:
                raise BatchError(
                    f"the {name}'s chunk_ids go up to {int(chunk_ids.max())}, but num_chunks is "
                    f"{self.num_chunks}; number the chunks of a sequence from 0, of which its "
                    f"{at_most} predicted tokens can make no more than {at_most}, and give the "
                    "largest number of chunks in one sequence, or 0"
                )

    @classmethod
    def from_causal_lm(
        cls,
        *,
        student_logits: Tensor | RowLogits,
        student_labels: Tensor,
        teacher_logits: Tensor | RowLogits,
        teacher_labels: Tensor,
        student_chunk_ids: Tensor | None = None,
        teacher_chunk_ids: Tensor | None = None,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        student_max_scored: int | None = None,
        teacher_max_scored: int | None = None,
        num_chunks: int = 0,
    ) -> Batch:
        """Build a batch from the outputs and labels of two causal models.

        Each side goes through `Side.from_causal_lm`, which explains the arguments.

        Example:
            >>> batch = Batch.from_causal_lm(
            ...     student_logits=torch.zeros(1, 4, 5),
            ...     student_labels=torch.tensor([[-100, 1, 4, 2]]),
            ...     teacher_logits=torch.zeros(1, 3, 7),
            ...     teacher_labels=torch.tensor([[-100, 6, 0]]),
            ... )
            >>> batch.student.logits.shape, batch.teacher.logits.shape
            ((1, 3, 5), (1, 2, 7))
        """
        return cls(
            student=Side.from_causal_lm(
                student_logits,
                student_labels,
                chunk_ids=student_chunk_ids,
                hidden=student_hidden,
                vocab_size=student_vocab_size,
                max_scored=student_max_scored,
            ),
            teacher=Side.from_causal_lm(
                teacher_logits,
                teacher_labels,
                chunk_ids=teacher_chunk_ids,
                hidden=teacher_hidden,
                vocab_size=teacher_vocab_size,
                max_scored=teacher_max_scored,
            ),
            num_chunks=num_chunks,
        )
