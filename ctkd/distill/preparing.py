"""Models, examples and token ids that the settings of a run name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.distill.config import UNTRAINED, TrainConfig
from ctkd.distill.data.conversations import shortened
from ctkd.distill.data.encoding import EncodedExamples, EncodedSide, encode_examples
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.prompts import PromptForm, choose_shots
from ctkd.distill.data.rows import Source, is_embedded
from ctkd.distill.data.tasks import Example, examples, get_task, split_off
from ctkd.distill.devices import choose_device
from ctkd.distill.models.adapters import adapted_part, add_lora, is_adapted, mergeable
from ctkd.distill.models.from_config import described, prepare_student
from ctkd.distill.models.loading import (
    check_token_ids,
    decoder_start,
    head_width,
    load_model,
    load_tokenizer,
    most_positions,
)
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.texts import TeacherTexts
from ctkd.errors import DataError, ModelError, SettingError
from ctkd.tokenization.pair import TokenizerPair

__all__ = [
    "Forms",
    "Models",
    "answerable",
    "answered_by_teacher",
    "check_student",
    "encode",
    "load_examples",
    "load_models",
    "load_teacher",
    "read_held_out",
    "teacher_form",
    "teacher_precision",
    "with_student",
    "writable",
]

HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The models of a run; the teacher is None where a cache stands for it, or none is needed."""

    student: PreTrainedModel | None
    student_tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    pair: TokenizerPair | None = None
    teacher_width: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """The prompt form of each side."""

    student: PromptForm
    teacher: PromptForm

    @classmethod
    def of(cls, config: TrainConfig, training: Sequence[Example]) -> Forms:
        """The forms that the settings ask for, with shots from the training examples."""
        return cls(
            student=PromptForm(
                template=config.student_template,
                day=config.date,
                decoder_start=decoder_start(config.student),
            ),
            teacher=teacher_form(config, training),
        )


def teacher_form(config: TrainConfig, training: Sequence[Example]) -> PromptForm:
    """The teacher's prompt form, with shots from the training examples."""
    return PromptForm(
        template=config.teacher_template,
        day=config.date,
        shots=choose_shots(training, config.teacher_shots, config.seed),
        decoder_start=decoder_start(config.teacher) if config.needs_teacher else (),
    )


