"""Measurements of models on a held-out split; each answer is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.compare.plan.splits import Split
from ctkd.compare.records import Answer
from ctkd.distill.config import TrainConfig
from ctkd.distill.data.encoding import EncodedExample, EncodedSide, encode_examples
from ctkd.distill.data.prompts import PromptForm
from ctkd.distill.data.tasks import Example, get_task
from ctkd.distill.devices import choose_device, is_cpu
from ctkd.distill.evaluation.bits import text_bits
from ctkd.distill.evaluation.evaluate import held_out_losses
from ctkd.distill.evaluation.metrics import (
    ANSWER_METRICS,
    BITS_PER_BYTE,
    GIVEN_BITS,
    Prediction,
    score,
    write_predictions,
)
from ctkd.distill.models.loading import check_token_ids, decoder_start, load_model
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.preparing import load_teacher
from ctkd.distill.teachers.texts import TeacherTexts

__all__ = ["Evaluator", "means", "scored"]

ANSWERS = "answers.jsonl"

Say = Callable[[str], None]


class Evaluator:
    """Measures models on held-out splits: students, and a teacher on texts.

    Args:
        base: The settings that all runs share.
        tokenizer: The students'.
        say: Prints one line of progress.
    """

    def __init__(self, base: TrainConfig, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        self.base, self.tokenizer, self.say = base, tokenizer, say
        self.form = PromptForm(
            template=base.student_template,
            day=base.date,
            decoder_start=decoder_start(base.student),
        )
        self.device = choose_device(base.device)
        self._rows: dict[str, list[EncodedExample]] = {}

    def measure(
        self, source: str, folder: Path, split: Split
    ) -> tuple[tuple[Answer, ...], dict[str, float]]:
        """Measure a student on a split, and average its cross-entropy over it.

        Args:
            source: Name or folder of the student.
            folder: Keeps its answers as they come: a folder for this student alone.
            split: What to measure on.
        """
        model: PreTrainedModel | None = None

        def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            nonlocal model
            if model is None:
                model = load_model(source, device=self.device)
                check_token_ids(model, self.tokenizer)
            return model, self.tokenizer

        sides = [row.student for row in self._encoded(split)]
        if get_task(self.base.task).answered:
            answers = self._answered(load, folder, split)
            answers = _with_given_bits(answers, load()[0], self.tokenizer, split, sides)
        else:
            answers = _read(load()[0], self.tokenizer, split, sides)
        losses = held_out_losses(
            load()[0],
            self.tokenizer,
            self._encoded(split),
            batch_size=self.base.batch_size,
            use_cpu=is_cpu(self.device),
        )
        return answers, losses

    def measure_teacher(
        self,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        form: PromptForm,
        answers: tuple[Answer, ...] | None = None,
    ) -> tuple[Answer, ...]:
        """Measure the teacher on the texts of a split, or on the answers that the data give.

        Args:
            tokenizer: The teacher's.
            split: What to measure on.
            form: The form of its prompts.
            answers: Its own, whose scores are kept.
        """
        model = load_teacher(self.base, self.device)
        sides = [row.student for row in self._encode(split, tokenizer, form)]
        if answers is None:
            return _read(model, tokenizer, split, sides)
        return _with_given_bits(answers, model, tokenizer, split, sides)

    def _answered(
        self,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        folder: Path,
        split: Split,
    ) -> tuple[Answer, ...]:
        prompts = self.form.ids(self.tokenizer, split.examples)
        texts = TeacherTexts(
            folder / ANSWERS,
            max_new_tokens=self.base.max_new_tokens,
            one_line=get_task(self.base.task).one_line,
        )
        ends = self.form.ends(self.tokenizer)
        texts.complete(prompts, load, ends=ends, progress=f"answering the {split.name} split")
        answers = scored(split.examples, [texts.text(prompt) or "" for prompt in prompts])
        predictions = [
            Prediction(
                prediction=one.prediction, id=one.id, references=one.references, prompt=one.prompt
            )
            for one in answers
        ]
        write_predictions(folder / f"predictions-{split.name}.jsonl", predictions)
        return answers

    def _encoded(self, split: Split) -> list[EncodedExample]:
        if split.name not in self._rows:
            self._rows[split.name] = self._encode(split, self.tokenizer, self.form)
        return self._rows[split.name]

    def _encode(
        self, split: Split, tokenizer: PreTrainedTokenizerBase, form: PromptForm
    ) -> list[EncodedExample]:
        return encode_examples(
            list(split.examples),
            tokenizer,
            None,
            max_length=self.base.max_length,
            student_form=form,
        ).rows


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    sides: Sequence[EncodedSide],
) -> tuple[Answer, ...]:
    """The texts of a split, each with its bits per byte, weighted by its bytes."""
    logits = ModelLogits(model)
    found = text_bits(
        logits, tokenizer, split.examples, sides, progress=f"reading the {split.name} split"
    )
    return tuple(
        Answer(
            id=one.id,
            group=one.group,
            prompt=one.prompt,
            prediction="",
            references=one.references,
            scores={BITS_PER_BYTE: bits / size},
            weight=size,
        )
        for one, bits, size in zip(split.examples, found.bits, found.bytes, strict=True)
    )


def _with_given_bits(
    answers: tuple[Answer, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    sides: Sequence[EncodedSide],
) -> tuple[Answer, ...]:
    """Answers with the bits of those that the data give, unless one is too long to be read."""
    if len(sides) < len(answers):
        return answers
    logits = ModelLogits(model)
    found = text_bits(
        logits, tokenizer, split.examples, sides, progress=f"reading the {split.name} split"
    )
    return tuple(
        replace(one, scores={**one.scores, GIVEN_BITS: bits / size}, given_bytes=float(size))
        for one, bits, size in zip(answers, found.bits, found.bytes, strict=True)
    )


def scored(examples: Sequence[Example], texts: Sequence[str]) -> tuple[Answer, ...]:
    """Examples with their answers and scores."""
    scores = score(list(texts), [one.references for one in examples])
    each = {name: getattr(scores, f"{name}_each") for name in ANSWER_METRICS}
    return tuple(
        Answer(
            id=one.id,
            group=one.group,
            prompt=one.prompt,
            prediction=text,
            references=one.references,
            scores={name: each[name][place] for name in ANSWER_METRICS},
        )
        for place, (one, text) in enumerate(zip(examples, texts, strict=True))
    )


def means(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean of each metric, by the answers' weights."""
    found = {}
    for name in answers[0].scores:
        weights = [one.weight_in(name) for one in answers]
        weighted = (weight * one.scores[name] for weight, one in zip(weights, answers, strict=True))
        found[name] = math.fsum(weighted) / math.fsum(weights)
    return found
