"""Records of a comparison's runs: the lines of ``results.jsonl``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ctkd.distill.evaluation.metrics import GIVEN_BITS

__all__ = [
    "TEACHER",
    "UNTRAINED",
    "Answer",
    "Comparison",
    "Record",
]

UNTRAINED = "untrained student"
TEACHER = "teacher"
_CHECK = "check"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer of a model to one held-out prompt.

    Args:
        id: The example's.
        group: The passage or story that the prompt is about; examples of a group belong together.
        prompt: What the model read.
        prediction: What it answered.
        references: The accepted answers.
        scores: Each metric's value for this answer: from 0 to 100, or bits per byte.
        weight: In means: 1, but of a text that is measured in bits its bytes.
        given_bytes: Of the answer that the data give; its weight where its bits are measured.
    """

    id: str
    group: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    scores: dict[str, float]
    weight: float = 1.0
    given_bytes: float = 1.0

    def weight_in(self, metric: str) -> float:
        """Weight in the mean of a metric."""
        return self.given_bytes if metric == GIVEN_BITS else self.weight


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
        """One line, with a checksum."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, _CHECK: _checksum(fields)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a line that `as_json` made.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: If it did not, or the line changed.
        """
        fields = json.loads(line)
        if fields.pop(_CHECK) != _checksum(fields):
            raise ValueError("the line is not as it was written")
        fields["answers"] = tuple(
            Answer(**{**one, "references": tuple(one["references"])}) for one in fields["answers"]
        )
        fields["history"] = tuple(fields["history"])
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that a report is made from.

    Args:
        settings: Of the comparison, by name: what all runs have in common. The report also reads
            "published task", the data set as published tables name it, and "curve rows" and
            "development rows", how many held-out rows the curves and the trials rest on.
        metric: The one that methods are compared by, of `ctkd.distill.evaluation.metrics.METRICS`.
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
        """True if there is one seed only, so that nothing can be ranked."""
        return len(self.seeds) < 2

    def of(self, method: str) -> list[Record]:
        """The reported runs of one method, by seed."""
        runs = [record for record in self.finals if record.method == method]
        return sorted(runs, key=lambda record: -1 if record.seed is None else record.seed)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
