"""The arena looks for weights, trains what is left, and says what the rows say."""

import json
import math
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset

from benchmarks.arena import __main__ as command
from benchmarks.arena import answers, few_labels, paper, scratch
from benchmarks.arena.few_labels import FewLabels
from benchmarks.arena.paper import TASKS, Paper
from benchmarks.arena.report import Report, paired
from benchmarks.arena.runs import (
    Method,
    Plan,
    Run,
    best_weight,
    bits_per_byte,
    next_weight,
    read_runs,
    tried_weights,
    wanted,
)
from benchmarks.arena.texts import cut, python_rows
from benchmarks.arena.transfer import give_vocabulary
from ctkd.distill.config import SFT
from ctkd.errors import DataError
from ctkd.registry import describe, list_losses
from ctkd.tokenization.token_bytes import TokenBytes
from tests.distill import tiny
from tests.distill.conftest import curves_are_not_drawn as curves_are_not_drawn
from tests.distill.tiny_runs import Workplace

ROOT = Path(__file__).parents[2]
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
    while left := list(wanted(Plan(methods=METHODS, seeds=12), runs)):
        order.append(left[0])
        runs.append(finished(*left[0]))
    assert len({run.key for run in runs}) == len(runs)
    tried = {label: [w for m, w, s in order if (m.label, s) == (label, 0)] for label in BEST}
    assert tried == {SFT: [], "uld, position": [0.15, 0.45, 1.5, 0.045, 0.0135],
                     "uld, chunk": [0.15, 0.45, 1.5]}  # fmt: skip
    for method in METHODS:
        seeds = [s for m, w, s in order if m is method and w == BEST[m.label]]
        assert sorted(seeds) == list(range(0 if method.loss != SFT else 1, 13))
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
    report = Report(METHODS, runs, {"teacher": {"0": (1000.0, 1000)}})
    found = report.against_sft["uld, chunk"]
    assert found.mean == pytest.approx(-0.1) and report.p_values["uld, chunk"] < 1e-6
    assert report.against_sft["uld, position"].mean == 0.0
    sft = np.mean([bits_per_byte(run.test) for run in report.of(SFT) if run.seed])
    lines = report.table().splitlines()
    assert "uld, chunk" in lines[2] and f"{10 / (sft - 1):+.1f} %" in lines[2]
    assert paired(report.of(SFT), report.of(SFT)[:2]) is None
    others = replace(runs[1], test={"0": (1.0, 999)})
    with pytest.raises(DataError, match="on the same texts, got others of sft with seed 1"):
        paired(report.of(SFT), [others, *report.of(SFT)[2:]])
    assert "Not measured yet." in Report(METHODS[:1], runs, {}).contrast_table()
    no_gap = Report(METHODS, runs, {"teacher": report.of(SFT)[0].test | {"0": (9000.0, 1000)}})
    assert "%" not in no_gap.table().splitlines()[2]


def test_a_row_counts_for_the_method_that_it_names(tmp_path, capsys):
    """A method that is gone, or has other settings now, leaves its rows unread."""
    path, texts = tmp_path / "rows.jsonl", {"0": (1.0, 1)}
    row = {"data": "x", "weight": 1.0, "seed": 0, "seconds": 1.0, "dev": texts, "test": texts}
    rows = [{"method": one, "loss": "uld", "options": options, **row} for one, options in
            (("uld, chunk", {}), ("uld, chunk", {"pairing": "chunk"}), ("gone", {}))]  # fmt: skip
    damaged = [{**rows[0], "dev": {"0": (math.nan, 1)}}, {**rows[0], "test": []}, {"data": "x"},
               {**rows[0], "weight": None}]  # fmt: skip
    text = "".join(f"{json.dumps(one)}\n" for one in [*rows, *damaged])
    path.write_bytes(b'\n"\xff"\n' + text.encode())
    found, models = read_runs(path, "x", METHODS)
    assert [run.method for run in found] == ["uld, chunk"] and not models
    said = capsys.readouterr().err
    assert [int(one) for one in re.findall(r"line (\d+) is damaged", said)] == [2, 6, 7, 8, 9]
    with pytest.raises(DataError, match="cannot be read: Is a directory; move it away"):
        read_runs(tmp_path, "x", METHODS)
    assert next(wanted(Plan(methods=METHODS, seeds=2), found))[0] is METHODS[1]


