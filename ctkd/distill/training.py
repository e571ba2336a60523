"""One training run from settings to a trained model, with its metrics before and after."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from ctkd import __version__
from ctkd.distill.collator import Collator, padding_id
from ctkd.distill.config import TrainConfig
from ctkd.distill.data import EMBEDDED, load_rows, split_off
from ctkd.distill.encoded import EncodedExamples, EncodedSide
from ctkd.distill.encoding import encode_pair
from ctkd.distill.measuring import Measure, keep_history
from ctkd.distill.models import check_token_ids, head_width, load_model, load_tokenizer
from ctkd.distill.output_folder import OutputFolder
from ctkd.distill.progress import StepReport, StepsAsAsked, StopOnSignal
from ctkd.distill.prompts import PromptForm, choose_shots
from ctkd.distill.tasks import Example, examples
from ctkd.distill.trainer import CrossTokenizerTrainer
from ctkd.errors import CtkdError, DataError, ModelError, OutputError, SettingError
from ctkd.tokenization.pair import TokenizerPair

__all__ = ["Interrupted", "choose_device", "is_embedded", "load_examples", "train"]

HELD_OUT_FRACTION = 0.1


class Interrupted(CtkdError):
    """Training was stopped by the user; a checkpoint was written."""


@dataclass(frozen=True, slots=True, eq=False)
class _Models:
    student: PreTrainedModel
    student_tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None
    teacher_tokenizer: PreTrainedTokenizerBase | None
    pair: TokenizerPair | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forms:
    """How each side is asked."""

    student: PromptForm
    teacher: PromptForm


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> OutputFolder:
    """Distil the teacher into the student and measure both before and after.

    The output folder holds the trained model and its tokenizer, ``ctkd.json`` with the settings
    and every result, answers to held-out prompts, and a picture of the curves.

    Args:
        config: The settings.
        resume: Go on with the same run where it was stopped.
        overwrite: Replace a run that is there.
        say: Prints one line of progress.

    Raises:
        CtkdError: If anything the user gave cannot be used; nothing has been trained then, or a
            checkpoint is there.
    """
    device = choose_device(config.device)
    _check_tracker(config.report_to)
    if overwrite:
        _check_nothing_needed_is_deleted(config)
    settings = config.as_dict()
    found = OutputFolder.check(config.folder, settings, resume=resume, overwrite=overwrite)
    if "finished" in found.results:
        say(f"{found.path} is finished already; nothing is left to do")
        return found
    training, held_out = load_examples(config, say)
    models = _load_models(config, say)
    forms = _Forms(
        student=PromptForm(template=config.student_template),
        teacher=PromptForm(
            template=config.teacher_template,
            shots=choose_shots(training, config.teacher_shots, config.seed),
        ),
    )
    encoded = _encode(config, models, training, forms, "training", say)
    encoded_held_out = _encode(
        config, models, held_out, forms, "held-out", say, room=config.max_new_tokens
    )
    kept = {row.id for row in encoded_held_out.rows}
    held_out = [one for one in held_out if one.id in kept]

    # Only now may an earlier run be overwritten: everything that was given can be used.
    folder = OutputFolder.prepare(config.folder, settings, resume=resume, overwrite=overwrite)
    folder.record["environment"] = _environment(device)
    folder.write()
    report, stop = StepReport(say), StopOnSignal(say)
    trainer = _make_trainer(config, models, encoded, encoded_held_out, folder, device)
    for callback in (StepsAsAsked(), report, stop):
        trainer.add_callback(callback)

    measure = Measure(config, folder, held_out, say)
    measure.metrics("student before", models.student, models.student_tokenizer, forms.student)
    if models.teacher is not None and models.teacher_tokenizer is not None:
        measure.metrics("teacher", models.teacher, models.teacher_tokenizer, forms.teacher)
    measure.losses("losses before", trainer)

    _warn_about_precision(config, say)
    checkpoint = folder.last_checkpoint() if resume else None
    if checkpoint is not None:
        say(f"going on from {checkpoint.name}")
    try:
        _train_from(trainer, checkpoint)
    finally:
        stop.restore()
    folder.results["steps"] = trainer.state.global_step
    if report.seconds_per_step is not None:
        folder.results["seconds per step"] = report.seconds_per_step
    keep_history(folder, trainer)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; repeat the "
            "command with --resume to go on"
        )

    models.student.config.use_cache = True
    trainer.save_model(str(folder.path))
    measure.losses("losses after", trainer)
    keep_history(folder, trainer)
    measure.metrics("student after", models.student, models.student_tokenizer, forms.student)
    folder.keep("finished", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    if not config.keep_checkpoints:
        folder.remove_checkpoints()
    return folder


def load_examples(
    config: TrainConfig, say: Callable[[str], None]
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, the latter cut off by group where none were given."""
    found = examples(load_rows(config.data), config.task, config.columns)
    held_out_data = config.eval_data
    if held_out_data is None and is_embedded(config.data):
        held_out_data = config.data
    if held_out_data is not None:
        split = "test" if is_embedded(held_out_data) else None
        held_out = examples(load_rows(held_out_data, split=split), config.task, config.columns)
    else:
        found, held_out = split_off(found, HELD_OUT_FRACTION, config.seed)
        say(f"no evaluation data given: cut off {len(held_out)} of the training examples")
    if len(held_out) > config.eval_limit:
        say(f"held-out examples: the first {config.eval_limit} of {len(held_out)} (--eval-limit)")
        held_out = held_out[: config.eval_limit]
    say(f"{len(found)} training examples, {len(held_out)} held out")
    return found, held_out


