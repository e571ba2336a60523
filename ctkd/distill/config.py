"""The settings of one training run, from a file, from options, or from Python."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ctkd.errors import SettingError
from ctkd.loss import Loss, Weights
from ctkd.pair import Pair, PlaceholderPair
from ctkd.registry import get_loss

__all__ = ["DTYPES", "TrainConfig", "parse_loss_option", "read_config_file"]

DTYPES = ("float32", "bfloat16", "bfloat16-pure")
SFT = "sft"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that is needed to repeat a training run.

    Args:
        loss: A registered loss, or "sft" for cross-entropy alone.
        loss_options: Settings of the loss.
        student: Model to train: packaged name, folder, GGUF file or hub id.
        teacher: Model to learn from; not loaded for "sft", nor with ``teacher_cache``.
        teacher_cache: Folder written by `ctkd cache` that is asked in place of the teacher.
        answers: What to train on: the answers in the "data", or those that the "teacher" writes to
            the same prompts. With "sft" the latter is sequence-level distillation, seqkd.
        data: Training data: embedded name, file, folder or hub id.
        eval_data: Held-out data; without it a part of the training data is cut off.
        task: How rows become prompts: qa, summarization or text.
        columns: Field of the task to column of the data.
        output: Folder for the trained model and what belongs to the run.
        epochs: Passes over the training data.
        max_steps: Optimizer steps; goes before ``epochs``.
        batch_size: Sequences per micro-batch.
        grad_accumulation: Micro-batches per optimizer step.
        learning_rate: Peak of a linear schedule. The paper uses 1e-6, for epochs on thousands of
            rows; the default suits short runs.
        warmup: Share of the steps over which the learning rate rises.
        weight_decay: Of AdamW.
        max_length: Longest prompt and answer together, in tokens of either side.
        on_long: What becomes of a longer training row: "drop" leaves it out, "cut" cuts its answer
            at one byte on both sides, "refuse" stops. Held-out rows are left out.
        min_coverage: Least share of the answers' bytes that both tokenizers must spell alike.
        student_template: How the student reads a prompt: "plain", or "chat" for its own template.
        teacher_template: The same for the teacher.
        teacher_shots: Answered training examples that the teacher reads before each prompt.
        kd_weight: Weight of the loss; default the loss's own.
        ce_weight: Weight of cross-entropy; default the loss's own.
        score_eos: Let distillation score the end of sequence, on both sides.
        dtype: float32; bfloat16 (float32 weights, bfloat16 autocast); or bfloat16-pure, in which
            small updates are lost.
        device: auto, cpu or cuda.
        seed: Of everything random.
        measure: "all" answers held-out prompts and averages held-out losses before and after
            training; "nothing" only trains.
        eval_limit: Most held-out examples to answer and to average over.
        eval_steps: Steps between two averages of held-out losses while training; None for none.
        max_new_tokens: Longest generated answer.
        logging_steps: Steps between two lines of the log.
        save_steps: Steps between two checkpoints.
        keep_checkpoints: Keep the last checkpoint when the run has ended.
        report_to: Trackers, as transformers names them.
    """

    loss: str = "multilevelot"
    loss_options: dict[str, Any] = field(default_factory=dict)
    student: str = "smollm2-135m-instruct"
    teacher: str = "gemma-3-270m"
    teacher_cache: str | None = None
    answers: Literal["data", "teacher"] = "data"
    data: str = "pocketqa"
    eval_data: str | None = None
    task: str = "qa"
    columns: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    grad_accumulation: int = 1
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_length: int = 1024
    on_long: Literal["drop", "cut", "refuse"] = "drop"
    min_coverage: float = 0.95
    student_template: Literal["plain", "chat"] = "plain"
    teacher_template: Literal["plain", "chat"] = "plain"
    teacher_shots: int = 0
    kd_weight: float | None = None
    ce_weight: float | None = None
    score_eos: bool = False
    dtype: Literal["float32", "bfloat16", "bfloat16-pure"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    measure: Literal["all", "nothing"] = "all"
    eval_limit: int = 200
    eval_steps: int | None = None
    max_new_tokens: int = 32
    logging_steps: int = 5
    save_steps: int = 200
    keep_checkpoints: bool = False
    report_to: str = "none"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(TrainConfig)
        for name in _names():
            _check_type(name, getattr(self, name), hints[name])
        for name in (
            "epochs",
            "max_steps",
            "batch_size",
            "grad_accumulation",
            "max_length",
            "eval_limit",
            "eval_steps",
            "max_new_tokens",
            "logging_steps",
            "save_steps",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{name} must be a finite number above 0, got {value}")
        for name in ("learning_rate", "weight_decay", "kd_weight", "ce_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise SettingError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise SettingError(
                f"warmup is a share of the steps, from 0 to below 1, got {self.warmup}"
            )
        if not 0 <= self.min_coverage <= 1:
            raise SettingError(
                f"min_coverage is a share of the bytes, from 0 to 1, got {self.min_coverage}"
            )
        if self.teacher_shots < 0:
            raise SettingError(f"teacher_shots must be at least 0, got {self.teacher_shots}")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}")
        if self.teacher_cache is not None and not self.needs_teacher:
            raise SettingError(
                "a teacher cache was given, but loss 'sft' on the data's own answers learns from "
                "no teacher; leave the cache out, choose a loss, or set answers to teacher"
            )
        # Fails here, before anything is fetched, if the loss or a setting of it is wrong.
        self.make_loss()

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Build a configuration from names and values.

        Raises:
            SettingError: If a name is unknown or a value is of the wrong kind.

        Example:
            >>> TrainConfig.from_mapping({"loss": "uld", "max_steps": 5}).max_steps
            5
        """
        names = _names()
        for name in settings:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise SettingError(
                    f"{source}: unknown setting {name!r}.{hint} Known: {', '.join(names)}"
                )
        return cls(**settings)

    @property
    def distils(self) -> bool:
        """Whether a loss between student and teacher takes part."""
        return self.loss != SFT

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher takes part, by a loss or by what it writes."""
        return self.distils or self.answers == "teacher"

    @property
    def folder(self) -> Path:
        """Where the run writes: ``output``, or a name made of loss and seed."""
        if self.output is not None:
            return Path(self.output).expanduser()
        return Path("runs") / f"{self.loss}-seed{self.seed}"

    def make_loss(self, pair: Pair | None = None) -> Loss | None:
        """The loss with its settings; None for "sft".

        Args:
            pair: The tokenizers. Without them the loss only tells its settings and weights.
        """
        if self.distils:
            return get_loss(self.loss, pair=pair or PlaceholderPair(), **self.loss_options)
        if self.loss_options:
            raise SettingError("loss 'sft' is cross-entropy alone and has no options")
        return None

    def weights(self) -> Weights:
        """Weights of cross-entropy and distillation, given or the loss's own."""
        loss = self.make_loss()
        default = Weights(1.0, 0.0) if loss is None else loss.default_weights
        return Weights(
            default.ce if self.ce_weight is None else self.ce_weight,
            default.kd if self.kd_weight is None else self.kd_weight,
        )

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, as `from_mapping` takes them."""
        return dataclasses.asdict(self)


def parse_loss_option(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE`` and read the value as YAML does: numbers, words, true and null.

    Raises:
        SettingError: If there is no ``=``, or the value is not YAML.

    Example:
        >>> parse_loss_option("sl_weight=0.1"), parse_loss_option("matching=greedy")
        (('sl_weight', 0.1), ('matching', 'greedy'))
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise SettingError(f"a loss option is KEY=VALUE, such as k=20, got {text!r}")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise SettingError(
            f"cannot read the value of loss option {text!r}; write a number, a word, true or null"
        ) from error


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        SettingError: If the file cannot be read or does not hold names and values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise SettingError(
            f"cannot read the configuration {path}: {cause}; name a YAML file of settings"
        ) from error
    try:
        settings = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SettingError(
            f"{path} is not YAML: {what}{where}; write settings as 'name: value' lines"
        ) from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingError(f"{path} must hold settings as 'name: value' lines")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML takes 1e-6 for text; everybody who writes it means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _names() -> list[str]:
    return [entry.name for entry in dataclasses.fields(TrainConfig)]


def _check_type(name: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is types.UnionType:
        kinds = typing.get_args(hint)
    else:
        kinds = (hint,)
    if any(_is_a(value, kind) for kind in kinds):
        return
    choices = [choice for kind in kinds for choice in typing.get_args(kind) if kind is not dict]
    if choices and all(isinstance(choice, str) for choice in choices):
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    raise SettingError(f"{name} must be {wanted}, got {value!r}")


_KINDS = {
    bool: "true or false",
    dict[str, Any]: "a mapping of names to values",
    dict[str, str]: "a mapping of names to names",
    float: "a number",
    int: "a whole number",
    str: "text",
    type(None): "nothing",
}


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        of_names, of_values = typing.get_args(kind)
        return isinstance(value, dict) and all(
            isinstance(name, of_names) and (of_values is Any or isinstance(entry, of_values))
            for name, entry in value.items()
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
