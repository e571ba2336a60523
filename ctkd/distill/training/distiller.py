"""Distillation in any training loop: texts to batches, and two models' outputs to a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ctkd.distill.config import check_needs, usual_template
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.conversations import COLUMNS, are_messages
from ctkd.distill.data.encoding import EncodedExample, EncodedExamples, encode_examples
from ctkd.distill.data.layouts import brought
from ctkd.distill.data.prompts import PromptForm
from ctkd.distill.data.rows import NothingLeft, Rows
from ctkd.distill.data.tasks import Example, Task, examples, get_task
from ctkd.distill.training.sums import Counts, causal_side, scored, sums_of
from ctkd.errors import BatchError, DataError, SettingError
from ctkd.logits import DenseLogits, RowLogits
from ctkd.loss import Loss, Weights
from ctkd.registry import get_loss
from ctkd.settings import check_choice
from ctkd.tokenization.pair import TokenizerPair

__all__ = ["Distiller", "DistillerOutput"]

_INPUTS = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids")
_COLUMNS = (*COLUMNS, "prompt", "answer", "completion", "instruction", "output", "text")
# What may tell a row apart in an error message.
_NAMING = ("id", "prompt", "text", "instruction")


@dataclass(frozen=True, slots=True, eq=False)
class DistillerOutput:
    """What `Distiller.loss` returns.

    Args:
        value: () differentiable, ``weights.ce * ce + weights.kd * kd``.
        parts: () each, detached, unweighted, under the names that `CrossTokenizerTrainer` logs:
            ``ce`` in nats per token, ``kd``, and ``kd/<part>`` for each part of the loss.
        counts: Tokens of cross-entropy and units of the loss that were averaged over.
    """

    value: Tensor
    parts: Mapping[str, Tensor]
    counts: Counts


class Distiller(nn.Module):
    """Cross-entropy and a distillation loss for any training loop: texts in, loss out.

    `collate` makes a batch of texts, as `ctkd train` does: prompt and answer are tokenized apart,
    for both models, and aligned by bytes. `student_inputs` and `teacher_inputs` are what the models
    are called with, `loss` compares their outputs. A batch is a dict of tensors, which any
    framework moves to its devices.

    Rows are mappings, or a `datasets.Dataset`, in one of these layouts: ``prompt`` and ``answer``;
    ``prompt`` and ``completion``; ``instruction``, ``input`` and ``output``; or ``text``, trained
    on as a whole. An answer is read as it is, with the space in front of it. Or they are
    conversations, as for ``ctkd train --task chat``: ``messages``, where they are there, or
    ``conversations``, or ``prompt`` and ``completion`` as lists of messages. Each side writes them
    in its own chat template, and every answer of the assistant is scored. Prompts are padded on the
    left; models that read padding in spite of its mask, as some recurrent ones do, need batches of
    one row.

    ``loss(...).value`` is a mean over one batch. Where gradients are accumulated, dividing it by
    the number of micro-batches weighs short ones like long ones; with ``counts=`` of the whole
    step the values add up to the loss of all rows at once, however they are split::

        counts = distiller.counts(*micro_batches)
        for batch in micro_batches:
            distiller.loss(..., batch, counts=counts).value.backward()

    On several processes counts are summed over all of them, and the value is multiplied by their
    number, since gradients are averaged.

    Args:
        loss: The loss, or its name; None for cross-entropy alone, without a teacher.
        student_tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's; needed with a loss.
        weights: Of cross-entropy and distillation; default the loss's own.
        max_length: Longest prompt and answer, in tokens of either side.
        on_long: Longer rows are left out by `encode` ("drop"), cut on both sides at one byte
            ("cut"), or refused ("refuse"). `collate` refuses what it would have to leave out.
        min_coverage: Least share of the answers' bytes, of the rows that are encoded together, that
            both tokenizers must spell alike.
        score_eos: Whether distillation scores the end of sequence, on both sides.
        student_template: Form of the student's prompts, "plain" or "chat"; by default plain, and
            chat for conversations, which are refused in plain text.
        teacher_template: The same for the teacher.
        student_vocab_size: Columns of the student's head, where it has fewer than its tokenizer has
            ids. What a head has beyond its tokenizer is cut by itself.
        teacher_vocab_size: The same for the teacher.
        student_decoder_start: Of an encoder-decoder what its decoder reads in front of an answer,
            see `ctkd.distill.models.loading.decoder_start_of`.
        teacher_decoder_start: The same for the teacher.
        **settings: Of a loss that is given by name, as for `ctkd.get_loss`.

    Attributes:
        distillation_loss: The loss. Parameters of its own are this module's.
        weights: As given, or the loss's own.
        student_vocab_size: Columns of the student's logits that the loss reads.
        teacher_vocab_size: The same for the teacher, None without one.

    Raises:
        SettingError: If loss and teacher do not come together, or a setting is out of range.
        UnknownLossError: If no loss has the name.

    Example:
        >>> import torch
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> def letters(merges):
        ...     words = ["<eos>", *"abcd", *map("".join, merges)]
        ...     bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
        ...     bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ...     bpe.decoder = decoders.ByteLevel()
        ...     return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
        >>> distiller = Distiller("uld", letters([]), letters([("b", "c")]))
        >>> batch = distiller.collate([{"prompt": "a", "answer": "bcd"}])
        >>> batch["input_ids"], batch["teacher_input_ids"]
        (tensor([[1, 2, 3, 4, 0]]), tensor([[1, 5, 4]]))
        >>> output = distiller.loss(torch.zeros(1, 5, 5), torch.zeros(1, 3, 6), batch)
        >>> round(float(output.parts["ce"]), 4), int(output.counts.ce), int(output.counts.kd)
        (1.6094, 4, 3)
    """

    distillation_loss: Loss | None

    def __init__(
        self,
        loss: Loss | str | None,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        weights: Weights | None = None,
        max_length: int = 1024,
        on_long: Literal["drop", "cut", "refuse"] = "drop",
        min_coverage: float = 0.95,
        score_eos: bool = False,
        student_template: Literal["plain", "chat"] | None = None,
        teacher_template: Literal["plain", "chat"] | None = None,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        student_decoder_start: Sequence[int] = (),
        teacher_decoder_start: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        super().__init__()
        if (loss is None) != (teacher_tokenizer is None):
            raise SettingError(
                "a loss needs a teacher's tokenizer, and cross-entropy alone none; give both or "
                "neither"
            )
        if settings and not isinstance(loss, str):
            raise SettingError(
                f"{', '.join(settings)} would be settings of a loss that is given by name; this "
                "one has its settings, leave them out"
            )
        check_choice("on_long", on_long, ("drop", "cut", "refuse"))
        check_choice("student_template", student_template or "plain", ("plain", "chat"))
        check_choice("teacher_template", teacher_template or "plain", ("plain", "chat"))
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.max_length, self.on_long, self.min_coverage = max_length, on_long, min_coverage
        self.score_eos = score_eos
        self._templates = student_template, teacher_template
        self._decoder_starts = tuple(student_decoder_start), tuple(teacher_decoder_start)
        self.student_vocab_size, self.teacher_vocab_size = student_vocab_size, teacher_vocab_size
        self._pair: TokenizerPair | None = None
        if teacher_tokenizer is not None:
            self._pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
            sizes = (self._pair.student_size, self._pair.teacher_size)
            given = (student_vocab_size, teacher_vocab_size)
            seen = self._pair.narrowed(
                *(most if size is None else size for most, size in zip(sizes, given, strict=True))
            )
            self.student_vocab_size = seen.student_size
            self.teacher_vocab_size = seen.teacher_size
            if isinstance(loss, str):
                loss = get_loss(loss, pair=seen, **settings)
        if isinstance(loss, Loss):
            check_needs(loss, type(loss).__name__)
        elif loss is not None:
            raise SettingError(
                f"loss must be a name or what ctkd.get_loss returns, got {type(loss).__name__}"
            )
        self.distillation_loss = loss
        if weights is None:
            weights = Weights(1.0, 0.0) if loss is None else loss.default_weights
        self.weights = Weights(*weights)
        self._collator = Collator(
            student_pad_id=padding_id(student_tokenizer),
            teacher_pad_id=None if teacher_tokenizer is None else padding_id(teacher_tokenizer),
            score_eos=score_eos,
        )

    def encode(self, rows: Iterable[Mapping[str, Any]], *, first: int = 1) -> EncodedExamples:
        """Tokenize rows once, ahead of training: `collate` takes the ``rows`` of the result too.

        What is left out or cut says its ``report()``, how much is aligned its
        ``coverage.report()``.

        Args:
            rows: The rows of text.
            first: The number by which messages call the first of them, where others went before.

        Raises:
            DataError: If a row cannot be used; the message names it. See `encode_examples`.
        """
        return self._encoded(rows, self.on_long, first)

    def collate(self, rows: Sequence[Mapping[str, Any] | EncodedExample]) -> dict[str, Tensor]:
        """Make a batch of tensors on the CPU, of rows of text or of encoded ones.

        Shape:
            As `ctkd.distill.data.collator.Collator` makes it: prompts are padded on the left,
            answers on the right, and labels belong to the last positions.

        Raises:
            DataError: If a row cannot be used, or is too long; the message names it.
            BatchError: If there are no rows.
        """
        encoded = [row for row in rows if isinstance(row, EncodedExample)]
        if len(encoded) < len(rows):
            texts = [row for row in rows if not isinstance(row, EncodedExample)]
            if encoded:
                raise BatchError("a batch holds rows of text or encoded ones, got both")
            found = self._encoded(texts, "cut" if self.on_long == "cut" else "refuse")
            if found.refused:
                raise DataError(f"{found.refused[0]}; leave such rows out with encode(rows)")
            if found.too_long:
                raise DataError(
                    f"of row {found.too_long[0]} nothing fits into {self.max_length} tokens; raise "
                    "max_length, or leave such rows out with encode(rows)"
                )
            encoded = found.rows
        return self._collator(encoded)

    def student_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the student is called with.

        ``input_ids``, ``attention_mask``, ``position_ids``, and ``logits_to_keep``, by which it
        computes logits where answers are scored and nowhere else. Leave out what a model does not
        take; `ctkd.distill.models.ModelLogits` does so by itself. Of an encoder-decoder
        ``input_ids``, ``attention_mask`` and ``decoder_input_ids``.
        """
        return _inputs(batch, "", "labels")

    def teacher_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the teacher is called with, as `student_inputs`."""
        return _inputs(batch, "teacher_", "teacher_distill_labels")

    def counts(self, *batches: Mapping[str, Tensor]) -> Counts:
        """How many tokens and units batches score together, known before models have read them."""
        counts = [scored(batch, self.distillation_loss) for batch in batches]
        if not counts:
            raise BatchError("counts needs at least one batch")
        ce, kd = (sum(entries[1:], start=entries[0]) for entries in zip(*counts, strict=True))
        return Counts(ce, kd)

    def loss(
        self,
        student_output: Any,
        teacher_output: Any,
        batch: Mapping[str, Tensor],
        *,
        counts: Counts | None = None,
    ) -> DistillerOutput:
        """Cross-entropy plus weighted distillation of one batch.

        Args:
            student_output: What the student returned for `student_inputs`: its output, whose
                ``logits`` are read, those logits, or `ctkd.HeadLogits` in their place. Positions
                in front of the scored ones may be there or not.
            teacher_output: The same for the teacher, which gets no gradient; None without a loss.
            batch: What `collate` returned, on the models' device.
            counts: What the sums are divided by, of all batches of an optimizer step as the method
                `counts` returns them. By default those of this batch.

        Raises:
            BatchError: If outputs do not belong to the batch, or it is none of `collate`.
        """
        inputs = _of_collate(batch, self.distillation_loss is not None)
        teacher = None
        if self.distillation_loss is not None:
            teacher = causal_side(
                _logits(teacher_output, "teacher"),
                inputs["teacher_distill_labels"],
                chunk_ids=inputs["teacher_distill_chunk_ids"],
                vocab_size=self.teacher_vocab_size,
            )
        sums = sums_of(
            _logits(student_output, "student"),
            inputs,
            self.distillation_loss,
            teacher,
            student_vocab_size=self.student_vocab_size,
        )
        counts = sums.counts() if counts is None else counts
        means = sums.means(counts)
        parts = {name: mean.detach() for name, mean in means.items()}
        return DistillerOutput(sums.value(self.weights, counts), parts, counts)

    def _encoded(
        self,
        rows: Iterable[Mapping[str, Any]],
        on_long: Literal["drop", "cut", "refuse"],
        first: int = 1,
    ) -> EncodedExamples:
        rows = list(rows)
        task = _task(rows, first)
        student_form, teacher_form = (
            PromptForm(template=template or usual_template(task.name), decoder_start=start)
            for template, start in zip(self._templates, self._decoder_starts, strict=True)
        )
        return encode_examples(
            _examples(rows, task, first),
            self.student_tokenizer,
            self.teacher_tokenizer,
            max_length=self.max_length,
            score_eos=self.score_eos,
            on_long=on_long,
            min_coverage=self.min_coverage,
            student_form=student_form,
            teacher_form=teacher_form,
            pair=self._pair,
        )


def _task(rows: list[Mapping[str, Any]], first: int) -> Task:
    """The task of rows in the layout of the first one.

    Raises:
        DataError: If one is no row.
    """
    for number, row in enumerate(rows, first):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is {type(row).__name__}; expected a mapping with prompt and answer, "
                "prompt and completion, messages, or text"
            )
    if not rows:
        raise DataError("there are no rows; expected at least one")
    layout = rows[0]
    is_chat = any(name in layout for name in COLUMNS) or are_messages(layout.get("completion"))
    return get_task("chat" if is_chat else "text")


def _examples(rows: list[Mapping[str, Any]], task: Task, first: int) -> list[Example]:
    """Rows as examples, each called by its number and by what tells it apart."""
    places = [_place(number, row) for number, row in enumerate(rows, first)]
    layout = [name for name in _COLUMNS if name in rows[0]]
    for place, row in zip(places, rows, strict=True):
        for name in layout:
            if name not in row:
                raise DataError(
                    f"{place} has no {name}, which the first row has; give rows of one layout"
                )
    found = brought(Rows("the data", rows, places), task, {}, lambda _: None)
    if not task.is_chat and not {"prompt", "answer"} <= set(found.columns):
        raise DataError(
            f"rows with {', '.join(found.columns) or 'nothing'} are of no layout that is known; "
            "expected prompt and answer, prompt and completion, instruction and output, messages, "
            "or text"
        )
    kept = set(found.places)
    missing = next((number for number, place in enumerate(places) if place not in kept), None)
    if missing is not None:
        place = places[missing]
        if task.is_chat:
            # By itself it is refused with the reason, but the others are sound.
            try:
                brought(Rows(place, [rows[missing]], [place]), task, {}, lambda _: None)
            except NothingLeft as error:
                raise DataError(str(error)) from error
        raise DataError(f"{place} has a blank output; write an answer, or remove the row")
    made = examples(found, task)
    # Numbers of their own begin at 1.
    return made if first == 1 else [replace(one, id=one.where) for one in made]


def _place(number: int, row: Mapping[str, Any]) -> str:
    name = next((name for name in _NAMING if row.get(name) not in (None, "")), None)
    return f"row {number}" if name is None else f"row {number} ({name} {str(row[name])[:40]!r})"


def _inputs(batch: Mapping[str, Tensor], prefix: str, labels: str) -> dict[str, Any]:
    if labels not in batch:
        whose = "teacher" if prefix else "student"
        raise BatchError(
            f"the batch has no {labels}, so it says nothing of a {whose}; make it with the collate "
            f"of a distiller that has a {whose}'s tokenizer"
        )
    named = {name: prefix + name for name in _INPUTS}
    inputs: dict[str, Any] = {name: batch[one] for name, one in named.items() if one in batch}
    if "decoder_input_ids" not in inputs:
        inputs["logits_to_keep"] = batch[labels].shape[1]
    return inputs


def _of_collate(batch: Mapping[str, Tensor], with_teacher: bool) -> Mapping[str, Tensor]:
    names = ["labels", "distill_labels"]
    if with_teacher:
        names += ["distill_chunk_ids", "teacher_distill_labels", "teacher_distill_chunk_ids"]
    missing = [name for name in names if name not in batch]
    if missing:
        raise BatchError(
            f"the batch has no {', '.join(missing)}; make it with the distiller's collate, and "
            "keep all of it (remove_unused_columns=False)"
        )
    return batch


def _logits(output: Any, side: str) -> RowLogits:
    if isinstance(output, RowLogits):
        return output
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"the {side}'s output is {type(output).__name__}; expected a model's output with "
            "logits, a tensor of logits, or ctkd.HeadLogits"
        )
    return DenseLogits(logits)
