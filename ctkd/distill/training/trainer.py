"""Training a student against a teacher with another tokenizer, on top of `transformers.Trainer`.

Everything a user knows from `Trainer` comes with it. What is added is the loss: cross-entropy on
the student's labels plus a weighted `ctkd.Loss` between both models' answers.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize
from transformers.training_args import ParallelMode

from ctkd.batch import IGNORE_INDEX, Side
from ctkd.distill.config import check_needs
from ctkd.distill.data.collator import KEPT, StoredTeacher, stored_side
from ctkd.distill.data.encoding import EncodedExample
from ctkd.distill.data.example_stream import BLOCK, ExampleStream
from ctkd.distill.data.rows import NothingLeft
from ctkd.distill.models.adapters import is_adapted, merged, quiet_peft, with_adapters
from ctkd.distill.models.loading import (
    below_wrappers,
    decoder_start_of,
    evaluating,
    head_width,
    positions_of,
    reads_padding,
)
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.training.distiller import Distiller
from ctkd.distill.training.progress import StepClock
from ctkd.distill.training.sums import Counts, Sums, scored, sums_of
from ctkd.errors import BatchError, ModelError, SettingError, TrainingError
from ctkd.logits import DenseLogits, RowLogits
from ctkd.loss import Loss, Weights

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["CrossTokenizerTrainer"]

LOSS_FILE = "ctkd_loss.safetensors"
# Settings of what Trainer would compute, and this trainer computes otherwise.
_BYPASSED = (
    "label_smoothing_factor",
    "fp16_full_eval",
    "bf16_full_eval",
    "batch_eval_metrics",
    "include_for_metrics",
)
# Tokens of a row of text, where the models read so many.
_LONGEST = 1024
_DIVERGED = "lower the learning rate, and look at the data and at the weights it began with"
_LOSS_MODULE = "ctkd_loss"


class CrossTokenizerTrainer(Trainer):  # type: ignore[misc]
    """Distils a teacher into a student whose tokenizer differs.

    The training loss is ``weights.ce * CE + weights.kd * KD``. CE is a mean over the student's
    labels, KD a mean over the loss's own units, both over the whole optimizer step: all
    micro-batches and all ranks. So any split of a batch gives the same gradient.

    Given both tokenizers it takes rows of text and conversations, as `Distiller` does: they are
    encoded before training, or while they are read where the data set is an iterable one; those
    longer than 1,024 tokens or than a model reads are left out with a warning. Iterable rows keep
    their order, begin again where they end, and need ``max_steps``; each process reads all, and
    trains on its own. Other settings of texts are those of a `Distiller`, whose ``collate`` is the
    data collator, or batches come from `ctkd.distill.data.collator.Collator`. Logs hold ``ce``,
    ``kd`` (unweighted) and ``kd/<part>`` for each part of the loss. TensorBoard's files go into
    ``tensorboard`` in the output folder, unless the environment variable
    ``TENSORBOARD_LOGGING_DIR`` says otherwise.

    Why it is a subclass: the ``compute_loss_func`` of `Trainer` is given outputs and labels, but
    not the inputs, which hold the teacher's side. A collator that stashes them for it is a batch
    ahead, as the data loader fetches the next batch before this one is trained on: the student
    would be compared with the teacher on another text. ``compute_loss`` is given the inputs.

    Args:
        model: The student.
        args: As in `Trainer`. ``remove_unused_columns`` is set to False, as the teacher's columns
            are no arguments of the student.
        loss: What to distil with; None trains on cross-entropy alone, without a teacher.
        teacher: The teacher; needed with a loss, or a cache. It is moved to the training device and
            frozen. It may be the model below the student's adapters: it is read without them, and
            neither it nor they are frozen or put in evaluation mode.
        teacher_cache: What the teacher said, in its place; the collator's as well.
        weights: Of cross-entropy and distillation; default the loss's own.
        student_vocab_size: Length of the student's tokenizer. Wider heads are cut for the loss.
            With a loss that knows the pair of tokenizers, the pair's ``student_size``.
        teacher_vocab_size: The same for the teacher.
        data_collator: As in `Trainer`; not needed where the tokenizers are given.
        train_dataset: As in `Trainer`: rows of text, or what the data collator takes.
        eval_dataset: As in `Trainer`, several by name too.
        processing_class: The student's tokenizer, saved with the model.
        teacher_processing_class: The teacher's tokenizer, for rows of text.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`. Parameters of the loss must be among the optimizer's.
        compute_metrics: As in `Trainer`. Predictions are the student's logits where answers are
            scored and one position before, ``predictions[:, i]`` of ``label_ids[:, i + 1]``.
        preprocess_logits_for_metrics: As in `Trainer`. Without it all logits are kept in memory.
        model_init: Refused: what reads the student's logits belongs to one student. A trainer for
            each model, or ``ctkd compare --sweep``, searches for settings.
        whole_logits: Compute all logits of a batch at once, also where a model's head allows to
            compute them a block at a time.
        peft_config: Adapters of peft for the student, which alone are trained then.

    Attributes:
        student_logits: How the student's logits are read; its ``why_whole`` says why all at once.
        teacher_logits: The same for a live teacher.

    Raises:
        SettingError: If loss and teacher do not come together, the loss needs hidden states, or
            the arguments would train wrongly without a word.
        DataError: If a row of text cannot be used; the message names it.
    """

    # The loss is divided by the counts of the whole step; Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    model: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
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
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        whole_logits: bool = False,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if (loss is None) != (teacher is None and teacher_cache is None):
            raise SettingError("a loss needs a teacher and a teacher a loss; give both or neither")
        if teacher is not None and teacher_cache is not None:
            raise SettingError("a cache stands for the teacher; give one of them")
        if model_init is not None:
            raise SettingError(
                "model_init exchanges the student at each train(), and what reads its logits "
                "belongs to one student; give the model, and search for settings with one trainer "
                "for each, or with ctkd compare --sweep"
            )
        for side, given in (("model", model), ("teacher", teacher)):
            if not isinstance(given, nn.Module) and (side == "model" or given is not None):
                raise SettingError(
                    f"{side} must be a model, got {type(given).__name__}; load it with "
                    "ctkd.distill.models.load_model"
                )
        if loss is not None:
            if not isinstance(loss, Loss):
                raise SettingError(
                    f"loss must be what ctkd.get_loss returns, got {type(loss).__name__} {loss!r}"
                )
            check_needs(loss, type(loss).__name__)
        student = cast(PreTrainedModel, model)
        args = TrainingArguments() if args is None else args
        _check_arguments(args)
        if teacher_processing_class is not None and (data_collator is not None or teacher is None):
            raise SettingError(
                "teacher_processing_class makes batches of text for a live teacher; leave it out "
                "with a data_collator, which makes them, and without such a teacher"
            )
        if data_collator is None and processing_class is not None and teacher_cache is None:
            if (teacher is None) != (teacher_processing_class is None):
                raise SettingError(
                    "the teacher's tokenizer is needed too: give teacher_processing_class, or a "
                    "data_collator"
                )
            texts = _distiller(student, teacher, loss, processing_class, teacher_processing_class)
            data_collator = texts.collate
            _check_datasets(train_dataset, eval_dataset)
            of_training = _streamed if isinstance(train_dataset, IterableDataset) else _encoded
            train_dataset = of_training(texts, train_dataset)
            eval_dataset = _encoded(texts, eval_dataset)
            student_vocab_size = student_vocab_size or texts.student_vocab_size
            teacher_vocab_size = teacher_vocab_size or texts.teacher_vocab_size
        if args.train_sampling_strategy not in ("random", "sequential") and _is_encoded(
            train_dataset
        ):
            raise SettingError(
                f"TrainingArguments(train_sampling_strategy={args.train_sampling_strategy!r}) asks "
                "each row for its length, and rows of two tokenizers have two; leave it out"
            )
        if peft_config is not None:
            if optimizers[0] is not None:
                raise SettingError(
                    "the optimizer was made before peft_config adds adapters to the student, and "
                    "would train none of them; add them with peft.get_peft_model first"
                )
            student = with_adapters(student, peft_config)
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.distillation_loss = None if loss is None else loss.to(args.device)
        self._trained_loss = None
        if loss is not None and any(parameter.requires_grad for parameter in loss.parameters()):
            self._trained_loss = loss
            _check_optimizer(optimizers[0], loss)
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
        self.student_logits = self._reader_of_student()
        self.teacher_logits = (
            None
            if self.teacher is None
            else ModelLogits(self.teacher, refuse=self._why_whole_logits())
        )
        self._step_counts: Counts | None = None
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
        self.student_logits = self._reader_of_student()
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
        counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        for sample in samples:
            own = scored(sample, self.distillation_loss)
            counts += torch.stack([one.to(self.args.device) for one in own])
        self._step_counts = Counts(*self.accelerator.reduce(counts, reduction="sum"))
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Share of this micro-batch in the loss of the whole optimizer step."""
        logits = self.student_logits.read(model, inputs, inputs["labels"].shape[1])
        sums = self._sums(logits, inputs)
        loss = sums.value(self.weights, self._step_counts or sums.counts())
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
        """Average cross-entropy and the loss over the units of all batches, and compute metrics."""
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        reader, gathered = self.student_logits, None
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        if not prediction_loss_only:
            reader = ModelLogits(self.model, refuse="predictions are whole logits")
            gathered = _Predictions(self)
        total: Tensor | None = None
        samples = 0
        for inputs in dataloader:
            inputs = self._without_repeats(self._prepare_inputs(inputs))
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = reader.read(model, inputs, inputs["labels"].shape[1])
                sums = self._sums(logits, inputs)
            if gathered is not None:
                gathered.add(cast(DenseLogits, logits).tensor, inputs["labels"])
            self._part_names = list(sums.parts)
            total = sums.tensor() if total is None else total + sums.tensor()
            samples += int((inputs["labels"] != IGNORE_INDEX).any(-1).sum())
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if total is None:
            raise BatchError("there is nothing to evaluate on; give evaluation data")
        means = self._means(self.accelerator.reduce(total, reduction="sum"))
        means["loss"] = self.weights.ce * means["ce"] + self.weights.kd * means.get("kd", 0.0)
        found = {} if gathered is None else gathered.metrics()
        metrics = {
            f"{metric_key_prefix}_{name.removeprefix(f'{metric_key_prefix}_')}": value
            for name, value in {**found, **means}.items()
        }
        return EvalLoopOutput(
            predictions=None if gathered is None else gathered.predictions.get_arrays(),
            label_ids=None if gathered is None else gathered.labels.get_arrays(),
            metrics=metrics,
            num_samples=samples,
        )

    def _without_repeats(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch in which nothing is scored of rows that are there for a second time.

        In the last batch of an epoch, accelerate gives all ranks as many rows as the first has.
        """
        state = self.accelerator.gradient_state
        ranks, loader = self.accelerator.num_processes, state.active_dataloader
        if ranks == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return inputs
        if isinstance(loader.dataset, IterableDataset):
            return inputs
        size = len(inputs["labels"])
        # Of a loader that skips what a resumed run was trained on, state.remainder says nothing.
        last = len(loader.dataset) % (size * ranks) or size * ranks
        kept = max(0, min(size, last - self.accelerator.process_index * size))
        unscored = {"labels": IGNORE_INDEX, "chunk_ids": -1}
        cut = {
            name: torch.cat([value[:kept], torch.full_like(value[kept:], none)])
            for name, value in inputs.items()
            for ending, none in unscored.items()
            if name.endswith(ending)
        }
        return {**inputs, **cut}

    def _sums(self, logits: RowLogits, inputs: Mapping[str, Tensor]) -> Sums:
        teacher = None
        if self.distillation_loss is not None:
            with torch.autocast(logits.device.type, enabled=False):
                teacher = self._teacher_side(inputs)
        sums = sums_of(
            logits,
            inputs,
            self.distillation_loss,
            teacher,
            student_vocab_size=self.student_vocab_size,
        )
        self._check_finite(sums, teacher)
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

    def _check_finite(self, sums: Sums, teacher: Side | None) -> None:
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

    def _reader_of_student(self) -> ModelLogits:
        refuse = self._why_whole_logits()
        if self.args.torch_compile:
            # Its head, which is compiled as well, shows nobody what goes into it.
            refuse = refuse or "the model is compiled"
        return ModelLogits(self.model, refuse=refuse)

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

    def _remember(self, sums: Sums) -> None:
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


def _check_arguments(args: TrainingArguments) -> None:
    # The teacher's columns would be dropped silently.
    args.remove_unused_columns = False
    # Batches of iterable rows are as long as their longest row, so no process can send them out.
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
    for name in _BYPASSED:
        if getattr(args, name, None):
            raise SettingError(
                f"TrainingArguments({name}={getattr(args, name)}) would have no effect: the loss "
                "and its evaluation are computed in another way here; leave it out"
            )
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.greater_is_better and (best in ("ce", "kd") or best.startswith("kd/")):
        raise SettingError(
            f"of {best} lower is better, and transformers takes the highest unless it is told so; "
            "set greater_is_better=False"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise SettingError(
            f"{world} processes were started, but training is not distributed, so gradients would "
            "not be synchronized; on CPUs set use_cpu=True (--device cpu)"
        )
    if world > 1 and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


class _Predictions:
    """Logits and labels of an evaluation, from all ranks."""

    def __init__(self, trainer: CrossTokenizerTrainer) -> None:
        self._trainer = trainer
        whole = trainer.args.eval_do_concat_batches
        self.predictions = EvalLoopContainer(whole, padding_index=IGNORE_INDEX)
        self.labels = EvalLoopContainer(whole, padding_index=IGNORE_INDEX)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        accelerator, prepare = (
            self._trainer.accelerator,
            self._trainer.preprocess_logits_for_metrics,
        )
        logits, labels = (
            accelerator.pad_across_processes(one, dim=1, pad_index=IGNORE_INDEX)
            for one in (logits, labels)
        )
        if prepare is not None:
            logits = prepare(logits, labels)
        for container, one in ((self.predictions, logits), (self.labels, labels)):
            container.add(accelerator.gather_for_metrics(one))
            container.to_cpu_and_numpy()

    def metrics(self) -> dict[str, Any]:
        if self._trainer.compute_metrics is None:
            return {}
        found: dict[str, Any] = denumpify_detensorize(
            self._trainer.compute_metrics(
                EvalPrediction(
                    predictions=self.predictions.get_arrays(), label_ids=self.labels.get_arrays()
                )
            )
        )
        return found


def _distiller(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    loss: Loss | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> Distiller:
    """What makes batches of rows of text."""
    models = [student] if teacher is None else [student, teacher]
    longest = [positions_of(below_wrappers(model).config) for model in models]
    return Distiller(
        loss,
        tokenizer,
        teacher_tokenizer,
        max_length=min([_LONGEST, *(one for one in longest if one is not None)]),
        student_vocab_size=head_width(student),
        teacher_vocab_size=None if teacher is None else head_width(teacher),
        student_decoder_start=decoder_start_of(student),
        teacher_decoder_start=() if teacher is None else decoder_start_of(teacher),
    )


def _check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    if isinstance(train_dataset, dict):
        raise SettingError(
            f"train_dataset has the parts {', '.join(map(str, train_dataset))}; give one of them"
        )
    every = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *every):
        if isinstance(dataset, Iterator):
            raise SettingError(
                f"rows were given as {type(dataset).__name__}, which is read only once; give a "
                "list, a datasets.Dataset, or an IterableDataset of torch or datasets"
            )


def _encoded(texts: Distiller, dataset: Any) -> Any:
    """A data set of texts, or several by name, encoded ahead; others as they are."""
    if isinstance(dataset, dict):
        return {name: _encoded(texts, one) for name, one in dataset.items()}
    if isinstance(dataset, IterableDataset):
        dataset = list(dataset)
    if not hasattr(dataset, "__len__") or _is_encoded(dataset):
        return dataset
    return _rows_of(texts, dataset)


def _is_encoded(dataset: Any) -> bool:
    return bool(
        hasattr(dataset, "__len__") and len(dataset) and isinstance(dataset[0], EncodedExample)
    )


def _streamed(texts: Distiller, dataset: Any) -> ExampleStream:
    """An iterable data set of texts, encoded while it is read."""

    def blocks(number: int) -> Iterator[Sequence[EncodedExample]]:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)
        rows, first = iter(dataset), 1
        while block := list(itertools.islice(rows, BLOCK)):
            try:
                yield (
                    block if isinstance(block[0], EncodedExample) else _rows_of(texts, block, first)
                )
                # A block of few rows may lie below what the first one was checked for.
                texts.min_coverage = 0.0
            except NothingLeft as error:
                warnings.warn(str(error), stacklevel=2)
            first += len(block)

    return ExampleStream(blocks)


def _rows_of(texts: Distiller, rows: Any, first: int = 1) -> list[EncodedExample]:
    encoded = texts.encode(rows, first=first)
    if encoded.report():
        warnings.warn(encoded.report(), stacklevel=2)
    return encoded.rows


def _check_optimizer(optimizer: torch.optim.Optimizer | None, loss: Loss) -> None:
    if optimizer is None:
        return
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if not all(id(one) in held for one in loss.parameters() if one.requires_grad):
        raise SettingError(
            f"the optimizer lacks the parameters of the loss {type(loss).__name__}, which would "
            "stay as they are; add loss.parameters() to it"
        )


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
