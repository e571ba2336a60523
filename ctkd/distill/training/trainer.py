"""Training a student against a teacher with another tokenizer, on top of `transformers.Trainer`.

Everything a user knows from `Trainer` comes with it. What is added is the loss: cross-entropy on
the student's labels plus a weighted `ctkd.Loss` between both models' answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import ParallelMode

from ctkd.batch import IGNORE_INDEX, Batch, Side
from ctkd.distill.config import check_needs
from ctkd.distill.data.collator import KEPT, StoredTeacher, stored_side
from ctkd.distill.models.adapters import is_adapted, merged, quiet_peft, with_adapters
from ctkd.distill.models.loading import below_wrappers, evaluating, reads_padding
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.training.progress import StepClock
from ctkd.errors import BatchError, ModelError, SettingError, TrainingError
from ctkd.logits import RowLogits
from ctkd.loss import Loss, Weights

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["CrossTokenizerTrainer"]

LOSS_FILE = "ctkd_loss.safetensors"
# Settings of what Trainer would compute, and this trainer computes otherwise.
_BYPASSED = ("label_smoothing_factor", "fp16_full_eval", "bf16_full_eval")
_DIVERGED = "lower the learning rate, and look at the data and at the weights it began with"
_LOSS_MODULE = "ctkd_loss"


@dataclass(slots=True)
class _Sums:
    """Sums over scored units, so that any split of a batch adds up to the same."""

    ce: Tensor
    ce_count: Tensor
    kd: Tensor | None = None
    kd_count: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self) -> Tensor:
        """All of them in a row, detached, for adding up over batches and ranks."""
        entries = [self.ce, self.ce_count]
        if self.kd is not None and self.kd_count is not None:
            entries += [self.kd, self.kd_count, *self.parts.values()]
        return torch.stack([entry.detach().double() for entry in entries])


class CrossTokenizerTrainer(Trainer):  # type: ignore[misc]
    """Distils a teacher into a student whose tokenizer differs.

    The training loss is ``weights.ce * CE + weights.kd * KD``. CE is a mean over the student's
    labels, KD a mean over the loss's own units, both over the whole optimizer step: all
    micro-batches and all ranks. So any split of a batch gives the same gradient.

    Batches come from `ctkd.distill.data.collator.Collator`. Logs hold ``ce``, ``kd`` (unweighted)
    and ``kd/<part>`` for each part of the loss. TensorBoard's files go into ``tensorboard`` in the
    output folder, unless the environment variable ``TENSORBOARD_LOGGING_DIR`` says otherwise.

    Why it is a subclass: the ``compute_loss_func`` of `Trainer` is given outputs and labels, but
    not the inputs, which hold the teacher's side. A collator that stashes them for it is a batch
    ahead, as the data loader fetches the next batch before this one is trained on: the student
    would be compared with the teacher on another text. ``compute_loss`` is given the inputs.

    Args:
        model: The student.
        args: As in `Trainer`. ``remove_unused_columns`` must be False.
        loss: What to distil with; None trains on cross-entropy alone, without a teacher.
        teacher: The teacher; needed with a loss, or a cache. It is moved to the training device and
            frozen. It may be the model below the student's adapters: it is read without them, and
            neither it nor they are frozen or put in evaluation mode.
        teacher_cache: What the teacher said, in its place; the collator's as well.
        weights: Of cross-entropy and distillation; default the loss's own.
        student_vocab_size: Length of the student's tokenizer. Wider heads are cut for the loss.
            With a loss that knows the pair of tokenizers, the pair's ``student_size``.
        teacher_vocab_size: The same for the teacher.
        data_collator: As in `Trainer`.
        train_dataset: As in `Trainer`.
        eval_dataset: As in `Trainer`.
        processing_class: The student's tokenizer, saved with the model.
        callbacks: As in `Trainer`.
        whole_logits: Compute all logits of a batch at once, also where a model's head allows to
            compute them a block at a time.
        peft_config: Adapters of peft for the student, which alone are trained then.

    Attributes:
        student_logits: How the student's logits are read; its ``why_whole`` says why all at once.
        teacher_logits: The same for a live teacher.

    Raises:
        SettingError: If loss and teacher do not come together, the loss needs hidden states, or
            the arguments would train wrongly without a word.
    """

    # The loss is divided by the counts of the whole step; Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    model: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        loss: Loss | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_cache: StoredTeacher | None = None,
        weights: Weights | None = None,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        data_collator: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        whole_logits: bool = False,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if (loss is None) != (teacher is None and teacher_cache is None):
            raise SettingError("a loss needs a teacher and a teacher a loss; give both or neither")
        if teacher is not None and teacher_cache is not None:
            raise SettingError("a cache stands for the teacher; give one of them")
        for side, given in (("model", model), ("teacher", teacher)):
            if given is not None and not isinstance(given, nn.Module):
                raise SettingError(
                    f"{side} must be a model, got {type(given).__name__}; load it with "
                    "ctkd.distill.models.load_model"
                )
        if loss is not None:
            check_needs(loss, type(loss).__name__)
        _check_arguments(args)
        if peft_config is not None:
            model = with_adapters(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.distillation_loss = None if loss is None else loss.to(args.device)
        self._trained_loss = None
        if loss is not None and any(parameter.requires_grad for parameter in loss.parameters()):
            self._trained_loss = loss
        self._is_own_teacher = any(teacher is one for one in self.model.modules())
        if self._is_own_teacher:
            _check_own_teacher(self.model)
        if teacher is not None and not self._is_own_teacher:
            teacher = _frozen(teacher, args.device)
        self.teacher = teacher
        self.teacher_cache = teacher_cache
        self.whole_logits = whole_logits
        for callback in self.callback_handler.callbacks:
            # It chooses a folder when training begins; what is evaluated before goes elsewhere.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(self.args.output_dir, "tensorboard")
        self.clock = StepClock()
        self.add_callback(self.clock)
        if weights is None:
            weights = Weights(1.0, 0.0) if loss is None else loss.default_weights
        self.weights = weights
        self.student_vocab_size = student_vocab_size
        self.teacher_vocab_size = teacher_vocab_size
        self._check_padding()
        refuse = self._why_whole_logits()
        self.student_logits = ModelLogits(self.model, refuse=refuse)
        self.teacher_logits = (
            None if self.teacher is None else ModelLogits(self.teacher, refuse=refuse)
        )
        self._step_counts: tuple[Tensor, Tensor] | None = None
        self._logged = torch.zeros(0, dtype=torch.float64)
        self._part_names: list[str] = []

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """Train as `Trainer` does, and the parameters of the loss with the student's."""
        if self._trained_loss is None:
            return super().train(*arguments, **settings)
        # Only what hangs below the model is optimized, clipped, synchronized and saved.
        self.model.add_module(_LOSS_MODULE, self._trained_loss)
        try:
            return super().train(*arguments, **settings)
        finally:
            delattr(self.model, _LOSS_MODULE)

    def merge_adapters(self) -> PreTrainedModel:
        """Make the student's adapters part of its weights, for good; it is returned."""
        self.model = self.model_wrapped = merged(self.model)
        self.student_logits = ModelLogits(self.model, refuse=self._why_whole_logits())
        student: PreTrainedModel = self.model
        return student

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of one optimizer step and count what they score."""
        self.clock.start()
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            samples[-1] = self._without_repeats(samples[-1])
        ce_count = torch.zeros((), dtype=torch.int64, device=self.args.device)
        kd_count = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for sample in samples:
            ce_count += (sample["labels"][:, 1:] != IGNORE_INDEX).sum().to(self.args.device)
            if self.distillation_loss is not None:
                kd_count += self.distillation_loss.units(_without_logits(sample)).to(
                    self.args.device
                )
        counts = self.accelerator.reduce(torch.stack([ce_count, kd_count]), reduction="sum")
        self._step_counts = (counts[0], counts[1])
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Share of this micro-batch in the loss of the whole optimizer step."""
        sums = self._sums(model, inputs)
        if self._step_counts is None:
            ce_count, kd_count = sums.ce_count, sums.kd_count
        else:
            ce_count, kd_count = self._step_counts
        loss = self.weights.ce * sums.ce / ce_count.clamp_min(1)
        if sums.kd is not None and kd_count is not None:
            loss = loss + self.weights.kd * sums.kd / kd_count.clamp_min(1)
        if self._step_counts is not None:
            # Gradients are averaged over ranks, but the counts are those of all ranks.
            loss = loss * self.accelerator.num_processes
        self._remember(sums)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add cross-entropy and the parts of the loss, averaged since the last log."""
        if "loss" in logs and len(self._logged):
            sums = self.accelerator.reduce(self._logged.to(self.args.device), reduction="sum")
            logs.update(self._means(sums))
            self._logged = self._logged.new_zeros(0)
        if "loss" in logs or "eval_ce" in logs:
            logs["seconds"] = self.clock.total
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Average cross-entropy and the loss over the units of all batches."""
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        total: Tensor | None = None
        samples = 0
        for inputs in dataloader:
            inputs = self._without_repeats(self._prepare_inputs(inputs))
            with torch.no_grad(), self.compute_loss_context_manager():
                sums = self._sums(model, inputs)
            self._part_names = list(sums.parts)
            total = sums.tensor() if total is None else total + sums.tensor()
            samples += int((inputs["labels"] != IGNORE_INDEX).any(-1).sum())
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if total is None:
            raise BatchError("there is nothing to evaluate on; give evaluation data")
        means = self._means(self.accelerator.reduce(total, reduction="sum"))
        means["loss"] = self.weights.ce * means["ce"] + self.weights.kd * means.get("kd", 0.0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=samples
        )

    def _without_repeats(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch in which nothing is scored of rows that are there for a second time.

        In the last batch of an epoch, accelerate gives all ranks as many rows as the first has.
        """
        state = self.accelerator.gradient_state
        ranks = self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        size = len(inputs["labels"])
        kept = max(0, min(size, state.remainder - self.accelerator.process_index * size))
        unscored = {"labels": IGNORE_INDEX, "chunk_ids": -1}
        cut = {
            name: torch.cat([value[:kept], torch.full_like(value[kept:], none)])
            for name, value in inputs.items()
            for ending, none in unscored.items()
            if name.endswith(ending)
        }
        return {**inputs, **cut}

    def _sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> _Sums:
        labels = inputs["labels"]
        logits = self.student_logits.read(model, inputs, labels.shape[1])
        with torch.autocast(logits.device.type, enabled=False):
            if self.distillation_loss is None:
                sums = _cross_entropy(logits, labels)
                self._check_finite(sums, None)
                return sums
            student = Side.from_causal_lm(
                logits,
                inputs["distill_labels"],
                chunk_ids=inputs.get("distill_chunk_ids"),
                vocab_size=self.student_vocab_size,
            )
            batch = Batch(student=student, teacher=self._teacher_side(inputs))
            output = self.distillation_loss(batch)
            if torch.is_grad_enabled() and not output.value.requires_grad and output.count:
                raise TrainingError(
                    f"the value of the loss {type(self.distillation_loss).__name__} has no "
                    "gradient, so nothing would be learned of it; compute it of "
                    "batch.student.logits, without detach() or no_grad()"
                )
            # Last: statistics of the rows that the loss computed serve cross-entropy too.
            sums = _cross_entropy(logits, labels)
        sums.kd = output.value * output.count
        sums.kd_count = output.count
        sums.parts = {name: part * output.count for name, part in output.parts.items()}
        self._check_finite(sums, batch.teacher)
        return sums

    def check_weights(self) -> None:
        """Refuse to keep a student that cannot be used.

        Raises:
            TrainingError: If one of its weights is nan or infinite.
        """
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise TrainingError(
                    f"after step {self.state.global_step} the student's {name} is nan or infinite: "
                    f"training has diverged; {_DIVERGED}"
                )

    def _check_finite(self, sums: _Sums, teacher: Side | None) -> None:
        """Stop at the first value that is nan or infinite, and say whose it is."""
        if sums.tensor().isfinite().all():
            return
        when = f"at step {self.state.global_step + 1}"
        if not sums.ce.isfinite():
            cause = "training has diverged" if self.state.global_step else "its weights may be so"
            raise TrainingError(
                f"{when} the student's logits are nan or infinite: {cause}; {_DIVERGED}"
            )
        if teacher is not None:
            log_probs = teacher.logits.log_probs(teacher.token_ids.unsqueeze(-1))
            if not log_probs.isfinite().all():
                raise TrainingError(
                    f"{when} the teacher's logits are nan or infinite; look for such values in its "
                    "weights or its cache, or load it in float32"
                )
        raise TrainingError(
            f"{when} the loss {type(self.distillation_loss).__name__} is nan or infinite, though "
            "the logits of both sides are not; try other settings of it, and report it to its "
            "authors"
        )

    def _check_padding(self) -> None:
        """Refuse models whose rows would depend on the rows beside them."""
        largest = max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        if largest == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        for side, model in (("student", self.model), ("teacher", self.teacher)):
            if model is not None and reads_padding(model):
                raise ModelError(
                    f"the {side} ({type(below_wrappers(model)).__name__}) reads the padding in "
                    "front of a text in spite of its mask, so a row would depend on those beside "
                    "it; give both batch sizes as 1, and accumulate gradients"
                )

    def _why_whole_logits(self) -> str | None:
        """Why a model's head must not be taken apart, whatever it is."""
        if self.whole_logits:
            return "this was asked for"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "weights are sharded over devices"
        if self.args.n_gpu > 1:
            return "the model is copied to several devices in one process"
        if self.args.ddp_static_graph:
            return "the graph of DistributedDataParallel is static"
        if self.args.torch_compile:
            return "the model is compiled"
        return None

    def _teacher_side(self, inputs: Mapping[str, Tensor]) -> Side:
        """The teacher's side, live or from the cache."""
        labels = inputs["teacher_distill_labels"]
        chunk_ids = inputs.get("teacher_distill_chunk_ids")
        if self.teacher_cache is not None:
            kept = {
                name.removeprefix(KEPT): value
                for name, value in inputs.items()
                if name.startswith(KEPT)
            }
            return stored_side(self.teacher_cache, kept, labels, chunk_ids)
        teacher_inputs = {
            name.removeprefix("teacher_"): value
            for name, value in inputs.items()
            if name.startswith("teacher_")
        }
        if self.teacher is None or self.teacher_logits is None:
            raise SettingError("a loss needs a teacher, or a cache in its place")
        with self._asking_teacher():
            logits = self.teacher_logits.read(self.teacher, teacher_inputs, labels.shape[1])
        return Side.from_causal_lm(
            logits, labels, chunk_ids=chunk_ids, vocab_size=self.teacher_vocab_size
        )

    @contextmanager
    def _asking_teacher(self) -> Iterator[None]:
        with torch.no_grad():
            if self._is_own_teacher:
                # Each module goes back to training if it was, and keeps its dropout.
                with evaluating(self.model), self.model.disable_adapter():
                    yield
            else:
                yield

    def _remember(self, sums: _Sums) -> None:
        self._part_names = list(sums.parts)
        tensor = sums.tensor()
        self._logged = tensor if len(self._logged) == 0 else self._logged + tensor

    def _means(self, sums: Tensor) -> dict[str, float]:
        entries = sums.tolist()
        means = {"ce": entries[0] / max(entries[1], 1.0)}
        if len(entries) > 2:
            count = max(entries[3], 1.0)
            means["kd"] = entries[2] / count
            for name, entry in zip(self._part_names, entries[4:], strict=True):
                means[f"kd/{name}"] = entry / count
        return means

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the student without the loss's parameters, and those in a file of their own."""
        with quiet_peft():
            self._save_apart(output_dir, state_dict)

    def _save_apart(self, output_dir: str | None, state_dict: Any) -> None:
        if self._trained_loss is None:
            super()._save(output_dir, state_dict)
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        prefix = f"{_LOSS_MODULE}."
        student = {name: value for name, value in state_dict.items() if not name.startswith(prefix)}
        # While training it hangs below the model, where a backend may shard it.
        own = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix)
        } or self._trained_loss.state_dict()
        own = {name: value.contiguous().cpu() for name, value in own.items()}
        folder = Path(output_dir or self.args.output_dir)
        super()._save(str(folder), student)
        save_file(own, folder / LOSS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / LOSS_FILE
        if path.is_file() and self.distillation_loss is not None:
            self.distillation_loss.load_state_dict(load_file(path))


def _cross_entropy(logits: RowLogits, labels: Tensor) -> _Sums:
    scored = Side.from_causal_lm(logits, labels)
    log_likelihood = scored.logits.log_probs(scored.token_ids.unsqueeze(-1))
    return _Sums(ce=-log_likelihood.sum(), ce_count=scored.mask.sum())


def _check_arguments(args: TrainingArguments) -> None:
    if args.remove_unused_columns:
        raise SettingError(
            "TrainingArguments(remove_unused_columns=False) is needed: the teacher's columns would "
            "be dropped silently"
        )
    for name in _BYPASSED:
        if getattr(args, name, None):
            raise SettingError(
                f"TrainingArguments({name}={getattr(args, name)}) would have no effect: the loss "
                "and its evaluation are computed in another way here; leave it out"
            )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise SettingError(
            f"{world} processes were started, but training is not distributed, so gradients would "
            "not be synchronized; on CPUs set use_cpu=True (--device cpu)"
        )
    if world > 1 and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def _frozen(teacher: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    teacher.requires_grad_(False)
    return teacher.to(device).eval()


def _check_own_teacher(student: PreTrainedModel) -> None:
    """Refuse a teacher that would learn with the student."""
    if not is_adapted(student):
        raise SettingError("the student cannot teach itself; load the teacher as a second model")
    for settings in student.peft_config.values():
        if getattr(settings, "bias", "none") != "none":
            raise SettingError(
                f"the adapters train biases of the model below them (bias={settings.bias!r}), so "
                "it cannot be the teacher; load the teacher as a second model"
            )


def _without_logits(sample: Mapping[str, Tensor]) -> Batch:
    """A batch that knows masks and ids; its logits are one zero seen from everywhere."""
    labels, teacher_labels = sample["distill_labels"], sample["teacher_distill_labels"]
    return Batch.from_causal_lm(
        student_logits=torch.zeros((), device=labels.device).expand(*labels.shape, 1),
        student_labels=labels,
        student_chunk_ids=sample.get("distill_chunk_ids"),
        teacher_logits=torch.zeros((), device=labels.device).expand(*teacher_labels.shape, 1),
        teacher_labels=teacher_labels,
        teacher_chunk_ids=sample.get("teacher_distill_chunk_ids"),
    )
