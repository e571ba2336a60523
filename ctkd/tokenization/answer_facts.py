"""Statistics of two tokenizations of the same answers."""

import os.path
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ctkd.errors import DataError
from ctkd.tokenization.alignment import Alignment
from ctkd.tokenization.kind_audit import readable
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = [
    "AlignedRow",
    "AnswerFacts",
    "AnswerIds",
    "DifferingRow",
    "Piece",
    "measure_answers",
]

_ROWS_AT_ONCE = 1024
_KEPT_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerIds:
    """One answer as both tokenizers read it.

    Args:
        id: What names the answer.
        text: The bytes that were tokenized, at least one.
        student_ids: The student's ids.
        teacher_ids: The teacher's ids.
    """

    id: str
    text: bytes
    student_ids: Sequence[int]
    teacher_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token of an answer, as text, and its chunk; -1 is no chunk."""

    text: str
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedRow:
    """One answer, its tokens on both sides and the share of its bytes in chunks."""

    id: str
    coverage: float
    student: tuple[Piece, ...]
    teacher: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferingRow:
    """An answer that the two sides spell differently, and what each has in the place."""

    id: str
    student: str
    teacher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFacts:
    """Figures over all answers. Ends of sequence are not counted.

    Args:
        answers: How many answers.
        coverage: The share of their bytes that lies in chunks, as training measures it.
        chunks: How many chunks.
        one_to_one: The share of them with one token on both sides; 0 without chunks.
        student_tokens: Tokens of the student.
        teacher_tokens: Tokens of the teacher.
        student_shared: The share of the student's tokens that the teacher's vocabulary has.
        teacher_shared: The share of the teacher's tokens that the student's vocabulary has.
        student_numerals: Tokens of the student with a digit in them.
        teacher_numerals: Tokens of the teacher with a digit in them.
        student_numerals_shared: The share of the former that the teacher's vocabulary has; None
            without any.
        teacher_numerals_shared: The share of the latter that the student's vocabulary has.
        chunk_shapes: How many chunks have so many student and teacher tokens: "2:1" to a count,
            the most frequent first.
        paired_by_index: Positions k that both sides of an answer have.
        in_step: The share of them at which both sides have read the same bytes; 1 without any.
        in_step_behind_first: The same without the first position, where nothing has been read.
        differing: How many answers the two sides spell differently.
        differing_rows: The first of them.
        worst: The answers with the least coverage, then with the fewest chunks for their tokens;
            none that is one to one throughout.
    """

    answers: int
    coverage: float
    chunks: int
    one_to_one: float
    student_tokens: int
    teacher_tokens: int
    student_shared: float
    teacher_shared: float
    student_numerals: int
    teacher_numerals: int
    student_numerals_shared: float | None
    teacher_numerals_shared: float | None
    chunk_shapes: dict[str, int]
    paired_by_index: int
    in_step: float
    in_step_behind_first: float
    differing: int
    differing_rows: tuple[DifferingRow, ...]
    worst: tuple[AlignedRow, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """One answer, kept until the worst are known."""

    answer: AnswerIds
    covered: int
    density: float
    chunk_ids: tuple[list[int], list[int]]

    @property
    def coverage(self) -> float:
        return self.covered / len(self.answer.text)


def measure_answers(pair: TokenizerPair, answers: Sequence[AnswerIds]) -> AnswerFacts:
    r"""Align answers and sum up.

    Raises:
        DataError: If there are no answers, one is empty, or an id is not in its vocabulary.

    Example:
        >>> student = TokenBytes((b" M\xc3\xbc", b"nster"), ("text", "text"))
        >>> teacher = TokenBytes((b" M\xc3\xbcnster",), ("text",))
        >>> answer = AnswerIds(
        ...     id="1", text=" Münster".encode(), student_ids=[0, 1], teacher_ids=[0]
        ... )
        >>> facts = measure_answers(TokenizerPair(student, teacher), [answer])
        >>> facts.coverage, facts.one_to_one, facts.chunk_shapes, facts.in_step
        (1.0, 0.0, {'2:1': 1}, 1.0)
    """
    if not answers or any(not answer.text for answer in answers):
        raise DataError(
            "there is nothing to align; expected at least one answer, none of them empty"
        )
    covered = 0
    shapes: Counter[tuple[int, int]] = Counter()
    paired = in_step = 0
    differing: list[DifferingRow] = []
    rows: list[_Row] = []
    for start in range(0, len(answers), _ROWS_AT_ONCE):
        block = answers[start : start + _ROWS_AT_ONCE]
        found = pair.align(
            [answer.student_ids for answer in block], [answer.teacher_ids for answer in block]
        )
        shared_bytes = {
            part.row: _common_start(pair, block[part.row]) for part in found.differences
        }
        differing += [
            DifferingRow(
                id=block[part.row].id,
                student=readable(part.student),
                teacher=readable(part.teacher),
            )
            for part in found.differences
        ]
        for number, (row, sizes) in enumerate(_rows(block, found)):
            covered += row.covered
            shapes.update(sizes)
            both, same = _steps(pair, row.answer, shared_bytes.get(number))
            paired, in_step = paired + both, in_step + same
            rows.append(row)
    student = _counted(answers, "student_ids")
    teacher = _counted(answers, "teacher_ids")
    student_shared, teacher_shared = (set(ids.tolist()) for ids in pair.shared_ids())
    student_numerals = _numerals(student, pair.student_bytes)
    teacher_numerals = _numerals(teacher, pair.teacher_bytes)
    chunks = shapes.total()
    behind = paired - len(answers)
    worst = sorted(
        (row for row in rows if row.coverage < 1 or row.density < 1),
        key=lambda row: (row.coverage, row.density),
    )
    return AnswerFacts(
        answers=len(answers),
        coverage=covered / sum(len(answer.text) for answer in answers),
        chunks=chunks,
        one_to_one=shapes[1, 1] / chunks if chunks else 0.0,
        student_tokens=student.total(),
        teacher_tokens=teacher.total(),
        student_shared=_share(student, student_shared) or 0.0,
        teacher_shared=_share(teacher, teacher_shared) or 0.0,
        student_numerals=student_numerals.total(),
        teacher_numerals=teacher_numerals.total(),
        student_numerals_shared=_share(student_numerals, student_shared),
        teacher_numerals_shared=_share(teacher_numerals, teacher_shared),
        chunk_shapes={f"{ours}:{theirs}": n for (ours, theirs), n in shapes.most_common()},
        paired_by_index=paired,
        in_step=in_step / paired if paired else 1.0,
        in_step_behind_first=(in_step - len(answers)) / behind if behind > 0 else 1.0,
        differing=len(differing),
        differing_rows=tuple(differing[:_KEPT_ROWS]),
        worst=tuple(_aligned_row(row, pair) for row in worst[:_KEPT_ROWS]),
    )


def _rows(
    block: Sequence[AnswerIds], found: Alignment
) -> Iterator[tuple[_Row, list[tuple[int, int]]]]:
    for answer, ours, theirs, chunks, covered in zip(
        block,
        found.student_chunk_ids.numpy(),
        found.teacher_chunk_ids.numpy(),
        found.chunks.tolist(),
        found.covered_bytes.tolist(),
        strict=True,
    ):
        sizes = [
            np.bincount(numbers[numbers >= 0], minlength=chunks).tolist()
            for numbers in (ours, theirs)
        ]
        lengths = len(answer.student_ids), len(answer.teacher_ids)
        row = _Row(
            answer=answer,
            # What a tokenizer adds to a text makes up for nothing that is lost elsewhere.
            covered=min(covered, len(answer.text)),
            density=chunks / max(*lengths, 1),
            chunk_ids=(ours[: lengths[0]].tolist(), theirs[: lengths[1]].tolist()),
        )
        yield row, list(zip(*sizes, strict=True))


def _common_start(pair: TokenizerPair, answer: AnswerIds) -> int:
    spelled = [
        pair.student_bytes.decode(answer.student_ids),
        pair.teacher_bytes.decode(answer.teacher_ids),
    ]
    return len(os.path.commonprefix(spelled))


def _steps(pair: TokenizerPair, answer: AnswerIds, shared_bytes: int | None) -> tuple[int, int]:
    """Count the positions that both sides have, and those where they have read the same bytes."""
    read = []
    for table, ids in (
        (pair.student_bytes, answer.student_ids),
        (pair.teacher_bytes, answer.teacher_ids),
    ):
        lengths = np.array([len(table.bytes_of[index]) for index in ids], dtype=np.int64)
        read.append(np.cumsum(lengths) - lengths)
    both = min(map(len, read))
    same = read[0][:both] == read[1][:both]
    if shared_bytes is not None:
        same &= read[0][:both] <= shared_bytes
    return both, int(same.sum())


def _counted(answers: Sequence[AnswerIds], field: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    for answer in answers:
        counts.update(getattr(answer, field))
    return counts


def _numerals(counts: Counter[int], table: TokenBytes) -> Counter[int]:
    return Counter(
        {
            index: n
            for index, n in counts.items()
            if any(48 <= byte <= 57 for byte in table.bytes_of[index])
        }
    )


def _share(counts: Counter[int], ids: set[int]) -> float | None:
    total = counts.total()
    return sum(n for index, n in counts.items() if index in ids) / total if total else None


def _aligned_row(row: _Row, pair: TokenizerPair) -> AlignedRow:
    sides = [
        tuple(
            Piece(text=_spelled(table, index), chunk=chunk)
            for index, chunk in zip(ids, chunk_ids, strict=True)
        )
        for table, ids, chunk_ids in (
            (pair.student_bytes, row.answer.student_ids, row.chunk_ids[0]),
            (pair.teacher_bytes, row.answer.teacher_ids, row.chunk_ids[1]),
        )
    ]
    return AlignedRow(id=row.answer.id, coverage=row.coverage, student=sides[0], teacher=sides[1])


def _spelled(table: TokenBytes, index: int) -> str:
    """A token's text; a special one, which has no bytes, as it is written."""
    piece = table.bytes_of[index]
    return readable(piece) if piece or not table.tokens else table.tokens[index]
