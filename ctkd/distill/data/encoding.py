"""From examples to token ids on both sides, with the chunks that tie the two together.

Prompt and answer are tokenized apart, so that the scored part begins at the same character for
student and teacher. Each side renders the prompt in its own form; the answer is the same text on
both. A conversation has several answers, each tokenized apart as well, with what a side's template
writes between them. An example that is too long on one side is left out or cut on both, never on
one alone.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from ctkd.distill.data.chat_templates import ChatTemplate
from ctkd.distill.data.conversations import RefusedRow, shortened
from ctkd.distill.data.coverage import Coverage, RowCoverage, kept_bytes, shared_ends, shown
from ctkd.distill.data.exact_ids import check_unicode, exact_ids, tokenized
from ctkd.distill.data.prompts import PLAIN, PromptForm, encode_prompt
from ctkd.distill.data.rows import NothingLeft
from ctkd.distill.data.tasks import Example
from ctkd.errors import DataError, SettingError
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["EncodedExamples", "EncodedExample", "EncodedSide", "encode_examples", "encode_side"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSide:
    """One example in one tokenizer's ids.

    Args:
        prompt_ids: The prompt, with what the tokenizer puts in front of a text; at least one id.
        answer_ids: The answer, without an end of sequence; at least one id. Of a conversation all
            that follows its first prompt: answers, their ends, and what is read between them.
        eos_id: The token that ends the answer, the end of sequence or of a turn, see
            `PromptForm.end_id`; None if there is none or the answer was cut.
        chunk_ids: The chunk of each of `answer_ids`, -1 for none. Equal numbers on both sides are
            the same bytes. Empty where nothing was aligned.
        kinds: A letter for each of `answer_ids`: "a" of an answer, "e" its end, "." only read.
            Empty where all of them are of one answer.
        decoder_start: What the decoder of an encoder-decoder reads in front of the answer, while
            its encoder reads the prompt; empty where one model reads both, see `PromptForm`.
        text_bytes: Bytes of the answers' text in UTF-8, which lossy ids do not tell.

    Example:
        >>> side = EncodedSide(prompt_ids=[7], answer_ids=[5, 2, 7, 6], eos_id=2, kinds="ae.a")
        >>> side.places(with_eos=True), side.places(with_eos=False), side.answers
        ([0, 1, 3, 4], [0, 3], [[5], [6]])
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    eos_id: int | None
    chunk_ids: list[int] = field(default_factory=list)
    kinds: str = ""
    decoder_start: tuple[int, ...] = ()
    text_bytes: int = 0

    @property
    def kinds_with_end(self) -> str:
        """A letter for each token behind the prompt, the last end included."""
        kinds = self.kinds or "a" * len(self.answer_ids)
        return kinds if self.eos_id is None else kinds + "e"

    @property
    def answers(self) -> list[list[int]]:
        """The ids of each answer."""
        runs = re.finditer("a+", self.kinds_with_end)
        return [self.answer_ids[run.start() : run.end()] for run in runs]

    @property
    def scored_ids(self) -> list[int]:
        """The ids of all answers, one behind the other."""
        return list(itertools.chain(*self.answers))

    def places(self, *, with_eos: bool) -> list[int]:
        """Where scored tokens stand behind the prompt, counted from 0.

        Args:
            with_eos: Whether ends are scored.
        """
        scored = "ae" if with_eos else "a"
        return [place for place, kind in enumerate(self.kinds_with_end) if kind in scored]

    def rows_of(self, stored: Sequence[int], *, with_eos: bool) -> list[int]:
        """Which of the stored places are scored, counted from 0.

        Args:
            stored: Some `places`.
            with_eos: Whether ends are scored.
        """
        row_of = {place: row for row, place in enumerate(stored)}
        return [row_of[place] for place in self.places(with_eos=with_eos) if place in row_of]

    def length(self, count: int) -> int:
        """The tokens that are read in one piece, with so many behind the prompt."""
        if self.decoder_start:
            return max(len(self.prompt_ids), len(self.decoder_start) + count)
        return len(self.prompt_ids) + count

    def cut_to(self, count: int) -> "EncodedSide":
        """Keep so many tokens behind the prompt, of which the last answer then has no end."""
        return replace(
            self,
            answer_ids=self.answer_ids[:count],
            chunk_ids=self.chunk_ids[:count],
            kinds=self.kinds[:count],
            eos_id=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExample:
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

    def without_end(self) -> "EncodedExample":
        """The same answer marked as cut: neither side ends."""
        return replace(
            self,
            student=replace(self.student, eos_id=None),
            teacher=None if self.teacher is None else replace(self.teacher, eos_id=None),
            cut=True,
        )

    def cut_to(self, max_length: int, student_bytes: TokenBytes) -> "EncodedExample | None":
        """Cut the answer at the last place at which all sides fit; None if there is none.

        Of a conversation the last answers are left away, and the last that is left is cut. Where it
        fits whole, its end is kept if that fits, too.

        Args:
            max_length: The most tokens a side may have.
            student_bytes: Tells where characters of the student's answer end.
        """
        pieces = [student_bytes.bytes_of[index] for index in self.student.answer_ids]
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        chunk_ids = [] if self.teacher is None else [side.chunk_ids for side in sides]
        kinds = self.student.kinds_with_end
        for ends in reversed(shared_ends(pieces, chunk_ids)):
            both = list(zip(sides, ends, strict=True))
            if kinds[ends[0] - 1] != "a":
                continue
            ended = all(side.kinds[end : end + 1] == "e" for side, end in both)
            for more in (1, 0) if ended else (0,):
                if all(side.length(end + more) <= max_length for side, end in both):
                    student, *teacher = [side.cut_to(end + more) for side, end in both]
                    return EncodedExample(
                        id=self.id,
                        student=student,
                        teacher=teacher[0] if teacher else None,
                        cut=True,
                    )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExamples:
    """The result of `encode_examples`.

    Args:
        rows: The encoded examples, in their order.
        coverage: How much of the answers both sides spell alike; it has a report of its own.
        max_length: The most tokens a side may have.
        too_long: The ids of the examples left out, each with its lengths.
        refused: Why conversations were left out, which a side's template or tokenizer changes.
        cut: The ids of the examples whose answers were cut, each with its lengths before.
    """

    rows: list[EncodedExample]
    coverage: Coverage
    max_length: int
    too_long: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
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
        total = len(self.rows) + len(self.too_long) + len(self.refused)
        parts = []
        if self.refused:
            reasons = shortened(self.refused)
            parts.append(f"left out {len(self.refused)} of {total} conversations: {reasons}")
        parts += [
            f"{what} {len(rows)} of {total} examples as longer than {self.max_length} tokens: "
            f"{', '.join(rows[:3])}{', ...' if len(rows) > 3 else ''}"
            for what, rows in (("left out", self.too_long), ("cut", self.cut))
            if rows
        ]
        return "; ".join(parts)


# Answers aligned together; the tensors are as wide as the longest among them.
_ROWS_AT_ONCE = 1024
# How many chunks an answer has, and which is that of each token of the student and the teacher.
_Chunks = tuple[int, list[int], list[int]]


def encode_side(
    tokenizer: PreTrainedTokenizerBase,
    token_bytes: TokenBytes,
    prompt: str,
    answer: str,
    *,
    leading: Sequence[int] | None = None,
    where: str = "example",
    side: str = "student",
) -> EncodedSide:
    """Tokenize plain prompt and answer apart, the answer to ids that spell exactly its bytes.

    Tokenizers that put a space in front of every text are dealt with, see `exact_ids`.

    Args:
        tokenizer: The model's tokenizer.
        token_bytes: Its byte table.
        prompt: What stands before the answer.
        answer: The text to score, at least one character.
        leading: As in `encode_prompt`.
        where: What an error message calls the example.
        side: What an error message calls the model.

    Raises:
        DataError: If the ids cannot spell the answer (the tokenizer changes the text, lacks a
            character, or takes a part of it for a special token), the prompt has no ids, or a text
            is not valid Unicode.
    """
    encoder = _Encoder(tokenizer, token_bytes, PLAIN, side)
    prompt_ids = encode_prompt(tokenizer, prompt, leading=leading, where=where)
    check_unicode(answer, "answer", where)
    (answer_ids,) = tokenized(tokenizer, [answer])
    return encoder.side(prompt_ids, answer_ids, answer, where, exactly=True)


def encode_examples(
    examples: Sequence[Example],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int,
    score_eos: bool = False,
    on_long: Literal["drop", "refuse", "cut"] = "drop",
    min_coverage: float = 0.95,
    student_form: PromptForm = PLAIN,
    teacher_form: PromptForm = PLAIN,
    pair: TokenizerPair | None = None,
) -> EncodedExamples:
    """Tokenize examples for the student and, if there is one, for the teacher, and align them.

    A tokenizer that changes the text is read as it is: the ids are its own, and chunks cover what
    the two sides spell alike. Where it takes a part of an answer for a special token, the row is
    refused.

    Where every side is asked in a chat, an answer stands without the space in front that a task
    gives it; else with it, on all sides, so that all score the same text.

    A conversation is refused, left out on all sides and reported, where a side's chat template
    does not write it as it is, see `ChatTemplate.turns`, or an answer holds a special token.

    Args:
        examples: What to encode, at least one.
        student_tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's; None to train without a teacher.
        max_length: The most tokens a side may have: prompt, answer and, where it is read, the end
            of sequence. What encoder and decoder read counts apart.
        score_eos: Whether distillation scores the end of sequence, on both sides.
        on_long: Treatment of an example that is too long on either side. "drop": it is left out
            on both and reported. "cut": its answer ends with the last chunk that fits on both, at
            the end of a character, without an end of sequence; without a chunk that fits it is left
            out. "refuse": an error.
        min_coverage: The least share of the answers' bytes, from 0 to 1, that must lie in chunks;
            without a teacher, that the student's tokenizer must keep.
        student_form: The form of the student's prompts.
        teacher_form: The form of the teacher's prompts.
        pair: The two tokenizers' pair; by default made here.

    Raises:
        SettingError: If `max_length` is too small to be meant, another setting is out of range,
            `score_eos` is asked of a tokenizer without an end of sequence or a template without
            ends of turns, or conversations are to be asked in plain text.
        DataError: If too little is covered, an answer holds a special token or has no ids, a text
            is not valid Unicode, an example is too long and `on_long` is "refuse", or no example is
            left.
        ModelError: If a side has no chat template and its form asks for one.
    """
    if max_length < 2:
        raise SettingError(f"max_length must be at least 2 tokens, got {max_length}")
    if on_long not in ("drop", "refuse", "cut"):
        raise SettingError(f"on_long must be 'drop', 'refuse' or 'cut', got {on_long!r}")
    if not 0.0 <= min_coverage <= 1.0:
        raise SettingError(f"min_coverage must be from 0 to 1, got {min_coverage}")
    if not examples:
        raise DataError("there are no examples to encode; expected at least one")
    sides = (
        ("student", student_tokenizer, student_form),
        ("teacher", teacher_tokenizer, teacher_form),
    )
    for name, tokenizer, form in sides:
        if score_eos and tokenizer is not None and form.end_id(tokenizer) is None:
            raise SettingError(
                f"score_eos needs an end of sequence on both sides, but the {name}'s tokenizer has "
                "none; leave score_eos off, or set the tokenizer's eos_token"
            )
    forms = [student_form] if teacher_tokenizer is None else [student_form, teacher_form]
    if all(form.template == "chat" for form in forms):
        examples = [replace(one, answer=one.answer.removeprefix(" ")) for one in examples]
    elif any(example.messages for example in examples):
        raise SettingError(
            "conversations are written in chat templates; leave the templates of both sides at chat"
        )
    if any(form.decoder_start for form in forms) and any(one.messages for one in examples):
        raise SettingError(
            "an encoder-decoder reads one prompt and writes one answer, no conversation; give rows "
            "of prompt and answer (task text), or a decoder-only model"
        )
    if teacher_tokenizer is None:
        table = TokenBytes.from_tokenizer(student_tokenizer)
        student = _Encoder(student_tokenizer, table, student_form, "student")
        examples, encoded, refused = _without_refused(examples, [student.all(examples)])
        aligned, coverage = _alone(examples, encoded[0], table)
    else:
        if pair is None:
            pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
        table = pair.student_bytes
        student = _Encoder(student_tokenizer, table, student_form, "student")
        teacher = _Encoder(teacher_tokenizer, pair.teacher_bytes, teacher_form, "teacher")
        both = [student.all(examples), teacher.all(examples)]
        examples, encoded, refused = _without_refused(examples, both)
        aligned, coverage = _aligned(examples, encoded[0], encoded[1], pair)
    if score_eos:
        _check_ends(examples, aligned)
    coverage.check(min_coverage)
    rows: list[EncodedExample] = []
    too_long: list[str] = []
    cut: list[str] = []
    for example, whole in zip(examples, aligned, strict=True):
        row = whole if example.ends else whole.without_end()
        lengths = {"student": _length(row.student, with_eos=True)}
        if row.teacher is not None:
            lengths["teacher"] = _length(row.teacher, with_eos=score_eos)
        if max(lengths.values()) <= max_length:
            rows.append(row)
            continue
        tokens = ", ".join(f"{side} {length}" for side, length in lengths.items())
        if on_long == "refuse":
            raise DataError(
                f"{_name(example)} is longer than {max_length} tokens ({tokens}); raise "
                "max_length, or shorten the row"
            )
        shorter = row.cut_to(max_length, table) if on_long == "cut" else None
        if shorter is None:
            why = "; no part of its answer fits" if on_long == "cut" else ""
            too_long.append(f"{example.id} ({tokens}{why})")
        else:
            cut.append(f"{example.id} ({tokens})")
            rows.append(shorter)
    if not rows:
        way_out = "cut them with --on-long cut, "
        if on_long == "cut":
            way_out = "no part of an answer fits behind its prompt: "
        raise NothingLeft(
            f"all {len(examples)} examples are longer than {max_length} tokens, the first is "
            f"{too_long[0]}; {way_out}shorten them, or raise --max-length as far as both "
            "models read"
        )
    return EncodedExamples(
        rows=rows,
        coverage=coverage,
        max_length=max_length,
        too_long=tuple(too_long),
        refused=tuple(refused),
        cut=tuple(cut),
    )


def _without_refused(
    examples: Sequence[Example], sides: Sequence[Sequence[EncodedSide | RefusedRow]]
) -> tuple[list[Example], list[list[EncodedSide]], list[str]]:
    """The examples that no side refuses, in the ids of each, and why others are refused."""
    reasons = [
        next((str(one) for one in found if isinstance(one, RefusedRow)), None)
        for found in zip(*sides, strict=True)
    ]
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    refused = [reason for reason in reasons if reason is not None]
    if not kept:
        raise NothingLeft(
            f"all {len(examples)} conversations are refused: {shortened(refused)}; rewrite them, "
            "or choose other models"
        )
    encoded = [[cast(EncodedSide, side[number]) for number in kept] for side in sides]
    return [examples[number] for number in kept], encoded, refused


def _check_ends(examples: Sequence[Example], rows: Sequence[EncodedExample]) -> None:
    """Refuse to score ends of turns that one side's template does not write."""
    for example, row in zip(examples, rows, strict=True):
        for name, side in (("student", row.student), ("teacher", row.teacher)):
            if side is not None and side.kinds.count("e") < len(example.answers) - 1:
                raise SettingError(
                    "score_eos needs an end of every turn on both sides, but the "
                    f"{name}'s chat template writes none behind an earlier answer "
                    f"({_name(example)}); leave score_eos off"
                )


@dataclass(frozen=True)
class _Encoder:
    """The encoder of one side."""

    tokenizer: PreTrainedTokenizerBase
    table: TokenBytes
    form: PromptForm
    name: str

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends an answer."""
        return self.form.end_id(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template that conversations are written in."""
        return self.form.chat_template(self.tokenizer, side=self.name)

    def all(self, examples: Sequence[Example]) -> list[EncodedSide | RefusedRow]:
        """Encode many examples, those that are no conversations in one call of the tokenizer."""
        single = iter(self._singles([one for one in examples if not one.messages]))
        return [self._conversation(one) if one.messages else next(single) for one in examples]

    def _singles(self, examples: Sequence[Example]) -> list[EncodedSide]:
        if not examples:
            return []
        prompts = self.form.ids(self.tokenizer, examples, side=self.name)
        for example in examples:
            check_unicode(example.answer, "answer", _name(example))
        answers = tokenized(self.tokenizer, [example.answer for example in examples])
        return [
            self.side(prompt_ids, answer_ids, example.answer, _name(example), exactly=False)
            for example, prompt_ids, answer_ids in zip(examples, prompts, answers, strict=True)
        ]

    def _conversation(self, example: Example) -> EncodedSide | RefusedRow:
        """Encode a conversation, or say why it is refused."""
        where = _name(example)
        try:
            turns = self.template.turns(example.messages)
        except RefusedRow as error:
            return RefusedRow(f"{where}: {error}")
        texts = [answer for _, answer in turns]
        read = tokenized(self.tokenizer, [before for before, _ in turns])
        answers = tokenized(self.tokenizer, texts)
        try:
            side = self.side(read[0], answers[0], texts[0], where, exactly=False)
            ids, kinds = list(side.answer_ids), "a" * len(side.answer_ids)
            for between, answer_ids, text in zip(read[1:], answers[1:], texts[1:], strict=True):
                if not between:
                    raise RefusedRow(
                        f"{where}: the {self.name}'s tokenizer drops what its chat template "
                        "writes between two answers"
                    )
                answer_ids = self._spelled(answer_ids, text, where, exactly=False)
                ids += [*between, *answer_ids]
                kinds += self._kinds_between(between) + "a" * len(answer_ids)
        except DataError as error:
            return RefusedRow(str(error))
        size = sum(len(text.encode()) for text in texts)
        return replace(side, answer_ids=ids, kinds=kinds, text_bytes=size)

    def _kinds_between(self, ids: Sequence[int]) -> str:
        """Kinds of what stands between two answers: the first special token may be an end."""
        special = (place for place, index in enumerate(ids) if self.table.roles[index] != "text")
        first = next(special, None)
        if first is None or ids[first] != self.end_id:
            return "." * len(ids)
        return "." * first + "e" + "." * (len(ids) - first - 1)

    def side(
        self,
        prompt_ids: list[int],
        answer_ids: list[int],
        answer: str,
        where: str,
        *,
        exactly: bool,
    ) -> EncodedSide:
        if not prompt_ids:
            raise DataError(
                f"{where}: the prompt is empty and the {self.name}'s tokenizer puts nothing in "
                "front of it, so that nothing predicts the answer's first token; write a prompt, "
                "or set the tokenizer's bos_token or eos_token"
            )
        return EncodedSide(
            prompt_ids=prompt_ids,
            answer_ids=self._spelled(answer_ids, answer, where, exactly=exactly),
            eos_id=self.end_id,
            decoder_start=self.form.decoder_start,
            text_bytes=len(answer.encode()),
        )

    def _spelled(
        self, answer_ids: list[int], answer: str, where: str, *, exactly: bool
    ) -> list[int]:
        """The ids of an answer, exact ones if there are some."""
        if not answer:
            raise DataError(f"{where}: the answer is empty; expected at least one character")
        exact = exact_ids(self.tokenizer, self.table, answer, answer_ids)
        if exact is None and (exactly or not answer_ids or self._has_special(answer_ids)):
            raise DataError(
                f"{where}: the {self.name}'s tokenizer ({type(self.tokenizer).__name__}) cannot "
                f"spell the answer exactly: expected {shown(answer.encode())}, its ids spell "
                f"{shown(self.table.decode(answer_ids))}; rewrite the answer or remove the row"
            )
        return answer_ids if exact is None else exact

    def _has_special(self, ids: Sequence[int]) -> bool:
        """True if the text spells a special token; one for unknown characters is none."""
        special = {index for index in ids if self.table.roles[index] != "text"}
        unknown = self.tokenizer.unk_token_id
        # GPT-2 names its end of sequence as unknown, too.
        return any(index != unknown or self.table.roles[index] != "other" for index in special)


def _aligned(
    examples: Sequence[Example],
    student: Sequence[EncodedSide],
    teacher: Sequence[EncodedSide],
    pair: TokenizerPair,
) -> tuple[list[EncodedExample], Coverage]:
    """Align the sides answer by answer, so that no chunk goes from one into the next."""
    ours = [ids for side in student for ids in side.answers]
    theirs = [ids for side in teacher for ids in side.answers]
    covered: list[int] = []
    found: list[_Chunks] = []
    one_to_one = 0
    for start in range(0, len(ours), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        alignment = pair.align(ours[block], theirs[block])
        one_to_one += int(alignment.one_to_one.sum())
        covered += alignment.covered_bytes.tolist()
        numbers = (alignment.student_chunk_ids.tolist(), alignment.teacher_chunk_ids.tolist())
        found += zip(alignment.chunks.tolist(), *numbers, strict=True)
    rest = iter(found)
    rows = []
    for example, one, other in zip(examples, student, teacher, strict=True):
        counts, our_chunks, their_chunks = zip(
            *itertools.islice(rest, len(example.answers)), strict=True
        )
        rows.append(
            EncodedExample(
                id=example.id,
                student=_numbered(one, our_chunks, counts),
                teacher=_numbered(other, their_chunks, counts),
            )
        )
    coverage = _coverage(examples, covered, ours, pair.student_bytes, theirs, pair.teacher_bytes)
    return rows, replace(
        coverage,
        chunks=sum(count for count, _, _ in found),
        one_to_one=one_to_one,
        student_tokens=sum(map(len, ours)),
        teacher_tokens=sum(map(len, theirs)),
    )


def _numbered(
    side: EncodedSide, chunks: Sequence[Sequence[int]], counts: Sequence[int]
) -> EncodedSide:
    """A side with the chunks of its answers, which are numbered through all of them."""
    numbers = [-1] * len(side.answer_ids)
    first = 0
    runs = re.finditer("a+", side.kinds_with_end)
    for run, of_answer, count in zip(runs, chunks, counts, strict=True):
        size = run.end() - run.start()  # others in the block may be longer
        numbers[run.start() : run.end()] = [
            chunk if chunk < 0 else first + chunk for chunk in of_answer[:size]
        ]
        first += count
    return replace(side, chunk_ids=numbers)


def _alone(
    examples: Sequence[Example], student: Sequence[EncodedSide], table: TokenBytes
) -> tuple[list[EncodedExample], Coverage]:
    ours = [ids for side in student for ids in side.answers]
    texts = [text for example in examples for text in example.answers]
    kept = [
        kept_bytes(text.encode(), table.decode(ids)) for text, ids in zip(texts, ours, strict=True)
    ]
    rows = [
        EncodedExample(id=example.id, student=side)
        for example, side in zip(examples, student, strict=True)
    ]
    coverage = _coverage(examples, kept, ours, table)
    return rows, replace(coverage, student_tokens=sum(map(len, ours)))


def _coverage(
    examples: Sequence[Example],
    covered: Sequence[int],
    ours: Sequence[Sequence[int]],
    table: TokenBytes,
    theirs: Sequence[Sequence[int]] | None = None,
    teacher_table: TokenBytes | None = None,
) -> Coverage:
    rows = []
    texts = [(example, text.encode()) for example in examples for text in example.answers]
    for number, ((example, text), count) in enumerate(zip(texts, covered, strict=True)):
        teacher = None
        if theirs is not None and teacher_table is not None:
            teacher = teacher_table.decode(theirs[number])
        rows.append(
            RowCoverage(
                id=example.id,
                where=_name(example),
                text=text,
                # What a tokenizer adds to a text makes up for nothing that is lost elsewhere.
                covered_bytes=min(count, len(text)),
                student=table.decode(ours[number]),
                teacher=teacher,
            )
        )
    return Coverage.summed(rows)


def _length(side: EncodedSide, *, with_eos: bool) -> int:
    return side.length(len(side.answer_ids) + (with_eos and side.eos_id is not None))


def _name(example: Example) -> str:
    return example.where or f"example {example.id}"
