"""Alignment by bytes: the tokens of two tokenizations that cover the same bytes of a text.

Every token ends at a byte of its text. Where a token of the student and one of the teacher end at
the same byte, a chunk closes: the tokens since the last such byte are the same piece of text cut
in two ways. Ends are running sums of byte lengths, so whole batches are aligned at once, without
offset mappings; a character that is cut over several tokens is no special case.

What this module does not do: it never looks at characters, strings or token names, and it does not
guess. Where the two texts differ, nothing is aligned.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctkd.errors import BatchError, DataError
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["Aligner", "Alignment", "Difference"]

_Ints = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]
_Flags = npt.NDArray[np.bool_]

_PAIRED_ROLES = {"bos": 1, "eos": 2}  # every other role is 0
_SHOWN_ROWS = 3
_SHOWN_BYTES = 24


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """A row whose two byte strings differ.

    Args:
        row: Its index in the batch.
        student: What the student's text has between the common start and the common end.
        teacher: What the teacher's text has there.
    """

    row: int
    student: bytes
    teacher: bytes

    def __str__(self) -> str:
        return f"row {self.row}: student {_shown(self.student)}, teacher {_shown(self.teacher)}"


def _shown(part: bytes) -> str:
    more = f" and {len(part) - _SHOWN_BYTES} more bytes" if len(part) > _SHOWN_BYTES else ""
    return f"{part[:_SHOWN_BYTES]!r}{more}"


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Two tokenizations of the same texts, cut into chunks. Everything is on the CPU.

    Shape:
        student_chunk_ids (B, S), teacher_chunk_ids (B, T), all other tensors (B,); all int64.

    Args:
        student_chunk_ids: The chunk of each token, laid out as the ids were; -1 is no chunk.
        teacher_chunk_ids: The same for the teacher: equal numbers in a row are the same bytes.
        num_chunks: The most chunks in one row.
        chunks: The chunks of each row; they are numbered from 0 in the order of the text.
        one_to_one: How many of them have one token on both sides.
        covered_bytes: The bytes of the text that are in a chunk.
        student_bytes: The length of the student's text.
        teacher_bytes: The length of the teacher's text.
        differences: The rows where the two texts are not the same bytes.
    """

    student_chunk_ids: Tensor
    teacher_chunk_ids: Tensor
    num_chunks: int
    chunks: Tensor
    one_to_one: Tensor
    covered_bytes: Tensor
    student_bytes: Tensor
    teacher_bytes: Tensor
    differences: tuple[Difference, ...]

    @property
    def coverage(self) -> float:
        """The share of the longer text that is in a chunk, over all rows; 1 without any bytes."""
        longer = int(torch.maximum(self.student_bytes, self.teacher_bytes).sum())
        return int(self.covered_bytes.sum()) / longer if longer else 1.0

    @property
    def row_coverage(self) -> Tensor:
        """The share of the longer text that is in a chunk, (B,) float64; 1 for an empty row."""
        longer = torch.maximum(self.student_bytes, self.teacher_bytes)
        share = self.covered_bytes.double() / longer.clamp(min=1)
        return torch.where(longer > 0, share, torch.ones_like(share))

    @property
    def one_to_one_share(self) -> float:
        """The share of the chunks that have one token on both sides; 0 without any chunk."""
        chunks = int(self.chunks.sum())
        return int(self.one_to_one.sum()) / chunks if chunks else 0.0

    def report(self) -> str:
        """Say in one line how much is aligned, and in a second one which texts differ, if any."""
        rows = len(self.chunks)
        lines = [
            f"aligned {rows} {'text' if rows == 1 else 'texts'}: {self.coverage:.2%} of the bytes "
            f"in {int(self.chunks.sum())} chunks, {self.one_to_one_share:.2%} of them one token "
            "to one token"
        ]
        if self.differences:
            shown = "; ".join(str(difference) for difference in self.differences[:_SHOWN_ROWS])
            more = "; ..." if len(self.differences) > _SHOWN_ROWS else ""
            lines.append(f"the texts differ in {len(self.differences)} of them: {shown}{more}")
        return "\n".join(lines)


