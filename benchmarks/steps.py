"""Whole training steps on packaged models, for the benchmarks that time them.

A step is what a user's is: collate, forward, loss, backward, AdamW. All steps train one student, so
that no model's place in memory favours one of them. TRL is imported when its trainer is made.
"""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
from transformers import Trainer, TrainingArguments

from ctkd.distill.config import CacheSettings, TrainConfig
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import EncodedExample
from ctkd.distill.data.rows import load_rows
from ctkd.distill.devices import now
from ctkd.distill.models.loading import head_width, load_tokenizer, resolve
from ctkd.distill.preparing import Forms, Models, encode, load_examples, load_models
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.cache_writing import write_cache
from ctkd.distill.training.trainer import CrossTokenizerTrainer


def quiet(line: str) -> None:
    """Say nothing."""


def write_rows(path: Path, tokenizer: Any, rows: int, length: int, scored: int) -> None:
    """Cut the embedded passages into texts of so many of the student's tokens."""
    passages = dict.fromkeys(str(row["context"]) for row in load_rows("pocketqa"))
    ids = tokenizer(" ".join(passages), add_special_tokens=False).input_ids
    # The end of sequence is the last token.
    texts = [ids[start : start + length - 1] for start in range(0, rows * length, length)]
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            cut = len(text) + 1 - scored
            row = {"prompt": tokenizer.decode(text[:cut]), "answer": tokenizer.decode(text[cut:])}
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Two models, encoded rows, and what the teacher says of them on disk, where it is asked."""

    config: TrainConfig
    models: Models
    cache: TeacherCache | None
    rows: list[EncodedExample]

    @classmethod
    def make(
        cls,
        folder: str,
        *,
        student: str,
        teacher: str,
        loss: str,
        batch_size: int,
        length: int,
        scored: int,
        cached: bool = True,
        states: Literal["none", "bfloat16", "float32"] = "none",
    ) -> "Prepared":
        """Write rows for four batches, ask the teacher if it is to be on disk, load and encode."""
        path = Path(folder, "rows.jsonl")
        config = TrainConfig(
            loss=loss,
            student=student,
            teacher=teacher,
            data=str(path),
            eval_data=str(path),
            task="text",
            batch_size=batch_size,
            control=False,
        )
        write_rows(path, load_tokenizer(student), 4 * batch_size, length, scored)
        cache = None
        if cached:
            settings = CacheSettings(texts="none", states=states)
            cache = write_cache(config, Path(folder, "cache"), settings, say=click.echo)
        models = load_models(config, quiet)
        examples, _ = load_examples(config, quiet)
        rows = encode(config, models, examples, Forms.of(config, examples), "training", quiet).rows
        return cls(config=config, models=models, cache=cache, rows=rows)

    def trainer(
        self,
        loss: str,
        folder: str,
        *,
        cached: bool = True,
        whole_logits: bool = False,
        options: dict[str, Any] | None = None,
    ) -> CrossTokenizerTrainer:
        """A trainer of the one student.

        Args:
            loss: A loss of the package, or "sft".
            folder: What the trainer might write goes there.
            cached: Read the teacher from disk; with "sft" there is none.
            whole_logits: Compute all logits at once, also where the head allows otherwise.
            options: Of the loss.
        """
        config = replace(self.config, loss=loss, loss_options=options or {})
        student = self.models.student
        pair = self.models.pair.narrowed(head_width(student), self.models.teacher_width)
        distils = config.distils
        cache = self.cache if distils and cached else None
        return CrossTokenizerTrainer(
            student,
            TrainingArguments(
                output_dir=folder, remove_unused_columns=False, report_to="none", disable_tqdm=True
            ),
            loss=config.make_loss(pair),
            teacher=self.models.teacher if distils and not cached else None,
            teacher_cache=cache,
            student_vocab_size=pair.student_size,
            teacher_vocab_size=pair.teacher_size,
            data_collator=Collator(
                student_pad_id=padding_id(self.models.student_tokenizer),
                teacher_pad_id=padding_id(self.models.teacher_tokenizer) if distils else None,
                teacher_cache=cache,
            ),
            whole_logits=whole_logits,
        )

    def trl_trainer(self, folder: str) -> Any:
        """TRL's ``GOLDTrainer`` of the same student and the same live teacher, on the same rows.

        It takes the rows as a user would give them, and tokenizes them itself. It is set to what
        the package's ``gold`` with ``merging="bayesian"`` computes, and to neither of what TRL does
        by default beyond that: no texts of the student, activations kept, float32.

        Args:
            folder: What the trainer might write goes there.
        """
        # TRL warns of everything in its experimental half unless told not to.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        lines = Path(self.config.data).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        aligns = trl_aligns(self.models)
        if not aligns:
            click.echo(
                "TRL pairs the k-th token with the k-th here and compares other rows than ctkd: it "
                "aligns byte-level tokenizers alone"
            )
        return GOLDTrainer(
            self.models.student,
            self.models.teacher,
            GOLDConfig(
                output_dir=folder,
                per_device_train_batch_size=self.config.batch_size,
                max_length=self.config.max_length,
                lmbda=0.0,
                use_uld_loss=True,
                uld_use_hybrid_loss=True,
                uld_token_merge_strategy="bayesian",
                use_extended_uld=aligns,
                teacher_tokenizer_name_or_path=resolve(self.config.teacher),
                activation_checkpointing=False,
                bf16=False,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
            ),
            processing_class=self.models.student_tokenizer,
        )

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the student, with steps so small that it stays the same student."""
        return torch.optim.AdamW(self.models.student.parameters(), lr=1e-6)

    def step_of(
        self, trainer: CrossTokenizerTrainer, optimizer: torch.optim.Optimizer
    ) -> Callable[[], float]:
        """One whole optimizer step on the next batch; every trainer's steps see the same ones."""
        rows = self.rows
        if trainer.distillation_loss is None:
            rows = [replace(row, teacher=None) for row in rows]
        return self._steps(trainer, rows, optimizer)

    def trl_step_of(self, trainer: Any, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
        """The same of TRL's trainer."""
        return self._steps(trainer, list(trainer.train_dataset), optimizer)

    def _steps(
        self, trainer: Trainer, rows: list[Any], optimizer: torch.optim.Optimizer
    ) -> Callable[[], float]:
        size = self.config.batch_size
        batches = itertools.cycle(rows[start : start + size] for start in range(0, len(rows), size))
        # Set by `Trainer.train`.
        trainer.current_gradient_accumulation_steps = 1

        def step() -> float:
            loss = trainer.training_step(trainer.model, trainer.data_collator(next(batches)))
            optimizer.step()
            optimizer.zero_grad()
            now()
            return float(loss)

        return step


def trl_aligns(models: Models) -> bool:
    """Whether both tokenizers are byte-level ones, which TRL's alignment of bytes asks for."""
    from trl.experimental.utils import is_byte_level_tokenizer

    tokenizers = models.student_tokenizer, models.teacher_tokenizer
    return all(is_byte_level_tokenizer(one.backend_tokenizer) for one in tokenizers)
