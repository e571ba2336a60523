"""How far the next bytes that a student expects are from those that its teacher expects.

Bytes are what two tokenizers have in common, so that this measure belongs to no loss.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ctkd.distill.data.collator import padded_sides, padding_id
from ctkd.distill.data.encoding import EncodedExample, EncodedSide
from ctkd.distill.models.loading import evaluating, head_width
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.errors import DataError, ModelError
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["Branches", "ByteMasses", "NextBytes", "next_byte_divergence"]


class _Branch(NamedTuple):
    """The tokens that go on after some bytes, in the order of their bytes.

    Attributes:
        start, stop: Where they lie.
        offsets: From there, where those begin that go on with each byte.
        bytes: These bytes.
    """

    start: int
    stop: int
    offsets: NDArray[np.int64]
    bytes: NDArray[np.int64]


class Branches:
    """What the tokens of a vocabulary go on with, byte by byte.

    Args:
        bytes_of: Of each id, as `TokenBytes` has them.

    Attributes:
        order: Ids of tokens that have bytes, ordered by them.
    """

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        spelled = sorted((piece, index) for index, piece in enumerate(bytes_of) if piece)
        self._pieces = [piece for piece, _ in spelled]
        self.order = torch.tensor([index for _, index in spelled])
        self._known: dict[bytes, _Branch] = {}

    def after(self, prefix: bytes) -> _Branch:
        """Where tokens lie that begin with some bytes and are longer."""
        if prefix not in self._known:
            starts = [bisect_left(self._pieces, prefix + bytes([one])) for one in range(256)]
            # The first that begins otherwise; a byte that cannot be raised has none behind it.
            raised = prefix.rstrip(b"\xff")
            ends = raised[:-1] + bytes([raised[-1] + 1]) if raised else None
            starts.append(len(self._pieces) if ends is None else bisect_left(self._pieces, ends))
            bounds = np.array(starts)
            found = np.nonzero(np.diff(bounds))[0]
            begin = int(bounds[0])
            self._known[prefix] = _Branch(begin, int(bounds[-1]), bounds[found] - begin, found)
        return self._known[prefix]


class ByteMasses(NamedTuple):
    """What a model expects at each byte of a text.

    Attributes:
        text: Its N bytes.
        log_masses: (N, 256) log-probability of the tokens that agree with the bytes of the text's
            own token so far, and go on with each byte; nan where there is none.
        starts: (N,) whether a token begins there.
    """

    text: bytes
    log_masses: NDArray[np.float64]
    starts: NDArray[np.bool_]


def byte_masses(
    rows: Tensor, ids: Sequence[int], table: TokenBytes, branches: Branches
) -> ByteMasses:
    r"""What a model expects at each byte of a text.

    .. math:: m_k(b) = \sum_{v:\, u_k b \preceq \mathrm{bytes}(v)} p_i(v)

    where the k-th byte lies in token i, of which :math:`u_k` are the bytes before it, and
    :math:`\preceq` means begins.

    Args:
        rows: (n, V) logits, of which row i predicts token i.
        ids: The tokens of the text, n.
        table: Of the tokenizer, the first V ids.
        branches: Of the same.

    Raises:
        ModelError: If a logit is nan.

    Example:
        >>> table = TokenBytes((b"a", b"ab", b"b"), ("text",) * 3)
        >>> rows = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> found = byte_masses(rows, [1], table, Branches(table.bytes_of))
        >>> np.exp(found.log_masses[:, [97, 98]]).round(6)  # "a" or "b"; then, of "ab", "b" alone
        array([[0.75, 0.25],
               [ nan, 0.25]])
        >>> found.starts
        array([ True, False])
    """
    pieces = [table.bytes_of[index] for index in ids]
    first = np.cumsum([0, *map(len, pieces)])
    log_masses = np.full((int(first[-1]), 256), np.nan)
    starts = np.zeros(len(log_masses), dtype=bool)
    starts[first[:-1][np.diff(first) > 0]] = True
    log_probs = rows.double().log_softmax(-1)[:, branches.order.to(rows.device)].cpu().numpy()
    if np.isnan(log_probs).any():
        raise ModelError(
            "the model's logits are no numbers; look for nan or infinite values in its weights"
        )
    # Rows of equal bytes so far are added up together.
    places: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for row, piece in enumerate(pieces):
        for depth in range(len(piece)):
            places[piece[:depth]].append((row, int(first[row]) + depth))
    for prefix, both in places.items():
        branch = branches.after(prefix)
        which, where = map(list, zip(*both, strict=True))
        some = log_probs[which, branch.start : branch.stop]
        log_masses[np.ix_(where, branch.bytes)] = _log_sums(some, branch.offsets)
    return ByteMasses(b"".join(pieces), log_masses, starts)


def _log_sums(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logs of sums of exponentials over runs of columns that begin at offsets."""
    largest = np.maximum.reduceat(values, offsets, axis=1)
    # A run of nothing but minus infinity stays that.
    largest = np.where(np.isneginf(largest), 0.0, largest)
    counts = np.diff(offsets, append=values.shape[1])
    terms = np.exp(values - np.repeat(largest, counts, axis=1))
    with np.errstate(divide="ignore"):
        return np.log(np.add.reduceat(terms, offsets, axis=1)) + largest