def is_embedded(source: str) -> bool:
    """Whether the name, which says no split, is that of an embedded set and of no file."""
    return source in EMBEDDED and not Path(source).exists()


def _load_models(config: TrainConfig, say: Callable[[str], None]) -> _Models:
    say(f"student: {config.student}")
    pure = config.dtype == "bfloat16-pure"
    student_tokenizer = load_tokenizer(config.student)
    student = load_model(config.student, dtype=torch.bfloat16 if pure else torch.float32)
    check_token_ids(student, student_tokenizer)
    if not config.distils:
        return _Models(student, student_tokenizer, None, None)
    say(f"teacher: {config.teacher}")
    teacher_tokenizer = load_tokenizer(config.teacher)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    teacher = load_model(config.teacher, dtype=dtype)
    check_token_ids(teacher, teacher_tokenizer)
    pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
    return _Models(student, student_tokenizer, teacher, teacher_tokenizer, pair)


def _encode(
    config: TrainConfig,
    models: _Models,
    chosen: Sequence[Example],
    forms: _Forms,
    what: str,
    say: Callable[[str], None],
    *,
    room: int = 0,
) -> EncodedExamples:
    encoded = encode_pair(
        chosen,
        models.student_tokenizer,
        models.teacher_tokenizer,
        max_length=_longest(config, models, room),
        score_eos=config.score_eos,
        # The references of a held-out row are whole answers.
        on_long=config.on_long if what == "training" else "drop",
        min_coverage=config.min_coverage,
        student_form=forms.student,
        teacher_form=forms.teacher,
        pair=models.pair,
    )
    say(f"{what}: {encoded.coverage.report()}")
    if encoded.report():
        say(f"{what}: {encoded.report()}")
    _check_ids(encoded, models)
    return encoded


def _check_ids(encoded: EncodedExamples, models: _Models) -> None:
    """Refuse ids without an embedding: some tokenizers spell special tokens that models lack."""
    for side, model in (("student", models.student), ("teacher", models.teacher)):
        if model is None:
            continue
        width = head_width(model)
        for row in encoded.rows:
            found: EncodedSide | None = getattr(row, side)
            largest = 0 if found is None else max(*found.prompt_ids, *found.answer_ids)
            if largest >= width:
                raise DataError(
                    f"example {row.id}: its token id {largest} is out of the {side}'s range of "
                    f"{width} ids; the text spells a special token that the model does not know, "
                    "remove it"
                )


