"""Few rows that somebody labelled, and a teacher's answers to the rest."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena.runs import Method, Plan
from benchmarks.arena.students import TextArena, write_rows
from benchmarks.arena.transfer import METHODS
from benchmarks.quality import fine_tuned, read
from ctkd.cache_folder import locked
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import Example, examples
from ctkd.distill.evaluation.evaluate import answer, score_predictions
from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.errors import DataError

TEACHER, STUDENT = "gemma-3-270m", "smollm2-135m-instruct"
SETTINGS: dict[str, Any] = {"max_steps": 60, "batch_size": 4, "learning_rate": 1e-4}
ROWS = {"train": 640, "dev": 40, "test": 120}
# In characters: short ones make short steps.
LONGEST_CONTEXT, LONGEST_ANSWER = 450, 60
MAX_NEW_TOKENS = 24


class FewLabels(TextArena):
    """SmolLM2 with few labels, towards a Gemma that was trained with all of them.

    Args:
        source: Folder of FairytaleQA.
        work: Folder for what is made.
        labels: Rows that keep their answer; the teacher answers the others.

    Raises:
        DataError: If there is no such folder, or it lacks rows.
    """

    task = "qa"
    limits = """\
The teacher was trained with the labels that the students lack, in place of a much larger model. It
is one pair of models, one data set, 60 steps, and each loss at its default weight alone. Bits are
those of the first gold answer, after its prompt. Intervals are Student's, for other seeds on other
stories; they hold one by one, the p values together.
"""

    def __init__(self, source: Path | None, work: Path, labels: int) -> None:
        if source is None:
            raise DataError("few_labels needs FairytaleQA; name the folder of its two files")
        rows = gold_rows(source)
        self.name, self._labels = f"few_labels_{labels}", labels
        plan = Plan(methods=METHODS, seeds=3, more_seeds=3)
        super().__init__(rows, TEACHER, {**SETTINGS, "labels": labels}, plan, work, keep_rows=False)
        self.settings, self._gold = SETTINGS, rows["train"]
        # The teacher and its answers, which the numbers of labels have in common.
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
        self._shared = work / f"few_labels-{digest}"

    @property
    def student(self) -> str:
        return STUDENT

    @property
    def models(self) -> Sequence[str]:
        return ["teacher", "start"]

    def of_model(self, name: str) -> dict[str, Any]:
        self._prepare()
        return super().of_model(name)

    def run(self, method: Method, weight: float, seed: int) -> dict[str, Any]:
        self._prepare()
        return super().run(method, weight, seed)

    def scores(self, model: str) -> dict[str, Any]:
        predictions = answer(
            load_model(model),
            load_tokenizer(model),
            self.examples("test"),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        f1 = score_predictions(predictions).summary()["f1"]
        return {**super().scores(model), "f1": round(f1, 2)}

    def _prepare(self) -> None:
        """Train the teacher, and write its answers in the place of labels, once."""
        self._shared.mkdir(parents=True, exist_ok=True)
        # Several processes share the runs, and the first makes what all need.
        with locked(self._shared / "teacher"):
            gold = self._shared / "gold.jsonl"
            write_rows(gold, self._gold)
            paths = {"train": str(gold), "dev": str(self.work / "dev.jsonl")}
            self.teacher = fine_tuned(TEACHER, paths, self._shared / "teacher")
            answers = self._answers(examples(load_rows(str(gold)), self.task, {"group": "story"}))
        mixed = [
            {**row, "answers": row["answers"] if number < self._labels else [said]}
            for number, (row, said) in enumerate(zip(self._gold, answers, strict=True))
        ]
        # A teacher that is silent has nothing to teach.
        spoken = [row for row in mixed if row["answers"][0].strip()]
        write_rows(self.work / "train.jsonl", spoken)

    def _answers(self, asked: Sequence[Example]) -> list[str]:
        path = self._shared / "answers.json"
        if not path.exists():
            predictions = answer(
                load_model(self.teacher),
                load_tokenizer(self.teacher),
                asked,
                max_new_tokens=MAX_NEW_TOKENS,
                progress="teacher: answering",
            )
            path.write_text(json.dumps([one.prediction for one in predictions]), "utf-8")
        answers: list[str] = json.loads(path.read_text("utf-8"))
        return answers


def gold_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Short rows of FairytaleQA by split, of other stories each, some of every story in turn."""
    files = {name: folder / f"fairytaleqa_{name}.parquet" for name in ("train", "validation")}
    of_file = {name: read(path, LONGEST_CONTEXT, LONGEST_ANSWER) for name, path in files.items()}
    stories = sorted({row["story"] for row in of_file["train"]})
    held_out = {*stories[::8]} | {row["story"] for row in of_file["validation"]}
    rows = {
        "train": [row for row in of_file["train"] if row["story"] not in held_out],
        "dev": [row for row in of_file["train"] if row["story"] in stories[::8]],
        "test": of_file["validation"],
    }
    return {split: _in_turn(some)[: ROWS[split]] for split, some in rows.items()}


def _in_turn(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """First rows of all stories, then second ones, and so on."""
    places: dict[str, int] = defaultdict(int)
    numbered = []
    for row in rows:
        numbered.append((places[row["story"]], row))
        places[row["story"]] += 1
    return [row for _, row in sorted(numbered, key=lambda one: one[0])]
