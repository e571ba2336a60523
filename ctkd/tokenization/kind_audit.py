"""An audit of the kinds of text on which tokenizers differ most.

Numerals, white space, Chinese, Japanese and Korean, and emoji. One vocabulary may hold whole
numbers where the other cuts single digits; a loss that matches tokens by their text then finds no
partner for exactly the tokens that carry the answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["KINDS", "Cut", "Kind", "KindAudit", "Probe", "audit_kinds", "readable"]

Cut = Callable[[list[str]], list[list[int]]]
"""Turns texts into ids, without special tokens."""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002fa1f"
_EMOJI = "\u2600-\u27bf\u2b50\u2b55\U0001f000-\U0001faff"
_EMOJI_JOINERS = "\u200d\ufe0f"


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of text.

    Args:
        name: What the page calls it.
        counted: Which tokens `pattern` finds, in words.
        pattern: Matches the whole text of such a token.
        probes: Short texts of that kind.
    """

    name: str
    counted: str
    pattern: re.Pattern[str]
    probes: tuple[str, ...]


KINDS = (
    Kind("numerals", "two digits or more", re.compile(" ?[0-9]{2,}"), ("1648", "2024", "365250")),
    Kind("white space", "two or more", re.compile(r"\s{2,}"), ("    ", "\n\n", "\t\t")),
    Kind(
        "CJK",
        "two characters or more",
        re.compile(f" ?[{_CJK}]{{2,}}"),
        ("東京都", "こんにちは", "대한민국"),
    ),
    Kind(
        "emoji",
        "one emoji or more",
        re.compile(f" ?[{_EMOJI}][{_EMOJI}{_EMOJI_JOINERS}]*"),
        ("🙂", "👍🏽", "👩\u200d👧"),
    ),
)
"""The kinds that are looked at, numerals first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    r"""One short text, cut by both tokenizers.

    Args:
        text: The text.
        student: The student's pieces of it, bytes that are no character written as ``\xe2``.
        teacher: The teacher's.
        student_exact: Whether the student's pieces spell the text.
        teacher_exact: Whether the teacher's do.
    """

    text: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    student_exact: bool
    teacher_exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KindAudit:
    """One kind of text, as both sides cut it.

    Args:
        name: The kind.
        counted: Which tokens are counted, in words.
        student_tokens: How many of them the student's vocabulary has.
        teacher_tokens: How many the teacher's has.
        student_longest: The most characters of a probe that one student token holds; 0 if every
            character is cut into bytes or lost.
        teacher_longest: The same for the teacher.
        probes: How the probes are cut.
    """

    name: str
    counted: str
    student_tokens: int
    teacher_tokens: int
    student_longest: int
    teacher_longest: int
    probes: tuple[Probe, ...]

    @property
    def split_on_one_side(self) -> bool:
        """True if one side has tokens of several characters where the other cuts each one."""
        return (self.student_longest > 1) != (self.teacher_longest > 1)


def audit_kinds(pair: TokenizerPair, student: Cut, teacher: Cut) -> tuple[KindAudit, ...]:
    """Look at every one of `KINDS`.

    Args:
        pair: The two vocabularies.
        student: Cuts a text as the student's tokenizer does.
        teacher: Cuts a text as the teacher's does.
    """
    counts = [_count(table) for table in (pair.student_bytes, pair.teacher_bytes)]
    found = []
    for number, kind in enumerate(KINDS):
        ours = _pieces(pair.student_bytes, student, kind.probes)
        theirs = _pieces(pair.teacher_bytes, teacher, kind.probes)
        probes = [
            Probe(
                text=text,
                student=tuple(map(readable, our)),
                teacher=tuple(map(readable, their)),
                student_exact=b"".join(our) == text.encode(),
                teacher_exact=b"".join(their) == text.encode(),
            )
            for text, our, their in zip(kind.probes, ours, theirs, strict=True)
        ]
        found.append(
            KindAudit(
                name=kind.name,
                counted=kind.counted,
                student_tokens=counts[0][number],
                teacher_tokens=counts[1][number],
                student_longest=_longest(kind.probes, ours),
                teacher_longest=_longest(kind.probes, theirs),
                probes=tuple(probes),
            )
        )
    return tuple(found)


def readable(piece: bytes) -> str:
    r"""Decode a token's bytes, those that are no character written as ``\xe2``.

    Example:
        >>> readable(b"caf\xc3")
        'caf\\xc3'
    """
    return piece.decode("utf-8", "backslashreplace")


def _count(table: TokenBytes) -> list[int]:
    counts = [0] * len(KINDS)
    for piece in table.bytes_of:
        text = piece.decode("utf-8", "ignore")
        if len(text) < 1 or len(text.encode()) != len(piece):
            continue
        for number, kind in enumerate(KINDS):
            counts[number] += kind.pattern.fullmatch(text) is not None
    return counts


def _pieces(table: TokenBytes, cut: Cut, probes: tuple[str, ...]) -> list[list[bytes]]:
    found = []
    for text, ids in zip(probes, cut(list(probes)), strict=True):
        pieces = [table.bytes_of[index] for index in ids]
        # Some tokenizers put a space before every text; it is no part of the probe.
        if b"".join(pieces) == b" " + text.encode():
            pieces[0] = pieces[0][1:]
            pieces = [piece for piece in pieces if piece]
        found.append(pieces)
    return found


def _longest(probes: tuple[str, ...], pieces: list[list[bytes]]) -> int:
    return max(
        (
            len(held)
            for text, cut in zip(probes, pieces, strict=True)
            for piece in cut
            if (held := piece.decode("utf-8", "ignore")) in text
        ),
        default=0,
    )