def test_a_run_is_a_row_and_is_not_repeated(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scratch, "TEACHER", str(place.teacher))
    monkeypatch.setattr(scratch, "SETTINGS", {"epochs": 2, "batch_size": 2})
    shared_kl = Method("shared_kl", "shared_kl", {"rest": "class"}, factors=(1.0,))
    monkeypatch.setattr(scratch, "all_methods", lambda: [METHODS[0], shared_kl])
    monkeypatch.setattr(
        scratch, "Plan", lambda methods, seeds, settled: Plan(methods=methods, seeds=2)
    )
    short = {
        split: [{**row, "text": row["text"][:90]} for row in rows[:3]]
        for split, rows in python_rows().items()
    }
    monkeypatch.setattr(scratch, "python_rows", lambda: short)
    words = ["scratch", "--results", str(tmp_path)]
    result = CliRunner().invoke(command.main, [*words, "--minutes", "0"])
    assert result.exit_code == 0
    assert result.output.endswith("in scratch yet: no report\nstopped; the same command goes on\n")
    with pytest.raises(KeyboardInterrupt), command.stopped_after(1e-3, time.monotonic()):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    result = CliRunner().invoke(command.main, words)
    assert result.exit_code == 0, result.output
    path = tmp_path / "arena_scratch.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["teacher", SFT, "shared_kl", SFT, "shared_kl"]
    assert [row["seed"] for row in rows[1:]] == [1, 1, 2, 2]
    assert rows[1]["test"] != rows[3]["test"] and set(rows[1]["test"]) == set(rows[0]["test"])
    report = (tmp_path / "arena_scratch.md").read_text()
    assert f"4 runs, the last of {rows[-1]['date'][:10]};" in report
    assert "| shared_kl | 1        | 2       |" in report and "Not measured yet." in report
    picture = (tmp_path / "arena_scratch.svg").read_text()
    (said,) = re.findall(r"\| ([+-]\d\.\d{4}) +\| \[", report)
    assert f">{said} [" in picture and "To plain fine-tuning" in picture
    assert CliRunner().invoke(command.main, [*words, "--report"]).exit_code == 0
    assert len(path.read_text().splitlines()) == len(rows)
    # Killed while it wrote, and something else.
    path.write_text(f"5\n{path.read_text()[:-40]}")
    result = CliRunner().invoke(command.main, words)
    assert f"line {len(rows) + 1} is damaged; its run is done again" in result.stderr
    again = path.read_text().splitlines()
    assert len(again) == len(rows) + 2 and json.loads(again[-1])["test"] == rows[-1]["test"]
    bad = CliRunner().invoke(command.main, [*words, "--share", "3/2"])
    assert bad.exit_code == 2 and "'3/2' is no share of the work" in bad.output


