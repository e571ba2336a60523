"""Every benchmark runs at a small size, judges by its bars, and keeps what it found."""

import json
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

import ctkd
from benchmarks import (
    cuda,
    loss_inputs,
    loss_memory,
    loss_speed,
    measuring,
    peak_process,
    peak_step,
    scaling,
    sinkhorn,
    teacher_cache,
    train_step,
)
from tests.distill.tiny_runs import Workplace
from tests.forks import python

SMALL = ["--pair", "300:200", "--tokens", "3", "--repeats", "1"]


def run(command, *words: str) -> Result:
    return CliRunner().invoke(command, words)


def finish(command, folder: Path, *words: str) -> str:
    result = run(command, *words, "--results", str(folder))
    assert result.exit_code == 0, result.output
    return result.stdout


def row_of(path: Path) -> dict:
    (line,) = path.read_text().splitlines()
    row = json.loads(line)
    assert {"date", "machine", "threads", "load", "versions"} <= row.keys()
    assert row["versions"]["torch"] == torch.__version__
    return row


def is_picture(path: Path) -> bool:
    return path.read_text().startswith("<svg")


def test_speed_of_all_losses(tmp_path, monkeypatch):
    printed = finish(loss_speed.main, tmp_path, *SMALL, "--dtype", "float32", "--note", "a test")
    row = row_of(tmp_path / "loss_speed.jsonl")
    assert row["note"] == "a test"
    (case,) = row["cases"]
    assert set(ctkd.list_losses()) < case["ratios"].keys()
    assert {"multilevelot, stored", "uld, as published"} < case["ratios"].keys()
    assert case["ratios"]["cross-entropy"] == 1.0
    assert all(name in printed for name in case["ratios"])
    assert is_picture(tmp_path / "loss_speed.svg")

    # The same on a GPU, here without one.
    commands = []

    def fail(command, **options) -> SimpleNamespace:
        commands.append(command)
        assert options["env"]["CTKD_TEST_DEVICE"] == "cpu"
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(cuda.subprocess, "run", fail)
    words = ["--device", "cpu", "--repeats", "1", "--results", str(tmp_path)]
    result = run(cuda.main, *words)
    assert result.exit_code == 1 and result.stderr.endswith("Error: failed: the tests\n")
    assert "tests/cuda/test_losses.py" in commands[0] and "tests/test_loss.py" in commands[0]
    losses, transport, head = row_of(tmp_path / "cuda.jsonl")["cases"]
    assert set(ctkd.list_losses()) < losses["ms"].keys() & head["ms"].keys()
    assert losses["failed"].keys() <= {"multilevelot, as published"}
    assert {"ctkd", "POT, batched"} < transport["ms"].keys()
    assert all(name in result.stdout for name in losses["ms"].keys() | losses["failed"].keys())
    assert is_picture(tmp_path / "cuda.svg")
    assert cuda.median([3.0, 1.0, 2.0]) == [2.0, 1.0, 3.0]
    assert cuda.median(range(20)) == [9.5, 5, 14]
    if not torch.cuda.is_available():
        result = run(cuda.main, "--results", str(tmp_path))
        assert result.exit_code == 1 and "torch finds no CUDA device" in result.stderr


def test_a_dtype_that_a_published_loss_refuses_is_told(tmp_path):
    name = "multilevelot, as published"
    printed = finish(loss_speed.main, tmp_path, *SMALL, "--dtype", "bfloat16", "--loss", name)
    (case,) = row_of(tmp_path / "loss_speed.jsonl")["cases"]
    if name in case["ratios"]:
        pytest.skip("this torch takes it")
    assert "cdist" in case["refused"][name] and case["refused"][name] in printed


def test_chosen_losses_alone(tmp_path):
    finish(loss_speed.main, tmp_path, *SMALL, "--loss", "uld", "--dtype", "float32")
    (case,) = row_of(tmp_path / "loss_speed.jsonl")["cases"]
    assert all(name == "cross-entropy" or name.startswith("uld") for name in case["ratios"])
    assert len(case["ratios"]) == 5


