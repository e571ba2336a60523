"""Which losses suit a pair of tokenizers, told from measurements and from what each loss needs.

What this module does not do: it knows nothing of models. A loss that suits a pair may still teach
nothing, if the teacher has nothing to teach.
"""

from dataclasses import dataclass
from typing import Literal

from ctkd.errors import CtkdError
from ctkd.registry import LossFacts, describe, list_losses
from ctkd.tokenization.doctor import Examination, percent

__all__ = ["LossAdvice", "advise", "advise_on"]

Suits = Literal["good", "careful", "unsuited"]

# Rules of thumb, not from a paper: the share of what a loss looks at from which it has enough.
_GOOD, _ENOUGH = 0.9, 0.5
_GOOD_ONE_TO_ONE, _ENOUGH_ONE_TO_ONE = 0.7, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAdvice:
    """How well one loss suits the pair, and why."""

    name: str
    suits: Suits
    reason: str


def advise(examination: Examination, *, min_coverage: float) -> tuple[LossAdvice, ...]:
    """Judge every registered loss.

    Args:
        examination: What was measured.
        min_coverage: The share of the answers' bytes in chunks below which training stops.
    """
    found = []
    for name in list_losses():
        try:
            facts = describe(name)
        except CtkdError as error:
            reason = " ".join(str(error).split())
            found.append(LossAdvice(name=name, suits="unsuited", reason=reason))
            continue
        found.append(advise_on(facts, examination, min_coverage=min_coverage))
    return tuple(found)


def advise_on(facts: LossFacts, examination: Examination, *, min_coverage: float) -> LossAdvice:
    """Judge one loss by what it needs.

    A loss that needs chunks and both vocabularies compares shared tokens; `mined` compares the
    tokens of one-to-one chunks. A loss that needs chunks alone compares chunks. A loss that needs
    neither pairs positions by their index, which is never worse than careful where it has another
    `pairing`.

    Args:
        facts: The loss's.
        examination: What was measured.
        min_coverage: As for `advise`.
    """
    judged: list[tuple[Suits, str]] = []
    if "chunks" in facts.needs:
        judged += _of_coverage(examination, min_coverage)
    if facts.name == "mined":
        judged.append(_of_one_to_one(examination))
    elif "pair" in facts.needs:
        judged += _of_overlap(examination)
    elif not facts.needs:
        judged.append(_of_positions(facts, examination))
    if facts.name == "multilevelot_released":
        judged.append(("careful", "for comparison with published runs"))
    order: tuple[Suits, ...] = ("unsuited", "careful", "good")
    suits: Suits = min((level for level, _ in judged), key=order.index, default="careful")
    reasons = [reason for level, reason in judged if level == suits]
    if not judged:
        reasons = [f"needs {', '.join(sorted(facts.needs))}, of which nothing was measured"]
    return LossAdvice(name=facts.name, suits=suits, reason="; ".join(reasons))


def _of_coverage(examination: Examination, min_coverage: float) -> list[tuple[Suits, str]]:
    share = examination.answers.coverage
    told = f"{percent(share)} of bytes in chunks"
    if share < min_coverage:
        return [("unsuited", told)]
    return [("good" if share >= max(_GOOD, min_coverage) else "careful", told)]


def _of_one_to_one(examination: Examination) -> tuple[Suits, str]:
    share = examination.answers.one_to_one
    told = f"{percent(share)} of chunks one to one"
    if share < _GOOD_ONE_TO_ONE:
        told += "; elsewhere it trains on the labels alone"
    return _level(share, _GOOD_ONE_TO_ONE, _ENOUGH_ONE_TO_ONE), told


def _of_overlap(examination: Examination) -> list[tuple[Suits, str]]:
    answers = examination.answers
    if not examination.overlap.shared:
        return [("unsuited", "the vocabularies share no token")]
    share = min(answers.student_shared, answers.teacher_shared)
    judged: list[tuple[Suits, str]] = [
        (
            _level(share, _GOOD, _ENOUGH),
            f"{percent(share)} of answer tokens in both vocabularies",
        )
    ]
    shared_numerals = [
        one
        for one in (answers.student_numerals_shared, answers.teacher_numerals_shared)
        if one is not None
    ]
    if examination.numerals_split_on_one_side:
        judged.append(("careful", "numerals cut into digits on one side only"))
    elif shared_numerals and min(shared_numerals) < _ENOUGH:
        told = f"only {percent(min(shared_numerals))} of numerals in both vocabularies"
        judged.append(("careful", told))
    return judged


def _of_positions(facts: LossFacts, examination: Examination) -> tuple[Suits, str]:
    answers = examination.answers
    told = f"{percent(answers.in_step)} of positions paired by index in step"
    suits = _level(answers.in_step, _GOOD, _ENOUGH)
    if suits == "good" or "pairing" not in facts.settings:
        return suits, told
    return "careful", f"{told}; use --loss-option pairing=chunk"


def _level(share: float, good: float, enough: float) -> Suits:
    return "good" if share >= good else "careful" if share >= enough else "unsuited"