def test_few_labels_are_mixed_with_the_teachers_answers(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(answers, "TEACHER", str(place.teacher))
    monkeypatch.setattr(answers, "STUDENT", str(place.student))
    shared_kl = Method("shared_kl", "shared_kl", factors=(1.0,))
    for name, value in {
        "SETTINGS": {"max_steps": 1, "batch_size": 2},
        "ROWS": {"train": 6, "dev": 2, "test": 3},
        "MAX_NEW_TOKENS": 2,
        "DEFAULT_WEIGHTS": Plan(methods=[METHODS[0], shared_kl], seeds=2),
    }.items():
        monkeypatch.setattr(few_labels, name, value)
    for split, count in (("train", 20), ("validation", 4)):
        rows = [
            {"story": f"{split} {one % 10}", "context": "x", "question": "w?", "answers": ["a b"]}
            for one in range(count)
        ]
        Dataset.from_list(rows).to_parquet(tmp_path / f"fairytaleqa_{split}.parquet")
    words = ["few_labels", str(tmp_path), "--results", str(tmp_path)]
    # Both have one teacher.
    parts = [partial(FewLabels, labels=count) for count in (2, 4)]
    monkeypatch.setitem(command.ARENAS, "few_labels", parts)
    result = CliRunner().invoke(command.main, words)
    assert result.exit_code == 0, result.output
    (said,) = (tmp_path / "cache").glob("arena/answers-*/answers.json")
    for count in (2, 4):
        # A report makes it too, while others train.
        mixed = FewLabels(tmp_path, tmp_path / "cache/arena", labels=count).training
        labels = [json.loads(line)["answers"] for line in mixed.read_text().splitlines()]
        spoken = [[one] for one in json.loads(said.read_text())[count:] if one.strip()]
        assert labels == [["a b"]] * count + spoken
    stories = [json.loads(line)["story"] for line in mixed.read_text().splitlines()]
    assert "train 0" not in stories and len(set(stories[:6])) == len(stories[:6])
    report = (tmp_path / "arena_few_labels_2.md").read_text()
    assert report.splitlines()[4].endswith("recovered   | f1        |")
    assert (
        CliRunner()
        .invoke(command.main, [*words[:1], *words[2:]])
        .output.endswith("few_labels needs FairytaleQA; name the folder of its two files\n")
    )


def test_the_paper_s_tasks_need_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    words = ["paper", str(tmp_path), "--results", str(tmp_path)]
    for name, (task, group) in TASKS.items():
        result = CliRunner().invoke(command.main, words)
        assert f"{name}_train.parquet does not exist" in result.output
        asked = {"qa": {"context": "x y", "question": "w?", "answers": ["a b"]},
                 "summarization": {"dialogue": "x y", "summaries": ["a b"]}}  # fmt: skip
        rows = [{**asked[task], group: f"{one}"} for one in range(40)]
        for split in ("train", "validation"):
            Dataset.from_list(rows).to_parquet(tmp_path / f"{name}_{split}.parquet")
    result = CliRunner().invoke(command.main, words)
    assert result.exit_code == 1 and "no report" not in result.output
    said = (
        r"paper_fairytaleqa, one of the arena's 6 parts, needs a GPU: its 24 runs would take \w+ \d"
    )
    assert re.search(said, result.output)
    # What rows of another machine say needs none.
    qa = [partial(Paper, data_set="fairytaleqa", labelled=one) for one in (True, False)]
    monkeypatch.setitem(command.ARENAS, "paper", qa)
    result = CliRunner().invoke(command.main, [*words, "--report"])
    assert result.exit_code == 0 and "in paper_fairytaleqa_unlabelled yet: no" in result.output
    monkeypatch.setattr(paper, "is_cpu", lambda _: False)
    found = Paper(tmp_path, tmp_path / "work", "fairytaleqa", labelled=False)
    sizes = [len(found.examples(split)) for split in ("train", "dev", "test")]
    assert sizes == [38, 2, 40] and found.metric == "f1"
    assert found.data != Paper(tmp_path, tmp_path / "work", "fairytaleqa", labelled=True).data


def test_a_model_is_given_another_vocabulary():
    old, new = tiny.tokenizer(330), tiny.tokenizer(280)
    given = tiny.model(len(old), seed=3)
    given.tie_weights()
    before = given.get_input_embeddings().weight.detach().clone()
    give_vocabulary(given, old, new)
    after = given.get_input_embeddings().weight
    assert given.config.vocab_size == len(new) == after.shape[0]
    table, of_old = TokenBytes.from_tokenizer(new), TokenBytes.from_tokenizer(old)
    for index, piece in enumerate(table.bytes_of):
        if piece.isascii() and table.roles[index] == "text":
            ids = old(piece.decode(), add_special_tokens=False).input_ids
            torch.testing.assert_close(after[index], before[ids].mean(0))
    assert torch.equal(after[new.eos_token_id], before[old.eos_token_id])
    # A token of bytes that are no text is the mean of their tokens.
    lone = table.bytes_of.index(b"\xc3")
    assert torch.equal(after[lone], before[of_old.bytes_of.index(b"\xc3")])


def test_texts_are_cut_into_pieces():
    rows = {"train": [{"story": "a", "text": "one two three four"}, {"story": "b", "text": "five"}]}
    pieces = [{"story": "a", "text": "one two "}, {"story": "a", "text": "three "}]
    assert cut(rows, 9, {"train": 2}) == {"train": pieces}
    whole = cut(rows, 9, {"train": 9})["train"]
    assert "".join(one["text"] for one in whole) == "one two three fourfive"


def test_an_arena_without_rows_has_no_report(tmp_path):
    result = CliRunner().invoke(command.main, ["transfer", "--report", "--results", str(tmp_path)])
    assert result.exit_code == 0
    assert "no two seeds of a method and of sft in transfer yet: no report" in result.output


def test_what_losses_say_of_themselves_was_measured_in_scratch():
    path = ROOT / "benchmarks/results/arena_scratch.jsonl"
    data = json.loads(path.read_text().splitlines()[-1])["data"]
    methods = scratch.all_methods()
    report = Report(methods, *read_runs(path, data, methods))
    teacher = report.models["teacher"]
    for name in list_losses():
        facts = describe(name)
        label = f"{name}, position" if "pairing" in facts.settings else name
        found, measured = report.against_sft[label], facts.measured
        assert measured.kd == report.weights[label], name
        sft = report.mean(label) - found.mean
        figures = found.mean, *found.interval(), -found.mean / (sft - teacher)
        said = measured.difference, measured.low, measured.high, measured.share
        assert said == tuple(round(one, 4) for one in figures[:3]) + (round(figures[3], 3),), name
        tried = tried_weights(report.runs)
        at_default = tried[label][facts.default_weights.kd] - tried[SFT][0.0]
        assert measured.at_default == round(at_default, 4), name
        assert measured.helped == (name in ("bpm", "multilevelot_released", "shared_kl"))
        if name not in ("multilevelot_token", "multilevelot_sequence"):
            row = f"| `{name}` | {measured.kd:g} ({facts.default_weights.kd:g}) | "
            assert row in (ROOT / "README.md").read_text(), name
