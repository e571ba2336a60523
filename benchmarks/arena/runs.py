"""Finished runs of an arena: read from its file, counted, and what is to be trained next.

Of each method weights are tried on development texts, first a tenth, a third and the whole of its
default, then one beyond an end that is best. Other seeds are trained at the best one.
"""

import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import ctkd
from ctkd.distill.config import SFT
from ctkd.errors import DataError

FACTORS = (0.1, 0.3, 1.0)
MOST_WEIGHTS = 5


@dataclass(frozen=True)
class Method:
    """A loss with its settings.

    Attributes:
        label: Of the tables.
        loss: Its name, or sft.
        options: Its settings.
        factors: Of its default weight, what is tried first.
    """

    label: str
    loss: str
    options: dict[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] = field(default=FACTORS, compare=False)

    def weights(self) -> list[float]:
        """The weights that are tried first, ascending."""
        if self.loss == SFT:
            return [0.0]
        default = ctkd.describe(self.loss).default_weights.kd
        return [_rounded(factor * default) for factor in self.factors]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an arena trains.

    Attributes:
        methods: Those compared, sft among them.
        seeds: Of each method, after seed 0, which only chooses weights.
        settled: When that was, for the report.
    """

    methods: Sequence[Method]
    seeds: int
    settled: str = "which was settled before any test text was looked at"


DEFAULT_WEIGHTS = Plan(
    methods=[
        Method(SFT, SFT),
        *(
            Method(label, loss, options, factors=(1.0,))
            for label, loss, options in (
                ("shared_kl", "shared_kl", {}),
                ("uld, chunk", "uld", {"pairing": "chunk"}),
                ("multilevelot, chunk", "multilevelot", {"pairing": "chunk"}),
                ("bpm", "bpm", {}),
                ("multilevelot_released", "multilevelot_released", {}),
                ("uld, position", "uld", {"pairing": "position"}),
                ("multilevelot, position", "multilevelot", {"pairing": "position"}),
            )
        ),
    ],
    seeds=3,
)
"""For long runs: some losses, each at its default weight, with few seeds."""


def _rounded(weight: float) -> float:
    """Weights are compared as they are written."""
    return float(f"{weight:.3g}")


Documents = Mapping[str, tuple[float, int]]
"""Bits and bytes by story."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        method: Its label.
        weight: Of the loss.
        seed: Of the weights and the order of the rows.
        seconds: Of training.
        dev: Of the development texts.
        test: Of the test texts.
        score: Of answers to the test rows' prompts, in percent, where there are prompts.
        date: When it was finished, as ISO 8601 has it.
    """

    method: str
    weight: float
    seed: int
    seconds: float
    dev: Documents
    test: Documents
    score: float | None = None
    date: str = ""

    @property
    def key(self) -> tuple[str, float, int]:
        return self.method, self.weight, self.seed


def bits_per_byte(documents: Documents) -> float:
    """All bits over all bytes."""
    found = documents.values()
    return math.fsum(bits for bits, _ in found) / sum(size for _, size in found)


def read_runs(
    path: Path, data: str, methods: Sequence[Method]
) -> tuple[list[Run], dict[str, Documents]]:
    """The runs of these methods on these data that a file holds, and test texts of whole models.

    Raises:
        DataError: If the file cannot be read.
    """
    runs: dict[tuple[str, float, int], Run] = {}
    models: dict[str, Documents] = {}
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; move it away") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("data") != data:
                continue
            if "loss" not in row:
                models[row["method"]] = _documents(row["test"])
                continue
            # Rows of a method that is no longer compared, or was defined otherwise, stay behind.
            if Method(row["method"], row["loss"], row["options"]) in methods:
                run = Run(
                    method=row["method"],
                    weight=float(row["weight"]),
                    seed=int(row["seed"]),
                    seconds=float(row["seconds"]),
                    dev=_documents(row["dev"]),
                    test=_documents(row["test"]),
                    score=row.get("score"),
                    date=row.get("date", ""),
                )
                runs[run.key] = run
        except (ValueError, TypeError, LookupError, AttributeError):
            click.echo(f"{path}: line {number} is damaged; its run is done again", err=True)
    return list(runs.values()), models


def _documents(found: Mapping[str, Any]) -> Documents:
    """Bits and bytes of each story of a row.

    Raises:
        ValueError: If there are none, or one is no number.
    """
    documents = {story: (float(bits), int(size)) for story, (bits, size) in found.items()}
    if not documents or not all(math.isfinite(bits) and size for bits, size in documents.values()):
        raise ValueError("bits that are no numbers")
    return documents


def chosen_weights(methods: Iterable[Method], runs: Iterable[Run]) -> dict[str, float | None]:
    """The weight of each method that is best on development texts; None while it is looked for."""
    tried = tried_weights(runs)
    chosen: dict[str, float | None] = {}
    for one in methods:
        if len(one.weights()) == 1:
            chosen[one.label] = one.weights()[0]
        elif next_weight(one, tried[one.label]) is None:
            chosen[one.label] = best_weight(tried[one.label])
        else:
            chosen[one.label] = None
    return chosen


def tried_weights(runs: Iterable[Run]) -> Mapping[str, Mapping[float, float]]:
    """Bits per byte of development texts of seed 0, by method and weight."""
    tried: dict[str, dict[float, float]] = defaultdict(dict)
    for run in runs:
        if run.seed == 0:
            tried[run.method][run.weight] = bits_per_byte(run.dev)
    return tried


def best_weight(tried: Mapping[float, float]) -> float:
    """The weight of the least bits per byte, the smaller one of two that are equal."""
    return min(sorted(tried), key=lambda weight: tried[weight])


def next_weight(method: Method, tried: Mapping[float, float]) -> float | None:
    """The weight to try next, or None if the best of them lies between others, or many were tried.

    Example:
        >>> next_weight(Method("uld", "uld"), {0.15: 2.1, 0.45: 2.0, 1.5: 2.2}) is None
        True
        >>> next_weight(Method("uld", "uld"), {0.15: 2.0, 0.45: 2.1, 1.5: 2.2})
        0.045
    """
    for weight in method.weights():
        if weight not in tried:
            return weight
    if len(tried) >= MOST_WEIGHTS:
        return None
    best = best_weight(tried)
    # Thirds, as ten is about three times three.
    if best == max(tried):
        return _rounded(best / FACTORS[1])
    return _rounded(best * FACTORS[1]) if best == min(tried) else None


def wanted(plan: Plan, runs: Sequence[Run]) -> Iterator[tuple[Method, float, int]]:
    """What is to be trained as far as the runs tell, what matters most first."""
    done = {run.key for run in runs}
    weights, tried = chosen_weights(plan.methods, runs), tried_weights(runs)
    for method in plan.methods:
        if weights[method.label] is None:
            weight = next_weight(method, tried[method.label])
            if weight is not None:
                yield method, weight, 0
    for seed in range(1, plan.seeds + 1):
        for method in plan.methods:
            weight = weights[method.label]
            if weight is not None and (method.label, weight, seed) not in done:
                yield method, weight, seed


class Arena(ABC):
    """A student, a teacher and texts.

    Attributes:
        name: On the command line and of its files.
        limits: What its report does not show.
        plan: What it trains.
        data: Of the texts and settings, which runs have in common.
        metric: Of the score of answers.
        models: Those that are measured as they are: the teacher, and a student that can be.
    """

    name: str
    limits: str
    metric: str | None
    plan: Plan
    data: str
    models: Sequence[str] = ("teacher", "start")

    def prepare(self) -> None:  # noqa: B027 - not abstract, as most arenas make nothing
        """Make what the runs have in common, if there is any; called before they begin.

        Raises:
            CtkdError: If they cannot be trained here.
        """

    @abstractmethod
    def of_model(self, name: str) -> dict[str, Any]:
        """A row of one of them."""

    @abstractmethod
    def run(self, method: Method, weight: float, seed: int) -> dict[str, Any]:
        """Train and measure a student; a row of the file."""
