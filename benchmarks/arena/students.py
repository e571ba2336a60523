"""Arenas whose students learn texts, and are measured in bits per byte of others."""

import hashlib
import json
import os
import shutil
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena.runs import Arena, Method, Plan
from ctkd.distill.config import SFT, TrainConfig
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import Example, examples
from ctkd.distill.devices import choose_device
from ctkd.distill.evaluation.bits import text_bits
from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.teachers.memory import KnownStates
from ctkd.distill.training.run import train
from ctkd.errors import OutputError


class TextArena(Arena):
    """An arena whose students are trained by ``ctkd train``, on documents unless it says otherwise.

    Args:
        rows: Texts and their stories by split: train, dev, test.
        teacher: Of every run.
        settings: Others of every run.
        plan: See `Arena`.
        work: Folder for what is made.
        keep_rows: Keep the teacher's logits in a file, 4 bytes for each of a position.
    """

    task = "lm"
    metric: str | None = None
    columns: Mapping[str, str] = {"group": "story"}

    def __init__(
        self,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        teacher: str,
        settings: dict[str, Any],
        plan: Plan,
        work: Path,
        *,
        keep_rows: bool,
    ) -> None:
        self.teacher, self.settings, self.plan = teacher, settings, plan
        text = json.dumps([rows, settings, teacher], sort_keys=True)
        self.data = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.work = work / self.data
        self.work.mkdir(parents=True, exist_ok=True)
        for split, some in rows.items():
            write_rows(self.work / f"{split}.jsonl", some)
        self.training = self.work / "train.jsonl"
        self._known = KnownStates(rows_folder=self.work if keep_rows else None)

    @property
    @abstractmethod
    def student(self) -> str:
        """What every run starts from."""

    def of_model(self, name: str) -> dict[str, Any]:
        model = self.teacher if name == "teacher" else self.student
        return {"method": name, **self.scores(model)}

    def run(self, method: Method, weight: float, seed: int) -> dict[str, Any]:
        label = "".join(one if one.isalnum() else "-" for one in method.label)
        output = self.work / "runs" / f"{label}-{weight:g}-{seed}"
        config = TrainConfig(
            loss=method.loss,
            loss_options=method.options,
            teacher=self.teacher,
            data=str(self.training),
            eval_data=str(self.work / "dev.jsonl"),
            task=self.task,
            columns=dict(self.columns),
            kd_weight=None if method.loss == SFT else weight,
            # Some losses come without cross-entropy, or with less of it.
            ce_weight=None if method.loss == SFT else 1.0,
            seed=seed,
            output=str(output),
            measure="nothing",
            control=False,
            **self.student_settings(),
            **self.settings,
        )
        before = time.monotonic()
        known = self._known
        try:
            # What a stop has left of this run goes on.
            trained = train(config, resume=True, say=_silent, teacher_states=known)
        except OutputError:
            # Left by other settings.
            trained = train(config, overwrite=True, say=_silent, teacher_states=known)
        seconds = trained.results["training seconds"]
        scores = self.scores(str(output))
        shutil.rmtree(output)
        return {
            "method": method.label,
            "loss": method.loss,
            "options": method.options,
            "weight": weight,
            "seed": seed,
            "seconds": round(seconds, 1),
            "all_seconds": round(time.monotonic() - before, 1),
            **scores,
        }

    def scores(self, model: str) -> dict[str, Any]:
        """What a row says of a model."""
        return {split: self.measure(model, split) for split in ("dev", "test")}

    def student_settings(self) -> dict[str, Any]:
        """What names the student."""
        return {"student": self.student}

    def examples(self, split: str) -> list[Example]:
        """The windows or rows of a split."""
        return examples(load_rows(str(self.work / f"{split}.jsonl")), self.task, dict(self.columns))

    def measure(self, model: str, split: str) -> dict[str, tuple[float, int]]:
        """Bits and bytes of each story."""
        tokenizer, chosen = load_tokenizer(model), self.examples(split)
        rows = encode_examples(chosen, tokenizer, None, max_length=1024).rows
        read = {row.id for row in rows}
        chosen = [one for one in chosen if one.id in read]
        logits = ModelLogits(load_model(model, device=choose_device("auto")))
        found = text_bits(logits, tokenizer, chosen, [row.student for row in rows])
        bits: dict[str, float] = defaultdict(float)
        sizes: dict[str, int] = defaultdict(int)
        for one, of_window, size in zip(chosen, found.bits, found.bytes, strict=True):
            bits[one.group] += of_window
            sizes[one.group] += size
        return {story: (round(bits[story], 2), sizes[story]) for story in bits}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines, all at once, as other processes may be reading the same ones."""
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(lines, "utf-8")
    partial.replace(path)


def _silent(_: str) -> None:
    """Many runs would say the same things."""
