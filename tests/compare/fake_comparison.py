"""Made-up comparisons: no model, equal arguments give equal records, and known true differences."""

import dataclasses
import math
import random
from typing import Any

from ctkd.compare.records import TEACHER, UNTRAINED, Answer, Comparison, Record
from ctkd.distill.evaluation.metrics import ANSWER_METRICS

METHODS = ("sft", "uld kd_weight=1.5", "mined", "multilevelot")
WORDS = (
    "well rope door shelf bottle vinegar wine cellar nephew summer depth iron farm water".split()
)
QUALITY = {UNTRAINED: 12.0, TEACHER: 55.0}


def fake_comparison(
    *,
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0, 1, 2),
    examples: int = 36,
    groups: int = 12,
    steps: int = 60,
    logging_steps: int = 2,
    eval_steps: int | None = 10,
    gain: float = 4.0,
    trials: bool = True,
    salt: str = "",
) -> Comparison:
    """A comparison in which every method is better than the one before.

    Args:
        methods: The first is the baseline.
        seeds: One run of each method per seed.
        examples: Held-out examples, spread evenly over the groups.
        groups: Passages.
        steps: Optimizer steps of every run.
        logging_steps: Steps between two logs of the training cross-entropy.
        eval_steps: Steps between two held-out cross-entropies; None logs none.
        gain: How many points of the metric each method has over the one before, without noise.
        trials: Whether settings were tried on a development split.
        salt: Another one gives other noise.
    """
    asked = [_ask(number, groups) for number in range(examples)]
    common = {"examples": asked, "salt": salt}
    quality = {method: 30.0 + gain * place for place, method in enumerate(methods)}
    finals = tuple(
        dataclasses.replace(
            _record(method, quality[method], seed, **common),
            stage="final",
            settings=_settings(method, seed, steps),
            varied=_varied(method),
            losses={"ce": 2.4 - 0.05 * place + 0.01 * seed},
            history=_history(place, seed, steps, logging_steps, eval_steps, salt),
            steps=steps,
            seconds_per_step=0.4 + 0.15 * place,
            seconds=steps * (0.4 + 0.15 * place),
            peak_memory=(3 << 30) + place * (1 << 28),
        )
        for place, method in enumerate(methods)
        for seed in seeds
    )
    return Comparison(
        settings={
            "student": "smollm2-135m-instruct",
            "teacher": "gemma-3-270m",
            "data": "pocketqa",
            "task": "qa",
            "max_steps": steps,
            "batch_size": 4,
            "learning_rate": 5e-5,
            "dtype": "float32",
            "development rows": 24 if trials else 0,
            "curve rows": 24 if trials else min(32, examples),
        },
        metric="f1",
        baseline=methods[0],
        references=tuple(_record(name, QUALITY[name], None, **common) for name in QUALITY),
        finals=finals,
        trials=_trials(methods, quality, common) if trials else (),
        preparation={"teacher cache": 81.4, "fetching models": 12.0},
    )


def without_eval_ce(comparison: Comparison, *methods: str) -> Comparison:
    """The same, but these methods' held-out cross-entropy was never logged."""
    return _with_history(
        comparison, methods, lambda row: {k: v for k, v in row.items() if k != "eval_ce"}
    )


def with_nan(comparison: Comparison, *methods: str, after: int) -> Comparison:
    """The same, but these methods' losses are nan after a step."""
    return _with_history(
        comparison,
        methods,
        lambda row: {k: math.nan if k.endswith("ce") and row["step"] > after else v
                     for k, v in row.items()},
    )  # fmt: skip


def _with_history(comparison: Comparison, methods: tuple[str, ...], change: Any) -> Comparison:
    finals = tuple(
        dataclasses.replace(one, history=tuple(map(change, one.history)))
        if one.method in methods
        else one
        for one in comparison.finals
    )
    return dataclasses.replace(comparison, finals=finals)


