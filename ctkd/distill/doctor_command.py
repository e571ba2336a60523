"""What ``ctkd doctor`` does: examine a pair of tokenizers before any training.

Only tokenizers and configurations are loaded, never weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from ctkd.distill.data import load_rows
from ctkd.distill.doctor_page import render
from ctkd.distill.encoded import EncodedPair
from ctkd.distill.encoding import encode_pair
from ctkd.distill.loading import check_causal, one_line, quiet
from ctkd.distill.loss_advice import LossAdvice, advise
from ctkd.distill.models import load_tokenizer, resolve
from ctkd.distill.tasks import Example, examples
from ctkd.errors import DataError, ModelError, SettingError
from ctkd.tokenization.answer_facts import AnswerIds
from ctkd.tokenization.doctor import Examination, Thresholds, Verdict, examine, judge
from ctkd.tokenization.pair import TokenizerPair

__all__ = ["DoctorReport", "DoctorRequest", "read_head_width", "run_doctor"]

# Nothing is left out for its length here: training says what it leaves out.
_NO_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorRequest:
    """What to examine, as the options of ``ctkd doctor`` say it.

    Raises:
        SettingError: If the limit is below 1 or a threshold lies outside its range.
    """

    student: str = "smollm2-135m-instruct"
    teacher: str = "gemma-3-270m"
    data: str = "pocketqa"
    task: str = "qa"
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int = 200
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise SettingError(f"limit must be at least 1, got {self.limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What was found.

    Args:
        request: What was asked.
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
        """Whether distillation with this pair would be sound."""
        return self.verdict.sound

    def page(self) -> str:
        """Everything on a page for the terminal, in colour."""
        asked = self.request
        title = f"{asked.student} learns from {asked.teacher}, on {asked.data}"
        return render(title, self.examination, self.losses, self.verdict)

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
    say(f"data: {request.data}, the first {request.limit} rows")
    chosen = examples(load_rows(request.data), request.task, request.columns)[: request.limit]
    say(f"student: the tokenizer of {request.student}")
    student = load_tokenizer(request.student)
    student_head = read_head_width(request.student)
    say(f"teacher: the tokenizer of {request.teacher}")
    teacher = load_tokenizer(request.teacher)
    teacher_head = read_head_width(request.teacher)
    say(f"aligning {len(chosen)} answers")
    pair = TokenizerPair(student, teacher, progress=False)
    rows, refused = _encode(chosen, student, teacher, pair)
    text_of = {example.id: example.answer.encode() for example in chosen}
    found = examine(
        student,
        teacher,
        [_answer(row, text_of[row.id]) for row in rows],
        pair=pair,
        student_head=student_head,
        teacher_head=teacher_head,
        refused=refused,
    )
    return DoctorReport(
        request=request,
        examination=found,
        losses=advise(found, min_coverage=request.thresholds.min_coverage),
        verdict=judge(found, request.thresholds),
    )


def read_head_width(name: str) -> int | None:
    """Read the size of the last axis of a model's logits off its configuration.

    Args:
        name: A model, as for `resolve`.

    Returns:
        The size, None if only a tokenizer is there or the configuration does not tell.

    Raises:
        ModelError: If nothing goes by that name, its configuration cannot be read, or it is no
            causal language model.
    """
    source = resolve(name)
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
) -> tuple[list[EncodedPair], list[str]]:
    """Encode as training does, and tell which rows it would refuse."""

    def encode(some: Sequence[Example]) -> list[EncodedPair]:
        return encode_pair(
            some, student, teacher, max_length=_NO_LIMIT, min_coverage=0.0, pair=pair
        ).rows

    try:
        return encode(chosen), []
    except DataError:
        rows, refused = [], []
        for example in chosen:
            try:
                rows += encode([example])
            except DataError as error:
                refused.append(str(error))
        if not rows:
            raise
        return rows, refused


def _answer(row: EncodedPair, text: bytes) -> AnswerIds:
    teacher_ids = [] if row.teacher is None else row.teacher.answer_ids
    return AnswerIds(
        id=row.id, text=text, student_ids=row.student.answer_ids, teacher_ids=teacher_ids
    )
