"""Arenas of questions: some rows keep their labels, a teacher that knows them answers the rest."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena.runs import Plan
from benchmarks.arena.students import TextArena, write_rows
from benchmarks.quality import fine_tuned
from ctkd.cache_folder import locked
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import Example, examples, get_task
from ctkd.distill.devices import choose_device
from ctkd.distill.evaluation.evaluate import answer, score_predictions
from ctkd.distill.models.loading import load_model, load_tokenizer

TEACHER, STUDENT = "gemma-3-270m", "smollm2-135m-instruct"


class AnswerArena(TextArena):
    """SmolLM2 towards a Gemma that was trained with all labels.

    Args:
        name: Of the arena.
        rows: By split: train, dev, test.
        task: How they are read.
        columns: Of its fields.
        labels: Rows that keep their label; None for all.
        settings: Of every student's training.
        plan: See `Arena`.
        work: Folder for what is made.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        task: str,
        columns: dict[str, str],
        labels: int | None,
        settings: dict[str, Any],
        plan: Plan,
        work: Path,
        max_new_tokens: int,
    ) -> None:
        self.name, self.task, self.columns = name, task, columns
        self.metric = get_task(task).metrics[0]
        self._gold, self._dev, self._max_new_tokens = rows["train"], rows["dev"], max_new_tokens
        self._labels = len(self._gold) if labels is None else labels
        known = {**settings, "labels": self._labels}
        super().__init__(rows, TEACHER, known, plan, work, keep_rows=False)
        self.settings = settings
        # The teacher and its answers, which do not depend on the number of labels.
        text = json.dumps([TEACHER, rows], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._shared = work / f"answers-{digest}"
        self.training = self.work / "mixed.jsonl"

    @property
    def student(self) -> str:
        return STUDENT

    def prepare(self) -> None:
        """Train the teacher, and write its answers in the place of labels, once."""
        self._shared.mkdir(parents=True, exist_ok=True)
        # Several processes share the runs, and the first makes what all need.
        with locked(self._shared / "teacher"):
            gold, dev = self._shared / "gold.jsonl", self._shared / "dev.jsonl"
            write_rows(gold, self._gold)
            write_rows(dev, self._dev)
            paths = {"train": str(gold), "dev": str(dev)}
            self.teacher = fine_tuned(
                TEACHER, paths, self._shared / "teacher", task=self.task, columns=self.columns
            )
            asked = examples(load_rows(str(gold)), self.task, self.columns)
            said = [] if self._labels == len(asked) else self._answers(asked)
        target = get_task(self.task).target
        target = self.columns.get(target, target)
        mixed = [
            row if number < self._labels else {**row, target: [said[number]]}
            for number, row in enumerate(self._gold)
        ]
        # A teacher that is silent has nothing to teach.
        write_rows(self.training, [row for row in mixed if row[target][0].strip()])

    def scores(self, model: str) -> dict[str, Any]:
        predictions = self._answer(model, self.examples("test"))
        score = score_predictions(predictions).summary()[get_task(self.task).metrics[0]]
        return {**super().scores(model), "score": round(score, 2)}

    def _answers(self, asked: Sequence[Example]) -> list[str]:
        path = self._shared / "answers.json"
        if not path.exists():
            predictions = self._answer(self.teacher, asked, progress="teacher: answering")
            path.write_text(json.dumps([one.prediction for one in predictions]), "utf-8")
        answers: list[str] = json.loads(path.read_text("utf-8"))
        return answers

    def _answer(self, model: str, asked: Sequence[Example], **options: Any) -> Any:
        return answer(
            load_model(model, device=choose_device("auto")),
            load_tokenizer(model),
            asked,
            max_new_tokens=self._max_new_tokens,
            one_line=get_task(self.task).one_line,
            **options,
        )
