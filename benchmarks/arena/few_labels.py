"""Few rows that somebody labelled, and a teacher's answers to the rest."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena.answers import AnswerArena
from benchmarks.arena.runs import DEFAULT_WEIGHTS
from benchmarks.quality import read
from ctkd.errors import DataError

LABELS = (128, 32, 512)
SETTINGS: dict[str, Any] = {"max_steps": 60, "batch_size": 4, "learning_rate": 1e-4}
ROWS = {"train": 640, "dev": 40, "test": 120}
# In characters: short ones make short steps.
LONGEST_CONTEXT, LONGEST_ANSWER = 450, 60
MAX_NEW_TOKENS = 24


class FewLabels(AnswerArena):
    """Questions on FairytaleQA, of which few keep their label.

    Args:
        source: Folder of FairytaleQA.
        work: Folder for what is made.
        labels: Rows that keep their label.

    Raises:
        DataError: If there is no such folder, or it lacks rows.
    """

    limits = """\
The teacher was trained with the labels that the students lack, in place of a much larger model. It
is one pair of models, one data set, 60 steps, and each loss at its default weight alone. Bits are
those of the first gold answer, after its prompt. Intervals are Student's, for other seeds on other
stories; they hold one by one, the p values together.
Models are packaged ones, whose weights were rounded to some 4 bits.
"""

    def __init__(self, source: Path | None, work: Path, labels: int) -> None:
        if source is None:
            raise DataError("few_labels needs FairytaleQA; name the folder of its two files")
        super().__init__(
            f"few_labels_{labels}",
            gold_rows(source),
            "qa",
            {"group": "story"},
            labels,
            SETTINGS,
            DEFAULT_WEIGHTS,
            work,
            MAX_NEW_TOKENS,
        )


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