def _ask(number: int, groups: int) -> Answer:
    noise = random.Random(f"question {number}")
    told = " ".join(noise.choice(WORDS) for _ in range(60))
    wanted = " ".join(noise.sample(WORDS, 3))
    question = f"What did the {wanted.split()[0]} hold, {number}?"
    return Answer(
        id=f"p{number % groups}-q{number // groups}",
        group=f"p{number % groups}",
        prompt=f"Context: {told}.\nQuestion: {question}\nAnswer:",
        prediction="",
        references=(wanted, wanted.split()[0]),
        scores={},
    )  # fmt: skip


def _answer(asked: Answer, quality: float, name: str) -> Answer:
    noise = random.Random(ascii(f"{name} {asked.id}"))
    value = min(max(noise.gauss(quality, 18.0) + _ease(asked), 0.0), 100.0)
    right = asked.references[0].split()
    kept = round(len(right) * value / 100)
    prediction = " ".join([*right[:kept], *(noise.choice(WORDS) for _ in range(3 - kept))])
    scores = {"f1": value, "exact_match": 100.0 * (value > 80), "rouge_lsum": 0.9 * value}
    return dataclasses.replace(asked, prediction=prediction, scores=scores)


def _ease(asked: Answer) -> float:
    """How much easier an example is than others, mostly because of its group."""
    return random.Random(asked.group).gauss(0, 12) + random.Random(asked.id).gauss(0, 6)


def _record(
    method: str, quality: float, seed: int | None, *, examples: list[Answer], salt: str
) -> Record:
    answers = tuple(_answer(one, quality, f"{salt} {method} {seed}") for one in examples)
    metrics = {
        name: math.fsum(a.scores[name] for a in answers) / len(answers) for name in ANSWER_METRICS
    }
    return Record(
        key=f"{method} seed={seed}",
        method=method,
        stage="reference",
        split="test",
        seed=seed,
        settings={},
        varied={},
        metrics=metrics,
        answers=answers,
        losses={"ce": 3.1} if method == UNTRAINED else {},
    )


def _varied(method: str) -> dict[str, Any]:
    return {"kd_weight": 1.5} if method.startswith(("uld", "multilevelot")) else {}


def _settings(method: str, seed: int, steps: int) -> dict[str, Any]:
    loss = method.split()[0]
    return {
        "loss": "sft" if loss == "seqkd" else loss,
        "answers": "teacher" if loss == "seqkd" else "data",
        "kd_weight": 1.5 if _varied(method) else None,
        "student": "smollm2-135m-instruct",
        "max_steps": steps,
        "warmup": 0.1,
        "max_length": 1024,
        "seed": seed,
    }


def _history(
    place: int, seed: int, steps: int, logging_steps: int, eval_steps: int | None, salt: str
) -> tuple[dict[str, Any], ...]:
    noise = random.Random(f"{salt} {place} {seed}")
    rows = []
    for step in range(steps + 1):
        ideal = 2.2 - 0.06 * place + 1.2 * math.exp(-step / 14.0)
        seconds = step * (0.4 + 0.15 * place)
        if step and step % logging_steps == 0:
            ce = ideal + noise.gauss(0, 0.12)
            rows.append({"step": step, "seconds": seconds, "loss": ce, "ce": ce})
        if eval_steps and step % eval_steps == 0:
            held_out = ideal + 0.15 + noise.gauss(0, 0.015)
            rows.append({"step": step, "seconds": seconds, "eval_ce": held_out})
    return tuple(rows)


def _trials(
    methods: tuple[str, ...], quality: dict[str, float], common: dict[str, Any]
) -> tuple[Record, ...]:
    """Two trials for each method; what the finals use was the better one."""
    found = []
    for method in methods:
        for better in (False, True):
            tried = _varied(method) if better else {"kd_weight": 0.15}
            if not _varied(method):
                tried = {} if better else {"learning_rate": 1e-5}
            record = _record(method, quality[method] + 5 * better, 0, **common)
            found.append(
                dataclasses.replace(
                    record,
                    key=f"trial {method} {tried}",
                    stage="trial",
                    split="dev",
                    varied=tried,
                    losses={"ce": 2.5 - 0.1 * better},
                )
            )
    return tuple(found)