def load_examples(
    config: TrainConfig, say: Callable[[str], None]
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, the latter cut off by group where none were given."""
    training = _read(config.data, config, say)
    held_out = read_held_out(config, say)
    if held_out is None:
        training, held_out = split_off(training, HELD_OUT_FRACTION, config.seed)
        say(f"no evaluation data given: cut off {len(held_out)} of the training examples")
        held_out = _limited(held_out, config, say)
    asked = {(one.prompt, one.answer) for one in held_out}
    copies = sum((one.prompt, one.answer) in asked for one in training)
    if copies:
        say(
            f"warning: {copies} of the {len(training)} training examples are held out as well, "
            "prompt and answer; what is measured there may be remembered"
        )
    size = get_task(config.task).window
    cut = f"; documents are cut into pieces of up to {size} bytes" if size else ""
    say(f"{len(training)} training examples, {len(held_out)} held out{cut}")
    return training, held_out


def read_held_out(config: TrainConfig, say: Callable[[str], None]) -> list[Example] | None:
    """As many held-out examples as may be used, of the data for that; None if there are none."""
    source = config.eval_data
    if source is None and is_embedded(config.data):
        source = config.data
    if source is None:
        return None
    return _limited(_read(source, config, say, held_out=True), config, say)


def _read(
    source: Source, config: TrainConfig, say: Callable[[str], None], *, held_out: bool = False
) -> list[Example]:
    rows = read_rows(source, config.task, config.columns, say=say, held_out=held_out)
    return examples(rows, config.task, config.columns)


def _limited(
    held_out: list[Example], config: TrainConfig, say: Callable[[str], None]
) -> list[Example]:
    if len(held_out) > config.eval_limit:
        say(f"held-out examples: the first {config.eval_limit} of {len(held_out)} (--eval-limit)")
    return held_out[: config.eval_limit]


def with_student(
    config: TrainConfig, training: Sequence[Example], say: Callable[[str], None]
) -> TrainConfig:
    """The settings with a folder of random weights for a student's configuration, if there is one.

    Args:
        config: The settings; the weights are drawn from their seed.
        training: The training examples. A vocabulary is learned from their prompts and answers,
            but not where they are streamed, and these are only the first.
        say: Prints one line of progress.

    Raises:
        ModelError: If no student can be made.
    """
    if config.student_config is None:
        return config
    texts = None if config.streaming else [one.prompt + one.answer for one in training]
    made = prepare_student(config.student_config, texts, config.seed)
    drawn = f"{config.student_config}, {described(made)}, drawn with seed {config.seed}"
    say(f"student: {drawn}, in {made}")
    return replace(config, student=str(made), student_config=None)


def load_models(
    config: TrainConfig,
    say: Callable[[str], None],
    *,
    cache: TeacherCache | None = None,
    student: bool = True,
    teacher: bool | None = None,
) -> Models:
    """Load what the settings name.

    Args:
        config: The settings.
        say: Prints one line of progress.
        cache: Stands for the teacher, of which only the tokenizer is loaded then.
        student: Whether to load the student's weights besides its tokenizer.
        teacher: Whether a teacher takes part; by default as the settings say.
    """
    say(f"student: {config.student}")
    pure = config.dtype == "bfloat16-pure"
    student_tokenizer = load_tokenizer(config.student)
    student_model = None
    if student:
        dtype = torch.bfloat16 if pure else torch.float32
        student_model = load_model(config.student, dtype=dtype, trainable_adapter=True)
        check_token_ids(student_model, student_tokenizer)
        student_model = _with_lora(student_model, config)
        if is_adapted(student_model):
            say(f"student: {adapted_part(student_model)}")
    if not (config.needs_teacher if teacher is None else teacher):
        return Models(student_model, student_tokenizer)
    teacher_tokenizer = load_tokenizer(config.teacher)
    pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
    if cache is not None:
        say(f"teacher: {config.teacher}, from the cache {cache.path}")
        cache.check_teacher(config.teacher, pair.teacher_bytes, say=say)
        cached, usual = cache.record["dtype"], teacher_precision(config)
        if cached != usual:
            say(f"note: the cached teacher was asked in {cached}, a live one would be in {usual}")
        width = cache.teacher_width
        return Models(student_model, student_tokenizer, None, teacher_tokenizer, pair, width)
    say(f"teacher: {config.teacher}")
    model = load_teacher(config)
    check_token_ids(model, teacher_tokenizer)
    width = head_width(model)
    return Models(student_model, student_tokenizer, model, teacher_tokenizer, pair, width)


def _with_lora(student: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """The student, with new adapters if there are to be some."""
    if config.lora_rank is None and config.lora_merge and not is_adapted(student):
        raise SettingError(
            f"lora_merge has no adapters to merge: {config.student} has none; give a lora_rank"
        )
    if config.lora_rank is not None:
        student = _new_lora(student, config, config.lora_rank)
    if config.lora_merge and not mergeable(student):
        raise SettingError(
            f"{config.student} has embeddings and head in one weight, into which an adapter of one "
            "of them cannot be merged; leave lora_merge out, or adapt other layers (lora_target)"
        )
    return student


def _new_lora(student: PreTrainedModel, config: TrainConfig, rank: int) -> PreTrainedModel:
    if is_adapted(student):
        raise SettingError(
            f"{config.student} is an adapter already; leave lora_rank out to go on with it, or "
            "merge it first (--lora-merge)"
        )
    targets = [] if config.lora_target in (None, "all-linear") else config.lora_target
    return add_lora(
        student,
        rank=rank,
        alpha=2 * rank if config.lora_alpha is None else config.lora_alpha,
        dropout=config.lora_dropout or 0.0,
        targets=[targets] if isinstance(targets, str) else targets,
        seed=config.seed,
    )


def check_student(config: TrainConfig) -> None:
    """Refuse to teach random weights what they cannot learn.

    Raises:
        SettingError: If the task asks them to answer.
    """
    if config.student == UNTRAINED and get_task(config.task).answered:
        raise SettingError(
            f"{UNTRAINED} begins from random weights and cannot learn to answer in a short run; "
            f"name a --student, such as smollm2-135m-instruct, or train it on texts (--task lm)"
        )


def _teacher_dtype(config: TrainConfig) -> torch.dtype:
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def teacher_precision(config: TrainConfig) -> str:
    """The dtype in which the teacher is asked, and to how many bits its weights are rounded.

    Example:
        >>> teacher_precision(TrainConfig(teacher_load_in_4bit=True))
        'float32, weights in 4 bits'
    """
    bits = config.teacher_bits
    rounded = "" if bits is None else f", weights in {bits} bits"
    return str(_teacher_dtype(config)).removeprefix("torch.") + rounded


def load_teacher(config: TrainConfig, device: torch.device | None = None) -> PreTrainedModel:
    """Load the teacher as it is to be asked.

    Args:
        config: The settings.
        device: Where it goes; by default it stays in main memory, unless it is rounded, which is
            done on the device of the settings.
    """
    bits = config.teacher_bits
    if bits is not None and device is None:
        device = choose_device(config.device)
    return load_model(config.teacher, dtype=_teacher_dtype(config), device=device, bits=bits)


def answerable(
    config: TrainConfig,
    models: Models,
    chosen: Sequence[Example],
    forms: Forms,
    what: str,
    say: Callable[[str], None],
) -> tuple[list[Example], list[list[int]]]:
    """The examples whose prompts are short enough for the teacher to answer, and its prompts.

    Raises:
        DataError: If there is none, or a training prompt is too long and is not to be left out.
    """
    if models.teacher_tokenizer is None:
        raise ModelError(f"the tokenizer of {config.teacher} was not loaded")
    chosen = writable(models, chosen, forms, what, say)
    prompts = forms.teacher.ids(models.teacher_tokenizer, chosen, side="teacher")
    longest = _longest(config, models, forms, config.max_new_tokens)
    prompted = list(zip(chosen, prompts, strict=True))
    short = [(example, prompt) for example, prompt in prompted if len(prompt) <= longest]
    too_long = [example.id for example, prompt in prompted if len(prompt) > longest]
    if too_long:
        message = (
            f"{what}: {len(too_long)} of {len(chosen)} prompts are longer than the {longest} "
            f"tokens that leave the teacher room to answer, the first is {too_long[0]}"
        )
        if not short or (what == "training" and config.on_long == "refuse"):
            raise DataError(f"{message}; raise max_length, or shorten the prompts")
        say(f"{message}; left out")
    return [example for example, _ in short], [prompt for _, prompt in short]


def writable(
    models: Models,
    chosen: Sequence[Example],
    forms: Forms,
    what: str,
    say: Callable[[str], None],
) -> list[Example]:
    """The examples but conversations whose prompts the teacher's chat template refuses.

    Raises:
        DataError: If none is left.
    """
    if models.teacher_tokenizer is None:
        return list(chosen)
    written, refused = forms.teacher.writable(models.teacher_tokenizer, chosen, side="teacher")
    if refused:
        message = f"left out {len(refused)} of {len(chosen)} conversations: {shortened(refused)}"
        if not written:
            raise DataError(f"{what}: {message}; none is left, choose another teacher")
        say(f"{what}: {message}")
    return written


def answered_by_teacher(
    chosen: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    texts: TeacherTexts,
    say: Callable[[str], None],
) -> list[Example]:
    """Replace each example's answer by what the teacher wrote to its prompt.

    References stay as they are. Examples to which the teacher wrote nothing are left out, and an
    answer that was cut after the most tokens is no example of where to stop.

    Raises:
        DataError: If the teacher's answer to some prompt is not known, or it wrote nothing at all.
    """
    answered = []
    for example, prompt in zip(chosen, prompts, strict=True):
        text = texts.text(prompt)
        if text is None:
            raise DataError(
                f"the teacher cache {texts.path.parent} holds no answer of the teacher to example "
                f"{example.id}; make it with `ctkd cache --texts all` and the same options"
            )
        if text:
            answered.append(example.with_answer(text, ends=texts.ended(prompt)))
    if not answered:
        raise DataError(
            "the teacher wrote nothing to any prompt; raise max_new_tokens, or take another teacher"
        )
    if len(answered) < len(chosen):
        say(f"left out {len(chosen) - len(answered)} examples to which the teacher wrote nothing")
    cut = sum(not example.ends for example in answered)
    if cut:
        say(
            f"{cut} of the teacher's {len(answered)} answers were cut after {texts.max_new_tokens} "
            "tokens (--max-new-tokens); where they end is not learned"
        )
    return answered


def encode(
    config: TrainConfig,
    models: Models,
    chosen: Sequence[Example],
    forms: Forms,
    what: str,
    say: Callable[[str], None],
) -> EncodedExamples:
    """Tokenize examples for all sides, align them, and report what was lost.

    Held-out rows leave models room to answer, if the task asks for answers.

    Args:
        config: The settings.
        models: Whose tokenizers.
        chosen: The examples.
        forms: The prompt form of each side.
        what: "training" or "held-out", for the report.
        say: Prints one line of progress.
    """
    answered = what == "held-out" and get_task(config.task).answered
    encoded = encode_examples(
        chosen,
        models.student_tokenizer,
        # A teacher that only wrote the answers scores nothing.
        models.teacher_tokenizer if config.distils else None,
        max_length=_longest(config, models, forms, config.max_new_tokens if answered else 0),
        score_eos=config.score_eos,
        # The references of a held-out row are whole answers.
        on_long=config.on_long if what == "training" else "drop",
        min_coverage=config.min_coverage,
        student_form=forms.student,
        teacher_form=forms.teacher,
        pair=models.pair if config.distils else None,
    )
    say(f"{what}: {encoded.coverage.report()}")
    if encoded.report():
        say(f"{what}: {encoded.report()}")
    if what == "training":
        _tell_of_roles(models, chosen, forms, say)
    _check_ids(encoded, models)
    return encoded


def _tell_of_roles(
    models: Models, chosen: Sequence[Example], forms: Forms, say: Callable[[str], None]
) -> None:
    """Say where messages of a system or of tools stand for a template without such roles."""
    roles = {message.role for example in chosen for message in example.messages}
    sides = (
        ("student", forms.student, models.student_tokenizer),
        ("teacher", forms.teacher, models.teacher_tokenizer),
    )
    for name, form, tokenizer in sides:
        if tokenizer is None or not roles:
            continue
        template = form.chat_template(tokenizer, side=name)
        if "system" in roles and not template.knows_systems:
            say(
                f"note: the {name}'s chat template has no messages of a system; they stand in "
                "front of the user's"
            )
        if "tool" in roles and not template.knows_tools:
            say(f"note: the {name}'s chat template has no messages of tools; a user says them")


def _check_ids(encoded: EncodedExamples, models: Models) -> None:
    """Refuse ids without an embedding: some tokenizers spell special tokens that models lack."""
    student_width = None if models.student is None else head_width(models.student)
    for side, width in (("student", student_width), ("teacher", models.teacher_width)):
        if width is None:
            continue
        for row in encoded.rows:
            encoded_side: EncodedSide | None = getattr(row, side)
            largest = (
                0
                if encoded_side is None
                else max(*encoded_side.prompt_ids, *encoded_side.answer_ids)
            )
            if largest >= width:
                raise DataError(
                    f"example {row.id}: its token id {largest} is out of the {side}'s range of "
                    f"{width} ids; the text spells a special token that the model does not know, "
                    "remove it"
                )


def _longest(config: TrainConfig, models: Models, forms: Forms, reserved: int) -> int:
    """The most tokens of a row that leave all models so many positions."""
    longest = config.max_length
    sides = [(config.student, forms.student)]
    if models.teacher_tokenizer is not None:
        sides.append((config.teacher, forms.teacher))
    for name, form in sides:
        positions = most_positions(name)
        if positions is None:
            continue
        if positions < reserved + 2:
            raise SettingError(
                f"max_new_tokens {reserved} leaves no room for a prompt in the "
                f"{positions} positions of {name}; lower it"
            )
        # What a decoder writes takes no positions from its encoder.
        longest = min(longest, positions - (0 if form.decoder_start else reserved))
    return longest
