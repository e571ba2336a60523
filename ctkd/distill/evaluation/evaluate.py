"""Answers of a model to held-out prompts, their scores, and held-out losses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ctkd.distill.config import (
    EvaluateRequest,
    TrainConfig,
    check_needs,
    usual_task,
    usual_template,
)
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import EncodedExample, encode_examples
from ctkd.distill.data.layouts import brought
from ctkd.distill.data.prompts import PLAIN, PromptForm
from ctkd.distill.data.rows import Source, joined, load_parts, paths_of
from ctkd.distill.data.tasks import Example, Task, examples, get_task
from ctkd.distill.devices import choose_device, is_cpu
from ctkd.distill.evaluation.bits import TextBits, text_bits
from ctkd.distill.evaluation.metrics import (
    BITS_PER_BYTE,
    GIVEN_BITS,
    Prediction,
    Scores,
    match_predictions,
    read_predictions,
    score,
    write_predictions,
)
from ctkd.distill.evaluation.next_bytes import next_byte_divergence
from ctkd.distill.models.generation import BATCH_SIZE, generate
from ctkd.distill.models.loading import (
    check_token_ids,
    decoder_start,
    head_width,
    load_model,
    load_tokenizer,
    most_positions,
)
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.options import default_of
from ctkd.distill.training.output_folder import OutputFolder, try_to_write
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import DataError, OutputError, SettingError
from ctkd.loss import Loss
from ctkd.registry import get_loss
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenizers import PlaceholderPair

__all__ = ["answer", "held_out_losses", "run_evaluation", "score_predictions"]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    form: PromptForm = PLAIN,
    one_line: bool = True,
    progress: bool | str = False,
) -> list[Prediction]:
    """Let a model answer each example's prompt by greedy decoding.

    Args:
        model: The model, in its own tokenizer's ids.
        tokenizer: Its tokenizer.
        examples: What to answer.
        max_new_tokens: Longest answer.
        batch_size: Prompts decoded together.
        form: The form of the prompts: as in training.
        one_line: Whether an answer ends at its first line break, see `Task`.
        progress: Whether to show a bar, and its text.
    """
    prompts = form.ids(tokenizer, examples)
    generated = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_at_newline=one_line,
        ends=form.ends(tokenizer),
        progress=progress,
    )
    return [
        Prediction(prediction=text.text, id=one.id, references=one.references, prompt=one.prompt)
        for text, one in zip(generated, examples, strict=True)
    ]


def score_predictions(predictions: Sequence[Prediction]) -> Scores:
    """Score answers against the references they carry."""
    return score([one.prediction for one in predictions], [one.references for one in predictions])


def held_out_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedExample],
    *,
    loss: Loss | None = None,
    teacher: PreTrainedModel | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    pair: TokenizerPair | None = None,
    batch_size: int = 4,
    score_eos: bool = False,
    use_cpu: bool = False,
) -> dict[str, float]:
    """Mean cross-entropy and distillation loss over encoded rows.

    Args:
        model: The model to measure.
        tokenizer: Its tokenizer.
        rows: Encoded for both sides.
        loss: What to measure besides cross-entropy.
        teacher: Needed with a loss.
        teacher_tokenizer: Needed with a loss.
        pair: Both tokenizers; needed with a loss that was given them.
        batch_size: Rows per batch.
        score_eos: Whether the loss scores the end of sequence.
        use_cpu: Stay on the CPU where there is an accelerator.

    Returns:
        ``ce`` in nats per token, and with a loss ``kd`` and ``kd/<part>`` for each of its parts.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = CrossTokenizerTrainer(
            model,
            TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                remove_unused_columns=False,
                use_cpu=use_cpu,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            loss=loss,
            teacher=teacher,
            student_vocab_size=len(tokenizer) if pair is None else pair.student_size,
            teacher_vocab_size=_length(teacher_tokenizer) if pair is None else pair.teacher_size,
            data_collator=Collator(
                student_pad_id=padding_id(tokenizer),
                teacher_pad_id=None if teacher_tokenizer is None else padding_id(teacher_tokenizer),
                score_eos=score_eos,
            ),
        )
        output = trainer.evaluation_loop(trainer.get_eval_dataloader(list(rows)), "held-out")
    return {
        name.removeprefix("eval_"): value
        for name, value in output.metrics.items()
        if name != "eval_loss"
    }


