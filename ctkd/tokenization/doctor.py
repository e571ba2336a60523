"""Examine two tokenizers, and judge whether distillation between their models would be sound.

This module loads nothing and runs no model: the widths of their heads are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ctkd.tokenization.answer_facts import AnswerFacts, AnswerIds, measure_answers
from ctkd.tokenization.kind_audit import KindAudit, audit_kinds
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.thresholds import Thresholds
from ctkd.tokenization.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Examination",
    "Head",
    "NamedToken",
    "Overlap",
    "SideFacts",
    "Verdict",
    "examine",
    "judge",
    "percent",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedToken:
    """A token and its id."""

    token: str
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's head against its tokenizer.

    Args:
        width: Columns of the model's logits; None if it is not known.
        outside: The last token that training needs and the head has no column for, if any.
        spare_special: Special tokens without a column that only a text spelling them out yields;
            some published models have one.
        spare_columns: Columns without a token.
    """

    width: int | None
    outside: NamedToken | None
    spare_special: int
    spare_columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFacts:
    """Facts about one tokenizer.

    Args:
        kind: How it cuts text, in words.
        size: Its length.
        text_tokens: Tokens that stand for bytes.
        bos: The begin of a sequence.
        eos: The end of a sequence.
        pad: The padding.
        leading: The tokens that it puts before a text by itself.
        trailing: The tokens that it puts behind a text by itself.
        chat_template: Whether it has one.
        head: The model's head.
    """

    kind: str
    size: int
    text_tokens: int
    bos: NamedToken | None
    eos: NamedToken | None
    pad: NamedToken | None
    leading: tuple[str, ...]
    trailing: tuple[str, ...]
    chat_template: bool
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The tokens that two vocabularies share.

    Args:
        spelled_alike: Tokens that both write the same way, markers of spaces included.
        shared: Tokens that stand for the same bytes, or are both bos, both eos or both pad.
    """

    spelled_alike: int
    shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Everything that was measured.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        overlap: What the vocabularies share.
        kinds: How kinds of text are cut.
        answers: How the answers are aligned.
        asymmetries: What the special tokens of the two sides do not have in common, in words.
        refused: The rows that training would refuse, each with the reason.
    """

    student: SideFacts
    teacher: SideFacts
    overlap: Overlap
    kinds: tuple[KindAudit, ...]
    answers: AnswerFacts
    asymmetries: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def numerals_split_on_one_side(self) -> bool:
        """True if one side has tokens of several digits and the other cuts every digit."""
        return any(kind.name == "numerals" and kind.split_on_one_side for kind in self.kinds)

    def as_dict(self) -> dict[str, Any]:
        """Every figure, in values that JSON has."""
        figures = asdict(self)
        for kind, audit in zip(figures["kinds"], self.kinds, strict=True):
            kind["split_on_one_side"] = audit.split_on_one_side
        return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgment of a pair, and the reasons against it.

    Args:
        reasons: What is wrong, each with a way out; empty if nothing is.
        thresholds: What was asked for.
    """

    reasons: tuple[str, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def sound(self) -> bool:
        """True if nothing is wrong."""
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """The verdict in values that JSON has."""
        return {"sound": self.sound, **asdict(self)}


def examine(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    answers: Sequence[AnswerIds],
    *,
    pair: TokenizerPair | None = None,
    student_head: int | None = None,
    teacher_head: int | None = None,
    refused: Sequence[str] = (),
) -> Examination:
    """Measure two tokenizers, each by itself, against each other and on answers.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        answers: What to align, at least one.
        pair: The two tokenizers' pair; by default made here.
        student_head: Columns of the student's logits, if known.
        teacher_head: Columns of the teacher's logits, if known.
        refused: Rows that could not be encoded, each with the reason.

    Raises:
        DataError: If there are no answers, or an id is not in its vocabulary.
        ModelError: If a tokenizer spells its tokens in a way ctkd does not know.
    """
    if pair is None:
        pair = TokenizerPair(student, teacher)
    tables = pair.student_bytes, pair.teacher_bytes
    ours = _side(student, tables[0], student_head)
    theirs = _side(teacher, tables[1], teacher_head)
    spelled = [
        {token for token, role in zip(table.tokens, table.roles, strict=True) if role == "text"}
        for table in tables
        if table.tokens
    ]
    return Examination(
        student=ours,
        teacher=theirs,
        overlap=Overlap(
            spelled_alike=len(set.intersection(*spelled)) if len(spelled) == 2 else 0,
            shared=len(pair.shared_ids()[0]),
        ),
        kinds=audit_kinds(
            pair, lambda texts: _cut(student, texts), lambda texts: _cut(teacher, texts)
        ),
        answers=measure_answers(pair, answers),
        asymmetries=tuple(_asymmetries(ours, theirs)),
        refused=tuple(refused),
    )


def judge(examination: Examination, thresholds: Thresholds | None = None) -> Verdict:
    """Say whether distillation between the two models would be sound.

    Two vocabularies that differ are no fault, however much they do.
    """
    thresholds = thresholds or Thresholds()
    reasons = []
    for name, side in (("student", examination.student), ("teacher", examination.teacher)):
        if side.head.outside is not None:
            reasons.append(
                f"the {name}'s head has {side.head.width:,} columns, but its tokenizer writes ids "
                f"up to {side.head.outside.id:,} ({side.head.outside.token!r}); give the model's "
                "own tokenizer, or resize the embeddings with resize_token_embeddings"
            )
    if examination.refused:
        more = len(examination.refused) - 1
        reasons.append(
            f"training refuses {more + 1} of the rows: {examination.refused[0]}"
            + (f"; and {more} more" if more else "")
        )
    answers = examination.answers
    if answers.coverage < thresholds.min_coverage:
        reasons.append(
            f"only {percent(answers.coverage)} of the answers' bytes are spelled alike on both "
            f"sides, expected at least {percent(thresholds.min_coverage)}; a tokenizer changes "
            "or loses text: choose another model, or rewrite or remove those rows"
        )
    if answers.one_to_one < thresholds.min_one_to_one:
        reasons.append(
            f"only {percent(answers.one_to_one)} of the chunks are one token on both sides, "
            f"expected at least {percent(thresholds.min_one_to_one)}; the two cut text too "
            "differently for token against token: choose another model, or distil with alm and "
            "lower min_one_to_one"
        )
    return Verdict(reasons=tuple(reasons), thresholds=thresholds)


def percent(share: float) -> str:
    """Write a share in percent, rounded down, so that only a whole one reads 100 %.

    Example:
        >>> percent(1.0), percent(0.9999), percent(0.95)
        ('100 %', '99.9 %', '95 %')
    """
    return f"{math.floor(round(share * 1000, 6)) / 10:g} %"


def _cut(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = False
) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=special, padding=False, truncation=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _side(
    tokenizer: PreTrainedTokenizerBase, table: TokenBytes, head_width: int | None
) -> SideFacts:
    leading, trailing = _added(tokenizer)
    return SideFacts(
        kind=_kind(tokenizer),
        size=len(table),
        text_tokens=sum(role == "text" for role in table.roles),
        bos=_named(tokenizer, tokenizer.bos_token_id),
        eos=_named(tokenizer, tokenizer.eos_token_id),
        pad=_named(tokenizer, tokenizer.pad_token_id),
        leading=tuple(map(str, tokenizer.convert_ids_to_tokens(leading))),
        trailing=tuple(map(str, tokenizer.convert_ids_to_tokens(trailing))),
        chat_template=bool(tokenizer.chat_template),
        head=_head(tokenizer, table, head_width),
    )


def _named(tokenizer: PreTrainedTokenizerBase, index: int | None) -> NamedToken | None:
    if index is None:
        return None
    return NamedToken(token=str(tokenizer.convert_ids_to_tokens(index)), id=index)


def _kind(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"slow {type(tokenizer).__name__}"
    model = type(backend.model).__name__
    if "ByteLevel" in f"{backend.decoder}{backend.pre_tokenizer}":
        return f"byte-level {model}"
    if getattr(backend.model, "byte_fallback", False):
        return f"{model} with byte fallback"
    return model


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find what a tokenizer by itself puts before and behind a text."""
    (plain,) = _cut(tokenizer, ["a"])
    (full,) = _cut(tokenizer, ["a"], special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _head(tokenizer: PreTrainedTokenizerBase, table: TokenBytes, width: int | None) -> Head:
    if width is None:
        return Head(width=None, outside=None, spare_special=0, spare_columns=0)
    used = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = [index for index in tokenizer.get_vocab().values() if index >= width]
    needed = [index for index in beyond if index in used or index not in special]
    return Head(
        width=width,
        outside=_named(tokenizer, max(needed)) if needed else None,
        spare_special=len(beyond) - len(needed),
        spare_columns=max(width - len(table), 0),
    )


def _asymmetries(student: SideFacts, teacher: SideFacts) -> list[str]:
    sides = {"student": student, "teacher": teacher}
    asymmetries = []
    for what, has in (
        ("has a BOS", {name: side.bos is not None for name, side in sides.items()}),
        ("puts tokens before a text", {name: bool(side.leading) for name, side in sides.items()}),
        ("has a chat template", {name: side.chat_template for name, side in sides.items()}),
    ):
        if has["student"] != has["teacher"]:
            asymmetries.append(f"only the {'student' if has['student'] else 'teacher'} {what}")
    for name, side in sides.items():
        if side.eos is None:
            taught = "answers are taught without an end, unless a chat template writes one, and "
            asymmetries.append(
                f"the {name} has no EOS, so {taught if name == 'student' else ''}--score-eos is "
                "refused"
            )
        elif side.pad is not None and side.pad.id == side.eos.id:
            asymmetries.append(
                f"the {name}'s pad is its EOS; ctkd masks padding by length, not by id"
            )
        if side.trailing:
            asymmetries.append(
                f"the {name} ends a text with {' '.join(side.trailing)}; ctkd leaves it out"
            )
    return asymmetries
