"""One training run from settings to a trained model, with its metrics before and after."""

from __future__ import annotations

import hashlib
import math
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from ctkd import __version__
from ctkd.cache_folder import cache_dir
from ctkd.distill import processes
from ctkd.distill.config import SFT, TrainConfig
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import EncodedExample, EncodedExamples
from ctkd.distill.data.example_stream import ExampleStream
from ctkd.distill.data.rows import Source, paths_of
from ctkd.distill.data.tasks import Example, get_task
from ctkd.distill.devices import PeakMemory, choose_device, is_cpu, now
from ctkd.distill.models.adapters import is_adapted
from ctkd.distill.models.checks import one_line
from ctkd.distill.models.fingerprint import model_fingerprint
from ctkd.distill.models.loading import head_width, make_savable, sources
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.preparing import (
    Forms,
    Models,
    answerable,
    answered_by_teacher,
    check_student,
    encode,
    load_examples,
    load_models,
    teacher_precision,
    with_student,
    writable,
)
from ctkd.distill.printable import say_nothing
from ctkd.distill.streaming import StreamedData
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.memory import KnownStates, TeacherMemory, memory_bytes
from ctkd.distill.teachers.texts import TeacherTexts
from ctkd.distill.training.card import CARD, facts_of_run, write_card
from ctkd.distill.training.checkpoints import Checkpoints, RunTrainer
from ctkd.distill.training.forecast import (
    Sample,
    forecast,
    free_bytes,
    measure_costs,
    teacher_tokens,
)
from ctkd.distill.training.hub import check_upload, upload
from ctkd.distill.training.measuring import Measure, keep_history
from ctkd.distill.training.output_folder import OutputFolder, alone
from ctkd.distill.training.progress import StepReport, StepsAsAsked, StopOnSignal
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import CtkdError, ModelError, OutputError, SettingError
from ctkd.loss import Loss
from ctkd.registry import source_fingerprint
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.vocabulary_map import fingerprint

__all__ = ["Interrupted", "dry_run", "train"]


class Interrupted(CtkdError):
    """Training was stopped by the user; a checkpoint was written."""


@processes.noticing_lost_processes()
def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    teacher_states: KnownStates | None = None,
) -> OutputFolder:
    """Distil the teacher into the student and measure both before and after.

    The output folder holds the trained model and its tokenizer, a model card, ``ctkd.json`` with
    the settings and every result, answers to held-out prompts, and a picture of the curves.

    Args:
        config: The settings.
        resume: Go on with the same run where it was stopped.
        overwrite: Replace a run that is there.
        say: Prints one line of progress.
        teacher_states: What runs with the same teacher pass on to each other, the ``known`` of
            `ctkd.distill.teachers.memory.TeacherMemory`.

    Raises:
        CtkdError: If anything the user gave cannot be used; nothing has been trained then, or a
            checkpoint is there.
    """
    device = choose_device(config.device)
    processes.join(device, config.dtype)
    if not processes.is_first():
        say = say_nothing
    folder_before = processes.of_first(lambda: _checked(config, resume=resume, overwrite=overwrite))
    if "finished" in folder_before.results:
        if processes.is_first():
            _end_again(config, folder_before, say)
        say(f"{folder_before.path} is finished already; nothing is left to do")
        return folder_before
    begun = folder_before.record.get("date")
    inputs = processes.first_before_others(lambda: _load(config, begun, say))
    # Only now may an earlier run be overwritten: everything that was given can be used.
    with alone(config.folder) if processes.is_first() else nullcontext():
        folder = processes.of_first(
            lambda: _begin(config, inputs, device, resume=resume, overwrite=overwrite)
        )
        if processes.count() > 1:
            say(f"{processes.count()} processes, {_rows_a_step(config)} rows a step")
        # Before hours of training: what stands in its way is found now.
        control = _control_folder(config) if config.control else None
        _run(config, inputs, folder, device, resume=resume, say=say, teacher_states=teacher_states)
        if control is not None:
            _train_control(config, inputs, folder, control, device, say)
        processes.of_first(lambda: _finish(config, folder, say))
        processes.of_first(lambda: upload(config, folder, say))
    return folder


