"""The arena looks for weights, trains what is left, and says what the rows say."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import arena
from benchmarks.arena import (
    SFT,
    Method,
    Report,
    Run,
    best_weight,
    next_weight,
    paired,
    read_runs,
    wanted,
)
from ctkd.errors import DataError
from tests.distill.tiny_runs import Workplace

METHODS = [Method(SFT, SFT), *(Method(f"uld, {one}", "uld") for one in ("position", "chunk"))]
# Of each method the weight that is best.
BEST = {SFT: 0.0, "uld, position": 0.045, "uld, chunk": 0.45}


def finished(method: Method, weight: float, seed: int) -> Run:
    """A run whose loss costs more the farther its weight lies from the best one."""
    off = abs(np.log(weight / BEST[method.label])) if weight else 0.0
    generator = np.random.default_rng(seed)
    bits = 1000.0 * (2.0 + 0.1 * off + 0.05 * generator.standard_normal(4))
    bits -= 100.0 * (method.label == "uld, chunk")
    texts = {str(number): (float(one), 1000) for number, one in enumerate(bits)}
    return Run(method.label, weight, seed, 1.0, texts, texts)


def test_weights_are_looked_for_and_then_seeds_are_trained():
    runs: list[Run] = []
    order = []
    while left := list(wanted(METHODS, runs)):
        order.append(left[0])
        runs.append(finished(*left[0]))
    assert len({run.key for run in runs}) == len(runs)
    tried = {label: [w for m, w, s in order if (m.label, s) == (label, 0)] for label in BEST}
    assert tried == {SFT: [0.0], "uld, position": [0.15, 0.45, 1.5, 0.045, 0.0135],
                     "uld, chunk": [0.15, 0.45, 1.5]}  # fmt: skip
    for method in METHODS:
        seeds = [s for m, w, s in order if m is method and w == BEST[m.label]]
        assert sorted(seeds) == list(range(arena.MORE_SEEDS + 1))
    # Nothing but chosen weights is trained with other seeds.
    assert all(w == BEST[m.label] for m, w, s in order if s)


def test_weights_have_an_end():
    tried = {0.15: 3.0, 0.45: 2.9, 1.5: 2.8}
    uld = METHODS[1]
    while (weight := next_weight(uld, tried)) is not None:
        tried[weight] = 3.0 - weight
    assert sorted(tried) == [0.15, 0.45, 1.5, 5.0, 16.7]
    # More weights than were asked for end it too, and of two that are equal the smaller is taken.
    assert next_weight(uld, {**tried, 50.0: 1.0}) is None
    assert best_weight({1.5: 2.0, 0.15: 2.0, 0.45: 3.0}) == 0.15


def test_a_report_says_what_the_rows_say(tmp_path):
    runs = [finished(one, weight, seed) for one in METHODS[:2] for weight in [BEST[one.label]]
            for seed in range(3)]  # fmt: skip
    runs += [
        finished(METHODS[2], weight, seed) for weight in (0.15, 0.45, 1.5) for seed in (0, 1, 2)
    ]
    # A weight that only seed 0 had counts for nothing else.
    runs += [finished(METHODS[1], weight, 0) for weight in (0.15, 0.45, 1.5, 0.0135)]
    report = Report(METHODS, runs, {"0": (1000.0, 1000)})
    found = report.against_sft["uld, chunk"]
    assert found.mean == pytest.approx(-0.1) and report.p_values["uld, chunk"] < 1e-6
    assert report.against_sft["uld, position"].mean == 0.0
    sft = np.mean([arena.bits_per_byte(run.test) for run in report.of(SFT) if run.seed])
    lines = report.table().splitlines()
    assert "uld, chunk" in lines[2] and f"{10 / (sft - 1):+.1f} %" in lines[2]
    assert paired(report.of(SFT), report.of(SFT)[:2])[0] is None
    others = replace(runs[1], test={"0": (1.0, 999)})
    with pytest.raises(DataError, match="on the same texts, got others with seed 1"):
        paired(report.of(SFT), [others, *report.of(SFT)[2:]])
    assert "Not measured yet." in Report(METHODS[:1], runs, None).contrasts()
    no_gap = Report(METHODS, runs, report.of(SFT)[0].test | {"0": (9000.0, 1000)})
    assert "%" not in no_gap.table().splitlines()[2]


def test_a_row_counts_for_the_method_that_it_names(tmp_path):
    """A method that is gone, or has other settings now, leaves its rows unread."""
    path, texts = tmp_path / "rows.jsonl", {"0": (1.0, 1)}
    row = {"data": "x", "weight": 1.0, "seed": 0, "seconds": 1.0, "dev": texts, "test": texts}
    rows = [{"method": one, "loss": "uld", "options": options, **row} for one, options in
            (("uld, chunk", {}), ("uld, chunk", {"pairing": "chunk"}), ("gone", {}))]  # fmt: skip
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    found, teacher = read_runs(path, "x", METHODS)
    assert [run.method for run in found] == ["uld, chunk"] and teacher is None
    assert next(wanted(METHODS, found))[0] is METHODS[0]


def test_a_run_is_a_row_and_is_not_repeated(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    monkeypatch.setenv("CTKD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(arena, "TEACHER", str(place.teacher))
    monkeypatch.setattr(arena, "SETTINGS", {"max_steps": 1, "batch_size": 2})
    monkeypatch.setattr(arena, "all_methods", lambda: METHODS[:1])
    monkeypatch.setattr(arena, "MORE_SEEDS", 2)
    monkeypatch.setattr(arena, "SEEDS", 2)
    short = {split: rows[:3] for split, rows in arena.python_rows().items()}
    for rows in short.values():
        rows[:] = [{**row, "text": row["text"][:300]} for row in rows]
    monkeypatch.setattr(arena, "python_rows", lambda: short)
    words = ["scratch", "--results", str(tmp_path)]
    result = CliRunner().invoke(arena.main, words)
    assert result.exit_code == 1 and "no two seeds of a method and of sft yet" in result.output
    path = tmp_path / "arena_scratch.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["teacher", SFT, SFT, SFT]
    assert [row["seed"] for row in rows[1:]] == [0, 1, 2]
    assert rows[1]["test"] != rows[2]["test"] and set(rows[1]["test"]) == set(rows[0]["test"])
    assert CliRunner().invoke(arena.main, words).exit_code == 1
    assert len(path.read_text().splitlines()) == len(rows)
    # Killed while it wrote.
    path.write_text(path.read_text()[:-40])
    result = CliRunner().invoke(arena.main, words)
    assert f"line {len(rows)} was cut off; its run is done again" in result.stderr
    again = path.read_text().splitlines()
    assert len(again) == len(rows) + 1 and json.loads(again[-1])["test"] == rows[-1]["test"]
    bad = CliRunner().invoke(arena.main, [*words, "--share", "3/2"])
    assert bad.exit_code == 2 and "'3/2' is no share of the work" in bad.output
