"""Alignment by bytes: the plain walk over two rows of tokens, one row at a time.

Two fingers run over the two sides; the one whose token ends earlier moves on; where both ends
meet, a chunk closes. Rows whose texts differ are walked from the front over what they share there,
and from the back over what they share there.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

FRONT, BACK = 0, 1


class Table(Protocol):
    """What each id stands for: its bytes and its role."""

    bytes_of: Sequence[bytes]
    roles: Sequence[str]


@dataclass
class Row:
    """What the walk finds in one row; -1 is no chunk."""

    student: list[int]
    teacher: list[int]
    chunks: int
    one_to_one: int
    covered_bytes: int
    middles: tuple[bytes, bytes]  # what the two texts do not share, both empty if they are equal


@dataclass
class _Piece:
    index: int  # of the token in its row
    start: int
    end: int
    role: str | None  # of a special token


def _pieces(table: Table, ids: Sequence[int]) -> tuple[list[_Piece], bytes]:
    pieces, text = [], b""
    for index, token in enumerate(ids):
        if token < 0:
            continue
        content = table.bytes_of[token]
        role = table.roles[token] if not content else None
        pieces.append(_Piece(index, len(text), len(text) + len(content), role))
        text += content
    return pieces, text


def _walk_front(student: list[_Piece], teacher: list[_Piece]) -> list[tuple[list, list]]:
    """Groups of tokens whose ends meet, both rows beginning at byte 0."""
    groups = []
    ours, theirs = [], []
    i = j = 0
    while i < len(student) and j < len(teacher):
        ours = ours or [student[i]]
        theirs = theirs or [teacher[j]]
        if student[i].end == teacher[j].end:
            groups.append((ours, theirs))
            ours, theirs = [], []
            i += 1
            j += 1
        elif student[i].end < teacher[j].end:
            i += 1
            ours += student[i : i + 1]
        else:
            j += 1
            theirs += teacher[j : j + 1]
    return groups


def _mirrored(pieces: list[_Piece], length: int) -> list[_Piece]:
    return [
        _Piece(piece.index, length - piece.end, length - piece.start, piece.role)
        for piece in reversed(pieces)
    ]


def align(
    student_table: Table,
    student_ids: Sequence[int],
    teacher_table: Table,
    teacher_ids: Sequence[int],
) -> Row:
    """Align one row."""
    student, student_text = _pieces(student_table, student_ids)
    teacher, teacher_text = _pieces(teacher_table, teacher_ids)
    shorter = min(len(student_text), len(teacher_text))
    front = back = 0
    if student_text == teacher_text:
        front = shorter
    else:
        while front < shorter and student_text[front] == teacher_text[front]:
            front += 1
        while back < shorter - front and student_text[-1 - back] == teacher_text[-1 - back]:
            back += 1

    # Each chunk found: (part, place in it, text before specials, token), student's, teacher's.
    found = []
    plain = [[piece for piece in side if piece.end > piece.start] for side in (student, teacher)]
    agreeing = [[piece for piece in side if piece.end <= front] for side in plain]
    for ours, theirs in _walk_front(*agreeing):
        found.append(((FRONT, ours[-1].end, 0, ours[0].index), ours, theirs))
    if back:
        agreeing = [
            [piece for piece in _mirrored(side, len(text)) if piece.end <= back]
            for side, text in zip(plain, (student_text, teacher_text), strict=True)
        ]
        for ours, theirs in _walk_front(*agreeing):
            # Seen from the back, the group's first token is the last of the text.
            found.append(((BACK, -ours[0].start, 0, ours[-1].index), ours, theirs))

    sides = (student, teacher)
    free = [[piece for piece in side if piece.role in ("bos", "eos")] for side in sides]
    for part in (FRONT, BACK):
        waiting = defaultdict(list)
        for piece in free[1]:
            place = piece.end if part == FRONT else piece.end - len(teacher_text)
            if (part == FRONT and place <= front) or (part == BACK and -place <= back):
                waiting[place, piece.role].append(piece)
        for piece in list(free[0]):
            place = piece.end if part == FRONT else piece.end - len(student_text)
            inside = place <= front if part == FRONT else -place <= back
            if inside and waiting[place, piece.role]:
                partner = waiting[place, piece.role].pop(0)
                found.append(((part, place, 1, piece.index), [piece], [partner]))
                free[0].remove(piece)
                free[1].remove(partner)

    row = Row([-1] * len(student_ids), [-1] * len(teacher_ids), len(found), 0, 0, (b"", b""))
    for number, (_, ours, theirs) in enumerate(sorted(found, key=lambda chunk: chunk[0])):
        for piece in ours:
            row.student[piece.index] = number
            row.covered_bytes += piece.end - piece.start
        for piece in theirs:
            row.teacher[piece.index] = number
        row.one_to_one += len(ours) == len(theirs) == 1
    row.middles = (
        student_text[front : len(student_text) - back],
        teacher_text[front : len(teacher_text) - back],
    )
    return row
