"""MinED (arXiv 2401.10491): vocabulary maps and time warping by exhaustive comparison.

A vocabulary is three lists: the bytes, the role and the spelling of each id. See
`ctkd.tokenization.token_bytes` for what they hold.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Vocabulary(NamedTuple):
    """Bytes, role and spelling of each id."""

    bytes_of: Sequence[bytes]
    roles: Sequence[str]
    tokens: Sequence[str]

    def text(self, index: int) -> str:
        """What the token is compared by."""
        if self.roles[index] == "text":
            return self.bytes_of[index].decode("utf-8", "surrogateescape")
        return self.tokens[index]

    def rank(self, index: int) -> tuple[bool, int]:
        """Order of preference among tokens that mean the same."""
        is_byte = bool(re.fullmatch("<0x[0-9A-Fa-f]{2}>", self.tokens[index]))
        return is_byte and len(self.bytes_of[index]) == 1, index

    def same(self, index: int, other: "Vocabulary", other_index: int) -> bool:
        """Whether two tokens mean the same: equal bytes, or equal roles bos, eos or pad."""
        role, other_role = self.roles[index], other.roles[other_index]
        if role == "text" and other_role == "text":
            return self.bytes_of[index] == other.bytes_of[other_index] != b""
        return role == other_role and role in ("bos", "eos", "pad")


def levenshtein(first: str, second: str) -> int:
    """Least number of inserted, deleted or replaced characters."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) + 1):
        for j in range(len(second) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
            else:
                table[i][j] = min(
                    table[i - 1][j] + 1,
                    table[i][j - 1] + 1,
                    table[i - 1][j - 1] + (first[i - 1] != second[j - 1]),
                )
    return table[-1][-1]


def nearest(student: Vocabulary, teacher: Vocabulary) -> list[int]:
    """Student id of each teacher id: the same token, else the one of least distance."""
    ids = range(len(student.bytes_of))
    answers = []
    for index, role in enumerate(teacher.roles):
        same = [i for i in ids if student.same(i, teacher, index)]
        if same:
            answers.append(min(same, key=student.rank))
            continue
        by_text: dict[str, list[int]] = {}
        for i in ids:
            if student.text(i) and (role != "text" or student.roles[i] == "text"):
                by_text.setdefault(student.text(i), []).append(i)
        allowed = [min(alike, key=student.rank) for alike in by_text.values()]
        query = teacher.text(index)
        answers.append(min(allowed, key=lambda i: (levenshtein(query, student.text(i)), i)))
    return answers


def shared(student: Vocabulary, teacher: Vocabulary) -> list[tuple[int, int]]:
    """Pairs of ids that mean the same, each id the preferred one of its side."""
    pairs = []
    for i in range(len(student.bytes_of)):
        for j in range(len(teacher.bytes_of)):
            if student.same(i, teacher, j):
                rivals = [k for k in range(len(student.bytes_of)) if student.same(k, teacher, j)]
                others = [k for k in range(len(teacher.bytes_of)) if student.same(i, teacher, k)]
                if i == min(rivals, key=student.rank) and j == min(others, key=teacher.rank):
                    pairs.append((i, j))
    return pairs


def warp(
    cost: Sequence[Sequence[float]],
) -> tuple[list[list[float]], list[tuple[int, int]]]:
    """Accumulated cost, and the cheapest path; ties go diagonally, then up, then left."""
    table: list[list[float]] = []
    for i, row in enumerate(cost):
        table.append([])
        for j, value in enumerate(row):
            before = [table[a][b] for a, b in _before(i, j) if a >= 0 and b >= 0]
            table[i].append(value + (min(before) if before else 0.0))
    i, j = len(cost) - 1, len(cost[0]) - 1
    path = [(i, j)]
    while (i, j) != (0, 0):
        i, j = min(_before(i, j), key=lambda at: table[at[0]][at[1]] if min(at) >= 0 else math.inf)
        path.append((i, j))
    return table, path[::-1]


def _before(i: int, j: int) -> list[tuple[int, int]]:
    return [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
