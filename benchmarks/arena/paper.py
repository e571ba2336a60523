"""The tasks of the MultiLevelOT paper, on full splits: for a machine with a GPU."""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.arena.answers import AnswerArena
from benchmarks.arena.runs import DEFAULT_WEIGHTS
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import examples, split_off
from ctkd.distill.devices import choose_device, is_cpu
from ctkd.errors import DataError

# Of each data set: its task, and the column whose equal values one split keeps together.
TASKS = {
    "fairytaleqa": ("qa", "story"),
    "qed": ("qa", "title"),
    "dialogsum": ("summarization", "dialogue"),
}
SETTINGS: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 8,
    "learning_rate": 5e-5,
    "save_steps": 100,
    "dtype": "bfloat16",
}
DEV_FRACTION = 0.05
# Parameters of student and teacher, of which the latter has no backward pass.
_MULTIPLICATIONS_PER_TOKEN = 3 * 135e6 + 270e6


class Paper(AnswerArena):
    """A data set of the paper, with its labels or with a teacher's answers in their place.

    Args:
        source: Folder of NAME_train.parquet and NAME_validation.parquet.
        work: Folder for what is made.
        data_set: Its name, of `TASKS`.
        labelled: Whether students see labels.

    Raises:
        DataError: If there are no such files.
    """

    limits = """\
It is one pair of models, both far smaller than the paper's, with each loss at its default weight
alone. The teacher was trained with the labels, and was no few-shot model. Intervals are Student's,
for other seeds on other rows of these data sets.
Models are packaged ones, whose weights were rounded to some 4 bits.
"""

    def __init__(self, source: Path | None, work: Path, data_set: str, *, labelled: bool) -> None:
        if source is None:
            raise DataError("paper needs the three data sets; name the folder of their files")
        task, group = TASKS[data_set]
        columns = {"group": group}
        table = load_rows(str(source / f"{data_set}_train.parquet"))
        _, held = split_off(examples(table, task, columns), DEV_FRACTION, 0)
        numbers = {int(one.id) for one in held}
        super().__init__(
            f"paper_{data_set}" + ("" if labelled else "_unlabelled"),
            {
                "train": [row for number, row in enumerate(table, 1) if number not in numbers],
                "dev": [row for number, row in enumerate(table, 1) if number in numbers],
                "test": list(load_rows(str(source / f"{data_set}_validation.parquet"))),
            },
            task,
            columns,
            None if labelled else 0,
            SETTINGS,
            DEFAULT_WEIGHTS,
            work,
            64,
        )

    def prepare(self) -> None:
        """Refuse a CPU, with an estimate of the time."""
        if is_cpu(choose_device("auto")):
            runs, hours = self.plan.seeds * len(self.plan.methods), self.seconds() / 3600
            raise DataError(
                f"{self.name}, one of the arena's {2 * len(TASKS)} parts, needs a GPU: its {runs} "
                f"runs would take some {hours:,.0f} hours on "
                "this CPU; the arenas scratch, transfer and few_labels are made for one"
            )
        super().prepare()

    def seconds(self) -> float:
        """Estimate what all runs take on a CPU, from a product of matrices."""
        prompts = sum(len(one.prompt) + len(one.answer) for one in self.examples("train"))
        # Four characters make a token of such text.
        operations = 2 * _MULTIPLICATIONS_PER_TOKEN * prompts / 4 * SETTINGS["epochs"]
        size, repeats = 1024, 5
        matrix = torch.ones(size, size)
        before = time.perf_counter()
        for _ in range(repeats):
            matrix @ matrix
        speed = repeats * 2 * size**3 / (time.perf_counter() - before)
        return float(operations / speed * self.plan.seeds * len(self.plan.methods))
