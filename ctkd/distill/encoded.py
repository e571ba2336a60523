"""Encoded examples: prompt, answer and chunks in the ids of one or two tokenizers."""

from dataclasses import dataclass, field, replace

from ctkd.distill.coverage import Coverage, shared_ends
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["EncodedExamples", "EncodedPair", "EncodedSide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSide:
    """One example in one tokenizer's ids.

    Args:
        prompt_ids: The prompt, with what the tokenizer puts in front of a text; at least one id.
        answer_ids: The answer, without an end of sequence; at least one id.
        eos_id: The end of sequence; None if the tokenizer has none or the answer was cut.
        chunk_ids: The chunk of each of `answer_ids`, -1 for none. Equal numbers on both sides are
            the same bytes. Empty where nothing was aligned.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    eos_id: int | None
    chunk_ids: list[int] = field(default_factory=list)

    def cut_to(self, count: int) -> "EncodedSide":
        """Keep so many tokens of the answer, which then has no end."""
        return replace(
            self,
            answer_ids=self.answer_ids[:count],
            chunk_ids=self.chunk_ids[:count],
            eos_id=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """One example in the ids of the student and, if there is one, of the teacher.

    Args:
        id: The example's.
        student: In the student's ids.
        teacher: In the teacher's; None without a teacher.
        cut: Whether the answer was cut, on both sides at the same byte.
    """

    id: str
    student: EncodedSide
    teacher: EncodedSide | None = None
    cut: bool = False

    def without_end(self) -> "EncodedPair":
        """The same answer, told to be cut: neither side ends."""
        return replace(
            self,
            student=replace(self.student, eos_id=None),
            teacher=None if self.teacher is None else replace(self.teacher, eos_id=None),
            cut=True,
        )

    def cut_to(self, max_length: int, student_bytes: TokenBytes) -> "EncodedPair | None":
        """Cut the answer at the last place at which all sides fit; None if there is none.

        Args:
            max_length: The most tokens a side may have.
            student_bytes: Tells where characters of the student's answer end.
        """
        pieces = [student_bytes.bytes_of[index] for index in self.student.answer_ids]
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        chunk_ids = [] if self.teacher is None else [side.chunk_ids for side in sides]
        for ends in reversed(shared_ends(pieces, chunk_ids)):
            both = list(zip(sides, ends, strict=True))
            if all(len(side.prompt_ids) + end <= max_length for side, end in both):
                student, *teacher = [side.cut_to(end) for side, end in both]
                return EncodedPair(
                    id=self.id, student=student, teacher=teacher[0] if teacher else None, cut=True
                )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExamples:
    """What `encode_pair` made of some examples.

    Args:
        rows: The encoded examples, in their order.
        coverage: How much of the answers both sides spell alike; it has a report of its own.
        max_length: The most tokens a side may have.
        too_long: The ids of the examples left out, each with its lengths.
        cut: The ids of the examples whose answers were cut, each with its lengths before.
    """

    rows: list[EncodedPair]
    coverage: Coverage
    max_length: int
    too_long: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def report(self) -> str:
        """Say in one line what was left out or cut; empty if nothing was.

        Example:
            >>> coverage = Coverage(answers=1, text_bytes=9, covered_bytes=9, student_tokens=9)
            >>> found = EncodedExamples(
            ...     rows=[], coverage=coverage, max_length=64, too_long=("7 (student 90)",)
            ... )
            >>> found.report()
            'left out 1 of 1 examples as longer than 64 tokens: 7 (student 90)'
        """
        total = len(self.rows) + len(self.too_long)
        told = [
            f"{what} {len(rows)} of {total} examples as longer than {self.max_length} tokens: "
            f"{', '.join(rows[:3])}{', ...' if len(rows) > 3 else ''}"
            for what, rows in (("left out", self.too_long), ("cut", self.cut))
            if rows
        ]
        return "; ".join(told)
