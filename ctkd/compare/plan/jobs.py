"""The runs of a comparison, and the measurements of each.

One training serves every measurement of the same settings and seed: the run that won on the
development split is the one that is reported for its seed, measured once more on the test split.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.plan.methods import Method
from ctkd.compare.plan.splits import COLUMNS, Splits
from ctkd.compare.records import TEACHER, Record
from ctkd.distill.config import TrainConfig
from ctkd.distill.evaluation.metrics import GIVEN_BITS, METRICS
from ctkd.errors import SettingError
from ctkd.registry import describe

__all__ = ["Job", "Plan", "Training", "best_trial", "digest", "settings_text"]

# They say where something lies, or how much is kept, not what comes out.
_PLACES = {"data", "eval_data", "columns", "output", "teacher_cache"}
_FREE = {"device", "save_steps", "logging_steps", "keep_checkpoints", "report_to", "measure"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run to train.

    Args:
        key: Equal for runs that give the same student.
        config: For `ctkd.distill.training.run.train`.
        settings: As a record shows them: with the user's own data, without places, and with what
            takes effect where nothing was given.
    """

    key: str
    config: TrainConfig
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return self.config.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A measurement of a trained student on one split.

    Args:
        key: Of the record it ends in.
        method: What is measured.
        stage: What the measurement is for.
        split: Where.
        varied: The point of the method's grid.
        seed: Of the run.
        training: The run.
    """

    key: str
    method: Method
    stage: Literal["trial", "final"]
    split: Literal["dev", "test"]
    varied: dict[str, Any]
    seed: int
    training: Training

    @property
    def title(self) -> str:
        """For a line of progress."""
        name = self.method.name
        if self.varied:
            name += f" {settings_text(self.varied)}"
        return f"{name}, seed {self.seed}"


class Plan:
    """All jobs of a comparison.

    Args:
        config: The comparison.
        splits: Its rows.
        fingerprints: Of what else the results depend on: "student" and "teacher".
        students: What runs begin from where it is not the student of the settings, by seed.
        cache: Folder of the teacher cache that runs with a teacher use; None for a live teacher.
        texts: Folder of the teacher cache that holds what the teacher wrote; None if it writes
            nothing.
    """

    def __init__(
        self,
        config: CompareConfig,
        splits: Splits,
        fingerprints: Mapping[str, str],
        *,
        students: Mapping[int, str] | None = None,
        cache: Path | None,
        texts: Path | None,
    ) -> None:
        self.config = config
        self.splits = splits
        self.fingerprints = dict(fingerprints)
        self.students = dict(students or {})
        self.cache, self.texts = cache, texts
        self.steps = _steps(config, len(splits.train.examples))
        self._trainings: dict[str, Training] = {}

    def trials(self) -> list[Job]:
        """Measurements on the development split, with the first seed; none without a sweep."""
        if self.splits.dev is None:
            return []
        seed = self.config.seed_values[0]
        return [
            self._job(method, "trial", varied, seed)
            for method in self.config.methods
            for varied in method.points()
        ]

    def finals(self, chosen: Mapping[str, Mapping[str, Any]]) -> list[Job]:
        """Measurements on the test split.

        Seed by seed, so that what a comparison lacks when it is stopped, all methods lack.

        Args:
            chosen: By method, the point of its grid.
        """
        return [
            self._job(method, "final", dict(chosen[method.name]), seed)
            for seed in self.config.seed_values
            for method in self.config.methods
        ]

    def reference_key(self, name: str) -> str:
        """Key of the record of the untrained student or the teacher."""
        base = self.config.base
        made_of: dict[str, Any] = {
            "reference": name,
            "fingerprints": self.fingerprints,
            "test": self.splits.test.fingerprint,
            "max_new_tokens": base.max_new_tokens,
            "templates": [base.student_template, base.teacher_template, base.teacher_shots],
        }
        if name == TEACHER and self.config.metric_name == GIVEN_BITS:
            # A teacher that wrote its answers before is not read for any other metric.
            made_of["metric"] = GIVEN_BITS
        return digest(made_of)

    def _job(
        self, method: Method, stage: Literal["trial", "final"], varied: dict[str, Any], seed: int
    ) -> Job:
        training = self._training(method, varied, seed)
        split: Literal["dev", "test"] = "dev" if stage == "trial" else "test"
        rows = self.splits.dev if stage == "trial" else self.splits.test
        key = digest(
            {
                "training": training.key,
                "method": method.name,
                "varied": varied,
                "stage": stage,
                "split": None if rows is None else rows.fingerprint,
            }
        )
        return Job(
            key=key,
            method=method,
            stage=stage,
            split=split,
            varied=varied,
            seed=seed,
            training=training,
        )

    def _training(self, method: Method, varied: dict[str, Any], seed: int) -> Training:
        config = self.config
        plain = config.train_config(method, varied, seed, max_steps=self.steps)
        settings = plain.as_dict()
        depends = {name: one for name, one in settings.items() if name not in _PLACES | _FREE}
        teacher = self.fingerprints["teacher"] if plain.needs_teacher else None
        key = digest(
            {
                "settings": depends,
                "train": self.splits.train.fingerprint,
                "curve": [self.splits.curve.fingerprint, config.curve_points],
                "student": self.fingerprints["student"],
                "teacher": teacher,
            }
        )
        if key not in self._trainings:
            points = config.curve_points
            cache = self.cache if plain.distils else self.texts
            name = re.sub(r"[^\w.=-]+", "-", f"{method.name}-seed{seed}")[:60]
            self._trainings[key] = Training(
                key=key,
                settings={
                    name: one
                    for name, one in {**settings, **_effective(plain)}.items()
                    if name not in {"output", "teacher_cache", "measure", "eval_steps", "date"}
                },
                config=replace(
                    plain,
                    student=self.students.get(seed, plain.student),
                    student_config=None,
                    data=str(self.splits.train.path),
                    eval_data=str(self.splits.curve.path),
                    columns=dict(COLUMNS),
                    measure="nothing",
                    eval_limit=len(self.splits.curve.examples),
                    eval_steps=math.ceil(self.steps / points) if points else None,
                    teacher_cache=str(cache) if plain.needs_teacher and cache else None,
                    output=str(config.folder / "runs" / f"{name}-{key[:12]}"),
                ),
            )
        return self._trainings[key]


def best_trial(trials: Sequence[Record], metric: str) -> Record:
    """The trial with the best metric; of equals the lower cross-entropy, then the first.

    Raises:
        SettingError: If there is none.
    """
    if not trials:
        raise SettingError("there is no trial to choose from; run the trials first")

    def quality(record: Record) -> tuple[float, float]:
        ce = record.losses.get("ce", math.nan)
        best = METRICS[metric].gain(0.0, record.metrics[metric])
        return best, -math.inf if math.isnan(ce) else -ce

    return max(trials, key=quality)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Write settings in a line.

    Example:
        >>> settings_text({"kd_weight": 1.5, "top_k": 64})
        'kd_weight=1.5 top_k=64'
    """
    return " ".join(f"{name}={value}" for name, value in settings.items())


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON can hold, in hexadecimal.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _effective(config: TrainConfig) -> dict[str, Any]:
    """Weights and the loss's settings, the loss's own defaults where nothing was given."""
    weights = config.weights()
    defaults = describe(config.loss).settings if config.distils else {}
    options = {**defaults, **config.loss_options}
    return {
        "ce_weight": weights.ce,
        "kd_weight": weights.kd,
        # A plugin's default may be anything, and records hold what JSON can.
        "loss_options": json.loads(json.dumps(options, default=repr)),
    }


def _steps(config: CompareConfig, rows: int) -> int:
    """Optimizer steps of every run, also of one that leaves rows out."""
    base = config.base
    if base.max_steps is not None:
        return base.max_steps
    batches = math.ceil(rows / base.batch_size)
    steps = math.ceil(math.ceil(batches / base.grad_accumulation) * base.epochs)
    return steps if config.most_steps is None else min(steps, config.most_steps)
