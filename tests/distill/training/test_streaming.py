"""Rows that are streamed are trained on as if they had been read at once, whatever their number."""

import csv
import itertools
import json
import os
import signal

import datasets
import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM

import ctkd
from ctkd.compare.plan.config import CompareConfig
from ctkd.distill import streaming
from ctkd.distill.config import TrainConfig
from ctkd.distill.data import example_stream
from ctkd.distill.data.example_stream import ExampleStream
from ctkd.distill.training import CrossTokenizerTrainer, Distiller, checkpoints, progress
from ctkd.distill.training import trainer as trainers
from ctkd.errors import DataError, SettingError
from tests.distill import tiny
from tests.distill.tiny_runs import ANSWER, error_of, finish, invoke, weights
from tests.distill.training.test_distiller import ROWS
from tests.distill.training.test_resume import same, training_logs
from tests.distill.training.test_trainer import arguments, same_weights, weights_of


@pytest.fixture
def in_order(monkeypatch):
    """Training without shuffling, streamed or not."""
    monkeypatch.setattr(example_stream, "_shuffled", lambda examples, draw: iter(examples))

    def sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    for kind in (CrossTokenizerTrainer, checkpoints.RunTrainer):
        monkeypatch.setattr(kind, "_get_train_sampler", sampler)


def write_files(folder):
    """Fifteen rows in files of three kinds; 4 to 6 are too long, and the answer of 9 is cut."""
    rows = [
        {"prompt": f"{tiny.TEXTS[number % 4]} {number}? Answer:", "answer": ANSWER}
        for number in range(1, 16)
    ]
    for row in rows[3:6]:
        row["prompt"] *= 4
    rows[8]["answer"] *= 12
    paths = [folder / name for name in ("a.jsonl", "b.csv", "c.parquet")]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows[7:11])
    datasets.Dataset.from_list(rows[11:]).to_parquet(paths[2])
    return itertools.chain.from_iterable(("--data", str(path)) for path in paths)


def test_streamed_rows_make_the_same_batches(place, monkeypatch, in_order):
    """In files of all kinds and in every pass, also where a whole block is left out."""
    monkeypatch.setattr(streaming, "BLOCK", 3)
    settings = ("--max-steps", "7", "--max-length", "60", "--on-long", "cut", "--score-eos")
    data = [*write_files(place.folder), "--eval-data", str(place.rows), *settings]
    finish(*place.train("whole", *data, "--teacher-memory", "0"))
    said = finish(*place.train("streamed", *data, "--streaming", "--measure", "nothing")).stderr
    whole, streamed = place.folder / "whole", place.folder / "streamed"
    assert len(training_logs(streamed)) == 7
    assert training_logs(streamed) == training_logs(whole)
    assert same(streamed, whole) and not same(streamed, place.student)
    # The loader is a batch ahead: two passes of 15 rows, and 8 of the 11 rows that follow.
    assert "training: 41 rows read, 32 of 41 examples taken, 3 cut, 100.0 % of their" in said
    loaded = AutoModelForCausalLM.from_pretrained(streamed).state_dict()
    assert all(torch.equal(loaded[name], one) for name, one in weights(streamed).items())
    card = (streamed / "README.md").read_text()
    assert "Trained on 28 rows streamed from `a.jsonl`, `b.csv`, `c.parquet`" in card
    assert "--streaming" in card


