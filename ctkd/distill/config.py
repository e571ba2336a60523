"""Settings of the commands, from a file, from options, or from Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctkd.distill.devices import Device
from ctkd.distill.options import (
    check_names,
    check_types,
    default_of,
    option,
    parse_column,
    parse_loss_option,
    same_as,
)
from ctkd.errors import SettingError
from ctkd.settings import check_choice, check_count, check_positive
from ctkd.tokenization.thresholds import Thresholds

# Options are made, and shown in help, without torch.
if TYPE_CHECKING:
    from ctkd.loss import Loss, Weights
    from ctkd.tokenizers import Pair

__all__ = [
    "DTYPES",
    "GIVEN_IN_TRAINING",
    "SFT",
    "UNTRAINED",
    "CacheSettings",
    "DoctorRequest",
    "EvaluateRequest",
    "TrainConfig",
    "check_needs",
    "simplify_sources",
    "usual_task",
    "usual_template",
]

DTYPES = ("float32", "bfloat16", "bfloat16-pure")
SFT = "sft"
UNTRAINED = "pocket-llama"
"""The packaged student that begins from random weights."""

GIVEN_IN_TRAINING = frozenset({"chunks", "pair"})
"""What training gives to a loss besides logits and ids, of `Loss.needs`."""

Template = Literal["plain", "chat"]

# Products of two such numbers are still finite, and 8 bytes hold one.
_MOST = 10**18


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that is needed to repeat a training run.

    Each field's help says what it is for. `student` is `student_config` where that is given. With
    `loss` "sft" and `answers` "teacher" a run is
    sequence-level distillation, seqkd. In "bfloat16-pure" small updates are lost; "bfloat16" keeps
    the weights in float32. Held-out rows that are too long are left out, whatever `on_long` says.

    Raises:
        SettingError: If a setting is of the wrong kind or out of range.
    """

    loss: str = option("shared_kl", "A loss of `ctkd losses`, or sft: cross-entropy alone.")
    loss_options: dict[str, Any] = option(
        {},
        "A setting of the loss; see `ctkd losses NAME`. Repeatable.",
        flag="--loss-option",
        metavar="KEY=VALUE",
        repeated=True,
        parse=parse_loss_option,
    )
    student: str = option(None, "Packaged name, folder, GGUF file or hub id.", unset=UNTRAINED)
    student_config: str | None = option(
        None,
        "In the student's place: a config.json or its folder, for a model of random weights drawn "
        f"from --seed, or {UNTRAINED} for the shape of that model. A tokenizer in the folder is "
        "taken, else one is learned from the training rows.",
        metavar="FILE|FOLDER",
    )
    teacher: str = option(
        "smollm2-135m-instruct", "Of the teacher: packaged name, folder, GGUF file or hub id."
    )
    teacher_cache: str | None = option(
        None, "Folder of `ctkd cache`, asked in the teacher's place."
    )
    teacher_load_in_4bit: bool = option(
        False, "Round the teacher's weights to 4 bits, but its head; needs bitsandbytes."
    )
    teacher_load_in_8bit: bool = option(False, "The same to 8 bits.")
    answers: Literal["data", "teacher"] = option(
        "data", "Answers to train on: those of the data, or the teacher's own."
    )
    data: str | list[str] = option(
        "pydocs",
        "pydocs, pocketqa, a file, a pattern, a folder or a hub id. Repeatable.",
        repeated=True,
    )
    eval_data: str | list[str] | None = option(
        None, "Held-out data. Default: a part of --data, by passage. Repeatable.", repeated=True
    )
    task: str = option(
        None,
        "qa, summarization, text, chat: conversations, or lm: documents.",
        unset="lm for pydocs, else qa",
    )
    streaming: bool = option(
        False,
        "Read and encode rows while training, for data of any size, shuffled within a buffer of "
        "1,024 examples; needs --max-steps.",
    )
    columns: dict[str, str] = option(
        {},
        "Name of a field's column in the data, such as context=passage. Repeatable.",
        flag="--column",
        metavar="FIELD=COLUMN",
        repeated=True,
        parse=parse_column,
    )
    output: str | None = option(None, "Folder of the run.", unset="runs/LOSS-seedN")
    epochs: float = option(None, "Passes over the data.", unset="1, or 4 from random weights")
    max_steps: int | None = option(None, "Optimizer steps, in place of --epochs.")
    batch_size: int = option(4, "Sequences per micro-batch.")
    grad_accumulation: int = option(1, "Micro-batches per optimizer step.")
    learning_rate: float = option(
        None,
        "Peak of a linear schedule; the paper's is 1e-6, for longer runs.",
        unset="5e-5, 2e-4 with --lora-rank, or 2e-3 from random weights",
    )
    warmup: float = option(0.1, "Share of the steps with a rising rate.")
    weight_decay: float = option(0.0, "Of AdamW.")
    max_length: int = option(
        1024, "Most tokens of prompt and answer; of each in an encoder-decoder."
    )
    on_long: Literal["drop", "cut", "refuse"] = option(
        "drop", "Longer training rows: drop, cut (answers, on both sides at one byte), refuse."
    )
    min_coverage: float = option(
        0.95, "Least share of the answers' bytes that both tokenizers must spell alike."
    )
    student_template: Template = option(
        None, "The student's prompts: plain, or chat.", unset="plain, but chat for task chat"
    )
    teacher_template: Template = option(
        None, "The same for the teacher.", unset="plain, but chat for task chat"
    )
    date: str | None = option(
        None,
        "Day that chat templates write as today.",
        metavar="YYYY-MM-DD",
        unset="that of the first start, or of the teacher cache",
    )
    teacher_shots: int = option(0, "Answered examples that the teacher reads first.")
    kd_weight: float | None = option(None, "Weight of the loss.", unset="the loss's own")
    ce_weight: float | None = option(None, "Weight of cross-entropy.", unset="the loss's own")
    score_eos: bool = option(False, "Let distillation score the end of sequence, on both sides.")
    dtype: Literal["float32", "bfloat16", "bfloat16-pure"] = option(
        "float32", "float32, bfloat16 (autocast over float32 weights), bfloat16-pure."
    )
    lora_rank: int | None = option(
        None, "Train low-rank adapters of this rank (LoRA) in place of the student's weights."
    )
    lora_alpha: int | None = option(
        None, "Their scale, divided by the rank.", unset="twice the rank"
    )
    lora_dropout: float | None = option(None, "Of what they read.", unset="0")
    lora_target: str | list[str] | None = option(
        None,
        "A linear layer to adapt, such as q_proj. Repeatable.",
        unset="all but the head",
        repeated=True,
    )
    lora_merge: bool = option(
        False, "Save the student with its adapters merged into it, not the adapters alone."
    )
    gradient_checkpointing: bool = option(
        False, "Compute the student's activations twice, to keep fewer of them in memory."
    )
    torch_compile: bool = option(
        False,
        "Compile the student's training steps with torch.compile; its logits are then computed all "
        "at once.",
    )
    device: Device = option(
        "auto", "auto, cpu or cuda: the GPU of CUDA_VISIBLE_DEVICES. Not mps: it has no float64."
    )
    seed: int = option(0, "Seed of all random choices.")
    control: bool = option(
        None,
        "Train once more without the loss, to tell what it contributed.",
        unset="from random weights yes, else no",
    )
    teacher_memory: float = option(
        1.0, "Gigabytes to remember a teacher in, where it would read rows in several epochs."
    )
    measure: Literal["all", "nothing"] = option(
        "all", "all, before and after training; nothing, to only train."
    )
    eval_limit: int = option(200, "Most held-out examples used.")
    eval_steps: int | None = option(
        None, "Steps between held-out losses.", unset="only at both ends"
    )
    max_new_tokens: int = option(32, "Longest generated answer.")
    logging_steps: int = option(5, "Steps between lines of the log.")
    save_steps: int = option(200, "Steps between checkpoints.")
    keep_checkpoints: bool = option(False, "Keep the last two checkpoints of a finished run.")
    report_to: str | list[str] = option(
        "none",
        "Tracker, as transformers names it; tensorboard writes into the output folder. Repeatable.",
        repeated=True,
    )
    push_to_hub: bool = option(
        False, "Send the finished model to the hub, with the token of HF_TOKEN or `hf auth login`."
    )
    hub_model_id: str | None = option(
        None, "Its name there, such as my-name/my-model.", unset="the output folder's name"
    )
    hub_private: bool = option(False, "Make it private, if it is not there yet.")

    def __post_init__(self) -> None:
        simplify_sources(self, "data", "eval_data", "lora_target", "report_to")
        # Defaults that follow from other settings; none of them is None any more afterwards.
        _check_one_student(self.student, self.student_config)
        from_nothing = self.student_config is not None or self.student in (None, UNTRAINED)
        for name, value in (
            ("student", self.student_config or UNTRAINED),
            ("task", usual_task(self.data)),
            ("student_template", usual_template(self.task)),
            ("teacher_template", usual_template(self.task)),
            ("epochs", 4.0 if from_nothing else 1.0),
            ("learning_rate", 2e-3 if from_nothing else 5e-5 if self.lora_rank is None else 2e-4),
            ("control", from_nothing and self.loss != SFT and self.measure != "nothing"),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_types(self)
        for name in (
            "epochs",
            "max_steps",
            "batch_size",
            "grad_accumulation",
            "max_length",
            "lora_rank",
            "lora_alpha",
            "eval_limit",
            "eval_steps",
            "max_new_tokens",
            "logging_steps",
            "save_steps",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{name} must be a finite number above 0, got {value}")
            if value is not None and value > _MOST:
                raise SettingError(f"{name} must be at most {_MOST}, got {value}")
        for name in ("learning_rate", "weight_decay", "kd_weight", "ce_weight", "teacher_memory"):
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
        self._check_lora(from_nothing)
        if not self.push_to_hub and (self.hub_private or self.hub_model_id is not None):
            raise SettingError(
                "hub_model_id and hub_private say how a model is sent to the hub; add push_to_hub, "
                "or leave them out"
            )
        if self.date is not None:
            _check_day(self.date)
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise SettingError(
                "teacher_load_in_4bit and teacher_load_in_8bit contradict each other; give one"
            )
        if self.teacher_shots < 0:
            raise SettingError(f"teacher_shots must be at least 0, got {self.teacher_shots}")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}")
        if self.control and (not self.distils or self.measure == "nothing"):
            raise SettingError(
                "control tells what a loss contributed to what was measured; "
                + ("name a loss" if not self.distils else "leave measure nothing out")
                + ", or leave control out"
            )
        _check_templates(self.task, self.student_template, self.teacher_template)
        if self.task == "chat" and self.teacher_shots:
            raise SettingError(
                "task chat has conversations, which no shots stand in front of; leave "
                "teacher_shots out"
            )
        if self.task == "lm" and self.answers == "teacher":
            raise SettingError(
                "task lm has no prompts that a teacher could answer; take the answers of the data"
            )
        if self.teacher_cache is not None and not self.needs_teacher:
            raise SettingError(
                "a teacher cache was given, but loss 'sft' on the data's own answers learns from "
                "no teacher; leave the cache out, choose a loss, or set answers to teacher"
            )
        self._check_streaming()
        # Fails here, before anything is fetched, if the loss or a setting of it is wrong.
        weights = self.weights()
        loss = self.make_loss()
        if loss is not None:
            check_needs(loss, self.loss)
        if weights.ce == 0 and (weights.kd == 0 or not self.distils):
            raise SettingError(
                "nothing would be trained: ce_weight is 0"
                + (", and so is kd_weight" if self.distils else " and loss 'sft' has no other part")
                + "; give one of them a weight above 0"
            )

    def _check_lora(self, from_nothing: bool) -> None:
        """Refuse what belongs to adapters where there are none, and adapters of nothing."""
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_target"):
                if getattr(self, name) is not None:
                    raise SettingError(f"{name} belongs to adapters; give a lora_rank, such as 16")
        elif from_nothing:
            raise SettingError(
                f"{self.student} begins from random weights, which adapters would leave as they "
                "are; leave lora_rank out, or name a trained student"
            )
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise SettingError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")

    def _check_streaming(self) -> None:
        """Refuse what must know all rows before training."""
        if not self.streaming:
            return
        if self.max_steps is None:
            raise SettingError(
                "streaming needs max_steps: how many rows there are is not known before they end"
            )
        if self.teacher_cache is not None:
            raise SettingError(
                "a teacher cache holds all rows, which streaming never does; leave one of them out"
            )
        if self.answers == "teacher":
            raise SettingError(
                "streaming reads rows while training, and the teacher answers all of them before "
                "it; leave one of them out"
            )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Build a configuration from names and values.

        Raises:
            SettingError: If a name is unknown or a value is of the wrong kind.

        Example:
            >>> TrainConfig.from_mapping({"loss": "uld", "max_steps": 5}).max_steps
            5
        """
        check_names(settings, cls, source)
        return cls(**settings)

    @property
    def distils(self) -> bool:
        """True if there is a loss between student and teacher."""
        return self.loss != SFT

    @property
    def needs_teacher(self) -> bool:
        """True if there is a teacher, for a loss or for its answers."""
        return self.distils or self.answers == "teacher"

    @property
    def teacher_bits(self) -> int | None:
        """Bits of the teacher's weights, if they are rounded."""
        return 4 if self.teacher_load_in_4bit else 8 if self.teacher_load_in_8bit else None

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
        from ctkd.registry import get_loss
        from ctkd.tokenizers import PlaceholderPair

        if self.distils:
            return get_loss(self.loss, pair=pair or PlaceholderPair(), **self.loss_options)
        if self.loss_options:
            raise SettingError("loss 'sft' is cross-entropy alone and has no options")
        return None

    def weights(self) -> Weights:
        """Weights of cross-entropy and distillation, given or the loss's own."""
        from ctkd.loss import Weights

        loss = self.make_loss()
        default = Weights(1.0, 0.0) if loss is None else loss.default_weights
        return Weights(
            default.ce if self.ce_weight is None else self.ce_weight,
            default.kd if self.kd_weight is None else self.kd_weight,
        )

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, as `from_mapping` takes them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Contents of a teacher cache.

    With `k` of 0 it holds the logits of observed tokens alone, with more than the vocabulary all of
    them. With `states` it holds what the teacher's head makes all of them from, at any temperature;
    `k` and `temperatures` do not matter then. Training prompts are answered whatever `texts` says
    where a run trains on those answers. A kill costs at most `shard_rows` rows.

    Raises:
        SettingError: If a setting is out of range.
    """

    k: int = option(
        256, "Largest logits kept per position; 0 keeps those of observed tokens alone."
    )
    temperatures: Sequence[float] = option(
        (1.0, 2.0),
        "At which a loss may ask. Repeatable.",
        flag="--temperature",
        repeated=True,
        parse=float,
    )
    states: Literal["none", "bfloat16", "float32"] = option(
        "none",
        "Keep hidden states in this dtype, and the head, in place of logits: serves every loss.",
        choice=True,
    )
    texts: Literal["none", "held-out", "all"] = option(
        "held-out",
        "Prompts that the teacher also answers; all, for --answers teacher.",
        choice=True,
    )
    shard_rows: int = option(64, "Rows per file.")

    def __post_init__(self) -> None:
        k = self.k
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise SettingError(f"k, the entries kept per position, must be at least 0, got {k!r}")
        if not self.temperatures:
            raise SettingError("at least one temperature is needed, such as 1")
        for temperature in self.temperatures:
            check_positive("a temperature", temperature)
        check_choice("states", self.states, ("none", "bfloat16", "float32"))
        check_choice("texts", self.texts, ("none", "held-out", "all"))
        check_count("shard_rows", self.shard_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRequest:
    """A model to evaluate, or a file of answers to score.

    Raises:
        SettingError: If a setting is out of range, or belongs to a loss and none is named.
    """

    model: str | None = None
    data: str | list[str] | None = same_as(TrainConfig, "data", default=None)
    task: str | None = same_as(TrainConfig, "task", default=None)
    columns: dict[str, str] = same_as(TrainConfig, "columns")
    limit: int | None = option(None, "Use the first N examples; of documents, pieces.")
    predictions: str | None = option(
        None, "Score the answers in this file, without a MODEL.", metavar="FILE"
    )
    output: str | None = option(
        None,
        "Write MODEL's answers to this file, or the bits of each piece of a document.",
        metavar="FILE",
    )
    loss: str | None = option(None, "Also measure this loss against a teacher.")
    loss_options: dict[str, Any] = same_as(TrainConfig, "loss_options")
    next_bytes: bool = option(
        False, "Also measure how far the next bytes it expects are from a teacher's."
    )
    answers: Literal["data", "teacher"] = same_as(
        TrainConfig,
        "answers",
        help="Given answers whose bits and losses are measured: the data's, or what a teacher "
        "writes. Scores take the data's.",
    )
    teacher: str | None = same_as(
        TrainConfig,
        "teacher",
        default=None,
        help="For --loss, --next-bytes and --answers teacher.",
    )
    template: Template | None = option(
        None,
        "plain, or chat.",
        unset="as the run in MODEL was trained, else plain, but chat for task chat",
    )
    teacher_template: Template | None = same_as(
        TrainConfig, "teacher_template", default=None, help="plain, or chat, of that teacher."
    )
    batch_size: int = option(16, "Prompts answered together.")
    max_new_tokens: int = same_as(TrainConfig, "max_new_tokens")
    max_length: int = same_as(TrainConfig, "max_length")
    device: str = same_as(TrainConfig, "device")

    def __post_init__(self) -> None:
        simplify_sources(self, "data")
        for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        task = self.task or usual_task(self.data or default_of(TrainConfig, "data"))
        _check_templates(task, self.template, self.teacher_template)
        of_teacher = (self.teacher, self.teacher_template)
        if self.loss is None and self.loss_options:
            raise SettingError("--loss-option belongs to a loss; name it with --loss")
        asks = self.loss is not None or self.next_bytes or self.answers == "teacher"
        if not asks and any(given is not None for given in of_teacher):
            raise SettingError(
                "--teacher and --teacher-template are for what is measured against a teacher; "
                "add --loss, --next-bytes or --answers teacher"
            )


def _check_one_student(student: str | None, student_config: str | None) -> None:
    if student_config is not None and student not in (None, student_config):
        raise SettingError(
            f"student {student!r} and student_config {student_config!r} are two students; leave "
            "one of them out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorRequest:
    """Two tokenizers to examine, and the data to examine them on.

    Raises:
        SettingError: If the limit is below 1 or a threshold lies outside its range.
    """

    student: str = same_as(TrainConfig, "student", default=None)
    student_config: str | None = same_as(
        TrainConfig,
        "student_config",
        help="In the student's place: a config.json or its folder. A tokenizer in the folder is "
        "taken, else one is learned from the data.",
    )
    teacher: str = same_as(TrainConfig, "teacher")
    data: str | list[str] = same_as(TrainConfig, "data")
    task: str = same_as(TrainConfig, "task")
    columns: dict[str, str] = same_as(TrainConfig, "columns")
    limit: int = option(200, "Use the first N rows.")
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        simplify_sources(self, "data")
        _check_one_student(self.student, self.student_config)
        if self.student is None:
            object.__setattr__(self, "student", self.student_config or UNTRAINED)
        if self.task is None:
            object.__setattr__(self, "task", usual_task(self.data))
        if self.limit < 1:
            raise SettingError(f"limit must be at least 1, got {self.limit}")


def usual_task(data: str | Sequence[str]) -> str:
    """The task of data for which none is named.

    Example:
        >>> usual_task("pydocs"), usual_task("rows.jsonl")
        ('lm', 'qa')
    """
    return "lm" if data == "pydocs" else "qa"


def usual_template(task: str | None) -> Template:
    """The form of prompts of a task for which none is named.

    Example:
        >>> usual_template("chat"), usual_template("qa")
        ('chat', 'plain')
    """
    return "chat" if task == "chat" else "plain"


def _check_templates(task: str, *templates: str | None) -> None:
    """Refuse a chat on documents, which have no turns, and conversations in plain text."""
    if task == "lm" and "chat" in templates:
        raise SettingError("task lm reads documents as they are; leave the template plain")
    if task == "chat" and "plain" in templates:
        raise SettingError("task chat is written in chat templates; leave the templates out")


def check_needs(loss: Loss, name: str) -> None:
    """Refuse a loss that needs what training does not give.

    Raises:
        SettingError: If there is such a need; the message says what to do instead.
    """
    lacking = sorted(loss.needs - GIVEN_IN_TRAINING)
    if lacking:
        raise SettingError(
            f"the loss {name!r} needs {' and '.join(lacking)}, which ctkd does not give to it in "
            "training; use it in a loop of your own, or choose another"
            + (
                ": ctkd.Batch.from_causal_lm takes student_hidden and teacher_hidden"
                if "hidden" in lacking
                else ""
            )
        )


def simplify_sources(settings: Any, *names: str) -> None:
    """Keep one way to write each source: text where it is one, else a list, as JSON has them."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, tuple | list) and value:
            object.__setattr__(settings, name, value[0] if len(value) == 1 else list(value))


def _check_day(text: str) -> None:
    """Refuse what is no day in the form YYYY-MM-DD."""
    try:
        datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise SettingError(f"date must be a day as YYYY-MM-DD, got {text!r}") from None