def _longest(config: TrainConfig, models: _Models, room: int) -> int:
    """The most tokens that all models can read, with room for so many more."""
    longest = config.max_length
    for model in (models.student, models.teacher):
        text = None if model is None else model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        if positions is None:
            continue
        if positions < room + 2:
            raise SettingError(
                f"max_new_tokens {room} leaves no room for a prompt in the {positions} positions "
                f"of {type(model).__name__}; lower it"
            )
        longest = min(longest, positions - room)
    return longest


def _make_trainer(
    config: TrainConfig,
    models: _Models,
    encoded: EncodedExamples,
    encoded_held_out: EncodedExamples,
    folder: OutputFolder,
    device: torch.device,
) -> CrossTokenizerTrainer:
    batches = math.ceil(len(encoded) / config.batch_size)
    steps = math.ceil(math.ceil(batches / config.grad_accumulation) * config.epochs)
    steps = config.max_steps or steps
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=1,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        report_to=config.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=device.type != "cpu",
    )
    set_seed(config.seed)
    teacher_tokenizer = models.teacher_tokenizer
    pair = models.pair
    if pair is not None and models.teacher is not None:
        pair = pair.narrowed(head_width(models.student), head_width(models.teacher))
    trainer = CrossTokenizerTrainer(
        models.student,
        arguments,
        loss=config.make_loss(pair),
        teacher=models.teacher,
        weights=config.weights(),
        student_vocab_size=None if pair is None else pair.student_size,
        teacher_vocab_size=None if pair is None else pair.teacher_size,
        data_collator=Collator(
            student_pad_id=padding_id(models.student_tokenizer),
            teacher_pad_id=None if teacher_tokenizer is None else padding_id(teacher_tokenizer),
            score_eos=config.score_eos,
        ),
        train_dataset=encoded.rows,
        eval_dataset=encoded_held_out.rows,
        processing_class=models.student_tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train_from(trainer: CrossTokenizerTrainer, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    # All steps are done; Trainer would do one more.
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state


def choose_device(name: str) -> torch.device:
    """Find the device of that name; "auto" takes a GPU where there is one.

    Raises:
        SettingError: If it is none of "auto", "cpu" and "cuda".
        ModelError: If it is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SettingError(f"device must be one of auto, cpu, cuda, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch finds none; use --device cpu")
    return torch.device(name)


def _check_tracker(name: str) -> None:
    installed = get_available_reporting_integrations()
    if name not in ("none", "all", *installed):
        raise SettingError(
            f"report_to {name!r} is no tracker that is installed here "
            f"({', '.join(installed) or 'there are none'}); install it, or use none"
        )


def _check_nothing_needed_is_deleted(config: TrainConfig) -> None:
    needed = {"student": config.student, "data": config.data, "eval_data": config.eval_data}
    if config.distils:
        needed["teacher"] = config.teacher
    folder = config.folder.resolve()
    for what, name in needed.items():
        path = None if name is None else Path(name).expanduser()
        if path is not None and path.exists() and path.resolve().is_relative_to(folder):
            raise OutputError(
                f"{what} {name} lies in the output folder {config.folder}, which --overwrite "
                "empties; choose another --output"
            )


def _environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "datasets", "accelerate")
    found = {"python": platform.python_version(), "ctkd": __version__, "device": str(device)}
    for package in packages:
        with suppress(ImportError):
            found[package] = version(package)
    found["threads"] = str(torch.get_num_threads())
    return found


def _warn_about_precision(config: TrainConfig, say: Callable[[str], None]) -> None:
    if config.dtype == "bfloat16-pure":
        say(
            "warning: weights are bfloat16, so updates smaller than about 1/256 of a weight are "
            "lost; at learning rate 1e-6 hardly any weight moves. --dtype bfloat16 keeps them in "
            "float32"
        )
