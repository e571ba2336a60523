"""Students of random weights: a Llama of 2 million, with 4,096 byte-level tokens of its own."""

from pathlib import Path
from typing import Any

import ctkd
from benchmarks.arena.runs import Method, Plan
from benchmarks.arena.students import TextArena
from benchmarks.arena.texts import fairytale_rows, python_rows
from ctkd.distill.config import SFT, UNTRAINED

TEACHER = "smollm2-135m-instruct"
SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 8, "learning_rate": 2e-3}

SETTLED = (
    "of which 12 of sft and of the five methods that are best on development texts, and 5 of the "
    "others, were settled before any test text was looked at, and the rest was added for shorter "
    "intervals"
)


class Scratch(TextArena):
    """Every loss towards SmolLM2-135M-Instruct, each at the best of several weights.

    Args:
        source: Folder of FairytaleQA; None for chapters of Python's reference.
        work: Folder for what is made.
    """

    name = "scratch"
    models = ("teacher",)
    limits = """\
It is one pair of models, of which the student knows nothing at first, one kind of text, one length
of training and one learning rate. Weights were chosen with one seed. Intervals are Student's, for
other seeds on other texts of this kind; they hold one by one, the p values together.
Models are packaged ones, whose weights were rounded to some 4 bits.
"""

    def __init__(self, source: Path | None, work: Path) -> None:
        rows = python_rows() if source is None else fairytale_rows(source)
        plan = Plan(methods=all_methods(), seeds=13, settled=SETTLED)
        super().__init__(rows, TEACHER, SETTINGS, plan, work, keep_rows=True)

    @property
    def student(self) -> str:
        return UNTRAINED

    def student_settings(self) -> dict[str, Any]:
        # Its weights are drawn anew with each seed, and its tokens learned from the texts.
        return {"student_config": UNTRAINED}


def all_methods() -> list[Method]:
    """Plain fine-tuning, and every loss: by position and by chunk where there are both."""
    found = [Method(SFT, SFT)]
    for name in ctkd.list_losses():
        if "pairing" in ctkd.describe(name).settings:
            # The sequence level, with its usual matching, is the same in both.
            once = name == "multilevelot_sequence"
            pairings = ["position"] if once else ["position", "chunk"]
            found += [Method(f"{name}, {one}", name, {"pairing": one}) for one in pairings]
        else:
            found.append(Method(name, name))
    # What has no column of its own on the other side is left free, or put into one class.
    rests = {"bpm": "renormalize", "shared_kl": "class"}
    return found + [Method(f"{name}, {rest}", name, {"rest": rest}) for name, rest in rests.items()]
