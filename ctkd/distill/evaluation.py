"""How well a model answers held-out prompts, and how far it is from a teacher on them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ctkd.distill.collator import Collator, padding_id
from ctkd.distill.encoded import EncodedPair
from ctkd.distill.generation import generate
from ctkd.distill.metrics import Prediction, Scores, score
from ctkd.distill.prompts import PLAIN, PromptForm
from ctkd.distill.tasks import Example
from ctkd.distill.trainer import CrossTokenizerTrainer
from ctkd.loss import Loss
from ctkd.tokenization.pair import TokenizerPair

__all__ = ["answer", "held_out_losses", "score_predictions"]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    form: PromptForm = PLAIN,
    progress: bool | str = False,
) -> list[Prediction]:
    """Let a model answer each example's prompt by greedy decoding, up to the first line break.

    Args:
        model: The model, in its own tokenizer's ids.
        tokenizer: Its tokenizer.
        examples: What to answer.
        max_new_tokens: Longest answer.
        batch_size: Prompts decoded together.
        form: How the model is asked: as it was in training.
        progress: Whether to show a bar, and its text.
    """
    prompts = form.ids(tokenizer, examples)
    texts = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [
        Prediction(prediction=text, id=one.id, references=one.references, prompt=one.prompt)
        for text, one in zip(texts, examples, strict=True)
    ]


def score_predictions(predictions: Sequence[Prediction]) -> Scores:
    """Score answers against the references they carry."""
    return score([one.prediction for one in predictions], [one.references for one in predictions])


def held_out_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedPair],
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