def _length(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    return None if tokenizer is None else len(tokenizer)


def run_evaluation(
    request: EvaluateRequest, *, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Score a model's answers, or a file of answers.

    Args:
        request: What to evaluate.
        overwrite: Replace the file for the answers, if it is there.
        say: Prints one line of progress.

    Returns:
        ``exact_match``, ``f1``, ``rouge_lsum`` in percent, ``n``, and of a model
        ``given_bits_per_byte``; or for task lm ``bits_per_byte``, ``n`` and ``bytes``; with a loss
        also ``ce``, ``kd`` and its parts; and what `NextBytes` says, if it was to be measured.

    Raises:
        CtkdError: If what was given cannot be used.
    """
    if request.model is None:
        return _score_file(request, say)
    if request.predictions is not None:
        raise SettingError(
            "--predictions is a file of answers to score, without MODEL; MODEL's own answers are "
            "written to the file of --output"
        )
    if request.loss is not None:
        # Fails here, before anything is loaded, if the loss or a setting of it is wrong.
        loss = get_loss(request.loss, pair=PlaceholderPair(), **request.loss_options)
        check_needs(loss, request.loss)
    form = _form(request)
    device = choose_device(request.device)
    if request.output is not None:
        _check_can_be_written(Path(request.output), request, overwrite)
    task = _task(request)
    chosen = _examples(request, say)
    given = chosen
    if request.answers == "teacher":
        given = _answered_by_teacher(request, chosen, device, form, say)
    say(f"model: {request.model}, {len(chosen)} examples")
    tokenizer = load_tokenizer(request.model)
    model = load_model(request.model, device=device)
    check_token_ids(model, tokenizer)
    losses: dict[str, float] = {}
    if request.loss is not None or request.next_bytes:
        losses = _against_teacher(request, given, model, tokenizer, form, say)
    bits = _bits(request, given, model, tokenizer, form, say)
    if not task.answered:
        if request.output is not None:
            bits.write(Path(request.output))
            say(f"bits of each piece of text: {request.output}")
        return {**bits.summary(), **losses}
    predictions = answer(
        model,
        tokenizer,
        form.writable(tokenizer, chosen, side="model")[0],
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        form=form,
        one_line=task.one_line,
        progress="answering",
    )
    if request.output is not None:
        write_predictions(request.output, predictions)
        say(f"answers: {request.output}")
    measured = {GIVEN_BITS: bits.summary()[BITS_PER_BYTE], **losses}
    return {**score_predictions(predictions).summary(), **measured}


def _answered_by_teacher(
    request: EvaluateRequest,
    chosen: Sequence[Example],
    device: torch.device,
    form: PromptForm,
    say: Callable[[str], None],
) -> list[Example]:
    """Examples with what a teacher writes in the place of the data's answers."""
    task, name = _task(request), _teacher(request)
    if not task.answered:
        raise SettingError(
            f"task {task.name} has no prompts that a teacher could answer; leave --answers at data"
        )
    tokenizer = load_tokenizer(name)
    form = _teacher_form(request, form)
    asked, _ = form.writable(tokenizer, chosen, side="teacher")
    predictions = answer(
        load_model(name, device=device),
        tokenizer,
        asked,
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        form=form,
        one_line=task.one_line,
        progress="teacher, answering",
    )
    written = [
        example.with_answer(found.prediction)
        for example, found in zip(asked, predictions, strict=True)
        if found.prediction
    ]
    say(f"answers given: those that the teacher {name} wrote, to {len(written)} of {len(chosen)}")
    if not written:
        raise DataError(f"the teacher {name} wrote nothing to any prompt; take another teacher")
    return written


def _bits(
    request: EvaluateRequest,
    chosen: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    say: Callable[[str], None],
) -> TextBits:
    """The bits of texts that are not too long."""
    encoded = encode_examples(
        chosen, tokenizer, max_length=_longest(request, request.model), student_form=form
    )
    for line in (encoded.coverage.report(), encoded.report()):
        if line:
            say(line)
    kept = {row.id for row in encoded.rows}
    return text_bits(
        ModelLogits(model),
        tokenizer,
        [one for one in chosen if one.id in kept],
        [row.student for row in encoded.rows],
        batch_size=request.batch_size,
        progress="reading",
    )


def _longest(request: EvaluateRequest, *models: str | None) -> int:
    """The most tokens of a row that all models can read."""
    positions = [most_positions(name) for name in models if name is not None]
    return min([request.max_length, *(one for one in positions if one is not None)])


def _against_teacher(
    request: EvaluateRequest,
    chosen: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    say: Callable[[str], None],
) -> dict[str, float]:
    name = _teacher(request)
    say(f"teacher: {name}")
    teacher_tokenizer = load_tokenizer(name)
    teacher = load_model(name, device=model.device)
    check_token_ids(teacher, teacher_tokenizer)
    pair = TokenizerPair(tokenizer, teacher_tokenizer)
    encoded = encode_examples(
        chosen,
        tokenizer,
        teacher_tokenizer,
        max_length=_longest(request, request.model, name),
        student_form=form,
        teacher_form=_teacher_form(request, form),
        pair=pair,
    )
    say(encoded.coverage.report())
    if encoded.report():
        say(encoded.report())
    found: dict[str, float] = {}
    if request.loss is not None:
        pair = pair.narrowed(head_width(model), head_width(teacher))
        found = held_out_losses(
            model,
            tokenizer,
            encoded.rows,
            loss=get_loss(request.loss, pair=pair, **request.loss_options),
            teacher=teacher,
            teacher_tokenizer=teacher_tokenizer,
            pair=pair,
            batch_size=min(request.batch_size, 4),
            use_cpu=is_cpu(model.device),
        )
    if request.next_bytes:
        divergence = next_byte_divergence(
            ModelLogits(teacher),
            teacher_tokenizer,
            ModelLogits(model),
            tokenizer,
            encoded.rows,
            batch_size=min(request.batch_size, 4),
            progress="next bytes",
        )
        if left_out := len(encoded.rows) - divergence.rows:
            say(
                f"next bytes: {left_out} of {len(encoded.rows)} answers are left out, of which the "
                "tokenizers do not have the same bytes"
            )
        found |= divergence.summary()
    return found


def _teacher(request: EvaluateRequest) -> str:
    name: str = request.teacher or default_of(TrainConfig, "teacher")
    return name


def _teacher_form(request: EvaluateRequest, form: PromptForm) -> PromptForm:
    return PromptForm(
        template=request.teacher_template or usual_template(_task(request).name),
        day=form.day,
        decoder_start=decoder_start(_teacher(request)),
    )


def _form(request: EvaluateRequest) -> PromptForm:
    """A student is asked as it was in training, where that is known."""
    record = OutputFolder.record_of(Path(request.model or "").expanduser())
    template = request.template or usual_template(_task(request).name)
    if request.template is None and record["settings"].get("student_template") == "chat":
        template = "chat"
    start = decoder_start(request.model) if request.model else ()
    return PromptForm(template=template, day=record.get("date"), decoder_start=start)


def _check_can_be_written(path: Path, request: EvaluateRequest, overwrite: bool) -> None:
    """Find out before the model answers, which takes long."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file for the answers")
    if any(path.resolve() == one.resolve() for one in paths_of(request.data)):
        raise OutputError(f"{path} holds the data; name another file for the answers")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already; replace it with --overwrite, or name another file for the "
            "answers (--predictions, without MODEL, scores the answers in a file)"
        )
    try:
        try_to_write(path.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write answers to {path}: {error.strerror}; name a file in a folder you may "
            "write to"
        ) from error


def _score_file(request: EvaluateRequest, say: Callable[[str], None]) -> dict[str, float]:
    if request.predictions is None:
        raise SettingError("name a MODEL to evaluate, or a file of answers with --predictions")
    for name in ("loss", "output", "next_bytes", "answers"):
        if getattr(request, name) not in (None, False, "data"):
            raise SettingError(f"--{name.replace('_', '-')} belongs to a model; name a MODEL")
    predictions = read_predictions(request.predictions)
    if request.data is not None or any(not one.references for one in predictions):
        chosen = _examples(request, say)
        if request.limit is not None:
            known = {one.id for one in chosen}
            predictions = [one for one in predictions if one.id is None or one.id in known]
        predictions = match_predictions(predictions, chosen)
    return score_predictions(predictions[: request.limit]).summary()


def _source(request: EvaluateRequest) -> Source:
    source: Source = request.data or default_of(TrainConfig, "data")
    return source


def _task(request: EvaluateRequest) -> Task:
    """The task that is named, or on data of one's own the one that the model was trained on."""
    trained = None
    if request.model is not None and request.data is not None:
        record = OutputFolder.record_of(Path(request.model).expanduser())
        trained = record["settings"].get("task")
    return get_task(request.task or trained or usual_task(_source(request)))


def _examples(request: EvaluateRequest, say: Callable[[str], None]) -> list[Example]:
    parts, task = load_parts(_source(request), held_out=True), _task(request)
    columns = _columns(request, [name for part in parts for name in part.columns], say)
    rows = joined([brought(part, task, columns, say) for part in parts])
    return examples(rows, task, columns)[: request.limit]


def _columns(
    request: EvaluateRequest, present: Sequence[str], say: Callable[[str], None]
) -> dict[str, str]:
    """Where data of one's own call a field by another name: as the run was told, if nothing is."""
    if request.columns or request.model is None or request.data is None:
        return request.columns
    settings = OutputFolder.record_of(Path(request.model).expanduser())["settings"]
    if settings.get("task") != _task(request).name:
        return {}
    columns = {
        field: column
        for field, column in (settings.get("columns") or {}).items()
        if column in present and field not in present
    }
    if columns:
        say(f"columns as in training: {', '.join('='.join(one) for one in columns.items())}")
    return columns