def _begin(
    config: TrainConfig, inputs: _Inputs, device: torch.device, *, resume: bool, overwrite: bool
) -> OutputFolder:
    """The output folder with what a run is begun with, or was begun with in the same way."""
    settings = config.as_dict()
    folder = OutputFolder.prepare(config.folder, settings, resume=resume, overwrite=overwrite)
    folder.record["environment"] = _environment(device)
    folder.record["date"] = inputs.date
    _check_same_rows(folder, inputs)
    _check_same_code(folder, config)
    _check_same_models(folder, config, inputs)
    _check_same_processes(folder)
    folder.record["facts"] = facts_of_run(
        config, inputs.models, inputs.forms, inputs.encoded, inputs.encoded_held_out
    )
    folder.write()
    return folder


def _end_again(config: TrainConfig, folder: OutputFolder, say: Callable[[str], None]) -> None:
    """Do what was left when a run was finished: a kill may have left checkpoints."""
    if not folder.record["settings"].get("keep_checkpoints", True):
        with alone(config.folder):
            Checkpoints(config.folder, say).remove()
    upload(config, folder, say)


def dry_run(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Load and check all that `train` would, and say what the run would be and cost.

    Two of its micro-batches are run forward and backward. Nothing is written into the output
    folder. A live teacher that is to answer writes nothing: rows have the answers of the data.

    Args:
        config: The settings.
        resume: As for `train`.
        overwrite: As for `train`.
        say: Prints one line of progress.

    Raises:
        CtkdError: If `train` could not begin.
    """
    if processes.count() > 1:
        raise SettingError("a dry run is made in one process; start it without torchrun")
    device = choose_device(config.device)
    folder = _checked(config, resume=resume, overwrite=overwrite)
    if "finished" in folder.results:
        return f"{folder.path} is finished already; nothing would be done"
    inputs = _load(config, folder.record.get("date"), say, answering=False)
    _check_same_code(folder, config)
    _check_same_models(folder, config, inputs)
    if config.answers == "data":
        _check_same_rows(folder, inputs)
    elif inputs.cache is None:
        say("the teacher has not answered yet; what follows is of the answers of the data")
    if config.gradient_checkpointing:
        _keep_few_activations(inputs.student, config)
    sample = Sample.of(config, inputs.encoded.rows)
    memory, reading = _remembered_sample(config, inputs, device, sample, say)
    with tempfile.TemporaryDirectory() as place:
        quiet = replace(config, report_to="none")
        elsewhere = OutputFolder(Path(place), {"settings": {}, "results": {}})
        trainer = _make_trainer(quiet, inputs, memory, elsewhere, device)
        _tell_how_logits_are_read(trainer, say)
        if config.torch_compile:
            say("what follows is of steps that are not compiled")
        costs = measure_costs(config, trainer, sample)
    _check_room(config.folder, costs.saved)
    output = "new"
    if resume and folder.path.exists():
        last = Checkpoints(folder.path, say).last()
        output = f"goes on from {'the start' if last is None else last.name}"
    elif overwrite and folder.path.exists():
        output = "what is there would be deleted"
    return forecast(
        config,
        inputs.models,
        inputs.encoded,
        costs,
        steps=_steps(config, len(inputs.encoded)),
        reading=reading,
        output=output,
    )


def _checked(config: TrainConfig, *, resume: bool, overwrite: bool) -> OutputFolder:
    """The output folder, untouched yet, if the settings can be used here."""
    check_student(config)
    _check_trackers(config.report_to)
    check_upload(config)
    if overwrite:
        _check_nothing_needed_is_deleted(config)
    settings = config.as_dict()
    return OutputFolder.check(config.folder, settings, resume=resume, overwrite=overwrite)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """Everything that a run needs, loaded and checked; the student by the name it is loaded by.

    Of rows that are streamed, `encoded` holds the first block.
    """

    student_name: str
    models: Models
    student: PreTrainedModel
    cache: TeacherCache | None
    loss: Loss | None
    pair: TokenizerPair | None
    forms: Forms
    encoded: EncodedExamples
    encoded_held_out: EncodedExamples
    held_out: Sequence[Example]
    date: str
    data: StreamedData | None = None
    stream: ExampleStream | None = None


def _load(
    config: TrainConfig, begun: str | None, say: Callable[[str], None], *, answering: bool = True
) -> _Inputs:
    """Load and check everything, for a run that was begun on a day if it was.

    Without `answering`, a live teacher that is to answer is spared it: the answers are the data's.
    """
    data = StreamedData(config, say) if config.streaming else None
    training, held_out = load_examples(config, say) if data is None else (data.first, data.held_out)
    cache, day = None, begun
    if config.teacher_cache is not None:
        cache = TeacherCache.open(config.teacher_cache, say=say)
        day = begun or cache.record.get("date")
    day = config.date or day or date.today().isoformat()
    config = replace(config, date=day)
    config = with_student(config, training, say)
    models = load_models(config, say, cache=cache)
    student = models.student
    if student is None:
        raise ModelError(f"{config.student} was not loaded")
    make_savable(student, say)
    forms = Forms.of(config, training)
    _tell_what_day_is_written(models, forms, day, say)
    if forms.student.end_id(models.student_tokenizer) is None:
        say(
            "warning: answers are taught without an end: the student's tokenizer has no end of "
            "sequence, so the student does not learn to stop; set the tokenizer's eos_token"
        )
    if config.answers == "teacher" and (answering or cache is not None):
        training = _as_the_teacher_answers(config, models, training, forms, cache, say)
        held_out = writable(models, held_out, forms, "held-out", say)
    encoded = encode(config, models, training, forms, "training", say)
    encoded_held_out = encode(config, models, held_out, forms, "held-out", say)
    kept = {row.id for row in encoded_held_out.rows}
    held_out = [one for one in held_out if one.id in kept]
    pair = _narrowed(config, models, student)
    set_seed(config.seed)
    loss = config.make_loss(pair)
    if cache is not None and pair is not None and loss is not None:
        cache.check_rows(encoded.rows, "training")
        cache.check_rows(encoded_held_out.rows, "held-out")
        cache.check_serves(loss, config.loss)
    return _Inputs(
        config.student,
        models,
        student,
        cache,
        loss,
        pair,
        forms,
        encoded,
        encoded_held_out,
        held_out,
        day,
        data,
        None if data is None else data.encoded(config, models, forms),
    )


def _run(
    config: TrainConfig,
    inputs: _Inputs,
    folder: OutputFolder,
    device: torch.device,
    *,
    resume: bool,
    say: Callable[[str], None],
    teacher_states: KnownStates | None = None,
) -> None:
    """Measure, train, save and measure again, as far as that was not done before."""
    student = inputs.student
    if config.gradient_checkpointing:
        _keep_few_activations(student, config)
    stop = StopOnSignal(say)
    memory = _remembered(config, inputs, device, say, teacher_states)
    trainer = _make_trainer(config, inputs, memory, folder, device)
    checkpoints = trainer.checkpoints = Checkpoints(folder.path, say)
    report = StepReport(say, trainer.clock)
    for callback in (StepsAsAsked(), report, stop):
        trainer.add_callback(callback)
    whole = config.lora_merge or not is_adapted(student)
    processes.of_first(lambda: _check_can_be_saved(trainer, student, folder, whole=whole))
    checkpoint = processes.of_first(checkpoints.last) if resume else None

    measure = Measure(config, folder, inputs.held_out, say)
    if config.measure == "all":
        _by_first(folder, lambda: _measure_student("student before", measure, inputs, trainer))
        _by_first(folder, lambda: _measure_teacher(measure, inputs, memory, device))
        measure.losses("losses before", trainer)

    _tell_how_logits_are_read(trainer, say)
    _warn_about_precision(config, student, say)
    if checkpoint is not None:
        again = "" if inputs.stream is None else "; the rows before it are read again"
        say(f"going on from {checkpoint.name}{again}")
    peak = PeakMemory(device)
    try:
        _train_from(trainer, checkpoint)
    finally:
        stop.restore()
    held = [folder.results.get("peak memory"), peak.read()]
    folder.results["peak memory"] = max((one for one in held if one is not None), default=None)
    folder.results["training seconds"] = trainer.clock.total
    folder.results["steps"] = trainer.state.global_step
    if report.seconds_per_step is not None:
        folder.results["seconds per step"] = report.seconds_per_step
    keep_history(folder, trainer)
    if inputs.data is not None:
        say(f"training: {inputs.data.tally.report()}")
    if stop.stopped:
        if not processes.is_first():
            raise SystemExit(0)
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; repeat the "
            "command with --resume to go on"
        )

    student.config.use_cache = True
    trainer.check_weights()
    if config.lora_merge:
        student = trainer.merge_adapters()
        inputs = replace(inputs, student=student)
    with checkpoints.writing_result() as partial:
        trainer.save_model(str(partial))
        # A template of peft's; the card is written in the end.
        (partial / CARD).unlink(missing_ok=True)
    if config.measure == "all":
        measure.losses("losses after", trainer)
        keep_history(folder, trainer)
        _by_first(folder, lambda: _measure_student("student after", measure, inputs, trainer))


def _by_first(folder: OutputFolder, measure: Callable[[], None]) -> None:
    """Measure in the first process, and let the others know the results."""

    def results() -> dict[str, Any]:
        measure()
        return folder.results

    folder.record["results"] = processes.of_first(results)


def _keep_few_activations(student: PreTrainedModel, config: TrainConfig) -> None:
    # The name that transformers gave it later, where there is one.
    enable = getattr(student, "activation_checkpointing_enable", None)
    try:
        (enable or student.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{config.student} cannot compute its activations twice: {one_line(error)}; leave "
            "gradient_checkpointing out"
        ) from error


def _finish(config: TrainConfig, folder: OutputFolder, say: Callable[[str], None]) -> None:
    """Mark a run as finished, with its card, and delete what only served to go on with it."""
    write_card(folder, say)
    folder.keep("finished", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    if not config.keep_checkpoints:
        Checkpoints(folder.path, say).remove()


def _check_can_be_saved(
    trainer: RunTrainer, student: PreTrainedModel, folder: OutputFolder, *, whole: bool
) -> None:
    """Find out before the first step what would fail after the last one."""
    weights = [one for one in student.parameters() if one.requires_grad or whole]
    _check_room(folder.path, sum(one.nbytes for one in weights))
    with trainer.checkpoints.trying(folder.path) as place:
        student.config.save_pretrained(place)
        if student.can_generate():
            student.generation_config.save_pretrained(place)
        trainer.processing_class.save_pretrained(place)


def _check_room(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise OutputError(
            f"the student takes {needed / 1e6:.1f} MB, but there are only {free / 1e6:.1f} MB left "
            f"for {folder}; make room, or choose another --output"
        )


def _as_the_teacher_answers(
    config: TrainConfig,
    models: Models,
    training: Sequence[Example],
    forms: Forms,
    cache: TeacherCache | None,
    say: Callable[[str], None],
) -> list[Example]:
    """The training examples with the teacher's texts for answers, which are kept on disk."""
    teacher, tokenizer = models.teacher, models.teacher_tokenizer
    if tokenizer is None:
        raise ModelError(f"the tokenizer of {config.teacher} was not loaded")
    chosen, prompts = answerable(config, models, training, forms, "training", say)
    if cache is not None:
        if cache.texts.max_new_tokens != config.max_new_tokens:
            raise SettingError(
                f"the teacher cache {cache.path} holds answers of up to "
                f"{cache.texts.max_new_tokens} tokens, but max_new_tokens is "
                f"{config.max_new_tokens}; give the same"
            )
        return answered_by_teacher(chosen, prompts, cache.texts, say)
    if teacher is None or models.pair is None:
        raise ModelError(f"{config.teacher} was not loaded")
    weights, words = model_fingerprint(config.teacher), fingerprint(models.pair.teacher_bytes)
    name = f"{weights} {words} torch.{teacher_precision(config)}"
    name = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = cache_dir() / "teacher_texts" / f"{name}.jsonl"
    one_line = get_task(config.task).one_line
    texts = TeacherTexts(path, max_new_tokens=config.max_new_tokens, one_line=one_line)
    teacher.to(choose_device(config.device))
    texts.complete(
        prompts,
        lambda: (teacher, tokenizer),
        ends=forms.teacher.ends(tokenizer),
        progress="teacher: writing answers",
    )
    return answered_by_teacher(chosen, prompts, texts, say)


def _narrowed(
    config: TrainConfig, models: Models, student: PreTrainedModel
) -> TokenizerPair | None:
    """The pair as the loss sees it, without ids that a model has no output for."""
    if not config.distils or models.pair is None or models.teacher_width is None:
        return None
    return models.pair.narrowed(head_width(student), models.teacher_width)


def _measure_student(name: str, measure: Measure, inputs: _Inputs, trainer: RunTrainer) -> None:
    tokenizer = inputs.models.student_tokenizer
    if get_task(measure.config.task).answered:
        measure.metrics(name, inputs.student, tokenizer, inputs.forms.student)
    sides = [row.student for row in inputs.encoded_held_out.rows]
    measure.bits(name, trainer.student_logits, sides, tokenizer)


def _measure_teacher(
    measure: Measure, inputs: _Inputs, memory: TeacherMemory | None, device: torch.device
) -> None:
    """Measure the teacher: live, as it is remembered, or by what it wrote for a cache."""
    teacher, tokenizer = inputs.models.teacher, inputs.models.teacher_tokenizer
    if tokenizer is None:
        return
    cache = inputs.cache
    if get_task(measure.config.task).answered:
        if cache is not None:
            measure.written("teacher", cache.texts, tokenizer, inputs.forms.teacher)
            if "teacher" not in measure.folder.results:
                return
        elif teacher is not None:
            measure.metrics("teacher", teacher, tokenizer, inputs.forms.teacher)
    # A teacher that only writes answers reads none.
    sides = [row.teacher for row in inputs.encoded_held_out.rows if row.teacher is not None]
    if not sides:
        return
    if teacher is not None:
        live = ModelLogits(cast(PreTrainedModel, teacher.to(device)))
        measure.bits("teacher", memory or live, sides, tokenizer)
    elif cache is not None and (cache.holds_states or 1.0 in cache.temperatures):
        measure.bits("teacher", cache, sides, tokenizer)
    else:
        measure.say("teacher: its bits are not measured, they are not cached at temperature 1")


def _remembered(
    config: TrainConfig,
    inputs: _Inputs,
    device: torch.device,
    say: Callable[[str], None],
    teacher_states: KnownStates | None,
    *,
    read: Sequence[EncodedExample] | None = None,
) -> TeacherMemory | None:
    """The teacher's hidden states, if rows are read more than once and there is room for them.

    Those of all rows, unless others are to be read.
    """
    teacher, tokenizer = inputs.models.teacher, inputs.models.teacher_tokenizer
    if teacher is None or tokenizer is None or inputs.pair is None:
        return None
    if inputs.stream is not None:
        say("teacher: rows that are streamed are not remembered, it reads them in every pass")
        return None
    rows = inputs.encoded.rows
    passes = config.epochs
    if config.max_steps is not None:
        passes = config.max_steps * _rows_a_step(config) / len(rows)
    logits = ModelLogits(cast(PreTrainedModel, teacher.to(device)))
    if passes <= 1 or logits.why_whole is not None:
        return None
    sides = [row.teacher for row in (*rows, *inputs.encoded_held_out.rows) if row.teacher]
    needed = memory_bytes(teacher, sides, score_eos=config.score_eos)
    # Each process has all of them.
    if needed * processes.count() > config.teacher_memory * 1e9:
        return None
    say(f"teacher: {len(sides)} rows, read once; their hidden states take {needed / 1e6:.0f} MB")
    if read is not None:
        sides = [row.teacher for row in read if row.teacher]
    return TeacherMemory(
        logits,
        sides,
        pad_id=padding_id(tokenizer),
        score_eos=config.score_eos,
        vocab_size=inputs.pair.teacher_size,
        batch_size=config.batch_size,
        known=teacher_states,
    )


def _rows_a_step(config: TrainConfig) -> int:
    """Rows in an optimizer step, of all processes."""
    return config.batch_size * config.grad_accumulation * processes.count()


def _remembered_sample(
    config: TrainConfig,
    inputs: _Inputs,
    device: torch.device,
    sample: Sample,
    say: Callable[[str], None],
) -> tuple[TeacherMemory | None, float | None]:
    """The teacher's hidden states at sampled rows, and in how many seconds it reads all rows."""
    read = [*sample.typical, *sample.longest]
    # The first time takes longer.
    if _remembered(config, inputs, device, say, None, read=read) is None:
        return None, None
    started = now()
    memory = _remembered(config, inputs, device, say_nothing, None, read=read)
    every = (*inputs.encoded.rows, *inputs.encoded_held_out.rows)
    return memory, (now() - started) * teacher_tokens(every) / teacher_tokens(read)


def _control_of(config: TrainConfig) -> TrainConfig:
    """The settings of the same run without the loss."""
    return replace(
        config,
        loss=SFT,
        loss_options={},
        teacher_cache=config.teacher_cache if config.answers == "teacher" else None,
        kd_weight=None,
        ce_weight=config.ce_weight or None,
        control=False,
        push_to_hub=False,
        hub_model_id=None,
        hub_private=False,
        output=str(config.folder / "control"),
    )


def _control_folder(config: TrainConfig) -> OutputFolder:
    """The control's folder below the run's, as it was left if it was begun."""
    control = _control_of(config)

    def prepare() -> OutputFolder:
        begun = bool(OutputFolder.record_of(control.folder)["settings"])
        return OutputFolder.prepare(
            control.folder, control.as_dict(), resume=begun, overwrite=False
        )

    return processes.of_first(prepare)


def _train_control(
    config: TrainConfig,
    inputs: _Inputs,
    folder: OutputFolder,
    below: OutputFolder,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Train the same student on the same rows without the loss, in a folder below the run's."""

    def say_whose(line: str) -> None:
        say(f"control: {line}")

    say("control: training once more, without the loss")
    if "finished" not in below.results:
        below.record.update(
            {name: folder.record[name] for name in ("environment", "date", "facts")}
        )
        _check_same_rows(below, inputs)
        below.results["student before"] = folder.results["student before"]
        below.write()
        control = _control_of(config)
        begun = replace(control, student=inputs.student_name, student_config=None)
        untrained = load_models(begun, say_whose, teacher=False)
        student = untrained.student
        if student is None:
            raise ModelError(f"{config.student} was not loaded")
        make_savable(student, say_whose)
        set_seed(config.seed)
        without = replace(
            inputs, models=untrained, student=student, cache=None, loss=None, pair=None
        )
        _run(control, without, below, device, resume=True, say=say_whose)
        processes.of_first(lambda: _finish(control, below, say_whose))
    folder.keep("control", below.results["student after"])


def _steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps on so many rows."""
    batches = math.ceil(rows / (config.batch_size * processes.count()))
    steps = math.ceil(math.ceil(batches / config.grad_accumulation) * config.epochs)
    return config.max_steps or steps


def _make_trainer(
    config: TrainConfig,
    inputs: _Inputs,
    memory: TeacherMemory | None,
    folder: OutputFolder,
    device: torch.device,
) -> RunTrainer:
    models, pair = inputs.models, inputs.pair
    cache = (memory or inputs.cache) if config.distils else None
    steps = _steps(config, len(inputs.encoded))
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
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.dtype == "bfloat16",
        torch_compile=config.torch_compile,
        use_cpu=is_cpu(device),
        remove_unused_columns=False,
        report_to=config.report_to,
        disable_tqdm=True,
        log_level_replica="error",
        dataloader_pin_memory=not is_cpu(device),
    )
    teacher_tokenizer = models.teacher_tokenizer if config.distils else None
    trainer = RunTrainer(
        inputs.student,
        arguments,
        loss=inputs.loss,
        teacher=models.teacher if config.distils and cache is None else None,
        teacher_cache=cache,
        weights=config.weights(),
        student_vocab_size=None if pair is None else pair.student_size,
        teacher_vocab_size=None if pair is None else pair.teacher_size,
        data_collator=Collator(
            student_pad_id=padding_id(models.student_tokenizer),
            teacher_pad_id=None if teacher_tokenizer is None else padding_id(teacher_tokenizer),
            score_eos=config.score_eos,
            teacher_cache=cache,
        ),
        train_dataset=inputs.encoded.rows if inputs.stream is None else inputs.stream,
        eval_dataset=inputs.encoded_held_out.rows,
        processing_class=models.student_tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tell_how_logits_are_read(trainer: CrossTokenizerTrainer, say: Callable[[str], None]) -> None:
    for name, logits in (("student", trainer.student_logits), ("teacher", trainer.teacher_logits)):
        if logits is not None:
            how = "a block at a time, from the head"
            if logits.why_whole is not None:
                how = f"all at once: {logits.why_whole}"
            say(f"logits of the {name}: {how}")


def _check_same_rows(folder: OutputFolder, inputs: _Inputs) -> None:
    """Keep fingerprints of the rows, or refuse to go on with others: paths say little."""
    splits = {"training": inputs.encoded, "held-out": inputs.encoded_held_out}
    now = {
        what: hashlib.sha256(repr(split.rows).encode()).hexdigest()
        for what, split in splits.items()
    }
    if inputs.data is not None:
        # What was encoded is the first block alone.
        now["training"] += inputs.data.fingerprint()
    before = folder.record.setdefault("rows", now)
    changed = [what for what in now if before.get(what) != now[what]]
    if changed:
        raise OutputError(
            f"the {' and '.join(changed)} rows are others than those that {folder.path} was begun "
            "with, though their places are the same; restore them, or start anew with --overwrite"
        )


def _check_same_code(folder: OutputFolder, config: TrainConfig) -> None:
    """Keep a fingerprint of a loss from elsewhere, or refuse to go on with an edited one."""
    now = None if config.loss == SFT else source_fingerprint(config.loss)
    if folder.record.setdefault("loss source", now) != now:
        raise OutputError(
            f"the file of the loss {config.loss} was edited since {folder.path} was begun with it; "
            "restore it, or start anew with --overwrite"
        )


def _check_same_models(folder: OutputFolder, config: TrainConfig, inputs: _Inputs) -> None:
    """Keep fingerprints of both models, or refuse to go on with others: names say little.

    A cache stands for its teacher.
    """
    if config.student_config is None:
        now = {"student": model_fingerprint(config.student)}
        others = {"student": f"{config.student} has other weights"}
    else:
        now = {"student": Path(inputs.student_name).name}
        configuration = config.student_config
        others = {"student": f"{configuration} is another configuration, or has another tokenizer,"}
    if inputs.cache is not None:
        now["teacher"] = inputs.cache.fingerprint
        others["teacher"] = f"{inputs.cache.path} is another cache"
    elif config.needs_teacher:
        now["teacher"] = model_fingerprint(config.teacher)
        others["teacher"] = f"{config.teacher} has other weights"
    before = folder.record.setdefault("models", now)
    for which, other in others.items():
        if before.get(which) != now[which]:
            raise OutputError(
                f"{other} than {folder.path} was begun with; restore it, or start anew with "
                "--overwrite"
            )


def _check_same_processes(folder: OutputFolder) -> None:
    """Keep the number of processes, or refuse to go on with another: steps would be others."""
    now = processes.count()
    # Earlier versions kept none.
    before = folder.record.setdefault("processes", now)
    if before != now:
        raise OutputError(
            f"{folder.path} was begun with {before} processes, now there are {now}; start as many, "
            "or start anew with --overwrite"
        )


def _tell_what_day_is_written(
    models: Models, forms: Forms, day: str, say: Callable[[str], None]
) -> None:
    sides = (
        ("student", forms.student, models.student_tokenizer),
        ("teacher", forms.teacher, models.teacher_tokenizer),
    )
    for name, form, tokenizer in sides:
        if tokenizer is not None and form.writes_day(tokenizer):
            say(f"the {name}'s chat template writes the date: {day} throughout (--date)")


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
    trainer.clock.go_on(state)


def _check_trackers(names: str | Sequence[str]) -> None:
    installed = get_available_reporting_integrations()
    known = ("none", "all", *installed) if isinstance(names, str) else installed
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise SettingError(
                f"report_to {name!r} is no tracker that is installed here "
                f"({', '.join(installed) or 'there are none'}); install it, or use none"
            )


def _check_nothing_needed_is_deleted(config: TrainConfig) -> None:
    needed: dict[str, Source | None] = {
        "student": _with_models_below(config.student),
        "data": config.data,
        "eval_data": config.eval_data,
    }
    if config.needs_teacher:
        needed["teacher"] = _with_models_below(config.teacher)
        needed["teacher_cache"] = config.teacher_cache
    folder = config.folder.resolve()
    for what, source in needed.items():
        for path in paths_of(source):
            if path.resolve().is_relative_to(folder):
                raise OutputError(
                    f"{what} {path} lies in the output folder {config.folder}, which --overwrite "
                    "empties; choose another --output"
                )


def _with_models_below(name: str) -> list[str]:
    """A model, and where it is a folder of adapters what lies below them."""
    return [name, *(sources(name)[1:] if Path(name).is_dir() else ())]


def _environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "datasets", "accelerate", "peft")
    environment = {"python": platform.python_version(), "ctkd": __version__, "device": str(device)}
    for package in packages:
        with suppress(ImportError):
            environment[package] = version(package)
    environment["threads"] = str(torch.get_num_threads())
    return environment


def _warn_about_precision(
    config: TrainConfig, student: PreTrainedModel, say: Callable[[str], None]
) -> None:
    if config.dtype == "bfloat16-pure" and not is_adapted(student):
        say(
            "warning: weights are bfloat16, so updates smaller than about 1/256 of a weight are "
            "lost; at learning rate 1e-6 hardly any weight moves. --dtype bfloat16 keeps them in "
            "float32"
        )
