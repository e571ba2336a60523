"""What a comparison knows of its runs: the lines of ``results.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ctkd.errors import DataError, OutputError

__all__ = [
    "METRICS",
    "TEACHER",
    "UNTRAINED",
    "Answer",
    "Comparison",
    "Record",
    "append_record",
    "read_records",
]

METRICS = {"f1": "F1", "exact_match": "exact match", "rouge_lsum": "Rouge-LSum"}
"""Metrics by name, from 0 to 100 each, with their titles."""

UNTRAINED = "untrained student"
TEACHER = "teacher"
RESULTS = "results.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model answered to one held-out prompt.

    Args:
        id: The example's.
        group: The passage or story that the prompt is about; examples of a group belong together.
        prompt: What the model read.
        prediction: What it answered.
        references: The accepted answers.
        scores: Each metric's value for this answer, from 0 to 100.
    """

    id: str
    group: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    scores: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One trained student, or one of the two references, measured on one split.

    Args:
        key: What makes two records the same work; equal keys are never computed twice.
        method: A loss's name, "sft" or "seqkd", perhaps with what tells it from another
            ("uld kd_weight=1.5"); `UNTRAINED` or `TEACHER` for a reference.
        stage: "trial" while settings are chosen, "final" for what is reported, "reference" for
            the untrained student and the teacher.
        split: "dev" for trials, "test" for the rest.
        seed: Of the run; None for a reference.
        settings: What this run's settings are, by name, as in `ctkd.distill.config.TrainConfig`.
        varied: Those of them that the sweep tried, ``{"kd_weight": 0.15}``; empty if none.
        metrics: Mean of each metric over the split.
        answers: One per held-out example, in one order for all records of a split.
        losses: Held-out ``ce`` in nats per token, and ``kd`` and its parts if there is a loss.
        history: What was logged while training, one mapping per log, each with ``step``;
            ``seconds`` is the training time so far, ``eval_ce`` the held-out cross-entropy.
        steps: Optimizer steps.
        seconds_per_step: Median.
        seconds: Training time, without evaluation.
        peak_memory: Bytes; None where it cannot be measured.
    """

    key: str
    method: str
    stage: Literal["trial", "final", "reference"]
    split: Literal["dev", "test"]
    seed: int | None
    settings: dict[str, Any]
    varied: dict[str, Any]
    metrics: dict[str, float]
    answers: tuple[Answer, ...]
    losses: dict[str, float] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    steps: int = 0
    seconds_per_step: float | None = None
    seconds: float = 0.0
    peak_memory: int | None = None

    def as_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a line that `as_json` made."""
        found = json.loads(line)
        found["answers"] = tuple(
            Answer(**{**one, "references": tuple(one["references"])}) for one in found["answers"]
        )
        found["history"] = tuple(found["history"])
        return cls(**found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that a report is made from.

    Args:
        settings: Of the comparison, by name: what all runs have in common. The report also reads
            "published task", the data set as published tables name it, and "curve rows" and
            "development rows", how many held-out rows the curves and the trials rest on.
        metric: The one that methods are compared by, of `METRICS`.
        baseline: The method that differences are taken to.
        references: Records of the untrained student and the teacher, on the test split.
        finals: Records of the reported runs, on the test split, one per method and seed.
        trials: Records of the runs that settings were chosen by, on the development split.
        preparation: What was done once, before any run, and its seconds: "teacher cache" and so on.
    """

    settings: dict[str, Any]
    metric: str
    baseline: str
    references: tuple[Record, ...]
    finals: tuple[Record, ...]
    trials: tuple[Record, ...] = ()
    preparation: dict[str, float] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Methods of the reported runs, in order of first appearance."""
        return list(dict.fromkeys(record.method for record in self.finals))

    @property
    def seeds(self) -> list[int]:
        """Seeds of the reported runs, ascending."""
        return sorted({record.seed for record in self.finals if record.seed is not None})

    @property
    def is_demonstration(self) -> bool:
        """Whether there is one seed only, so that nothing can be ranked."""
        return len(self.seeds) < 2

    def of(self, method: str) -> list[Record]:
        """The reported runs of one method, by seed."""
        found = [record for record in self.finals if record.method == method]
        return sorted(found, key=lambda record: -1 if record.seed is None else record.seed)


def append_record(folder: Path, record: Record) -> None:
    """Add a record to ``results.jsonl``, on disk before this returns.

    Raises:
        OutputError: If it cannot be written; what was there stays readable.
    """
    path = folder / RESULTS
    try:
        filled = path.exists() and path.stat().st_size > 0
        cut = filled and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            # A line that a kill cut short stays unreadable; it must not swallow this one.
            file.write(("\n" if cut else "") + record.as_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}; make room, or make it writable, "
            "then repeat the same command to go on"
        ) from error


def read_records(folder: Path) -> dict[str, Record]:
    """Read ``results.jsonl`` by key; a line that a kill cut short is left out.

    Raises:
        DataError: If the file cannot be read, or a whole line is not a record.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; make it readable, or choose another "
            "--output"
        ) from error
    found = {}
    # Bytes, as a kill may cut a line inside a character.
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            record = Record.from_json(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            # Cut short, or empty: what it was about is measured again.
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} line {number} is not a record of a comparison; remove the line, its run "
                "is then repeated"
            ) from error
        found[record.key] = record
    return found