def test_a_stopped_run_goes_on_in_a_later_pass(place, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 4)
    monkeypatch.setattr(example_stream, "BUFFER", 3)
    words = ("--streaming", "--eval-limit", "6", "--max-steps", "8", "--measure", "nothing")
    straight = finish(*place.train("straight", *words)).stderr
    step_end = progress.StepReport.on_step_end

    def interrupted(self, args, state, control, **rest):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step_end(self, args, state, control, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(progress.StepReport, "on_step_end", interrupted)
        assert "stopped at step 5 of 8" in error_of(invoke(*place.train("stopped", *words)))
    rows = place.rows.read_text()
    place.rows.write_text(rows + rows[: rows.index("\n") + 1])
    refused = error_of(invoke(*place.train("stopped", *words, "--resume")))
    assert "the training rows are others than those that" in refused
    place.rows.write_text(rows)
    said = finish(*place.train("stopped", *words, "--resume")).stderr
    assert "going on from checkpoint-5; the rows before it are read again" in said
    ours, theirs = place.folder / "stopped", place.folder / "straight"
    assert training_logs(ours) == training_logs(theirs)
    assert same(ours, theirs)
    # With a batch ahead and the buffer 39 examples of 14 in a pass: the third is read to its end.
    for one in (said, straight):
        assert "training: 60 rows read, 42 of 42 examples taken, 0 cut" in one, one
    words = ("--streaming", "--max-steps", "3", "--eval-limit", "6", "--dry-run", "--control")
    forecast = finish(*place.train("dry", *words)).stdout
    assert "streamed; this is of the first 2\n" in forecast and " epochs" not in forecast


def test_every_pass_draws_each_example_once_from_its_buffer(monkeypatch):
    monkeypatch.setattr(example_stream, "BUFFER", 5)
    passes = []

    def blocks(number):
        passes.append(number)
        return (range(start, start + 4) for start in range(0, 20, 4))

    drawn = list(itertools.islice(ExampleStream(blocks, seed=3), 60))
    orders = [drawn[start : start + 20] for start in (0, 20, 40)]
    assert passes == [0, 1, 2]
    for order in orders:
        assert sorted(order) == list(range(20)) != order
        # An example is drawn only when it was read.
        assert all(one <= place + 5 for place, one in enumerate(order))
    assert orders[0] != orders[1] != orders[2]
    assert drawn == list(itertools.islice(ExampleStream(blocks, seed=3), 60))
    assert drawn != list(itertools.islice(ExampleStream(blocks, seed=4), 60))
    with pytest.raises(DataError, match="no row is left to train on"):
        next(iter(ExampleStream(lambda number: [[], []])))


def test_passages_of_the_first_rows_are_held_out_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 2)
    path = tmp_path / "rows.jsonl"
    contexts = ["one", "two", "two", "three", "one", "four", "two"]
    rows = [{"context": one, "question": "?", "answers": ["yes"]} for one in contexts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    config = TrainConfig(data=str(path), streaming=True, max_steps=2, eval_limit=2)
    data = streaming.StreamedData(config, said.append)
    assert [one.id for one in data.held_out] == ["rows.jsonl row 1", "rows.jsonl row 2"]
    assert [one.id for one in data.first] == ["rows.jsonl row 4"]
    trained = itertools.chain.from_iterable(data._blocks(said.append))
    assert [one.id for one in trained] == ["rows.jsonl row 4", "rows.jsonl row 6"]
    assert said[0] == "no evaluation data given: the first 2 examples are held out"
    # The embedded sets have a part for that.
    data = streaming.StreamedData(TrainConfig(streaming=True, max_steps=2), said.append)
    assert data.held_out[0].where.startswith("pydocs:test") and data.first
    assert "pieces of up to 400 bytes" in said[-1]


def test_what_cannot_be_streamed_says_so(place, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 5)
    given = {"data": str(place.rows), "task": "text", "streaming": True}
    for settings, message in (
        ({}, "streaming needs max_steps"),
        ({"max_steps": 2, "teacher_cache": "cache"}, "a teacher cache holds all rows"),
        ({"max_steps": 2, "answers": "teacher"}, "the teacher answers all of them before it"),
    ):
        with pytest.raises(SettingError, match=message):
            TrainConfig(**given, **settings)
    with pytest.raises(SettingError, match="streaming is no setting of a comparison"):
        CompareConfig.from_mapping({"streaming": True})
    whole, folder = place.folder / "whole.json", place.folder / "no tokenizer"
    whole.write_text(json.dumps([{"prompt": "a", "answer": "b"}]))
    folder.mkdir()
    (folder / "config.json").write_text((place.student / "config.json").read_text())
    lines = place.rows.read_text().splitlines()
    for name, count in (("few", 3), ("none", 0)):
        (place.folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines[:count]))
    for options, message in (
        (("--data", str(whole)), "is JSON, which is read as a whole"),
        (("--data", "/dev/null"), "can be read only once"),
        (("--data", str(place.folder / "few.jsonl")), "holds nothing but the 3 examples that are"),
        (("--data", str(place.folder / "none.jsonl")), "none.jsonl has no rows"),
        (("--student-config", str(folder), "--student", str(folder)), "has no tokenizer, and none"),
        (("--max-length", "3"), "all 5 examples are longer than 3 tokens"),
    ):
        limit = ("--eval-limit", "5") if "few" not in message else ()
        assert message in error_of(invoke(*place.train("no", "--streaming", *limit, *options)))
    # What is wrong in a later block ends a run when it is read.
    broken = place.folder / "broken.jsonl"
    broken.write_text("\n".join([*lines[:18], json.dumps({"prompt": "?", "answer": 7})]))
    words = ("--streaming", "--eval-limit", "5", "--data", str(broken), "--max-steps", "9")
    error = error_of(invoke(*place.train("broken", *words, "--save-steps", "1")))
    assert error.startswith("broken.jsonl row 19: column 'answer' holds int 7 as an answer")


def test_a_trainer_streams_texts(tmp_path, monkeypatch, in_order):
    """Of an iterable data set, each pass in the order of its epoch; long rows are left out."""
    monkeypatch.setattr(trainers, "BLOCK", 4)
    rows = [*ROWS, {"prompt": "A dog. " * 60, "answer": " so"}]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    stream = stream.shuffle(seed=1, buffer_size=10)
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append([row for row in stream if row in ROWS])
    assert orders[0] != orders[1]

    def trained(train_dataset):
        setup = tiny.Setup()
        run = CrossTokenizerTrainer(
            setup.student,
            arguments(tmp_path, max_steps=4, per_device_train_batch_size=3),
            loss=ctkd.get_loss("uld"),
            teacher=setup.teacher,
            train_dataset=train_dataset,
            eval_dataset=datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
            processing_class=setup.student_tokenizer,
            teacher_processing_class=setup.teacher_tokenizer,
        )
        run.train()
        assert run.accelerator.dispatch_batches is False
        return weights_of(setup.student), run.evaluate()["eval_kd"]

    encode, thresholds = Distiller.encode, []

    def noted(self, rows, **options):
        thresholds.append(self.min_coverage)
        return encode(self, rows, **options)

    monkeypatch.setattr(Distiller, "encode", noted)
    with pytest.warns(UserWarning, match=r"left out 1 of . examples as longer than 128 tokens"):
        ours, measured = trained(stream)
    # Of the evaluation data and the first block; a later one may be a row.
    assert thresholds[:2] == [0.95, 0.95] and set(thresholds[2:]) == {0.0}
    theirs, wanted = trained([row for order in orders[:2] for row in order])
    for given, message in (
        ((row for row in ROWS), "rows were given as generator, which is read only once"),
        (
            {"train": ROWS, "test": ROWS},
            "train_dataset has the parts train, test; give one of them",
        ),
    ):
        with pytest.raises(SettingError, match=message):
            trained(given)
    assert same_weights(ours, theirs) and measured == pytest.approx(wanted)
    assert not same_weights(ours, weights_of(tiny.Setup().student), 1e-6)
