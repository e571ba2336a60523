"""What ``ctkd evaluate`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.distill.data import load_rows
from ctkd.distill.encoding import encode_pair
from ctkd.distill.evaluation import answer, held_out_losses, score_predictions
from ctkd.distill.metrics import match_predictions, read_predictions, write_predictions
from ctkd.distill.models import check_token_ids, head_width, load_model, load_tokenizer
from ctkd.distill.output_folder import OutputFolder, try_to_write
from ctkd.distill.preparing import choose_device, is_embedded
from ctkd.distill.prompts import PromptForm
from ctkd.distill.tasks import Example, examples
from ctkd.errors import OutputError, SettingError
from ctkd.pair import PlaceholderPair
from ctkd.registry import get_loss
from ctkd.tokenization.pair import TokenizerPair

__all__ = ["EvaluateRequest", "run_evaluation"]

DEFAULT_DATA = "pocketqa"
DEFAULT_TEACHER = "gemma-3-270m"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRequest:
    """What to evaluate, as the options of ``ctkd evaluate`` say it."""

    model: str | None = None
    data: str | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    predictions: str | None = None
    loss: str | None = None
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    template: Literal["plain", "chat"] | None = None
    teacher_template: Literal["plain", "chat"] | None = None
    batch_size: int = 8
    max_new_tokens: int = 32
    max_length: int = 1024
    device: str = "auto"


def run_evaluation(
    request: EvaluateRequest, *, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Score a model's answers, or a file of answers.

    Returns:
        ``exact_match``, ``f1``, ``rouge_lsum`` in percent and ``n``; with a loss also ``ce``,
        ``kd`` and its parts.

    Raises:
        CtkdError: If what was given cannot be used.
    """
    for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}")
    of_loss = (request.teacher, request.teacher_template, request.loss_options or None)
    if request.loss is None and any(given is not None for given in of_loss):
        raise SettingError(
            "--teacher, --teacher-template and --loss-option belong to a loss; name it with --loss"
        )
    if request.model is None:
        return _score_file(request)
    if request.loss is not None:
        # Fails here, before anything is loaded, if the loss or a setting of it is wrong.
        get_loss(request.loss, pair=PlaceholderPair(), **request.loss_options)
    form = PromptForm(template=request.template or _template_of_run(request.model))
    device = choose_device(request.device)
    if request.predictions is not None:
        _check_can_be_written(Path(request.predictions))
    chosen = _examples(request)
    say(f"model: {request.model}, {len(chosen)} examples")
    tokenizer = load_tokenizer(request.model)
    model = load_model(request.model, device=device)
    check_token_ids(model, tokenizer)
    losses: dict[str, float] = {}
    if request.loss is not None:
        losses = _losses(request, request.loss, chosen, model, tokenizer, form, say)
    predictions = answer(
        model,
        tokenizer,
        chosen,
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        form=form,
        progress="answering",
    )
    if request.predictions is not None:
        write_predictions(request.predictions, predictions)
        say(f"answers: {request.predictions}")
    return {**score_predictions(predictions).summary(), **losses}


def _losses(
    request: EvaluateRequest,
    loss: str,
    chosen: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    say: Callable[[str], None],
) -> dict[str, float]:
    name = request.teacher or DEFAULT_TEACHER
    say(f"teacher: {name}")
    teacher_tokenizer = load_tokenizer(name)
    teacher = load_model(name, device=model.device)
    check_token_ids(teacher, teacher_tokenizer)
    pair = TokenizerPair(tokenizer, teacher_tokenizer)
    encoded = encode_pair(
        chosen,
        tokenizer,
        teacher_tokenizer,
        max_length=request.max_length,
        student_form=form,
        teacher_form=PromptForm(template=request.teacher_template or "plain"),
        pair=pair,
    )
    say(encoded.coverage.report())
    if encoded.report():
        say(encoded.report())
    pair = pair.narrowed(head_width(model), head_width(teacher))
    return held_out_losses(
        model,
        tokenizer,
        encoded.rows,
        loss=get_loss(loss, pair=pair, **request.loss_options),
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        pair=pair,
        batch_size=min(request.batch_size, 4),
        use_cpu=model.device.type == "cpu",
    )


def _template_of_run(model: str) -> Literal["plain", "chat"]:
    """A student is asked as it was in training, where that is known."""
    settings = OutputFolder.settings_of(Path(model).expanduser())
    return "chat" if settings.get("student_template") == "chat" else "plain"


def _check_can_be_written(path: Path) -> None:
    """Find out before the model answers, which takes long."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file for the answers")
    try:
        try_to_write(path.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write answers to {path}: {error.strerror}; name a file in a folder you may "
            "write to"
        ) from error


def _score_file(request: EvaluateRequest) -> dict[str, float]:
    if request.predictions is None:
        raise SettingError("name a MODEL to evaluate, or a file of answers with --predictions")
    if request.loss is not None:
        raise SettingError("--loss measures a model; name a MODEL")
    predictions = read_predictions(request.predictions)
    if request.data is not None or any(not one.references for one in predictions):
        chosen = _examples(request)
        if request.limit is not None:
            known = {one.id for one in chosen}
            predictions = [one for one in predictions if one.id is None or one.id in known]
        predictions = match_predictions(predictions, chosen)
    return score_predictions(predictions[: request.limit]).summary()


def _examples(request: EvaluateRequest) -> list[Example]:
    source = request.data or DEFAULT_DATA
    split = "test" if is_embedded(source) else None
    found = examples(load_rows(source, split=split), request.task or "qa", request.columns)
    return found[: request.limit]