@dataclass(frozen=True, slots=True)
class NextBytes:
    r"""Divergence of the next bytes of two models over texts.

    .. math:: D = \frac{1}{N} \sum_k \sum_{b \in C_k} \bar t_k(b) \log_2 \frac{\bar t_k(b)}
        {\bar s_k(b)}, \quad \bar m_k(b) = \frac{m_k(b)}{\sum_{c \in C_k} m_k(c)}

    over the N bytes of the texts, with the masses t of the teacher and s of the student that
    `byte_masses` defines and the bytes C that both can go on with. Each model stands in a
    tokenization of its own. Within a token its expectation is that of tokens which are longer than
    the bytes so far: that the token might have ended there, and another begun, is left out, and so
    is a token without bytes, such as the end of sequence.

    Attributes:
        total: Bits over all bytes.
        starts: Bits over the bytes at which both models begin a token, where nothing is left out.
        bytes: N.
        start_bytes: Those at which both begin a token.
        rows: Texts.
    """

    total: float
    starts: float
    bytes: int
    start_bytes: int
    rows: int = 1

    def summary(self) -> dict[str, float]:
        """Means in bits a byte, and the share of bytes at which both models begin a token."""
        share = self.start_bytes / self.bytes if self.bytes else math.nan
        return {
            "next_byte_divergence": self.total / self.bytes if self.bytes else math.nan,
            "next_byte_divergence/starts": (
                self.starts / self.start_bytes if self.start_bytes else math.nan
            ),
            "next_byte_starts": share,
        }


def divergence(teacher: ByteMasses, student: ByteMasses) -> NextBytes:
    """The divergence at the bytes of one text."""
    common = ~np.isnan(teacher.log_masses) & ~np.isnan(student.log_masses)
    theirs, ours = (np.where(common, one.log_masses, -np.inf) for one in (teacher, student))
    one_run = np.zeros(1, np.int64)
    theirs, ours = (one - _log_sums(one, one_run) for one in (theirs, ours))
    expected = np.exp(theirs)
    with np.errstate(invalid="ignore"):
        bits = np.where(expected > 0.0, expected * (theirs - ours), 0.0).sum(1) / math.log(2)
    both = teacher.starts & student.starts
    return NextBytes(float(bits.sum()), float(bits[both].sum()), len(bits), int(both.sum()))


class _Reader:
    """A model that says what it expects at the bytes of rows."""

    def __init__(self, logits: ModelLogits, tokenizer: PreTrainedTokenizerBase) -> None:
        self._logits, self._pad_id = logits, padding_id(tokenizer)
        table = TokenBytes.from_tokenizer(tokenizer)
        self._width = min(len(table), head_width(logits.model))
        self._table = table.first(self._width)
        self._branches = Branches(self._table.bytes_of)

    @torch.no_grad()
    def read(self, sides: Sequence[EncodedSide]) -> list[ByteMasses]:
        model = self._logits.model
        inputs, labels = padded_sides(sides, self._pad_id, with_eos=False)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with evaluating(model):
            logits = self._logits.read(model, inputs, labels.shape[1])
        found = []
        for number, side in enumerate(sides):
            places = torch.tensor(side.places(with_eos=False), device=model.device)
            index = number * labels.shape[1] + places
            rows = torch.cat([one.read() for _, one in logits.chunks(index)])[:, : self._width]
            found.append(byte_masses(rows, side.scored_ids, self._table, self._branches))
        return found


def next_byte_divergence(
    teacher: ModelLogits,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student: ModelLogits,
    student_tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> NextBytes:
    """Measure the divergence of next bytes over the answers of rows.

    Args:
        teacher: The model whose expectations count.
        teacher_tokenizer: Its tokenizer.
        student: The model that is measured.
        student_tokenizer: Its tokenizer.
        rows: Encoded for both.
        batch_size: Rows read together.
        progress: The text of a bar, if one is to be shown.

    Raises:
        DataError: If no row has the same bytes in both tokenizations.
    """
    readers = _Reader(teacher, teacher_tokenizer), _Reader(student, student_tokenizer)
    parts = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(
        starts, desc=progress, leave=False, disable=True if progress is None else None
    ):
        some = [row for row in rows[start : start + batch_size] if row.teacher is not None]
        theirs, ours = (
            reader.read([side for row in some if (side := getattr(row, name))])
            for reader, name in zip(readers, ("teacher", "student"), strict=True)
        )
        # A tokenizer that writes a text otherwise stands at other bytes.
        parts += [
            divergence(one, other)
            for one, other in zip(theirs, ours, strict=True)
            if one.text == other.text
        ]
    if not parts:
        raise DataError("no row has the same bytes in both tokenizations; look with ctkd doctor")
    return NextBytes(
        math.fsum(one.total for one in parts),
        math.fsum(one.starts for one in parts),
        sum(one.bytes for one in parts),
        sum(one.start_bytes for one in parts),
        len(parts),
    )
