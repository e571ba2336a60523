"""The examination of two tokenizers before any training, and advice on losses.

Only tokenizers and configurations are loaded, never weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedTokenizerBase

from ctkd.distill.config import GIVEN_IN_TRAINING, DoctorRequest
from ctkd.distill.data.encoding import EncodedExample, EncodedExamples, encode_examples
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.prompts import PLAIN, PromptForm
from ctkd.distill.data.rows import names_of
from ctkd.distill.data.tasks import Example, examples, get_task
from ctkd.distill.models.checks import check_causal, one_line, quiet
from ctkd.distill.models.from_config import prepare_tokenizer
from ctkd.distill.models.loading import load_tokenizer, sources
from ctkd.errors import CtkdError, DataError, ModelError
from ctkd.loss import Measured
from ctkd.registry import LossFacts, describe, list_losses
from ctkd.tokenization.answer_facts import AnswerIds
from ctkd.tokenization.doctor import Examination, Verdict, examine, judge, percent
from ctkd.tokenization.pair import TokenizerPair

__all__ = [
    "DoctorReport",
    "LossAdvice",
    "advise",
    "advise_on",
    "read_head_width",
    "run_doctor",
]

# Nothing is left out for its length here: training says what it leaves out.
_NO_LIMIT = 1 << 40


Suits = Literal["good", "careful", "unsuited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAdvice:
    """A judgment of one loss for the pair, and its reason.

    Args:
        name: The loss's.
        suits: The judgment.
        reason: What it rests on.
        measured: What the loss did with another pair, where all were compared.
    """

    name: str
    suits: Suits
    reason: str
    measured: Measured | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """Figures of an examination.

    Args:
        request: The examination.
        examination: Every figure.
        losses: How well each registered loss suits the pair.
        verdict: Whether the pair is sound.
    """

    request: DoctorRequest
    examination: Examination
    losses: tuple[LossAdvice, ...]
    verdict: Verdict

    @property
    def sound(self) -> bool:
        """True if distillation with this pair would be sound."""
        return self.verdict.sound

    @property
    def first(self) -> LossAdvice | None:
        """Of the losses that suit the pair best, what helped most where all were compared."""
        levels = {loss.suits for loss in self.losses}
        best = "good" if "good" in levels else "careful"
        helped = {
            loss.measured.share: loss
            for loss in self.losses
            if loss.suits == best and loss.measured is not None and loss.measured.helped
        }
        return helped[max(helped)] if helped else None

    def as_dict(self) -> dict[str, Any]:
        """Everything in values that JSON has."""
        return {
            "student": self.request.student,
            "teacher": self.request.teacher,
            "data": self.request.data,
            "examination": self.examination.as_dict(),
            "losses": [asdict(loss) for loss in self.losses],
            "verdict": self.verdict.as_dict(),
        }


def run_doctor(request: DoctorRequest, *, say: Callable[[str], None] = print) -> DoctorReport:
    """Examine the tokenizers of two models on the answers of some data.

    Args:
        request: What to examine.
        say: Prints one line of progress.

    Raises:
        CtkdError: If what was given cannot be loaded or read.
    """
    unit = get_task(request.task).unit
    say(f"data: {names_of(request.data)}, the first {request.limit} {unit}")
    data = read_rows(request.data, request.task, request.columns, say=say)
    every = examples(data, request.task, request.columns)
    chosen = every[: request.limit]
    say(f"student: the tokenizer of {request.student}")
    if request.student_config is None:
        student = load_tokenizer(request.student)
        student_head = read_head_width(request.student)
    else:
        texts = [one.prompt + one.answer for one in every]
        folder, student_head = prepare_tokenizer(request.student_config, texts)
        student = load_tokenizer(str(folder))
    say(f"teacher: the tokenizer of {request.teacher}")
    teacher = load_tokenizer(request.teacher)
    teacher_head = read_head_width(request.teacher)
    say(f"aligning {len(chosen)} answers")
    pair = TokenizerPair(student, teacher, progress=False)
    rows, refused = _encode(chosen, student, teacher, pair)
    text_of = {example.id: "".join(example.answers).encode() for example in chosen}
    examination = examine(
        student,
        teacher,
        [_answer(row, text_of[row.id]) for row in rows],
        pair=pair,
        student_head=student_head,
        teacher_head=teacher_head,
        refused=refused,
    )
    losses = advise(examination, min_coverage=request.thresholds.min_coverage)
    verdict = judge(examination, request.thresholds)
    if all(loss.suits == "unsuited" for loss in losses):
        reason = "no loss suits the pair; choose another model, or other data"
        verdict = replace(verdict, reasons=(*verdict.reasons, reason))
    return DoctorReport(request=request, examination=examination, losses=losses, verdict=verdict)


def read_head_width(name: str) -> int | None:
    """Read the size of the last axis of a model's logits off its configuration.

    Args:
        name: A model, as for `resolve`.

    Returns:
        The size, None if only a tokenizer is there or the configuration does not tell.

    Raises:
        ModelError: If nothing goes by that name, its configuration cannot be read, or it is no
            language model.
    """
    source = sources(name)[-1]
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"cannot read the configuration of {name}: {one_line(error)}; its config.json may be "
            "damaged or made for another version of transformers"
        ) from error
    check_causal(config, name)
    width = getattr(config.get_text_config(), "vocab_size", None)
    return width if isinstance(width, int) else None


def _encode(
    chosen: Sequence[Example],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    pair: TokenizerPair,
) -> tuple[list[EncodedExample], list[str]]:
    """Encode as training does, and tell which rows it would refuse."""
    form = PromptForm(template="chat") if chosen[0].messages else PLAIN

    def encode(part: Sequence[Example]) -> EncodedExamples:
        return encode_examples(
            part,
            student,
            teacher,
            max_length=_NO_LIMIT,
            min_coverage=0.0,
            student_form=form,
            teacher_form=form,
            pair=pair,
        )

    try:
        encoded = encode(chosen)
        return encoded.rows, list(encoded.refused)
    except DataError:
        rows, refused = [], []
        for example in chosen:
            try:
                rows += encode([example]).rows
            except DataError as error:
                refused.append(str(error))
        if not rows:
            raise
        return rows, refused


def _answer(row: EncodedExample, text: bytes) -> AnswerIds:
    teacher_ids = [] if row.teacher is None else row.teacher.scored_ids
    return AnswerIds(
        id=row.id, text=text, student_ids=row.student.scored_ids, teacher_ids=teacher_ids
    )


# Rules of thumb, not from a paper: the share of what a loss looks at from which it has enough.
_GOOD, _ENOUGH = 0.9, 0.5
_GOOD_ONE_TO_ONE, _ENOUGH_ONE_TO_ONE = 0.7, 0.3


def advise(examination: Examination, *, min_coverage: float) -> tuple[LossAdvice, ...]:
    """Judge every registered loss.

    Args:
        examination: What was measured.
        min_coverage: The share of the answers' bytes in chunks below which training stops.
    """
    advice = []
    for name in list_losses():
        try:
            facts = describe(name)
        except CtkdError as error:
            reason = " ".join(str(error).split())
            advice.append(LossAdvice(name=name, suits="unsuited", reason=reason))
            continue
        advice.append(advise_on(facts, examination, min_coverage=min_coverage))
    return tuple(advice)


def advise_on(facts: LossFacts, examination: Examination, *, min_coverage: float) -> LossAdvice:
    """Judge one loss by what it needs.

    A loss that needs chunks and both vocabularies compares shared tokens; `mined` compares the
    tokens of one-to-one chunks, and `bpm` does without shared ones. A loss that needs chunks alone
    compares chunks. A loss that needs neither matches positions by their index, which is never
    worse than careful: where all losses were compared, few positions were in step, and such losses
    did no worse than with chunks. One that needs what training does not give is unsuited.

    Args:
        facts: The loss's.
        examination: What was measured.
        min_coverage: As for `advise`.
    """
    judged: list[tuple[Suits, str]] = []
    if lacking := sorted(facts.needs - GIVEN_IN_TRAINING):
        reason = f"needs {' and '.join(lacking)}: not with ctkd train, in a loop of your own"
        judged.append(("unsuited", reason))
    if "chunks" in facts.needs:
        judged += _of_coverage(examination, min_coverage)
    if facts.name == "mined":
        judged.append(_of_one_to_one(examination))
    elif "pair" in facts.needs and facts.name != "bpm":
        judged += _of_overlap(examination)
    elif not facts.needs:
        judged.append(_of_positions(facts, examination))
    if facts.name == "multilevelot_released":
        judged.append(("careful", "for comparison with published runs"))
    order: tuple[Suits, ...] = ("unsuited", "careful", "good")
    suits = min((level for level, _ in judged), key=order.index)
    reasons = [reason for level, reason in judged if level == suits]
    return LossAdvice(
        name=facts.name, suits=suits, reason="; ".join(reasons), measured=facts.measured
    )


def _of_coverage(examination: Examination, min_coverage: float) -> list[tuple[Suits, str]]:
    share = examination.answers.coverage
    reason = f"{percent(share)} of bytes in chunks"
    if share < min_coverage:
        return [("unsuited", reason)]
    return [("good" if share >= max(_GOOD, min_coverage) else "careful", reason)]


def _of_one_to_one(examination: Examination) -> tuple[Suits, str]:
    share = examination.answers.one_to_one
    reason = f"{percent(share)} of chunks one to one"
    if share < _GOOD_ONE_TO_ONE:
        reason += "; elsewhere it trains on the labels alone"
    return _level(share, _GOOD_ONE_TO_ONE, _ENOUGH_ONE_TO_ONE), reason


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
        reason = f"only {percent(min(shared_numerals))} of numerals in both vocabularies"
        judged.append(("careful", reason))
    return judged


def _of_positions(facts: LossFacts, examination: Examination) -> tuple[Suits, str]:
    answers = examination.answers
    reason = f"{percent(answers.in_step)} of positions paired by index in step"
    if answers.in_step >= _GOOD:
        return "good", reason
    if "pairing" in facts.settings:
        reason += "; --loss-option pairing=chunk pairs what has read the same"
    return "careful", reason


def _level(share: float, good: float, enough: float) -> Suits:
    return "good" if share >= good else "careful" if share >= enough else "unsuited"
