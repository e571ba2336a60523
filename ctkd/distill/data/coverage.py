"""Coverage: the share of the answers that both tokenizers spell alike, and places to cut one.

A tokenizer that changes the text (lower case, Unicode normalization, characters it lacks) is read
as it is: what it makes of an answer is what its model learns. How much of the answers is lost that
way is counted here, in bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ctkd.errors import DataError

__all__ = ["Coverage", "RowCoverage", "kept_bytes", "shared_ends", "shown"]

_WORST_ROWS = 5
_SHOWN_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCoverage:
    """Coverage of one answer.

    Args:
        id: The example's id.
        where: What an error message calls the example.
        text: The answer's bytes.
        covered_bytes: How many of them lie in chunks; without a teacher, how many the student's
            tokenizer keeps.
        student: What the student's ids spell.
        teacher: What the teacher's ids spell; None without a teacher.
    """

    id: str
    where: str
    text: bytes
    covered_bytes: int
    student: bytes
    teacher: bytes | None = None

    @property
    def share(self) -> float:
        """Covered bytes of all bytes of the answer."""
        return self.covered_bytes / len(self.text)

    def __str__(self) -> str:
        spelled = [("student", self.student), ("teacher", self.teacher)]
        differences = [
            f"the {side}'s ids spell {shown(what)}"
            for side, what in spelled
            if what is not None and what != self.text
        ]
        return f"{self.where} ({_percent(self.share)}): expected {shown(self.text)}, " + (
            " and ".join(differences)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Sums over all answers that were encoded, before any is left out or cut.

    Args:
        answers: How many answers.
        text_bytes: The bytes of their texts.
        covered_bytes: How many of them lie in chunks; without a teacher, how many the student's
            tokenizer keeps.
        chunks: How many chunks; 0 without a teacher.
        one_to_one: How many of them have one token on both sides.
        student_tokens: Tokens of the student, without ends of sequence.
        teacher_tokens: Tokens of the teacher; None without one.
        worst: The answers with the least coverage, worst first; none that are covered in full.

    Example:
        >>> found = Coverage(answers=2, text_bytes=20, covered_bytes=19, chunks=7, one_to_one=5,
        ...                  student_tokens=9, teacher_tokens=8)
        >>> found.share
        0.95
        >>> print(found.report())
        aligned 2 answers: 95.0 % of bytes in chunks, 71 % of chunks one to one, 4.5 student and \
4.0 teacher tokens per answer
    """

    answers: int
    text_bytes: int
    covered_bytes: int
    chunks: int = 0
    one_to_one: int = 0
    student_tokens: int = 0
    teacher_tokens: int | None = None
    worst: tuple[RowCoverage, ...] = ()

    @classmethod
    def summed(cls, rows: Sequence[RowCoverage]) -> "Coverage":
        """Sum the bytes of answers, and find the worst of them."""
        worst = sorted((row for row in rows if row.share < 1), key=lambda row: row.share)
        return cls(
            answers=len(rows),
            text_bytes=sum(len(row.text) for row in rows),
            covered_bytes=sum(row.covered_bytes for row in rows),
            worst=tuple(worst[:_WORST_ROWS]),
        )

    @property
    def share(self) -> float:
        """Covered bytes of all bytes; 1 if there are none."""
        return self.covered_bytes / self.text_bytes if self.text_bytes else 1.0

    @property
    def one_to_one_share(self) -> float | None:
        """Chunks with one token on both sides, of all chunks; None without chunks."""
        return self.one_to_one / self.chunks if self.chunks else None

    def report(self) -> str:
        """Say it in one line."""
        answers = f"{self.answers} answer{'s' if self.answers != 1 else ''}"
        per_answer = f"{self.student_tokens / max(self.answers, 1):.1f}"
        if self.teacher_tokens is None:
            return (
                f"encoded {answers}: {_percent(self.share)} of bytes kept by the tokenizer, "
                f"{per_answer} tokens per answer"
            )
        single = self.one_to_one_share
        return (
            f"aligned {answers}: {_percent(self.share)} of bytes in chunks, "
            + ("no chunks" if single is None else f"{single:.0%} of chunks one to one").replace(
                "%", " %"
            )
            + f", {per_answer} student and {self.teacher_tokens / max(self.answers, 1):.1f} "
            "teacher tokens per answer"
        )

    def check(self, minimum: float) -> None:
        """Refuse too little.

        Raises:
            DataError: If the share is below the minimum; the message names the worst answers.
        """
        if self.share >= minimum:
            return
        what = "are kept by the student's tokenizer"
        if self.teacher_tokens is not None:
            what = "are spelled alike on both sides"
        rows = "; ".join(map(str, self.worst[:_SHOWN_ROWS]))
        more = "; ..." if len(self.worst) > _SHOWN_ROWS else ""
        raise DataError(
            f"only {_percent(self.share)} of the answers' bytes {what}, expected at least "
            f"{_percent(minimum)}; {rows}{more}; rewrite or remove these rows, choose another "
            "model, or lower min_coverage"
        )


def kept_bytes(text: bytes, spelled: bytes) -> int:
    """Count the bytes of a text that its tokenizer keeps: the common start and the common end.

    Example:
        >>> kept_bytes(b" Paris", b" paris")
        5
    """
    shorter = min(len(text), len(spelled))
    start = 0
    while start < shorter and text[start] == spelled[start]:
        start += 1
    end = 0
    while end < shorter - start and text[-1 - end] == spelled[-1 - end]:
        end += 1
    return start + end


def shared_ends(
    pieces: Sequence[bytes], chunk_ids: Sequence[Sequence[int]] = ()
) -> list[tuple[int, ...]]:
    r"""Count the tokens up to each place where an answer can be cut, in order.

    Such a place is never inside a character. It ends a token; with chunks it ends the same chunk
    on all sides, so that all of them keep the same bytes.

    Args:
        pieces: The bytes of the first side's tokens.
        chunk_ids: The chunk of each token, one list per side; without any, there is one side.

    Example:
        >>> shared_ends([b" a", b"\xc3", b"\xa9", b"b"])
        [(1,), (3,), (4,)]
        >>> shared_ends([b" a", b"b", b"c"], [[0, 0, 1], [0, 1]])
        [(2, 1), (3, 2)]
    """
    inside = [False] * (len(pieces) + 1)
    following = b""
    for index in range(len(pieces) - 1, -1, -1):
        inside[index + 1] = bool(following) and following[0] & 0xC0 == 0x80
        following = pieces[index] or following
    if not chunk_ids:
        return [(end,) for end in range(1, len(pieces) + 1) if not inside[end]]
    sides = [{chunk: end for end, chunk in enumerate(ids, 1)} for ids in chunk_ids]
    common = sorted(set.intersection(*map(set, sides)) - {-1})
    ends = [tuple(side[chunk] for side in sides) for chunk in common]
    return [end for end in ends if not inside[end[0]]]


def shown(spelled: bytes, limit: int = 60) -> str:
    """Quote bytes for an error message, cut to so many characters."""
    text = repr(spelled.decode(errors="backslashreplace"))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _percent(share: float) -> str:
    """In percent, rounded down, so that only a whole one reads 100.0 %."""
    return f"{math.floor(round(share * 1000, 6)) / 10:.1f} %"