def test_verdicts_and_bars():
    assert [loss_speed.verdict(value, 2.0) for value in (1.9, 2.0, 2.1)] == ["yes", "yes", "NO"]
    assert loss_speed.verdict(9.0, None) == ""
    bars = {line.label: line.bar for line in loss_inputs.all_measured() if line.bar is not None}
    assert bars == {
        "multilevelot": 1.7,
        "multilevelot, stored": 1.2,
        "uld": 6.0,
        "uld top_k=256": 2.0,
        "uld top_k=256, stored": 2.0,
        **dict.fromkeys(("alm", "gold", "mined", "shared_kl"), 2.5),
    }


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (loss_speed.main, ["--loss", "ulb"], "nothing is called 'ulb'"),
        (loss_speed.main, ["--pair", "300"], "two sizes"),
        (loss_speed.main, ["--repeats", "0"], "--repeats"),
        (loss_memory.main, ["--dtype", "float16"], "--dtype"),
        (scaling.main, ["--tokens", "66"], "give multiples"),
        (train_step.main, ["--loss", "uld:many"], "whole number"),
        (train_step.main, ["--scored", "128"], "no prompt"),
    ],
)
def test_wrong_options_are_told(command, words, told, tmp_path):
    result = run(command, *words, "--results", str(tmp_path))
    assert result.exit_code == 2 and told in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        loss_memory.main,
        loss_speed.main,
        scaling.main,
        sinkhorn.main,
        teacher_cache.main,
        train_step.main,
    ],
)
def test_results_that_cannot_be_kept_are_told_before_anything_is_measured(command, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    start = time.perf_counter()
    result = run(command, "--results", str(file / "below"))
    assert result.exit_code == 2 and "cannot be made (Not a directory)" in result.output
    assert time.perf_counter() - start < 5.0
    assert file.read_text() == "kept"


def test_threads_are_set_and_told(tmp_path):
    before = torch.get_num_threads()
    try:
        words = ["--threads", str(before + 1), "--loss", "alm", "--dtype", "float32"]
        finish(loss_speed.main, tmp_path, *SMALL, *words)
        assert row_of(tmp_path / "loss_speed.jsonl")["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_scaling(tmp_path):
    words = ["--loss", "alm", "--repeats", "1", "--columns-tokens", "4"]
    sizes = ["--tokens", "8", "--tokens", "4", "--columns", "40", "--columns", "20"]
    printed = finish(scaling.main, tmp_path, *words, *sizes)
    seconds = row_of(tmp_path / "scaling.jsonl")["seconds"]
    assert list(seconds["tokens"]["alm"]) == ["4", "8"]
    assert list(seconds["vocabulary"]["cross-entropy"]) == ["20", "40"]
    assert "alm" in printed
    assert is_picture(tmp_path / "scaling.svg")


def test_growth_is_relative_to_linear():
    assert scaling.growth({64: 1.0, 128: 2.0, 256: 6.0}) == {64: 1.0, 128: 1.0, 256: 1.5}


def test_memory(tmp_path, monkeypatch):
    """Each process is run in this one, and what it would have printed is made up."""
    asked = []

    def peak_of(arguments: list[str], repeats: int) -> int:
        # The first one only compiles.
        assert arguments[:2] == ["-m", "benchmarks.peak_process"]
        assert repeats == (5 if asked else 1)
        result = run(peak_process.main, *arguments[2:])
        assert result.exit_code == 0 and result.stdout.startswith("peak of this process"), result
        asked.append(arguments)
        if "--hold" in arguments:
            return 1_000_000
        return {"alm": 1_000_336, "multilevelot": 1_010_000, "uld": 1_030_000}.get(
            arguments[2], 1_100_000
        )

    monkeypatch.setattr(loss_memory, "peak_of", peak_of)
    words = ["--pair", "300:200", "--tokens", "3", "--dtype", "float32", "--loss", "alm"]
    head = ["--head-pair", "60:50", "--head-tokens", "4", "--hidden", "8"]
    printed = finish(loss_memory.main, tmp_path, *words, *head)
    losses, heads = map(json.loads, (tmp_path / "loss_memory.jsonl").read_text().splitlines())
    (case,) = losses["cases"]
    assert case["logits_bytes"] == 4 * 3 * 300 * 4
    assert case["percent"] == {"cross-entropy": 694.4, "alm": 2.3}
    assert heads["case"]["percent"] == {"multilevelot": 10.0, "uld": 30.0}
    assert "10.0 %" in printed and "30.0 %" in printed
    # One that holds the inputs serves all that have the same inputs.
    assert sum("--hold" in one for one in asked) == 2 and len(asked) == 9
    assert all(is_picture(tmp_path / f"{name}.svg") for name in ("loss_memory", "head_memory"))


def test_what_is_held_is_the_leaf_and_its_gradient(monkeypatch):
    made = []
    monkeypatch.setattr(peak_process, "give_back_freed_memory", lambda: None)
    ones_like = torch.ones_like

    def noted(one: torch.Tensor, **options) -> torch.Tensor:
        made.append(one)
        return ones_like(one, **options)

    monkeypatch.setattr(torch, "ones_like", noted)
    size = ["--pair", "60:50", "--dtype", "float32", "--sequences", "2", "--tokens", "4", "--hold"]
    assert run(peak_process.main, "alm", *size).exit_code == 0
    assert run(peak_process.main, "uld", *size, "--hidden", "8").exit_code == 0
    shapes = [tuple(leaf.shape) for leaf in made if leaf.is_leaf and leaf.grad is not None]
    assert shapes == [(2, 4, 60), (60, 8)]


def test_a_step(tmp_path, monkeypatch):
    """Of both parts, without TRL; one process is run in this one, and peaks are made up."""

    def peak_of(arguments: list[str], repeats: int) -> int:
        assert arguments[:2] == ["-m", "benchmarks.peak_step"] and repeats == 1
        if arguments[2].startswith("gold, first"):
            result = run(peak_step.main, *arguments[2:])
            assert result.exit_code == 0 and "peak of this process" in result.stdout, result.output
        extra = {"sft, hidden states": 100, "gold, first, hidden states": 150}
        return extra.get(arguments[2], 200)

    monkeypatch.setattr(train_step, "is_installed", lambda: False)
    monkeypatch.setattr(train_step, "peak_of", peak_of)
    place = Workplace(tmp_path)
    models = ["--student", str(place.student), "--teacher", str(place.teacher)]
    size = ["--batch-size", "1", "--length", "12", "--scored", "6", "--repeats", "1"]
    words = [
        *models,
        *size,
        "--loss",
        "uld",
        "--loss",
        "uld:8",
        "--results",
        str(tmp_path / "kept"),
    ]
    result = run(train_step.main, *words)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "kept" / "train_step.jsonl").read_text().splitlines()
    stored, gold = map(json.loads, lines)
    ways = ("hidden states", "whole logits")
    assert list(stored["seconds"]) == [
        f"{label}, {way}" for way in ways for label in ("sft", "uld", "uld:8")
    ]
    assert [stored["ratios_to_own_sft"][f"sft, {way}"] for way in ways] == [1.0, 1.0]
    assert "after all" not in result.stdout
    assert gold["baseline"] == "sft, hidden states" and 'pip install "trl' in result.stderr
    assert gold["ratios"]["memory"] == {
        **{f"gold, bayesian, {way}": 2.0 for way in ways},
        "gold, first, hidden states": 1.5,
        "sft, hidden states": 1.0,
    }
    assert gold["ratios"]["time"].keys() == gold["ratios"]["memory"].keys()
    # The ways differ by nothing but a step of 1e-6 in between.
    bayesian = [gold["losses"][f"gold, bayesian, {way}"] for way in ways]
    assert bayesian[0] == pytest.approx(bayesian[1], rel=1e-3)
    assert all(
        is_picture(tmp_path / "kept" / f"{name}.svg") for name in ("train_step", "gold_step")
    )


def test_turns():
    ran = []
    functions = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = measuring.time_in_turn(functions, 2, between=lambda: ran.append("-"))
    assert "".join(ran) == "-a-b" * 3
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_what_runs_between_is_not_timed():
    seconds = measuring.time_in_turn({"a": lambda: None}, 1, between=lambda: time.sleep(0.05))
    assert seconds["a"][0] < 0.05


def test_ratios_are_of_medians():
    seconds = {"unit": [1.0, 2.0, 9.0], "other": [3.0, 5.0, 4.0]}
    assert measuring.ratios_to(seconds, "unit") == {"unit": 1.0, "other": 2.0}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="kept by Linux alone")