class Aligner:
    r"""Aligns ids of two tokenizers by bytes.

    A chunk closes where both sides have a token end at the same byte; no chunk could be cut
    further. Tokens behind the last common end belong to no chunk.

    Tokens without bytes never belong to a chunk of text. Of these, the k-th "bos" at a byte of the
    student's text and the k-th "bos" at the same byte of the teacher's are a chunk of their own,
    which comes after the text that ends there; likewise "eos". All others have no chunk.

    Where the texts of a row differ, their common start is aligned as usual, and their common end
    by ends counted from the end of the text. A chunk lies wholly inside one of the two; there, a
    first chunk begins at the first byte where both sides have a token begin. A common end shares
    no bytes with the common start.

    Args:
        student: What the student's ids stand for.
        teacher: What the teacher's ids stand for.

    Example:
        >>> student = TokenBytes((b"caf", b"\xc3\xa9", b"s", b""), ("text", "text", "text", "eos"))
        >>> teacher = TokenBytes((b"", b"ca", b"f\xc3", b"\xa9", b"s"), ("eos", *["text"] * 4))
        >>> aligned = Aligner(student, teacher).align([[0, 1, 2, 3]], [[1, 2, 3, 4, 0]])
        >>> aligned.student_chunk_ids.tolist(), aligned.teacher_chunk_ids.tolist()
        ([[0, 0, 1, 2]], [[0, 0, 0, 1, 2]])
        >>> aligned.coverage, aligned.one_to_one.tolist()
        (1.0, [2])
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes) -> None:
        self._student = _Table("student", student)
        self._teacher = _Table("teacher", teacher)

    def align(
        self,
        student_ids: Tensor | Sequence[Sequence[int]],
        teacher_ids: Tensor | Sequence[Sequence[int]],
    ) -> Alignment:
        """Find the chunks of a batch of texts.

        Negative ids are no part of the text, so labels in Hugging Face's convention can be given
        as they are. Padding with the end of sequence is not: set it to -100 first.

        Args:
            student_ids: (B, S) int64 on any device, or B rows of ids, which are padded with -1.
            teacher_ids: (B, T) likewise.

        Raises:
            BatchError: If ids have another dtype or shape, or the sides have not as many rows.
            DataError: If an id is not in its side's table.
        """
        student = _Tokens(self._student, student_ids)
        teacher = _Tokens(self._teacher, teacher_ids)
        rows = len(student.totals)
        if rows != len(teacher.totals):
            raise BatchError(
                f"expected as many rows on both sides, got {rows} of the student and "
                f"{len(teacher.totals)} of the teacher; give both tokenizations of each text"
            )
        agreed = _Agreement(student, teacher)
        opens, closes, up_to = _closings(agreed, student, teacher)
        pair_keys, *pairs = _special_pairs(agreed, student, teacher)
        # Chunks are numbered through the batch first; at one key, the text precedes the specials.
        text_numbers = np.arange(len(closes)) + np.searchsorted(pair_keys, closes)
        pair_numbers = up_to[pair_keys] + np.arange(len(pair_keys))
        keys = np.concatenate([closes, pair_keys])
        row_of_key = np.searchsorted(agreed.base[2::2], keys, side="right")
        chunks = np.bincount(row_of_key, minlength=rows)
        one_to_one = np.ones(len(keys), dtype=np.bool_)
        chunk_ids = []
        for side, pair in zip((student, teacher), pairs, strict=True):
            numbers = _text_chunks(agreed, side, opens, up_to)
            in_text = numbers >= 0
            numbers[in_text] = text_numbers[numbers[in_text]]
            numbers[pair] = pair_numbers
            found = numbers >= 0
            one_to_one &= np.bincount(numbers[found], minlength=len(keys)) == 1
            covered = np.bincount(side.rows, weights=side.lengths * found, minlength=rows)
            numbers[found] -= (np.cumsum(chunks) - chunks)[side.rows[found]]
            laid_out = np.full(side.shape, -1, dtype=np.int64)
            laid_out.reshape(-1)[side.slots] = numbers
            chunk_ids.append(torch.from_numpy(laid_out))
        single = np.repeat(np.arange(rows), chunks)[one_to_one]
        return Alignment(
            student_chunk_ids=chunk_ids[0],
            teacher_chunk_ids=chunk_ids[1],
            num_chunks=int(chunks.max(initial=0)),
            chunks=torch.from_numpy(chunks),
            one_to_one=torch.from_numpy(np.bincount(single, minlength=rows)),
            covered_bytes=torch.from_numpy(covered.astype(np.int64)),
            student_bytes=torch.from_numpy(student.totals),
            teacher_bytes=torch.from_numpy(teacher.totals),
            differences=agreed.differences,
        )


class _Table:
    """A TokenBytes as arrays; the bytes of all tokens lie one behind the other."""

    def __init__(self, side: str, token_bytes: TokenBytes) -> None:
        self.side = side
        self.size = len(token_bytes)
        lengths = map(len, token_bytes.bytes_of)
        codes = (_PAIRED_ROLES.get(role, 0) for role in token_bytes.roles)
        self.lengths = np.fromiter(lengths, dtype=np.int64, count=self.size)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.buffer = np.frombuffer(b"".join(token_bytes.bytes_of), dtype=np.uint8)
        self.roles = np.fromiter(codes, dtype=np.int64, count=self.size)


class _Tokens:
    """One side of a batch: its N tokens in one line, negative ids left out.

    `slots` (N,) says where they are in the flattened layout of `shape` (B, S), `ends` (N,) counts
    bytes from the start of the row's text, `text` holds the texts of all rows one behind the other.
    """

    def __init__(self, table: _Table, ids: Tensor | Sequence[Sequence[int]]) -> None:
        matrix = _matrix(table.side, ids)
        outside = np.argwhere(matrix >= table.size)
        if len(outside):
            row, position = outside[0].tolist()
            raise DataError(
                f"{table.side} id {matrix[row, position]} (row {row}, position {position}) is not "
                f"one of this tokenizer's 0 to {table.size - 1}; tokenize with this tokenizer"
            )
        flat = matrix.reshape(-1)
        self.shape = count, width = matrix.shape
        self.slots = np.flatnonzero(flat >= 0)
        self.rows = self.slots // max(width, 1)
        kept = flat[self.slots]
        self.roles = table.roles[kept]
        self.lengths = table.lengths[kept]
        sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])
        self.text_starts = sums[np.searchsorted(self.rows, np.arange(count + 1))]
        self.totals = np.diff(self.text_starts)
        self.ends = sums[1:] - self.text_starts[self.rows]
        moves = np.repeat(table.starts[kept] - sums[:-1], self.lengths)
        self.text: _Bytes = table.buffer[moves + np.arange(sums[-1])]


def _matrix(side: str, ids: Tensor | Sequence[Sequence[int]]) -> _Ints:
    """Return ids of either form as (rows, tokens), rows being padded with -1."""
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64 or ids.ndim != 2:
            raise _unusable(side, f"a tensor of shape {tuple(ids.shape)} and {ids.dtype}")
        return np.asarray(ids.detach().cpu())
    try:
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in ids]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.array(list(itertools.chain.from_iterable(rows)))
    except (TypeError, ValueError) as error:
        raise _unusable(side, type(ids).__name__) from error
    is_int = flat.dtype.kind in "iu" and np.can_cast(flat.dtype, np.int64)
    if flat.size and not (is_int and flat.ndim == 1):
        raise _unusable(side, f"rows of {type(next(filter(len, rows))[0]).__name__}")
    matrix = np.full((len(rows), lengths.max(initial=0)), -1, dtype=np.int64)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = flat
    return matrix


def _unusable(side: str, came: str) -> BatchError:
    return BatchError(
        f"expected {side} ids as a (rows, tokens) tensor of torch.int64 or as a list of "
        f"lists of int, got {came}; convert them, and put a single text into a batch of one"
    )


class _Agreement:
    """The bytes that both texts of each row share, on one line of keys.

    Row r has two parts: the common start (part 2r) and the common end (part 2r + 1). A part of n
    bytes has n + 1 keys, from base[part] on.
    """

    def __init__(self, student: _Tokens, teacher: _Tokens) -> None:
        sides = (student, teacher)
        same_length = student.totals == teacher.totals
        texts = [side.text[np.repeat(same_length, side.totals)] for side in sides]
        unequal = np.flatnonzero(texts[0] != texts[1])
        edges = np.cumsum(student.totals * same_length)
        differs = ~same_length
        differs[np.searchsorted(edges, unequal, side="right")] = True
        self.prefix = student.totals.copy()
        self.suffix = np.zeros_like(self.prefix)
        differences = []
        for row in np.flatnonzero(differs).tolist():
            ours, theirs = (side.text[slice(*side.text_starts[row : row + 2])] for side in sides)
            front = _shared(ours, theirs)
            back = _shared(ours[front:][::-1], theirs[front:][::-1])
            self.prefix[row], self.suffix[row] = front, back
            middle = [part[front : len(part) - back].tobytes() for part in (ours, theirs)]
            differences.append(Difference(row, *middle))
        self.differences = tuple(differences)
        sizes = np.stack([self.prefix, self.suffix], axis=1).reshape(-1) + 1
        self.base = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])

    def keys(self, side: _Tokens, rows: _Ints, offsets: _Ints, end: _Ints) -> tuple[_Ints, _Flags]:
        """Return the keys of some bytes in the common start (end 0) or end (1) of their rows.

        The flags say which of them lie in that part; the keys of others are meaningless.
        """
        from_end = self.suffix[rows] - (side.totals[rows] - offsets)
        inside = np.where(end, from_end >= 0, offsets <= self.prefix[rows])
        return self.base[2 * rows + end] + np.where(end, from_end, offsets), inside


def _shared(ours: _Bytes, theirs: _Bytes) -> int:
    shorter = min(len(ours), len(theirs))
    unequal = np.flatnonzero(ours[:shorter] != theirs[:shorter])
    return int(unequal[0]) if len(unequal) else shorter


def _closings(agreed: _Agreement, student: _Tokens, teacher: _Tokens) -> tuple[_Ints, _Ints, _Ints]:
    """Find the first key of each part where both sides have a token end, and all later ones.

    A chunk of text closes at each of the later ones. The third array counts for each key the
    chunks that close up to it, itself included.
    """
    common = _ends(agreed, student) & _ends(agreed, teacher)
    keys = np.flatnonzero(common)
    # Every part has one: the common start its first key, the common end its last.
    opens = keys[np.searchsorted(keys, agreed.base[:-1])]
    common[opens] = False
    return opens, np.flatnonzero(common), np.cumsum(common)


def _ends(agreed: _Agreement, side: _Tokens) -> _Flags:
    """Mark the keys where a token ends; the start of a text counts as an end."""
    has_bytes = side.lengths > 0
    every_row = np.arange(len(side.totals))
    rows = np.concatenate([every_row, side.rows[has_bytes]])
    offsets = np.concatenate([np.zeros_like(every_row), side.ends[has_bytes]])
    marks = np.zeros(agreed.base[-1], dtype=np.bool_)
    for end in (0, 1):
        keys, inside = agreed.keys(side, rows, offsets, np.full_like(rows, end))
        marks[keys[inside]] = True
    return marks


def _text_chunks(agreed: _Agreement, side: _Tokens, opens: _Ints, up_to: _Ints) -> _Ints:
    """Return for each token how many chunks of text close before its own, -1 if it has none."""
    chunks: _Ints = np.full_like(side.rows, -1)
    end = (side.ends > agreed.prefix[side.rows]).astype(np.int64)
    starts, inside = agreed.keys(side, side.rows, side.ends - side.lengths, end)
    whole = np.flatnonzero(inside & (side.lengths > 0))
    starts, parts = starts[whole], 2 * side.rows[whole] + end[whole]
    before = up_to[starts]
    closes = (starts >= opens[parts]) & (before < up_to[agreed.base[parts + 1] - 1])
    chunks[whole[closes]] = before[closes]
    return chunks


def _special_pairs(agreed: _Agreement, student: _Tokens, teacher: _Tokens) -> tuple[_Ints, ...]:
    """Pair tokens of one role; return the pairs' keys and their tokens on both sides, in order."""
    sides = (student, teacher)
    left = [np.flatnonzero((side.roles > 0) & (side.lengths == 0)) for side in sides]
    found = []
    for end in (0, 1):  # where one text has nothing of its own, its byte there is in both parts
        places, tokens = [], []
        for side, special in zip(sides, left, strict=True):
            part = np.full_like(special, end)
            keys, inside = agreed.keys(side, side.rows[special], side.ends[special], part)
            tokens.append(special[inside])
            places.append(keys[inside] * 2 + side.roles[tokens[-1]] - 1)
        most = max(map(len, tokens)) + 1
        numbered = [place * most + _occurrence(place) for place in places]
        _, ours, theirs = np.intersect1d(numbered[0], numbered[1], return_indices=True)
        found.append(np.stack([places[0][ours] // 2, tokens[0][ours], tokens[1][theirs]]))
        left = [np.setdiff1d(*both) for both in zip(left, found[-1][1:], strict=True)]
    pairs = np.concatenate(found, axis=1)
    return tuple(pairs[:, np.lexsort((pairs[1], pairs[0]))])


def _occurrence(values: _Ints) -> _Ints:
    """Count for each value how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    counts = np.empty_like(values)
    counts[order] = np.arange(len(values)) - np.searchsorted(values, values[order], sorter=order)
    return counts