def test_the_peak_of_a_process(monkeypatch, tmp_path):
    # A fork, whose imports are done, has a peak of its own as well.
    started = tmp_path / "python"
    started.write_text(f'#!/bin/sh\nexec {shlex.join(python())} "$@"\n')
    started.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(started))
    script = (
        "import torch\nfrom benchmarks.measuring import PeakMemory, print_peak\n"
        "x = bytearray({} << 20)\ndel x\npeak = PeakMemory(torch.device('cpu'))\n"
        "x = bytearray({} << 20)\ndel x\nprint_peak(peak)"
    )
    # What was there before and is gone does not count.
    low, high = (
        measuring.peak_of(["-c", script.format(before, size)], repeats=1)
        for before, size in ((256, 0), (0, 64))
    )
    assert 60 << 20 < high - low < 68 << 20
    with pytest.raises(Exception, match=r"ended with 3\n.*no"):
        measuring.peak_of(["-c", "import sys; print('no'); sys.exit(3)"], repeats=1)


def test_the_inputs():
    wide = loss_inputs.VOCABULARIES["wide"]
    pair = loss_inputs.SharingPair(wide._replace(student=400, teacher=300))
    ours, theirs = pair.shared_ids()
    assert len(set(ours.tolist())) == len(set(theirs.tolist())) == 255
    assert torch.equal(pair.nearest_student_ids()[theirs], ours)
    inputs = loss_inputs.Inputs.make(loss_inputs.TINY, tokens=5, live=False)
    assert inputs.teacher_logits is None and inputs.stored.k == 60
    probs = inputs.student_logits.softmax(-1)
    assert probs.sort(-1, descending=True).values[..., :8].sum(-1).min() > 0.9
    both = loss_inputs.Inputs.make(loss_inputs.TINY, tokens=5)
    live, stored = (both.batch(stored=one) for one in (False, True))
    ids = torch.arange(60).expand(4, 1, 60)
    torch.testing.assert_close(
        live.teacher.logits.log_probs(ids), stored.teacher.logits.log_probs(ids)
    )
