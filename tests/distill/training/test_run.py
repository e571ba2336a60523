"""A whole training run: what it reads, what it leaves behind, and that it can be repeated."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import ctkd
from ctkd.distill import preparing
from ctkd.distill.config import TrainConfig
from ctkd.distill.evaluation.metrics import Prediction
from ctkd.distill.preparing import load_examples
from ctkd.distill.training import measuring
from ctkd.distill.training import run as training
from ctkd.distill.training.curves import plot_curves
from ctkd.distill.training.measuring import summarize
from ctkd.errors import DataError, SettingError
from tests.distill.tiny import TEXTS
from tests.distill.tiny_runs import (
    ANSWER,
    error_of,
    finish,
    invoke,
    record,
    weights,
    write_rows,
)

ROOT = Path(__file__).parents[3]
LEARNING = ["--max-steps", "20", "--logging-steps", "5", "--learning-rate", "0.03"]


@pytest.fixture(scope="module")
def run(place):
    """A run that learns the one answer and draws its curves, with what it printed."""
    with mock.patch.object(measuring, "plot_curves", plot_curves):
        return finish(*place.train("run", *LEARNING))


def logged(folder, key) -> list[float]:
    return [entry[key] for entry in record(folder)["results"]["history"] if key in entry]


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_is_a_model_as_transformers_saves_it(place, run):
    model, report = AutoModelForCausalLM.from_pretrained(
        place.folder / "run", output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "run")
    assert (
        tokenizer("Rain fell.").input_ids
        == AutoTokenizer.from_pretrained(place.student)("Rain fell.").input_ids
    )
    before, after = weights(place.student), weights(place.folder / "run")
    assert before["model.norm.weight"].dtype == torch.float64
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all((before[name] != after[name]).any() for name in after)


def test_the_folder_holds_nothing_else_than_the_run(place, run):
    assert sorted(path.name for path in (place.folder / "run").iterdir()) == [
        "README.md",
        "bits-student-after.jsonl",
        "bits-student-before.jsonl",
        "bits-teacher.jsonl",
        "config.json",
        "ctkd.json",
        "curves.png",
        "generation_config.json",
        "model.safetensors",
        "predictions-student-after.jsonl",
        "predictions-student-before.jsonl",
        "predictions-teacher.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.bin",
    ]
    assert (place.folder / "run" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_everything_that_was_found_is_recorded(place, run):
    results = record(place.folder / "run")["results"]
    for stage in ("student before", "teacher"):
        bits = results[stage].pop("given_bits_per_byte")
        assert results[stage] == {"exact_match": 0.0, "f1": 0.0, "rouge_lsum": 0.0, "n": 2}
        assert bits > 1.5 > results["student after"]["given_bits_per_byte"] > 0.0
    assert results["student after"]["f1"] == results["student after"]["exact_match"] == 100.0
    names = ["ce", "kd", "kd/had", "kd/sl", "kd/sd"]
    for stage in ("losses before", "losses after"):
        assert list(results[stage]) == names
        parts = [results[stage][name] for name in names[2:]]
        assert sum(parts) == pytest.approx(results[stage]["kd"], rel=1e-5)
    assert results["losses before"]["ce"] > 5 > 1 > results["losses after"]["ce"]
    assert results["seconds per step"] > 0
    assert results["steps"] == 20
    assert results["finished"]
    environment = record(place.folder / "run")["environment"]
    assert environment["ctkd"] == ctkd.__version__
    assert environment["device"] == "cpu"
    assert {"python", "torch", "transformers", "threads"} <= set(environment)


def test_the_history_has_each_log_and_both_ends(place, run):
    history = record(place.folder / "run")["results"]["history"]
    results = record(place.folder / "run")["results"]
    training_logs = [entry for entry in history if "ce" in entry]
    assert [entry["step"] for entry in training_logs] == [1, 5, 10, 15, 20]
    # Later ones average over steps of unequal size: the loss by steps, its terms by tokens.
    first = training_logs[0]
    assert first["loss"] == pytest.approx(first["ce"] + 0.15 * first["kd"], rel=1e-5)
    for entry in training_logs:
        assert entry["kd"] == pytest.approx(
            sum(entry[f"kd/{part}"] for part in ("had", "sl", "sd")), rel=1e-5
        )
    held_out = [entry for entry in history if "eval_ce" in entry]
    assert [entry["step"] for entry in held_out] == [0, 20]
    for entry, stage in zip(held_out, ("losses before", "losses after"), strict=True):
        assert {f"eval_{name}": value for name, value in results[stage].items()}.items() <= (
            entry.items()
        )


def test_results_go_to_stdout_and_progress_to_stderr(place, run):
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["held-out,", "2", "examples", "before", "after", "teacher"]
    assert lines[2].split() == ["F1", "0.0", "100.0", "0.0"]
    losses = record(place.folder / "run")["results"]["losses after"]
    table = {tuple(line.split()[:-2]): line.split()[-2:] for line in lines if line[:1].strip()}
    assert table["cross-entropy", "(nats", "per", "token)"][1] == f"{losses['ce']:.4f}"
    assert table["multilevelot",][1] == f"{losses['kd']:.4f}"
    assert table["-", "sd"][1] == f"{losses['kd/sd']:.4f}"
    assert any(line.endswith("s per step, 20 steps") for line in lines)
    assert lines[-1].endswith(str(place.folder / "run"))
    for said in (
        "cut off 2 of the training examples",
        "18 training examples, 2 held out",
        f"student: {place.student}",
        f"teacher: {place.teacher}",
        "student before: F1 0.0",
        "losses before, held-out: ce 5.",
        "step    1/20  ce ",
        "step   20/20  ce ",
        "student after: F1 100.0, exact match 100.0",
    ):
        assert said in run.stderr, said
        assert said not in run.stdout, said


def test_answers_to_held_out_prompts_are_kept(place, run):
    lines = (place.folder / "run" / "predictions-student-after.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    rows = {row["id"]: row for row in map(json.loads, place.rows.read_text().splitlines())}
    assert len(answers) == 2
    for answer in answers:
        assert answer["prediction"] == ANSWER.strip()
        assert answer["prompt"] == rows[answer["id"]]["prompt"]
        assert answer["references"] == [ANSWER]


def test_the_summary_says_what_share_of_the_gap_was_closed_and_through_what(place, run):
    assert "(0) is no better than the student's before training (0): on this task it has" in (
        run.stdout
    )
    assert "--control tells what multilevelot contributed" in run.stdout
    folder = training.OutputFolder(place.folder / "run", record(place.folder / "run"))
    names = ("student before", "student after", "control", "teacher")

    def shown(task, metric, *values) -> str:
        folder.record["settings"]["task"] = task
        for name, one in zip(names, values, strict=True):
            if one is not None:
                folder.results[name] = {metric: one, "n": 9}
        return summarize(folder)

    said = shown("text", "rouge_lsum", 10.0, 50.0, None, 90.0)
    assert "50.0% of the gap in Rouge-LSum to the teacher was closed\n--control tells what" in said
    said = shown("text", "rouge_lsum", 10.0, 50.0, 42.0, 90.0)
    assert (
        "50.0% of the gap in Rouge-LSum to the teacher was closed, 40.0% without multilevelot: it"
        in said
    )
    assert "it contributed +10.0 points" in said and "note:" not in said
    said = shown("qa", "f1", 10.0, 50.0, 50.0, 40.0)
    assert "133.3% of the gap in F1 to the teacher was closed" in said
    assert (
        "it contributed +0.0 points; note: the student's F1 (50) has passed the teacher's (40)"
        in said
    )
    said = shown("qa", "f1", 10.0, 50.0, 42.0, 5.0)
    assert "multilevelot changed F1 by +8 (after, less control)" in said
    assert "note: the teacher's F1 (5) is no better than the student's before training (10)" in said
    said = shown("lm", "bits_per_byte", 2.5, 1.7, 1.6, 0.5)
    assert "40.0% of the gap in bits per byte to the teacher was closed, 45.0% without" in said
    assert "it contributed -5.0 points" in said
    assert ["bits", "per", "byte", "2.5000", "1.7000", "1.6000", "0.5000"] in [
        line.split() for line in said.splitlines()
    ]
    del folder.results["teacher"]
    assert "multilevelot changed bits per byte by +0.1 (after, less control)" in summarize(folder)


def test_a_run_is_repeated_from_its_record(place, run):
    settings = record(place.folder / "run")["settings"]
    assert TrainConfig.from_mapping(settings).as_dict() == settings
    (place.folder / "again.yaml").write_text(yaml.safe_dump(settings))
    again = place.folder / "again"
    finish("train", "--config", str(place.folder / "again.yaml"), "--output", str(again))
    assert same(weights(place.folder / "run"), weights(again))
    first, second = record(place.folder / "run")["results"], record(again)["results"]
    for stage in ("student before", "teacher", "losses before", "losses after", "student after"):
        assert first[stage] == second[stage]
    assert logged(place.folder / "run", "ce") == logged(again, "ce")
    assert {**record(again)["settings"], "output": settings["output"]} == settings


def test_another_seed_is_another_order(place):
    write_rows(place.folder / "same.jsonl", 3)
    for seed in ("0", "1"):
        words = ["--seed", seed, "--eval-data", str(place.folder / "same.jsonl")]
        finish(*place.train(f"seed{seed}", *words, "--max-steps", "1"))
    first, second = place.folder / "seed0", place.folder / "seed1"
    assert logged(first, "ce") != pytest.approx(logged(second, "ce"), rel=1e-6)
    before = [record(folder)["results"]["losses before"] for folder in (first, second)]
    assert before[0] == before[1]


def test_options_override_the_file(place):
    file = place.folder / "options.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "loss": "multilevelot",
                "loss_options": {"k": 7, "matching": "greedy"},
                "columns": {"prompt": "wrong"},
                "max_steps": 1,
                "learning_rate": 1e-6,
                "seed": 3,
            }
        ).replace("1.0e-06", "1e-6")
    )
    assert "1e-6" in file.read_text()
    place_options = place.train("options", "--config", str(file), "--column", "prompt=prompt")
    finish(*place_options, "--loss-option", "k=5")
    settings = record(place.folder / "options")["settings"]
    assert settings["loss_options"] == {"k": 5, "matching": "greedy"}
    assert settings["columns"] == {"prompt": "prompt"}
    assert (settings["learning_rate"], settings["seed"], settings["max_steps"]) == (1e-6, 3, 2)


def test_epochs_as_an_option_override_the_steps_of_the_file(place):
    file = place.folder / "steps.yaml"
    file.write_text("max_steps: 1\n")
    words = place.train("epochs", "--config", str(file))
    start = words.index("--max-steps")
    finish(*words[:start], *words[start + 2 :], "--epochs", "0.5")
    # 18 examples in batches of 4 are 5 steps an epoch; 2.5 of them are begun.
    assert record(place.folder / "epochs")["results"]["steps"] == 3
    assert record(place.folder / "epochs")["settings"]["max_steps"] is None


def test_sft_never_loads_a_teacher(place, monkeypatch):
    asked = []
    for name in ("load_model", "load_tokenizer"):
        load = getattr(preparing, name)
        monkeypatch.setattr(
            preparing,
            name,
            lambda source, _load=load, **settings: (
                asked.append(source) or _load(source, **settings)
            ),
        )
    shown = finish(*place.train("sft", "--loss", "sft", "--teacher", "./no-such-model"))
    assert set(asked) == {str(place.student)}
    results = record(place.folder / "sft")["results"]
    assert "teacher" not in results
    assert list(results["losses after"]) == ["ce"]
    assert logged(place.folder / "sft", "kd") == []
    assert "teacher" not in shown.output


def test_weights_of_zero_switch_a_term_off(place):
    folder = place.folder
    finish(*place.train("sft-alone", "--loss", "sft"))
    finish(*place.train("kd0", "--kd-weight", "0"))
    finish(*place.train("ce0", "--ce-weight", "0", "--kd-weight", "1.5"))
    assert same(weights(folder / "sft-alone"), weights(folder / "kd0"))
    assert not same(weights(folder / "kd0"), weights(folder / "ce0"))
    for name, ce, kd in (("kd0", 1.0, 0.0), ("ce0", 0.0, 1.5)):
        for loss, ce_value, kd_value in zip(
            *(logged(folder / name, key) for key in ("loss", "ce", "kd")), strict=True
        ):
            assert loss == pytest.approx(ce * ce_value + kd * kd_value, rel=1e-4)


def test_accumulated_batches_make_the_steps_of_one_batch(place):
    finish(*place.train("whole", "--batch-size", "4"))
    finish(*place.train("split", "--batch-size", "1", "--grad-accumulation", "4"))
    whole, split = place.folder / "whole", place.folder / "split"
    for key in ("ce", "kd", "kd/sd"):
        assert logged(whole, key) == pytest.approx(logged(split, key), rel=1e-4)
    assert record(split)["results"]["steps"] == 2


def test_evaluation_data_of_its_own_is_used(place):
    write_rows(place.folder / "held-out.jsonl", 3)
    shown = finish(*place.train("held", "--eval-data", str(place.folder / "held-out.jsonl")))
    assert "20 training examples, 3 held out" in shown.stderr
    assert "cut off" not in shown.stderr
    assert record(place.folder / "held")["results"]["student after"]["n"] == 3


def test_the_end_of_sequence_is_scored_if_asked(place):
    finish(*place.train("eos", "--score-eos", "--max-steps", "1"))
    finish(*place.train("no-eos", "--no-score-eos", "--max-steps", "1"))
    with_eos, without = logged(place.folder / "eos", "kd"), logged(place.folder / "no-eos", "kd")
    assert with_eos[0] != pytest.approx(without[0], rel=1e-2)
    assert logged(place.folder / "eos", "ce") == pytest.approx(
        logged(place.folder / "no-eos", "ce"), rel=1e-6
    )


def test_a_student_that_learns_no_end_is_pointed_out_once(place, tmp_path):
    shutil.copytree(place.student, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(place.student)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "student")
    words = ["--loss", "sft", "--measure", "nothing", "--max-steps", "1"]
    endless = finish(*place.train("endless", *words, "--student", str(tmp_path / "student")))
    assert endless.stderr.count("answers are taught without an end") == 1
    assert "without an end" not in finish(*place.train("ending", *words)).stderr
    sides = ["--student", str(tmp_path / "student"), "--teacher", str(place.teacher)]
    page = finish("doctor", *sides, "--data", str(place.rows), "--task", "text").stdout
    assert "the student has no EOS, so answers are taught without an end" in page


def test_bfloat16_trains_float32_weights(place):
    shown = finish(*place.train("bf16", "--dtype", "bfloat16"))
    after = weights(place.folder / "bf16")
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert any((value.bfloat16().float() != value).any() for value in after.values())
    assert "warning" not in shown.stderr


def test_weights_in_bfloat16_are_warned_about(place):
    shown = finish(*place.train("pure", "--dtype", "bfloat16-pure"))
    assert {value.dtype for value in weights(place.folder / "pure").values()} == {torch.bfloat16}
    warned = [line for line in shown.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert "--dtype bfloat16 keeps them in float32" in warned[0]


def test_only_answers_to_questions_end_at_a_line_break(place, monkeypatch):
    rules = {}

    def answered(*arguments, one_line, progress, **settings):
        rules[progress] = one_line
        return [
            Prediction(prediction="x", id=one.id, references=one.references, prompt=one.prompt)
            for one in arguments[2]
        ]

    monkeypatch.setattr(measuring, "answer", answered)
    finish(*place.train("lines"))
    assert len(rules) == 3 and not any(rules.values())
    rules.clear()
    rows = place.folder / "questions.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"context": f"c{n}", "question": "q", "answers": [ANSWER]}) + "\n"
            for n in range(20)
        )
    )
    finish(*place.train("questions", "--task", "qa", "--data", str(rows)))
    assert len(rules) == 3 and all(rules.values())


def test_the_last_two_checkpoints_are_kept_if_asked(place):
    finish(*place.train("kept", "--keep-checkpoints", "--save-steps", "1", "--max-steps", "3"))
    found = sorted(path.name for path in place.folder.glob("kept/checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3"]


def test_rows_too_long_for_a_model_are_left_out_and_said(place):
    rows = place.folder / "long.jsonl"
    write_rows(rows, 20)
    held_out = place.folder / "long-held-out.jsonl"
    write_rows(held_out, 2)
    long = {"prompt": "Well? " * 200, "answer": ANSWER}
    for file in (rows, held_out):
        file.write_text(file.read_text() + json.dumps(long) + "\n")
    shown = finish(*place.train("long", "--data", str(rows), "--eval-data", str(held_out)))
    assert "training: left out 1 of 21 examples as longer than 128 tokens" in shown.stderr
    assert "held-out: left out 1 of 3 examples as longer than 125 tokens" in shown.stderr
    assert record(place.folder / "long")["results"]["student after"]["n"] == 2


def test_an_answer_must_fit_into_the_model(place):
    result = invoke(*place.train("wide", "--max-new-tokens", "127"))
    assert "max_new_tokens 127 leaves no room for a prompt in the 128 positions of " in (
        error_of(result)
    )
    assert not (place.folder / "wide").exists()


def passages(path, count) -> None:
    rows = [
        {"context": f"Passage {number // 3}.", "question": f"Which? {number}", "answers": ["It"]}
        for number in range(count)
    ]
    path.write_text(json.dumps(rows))


def test_a_held_out_part_shares_no_passage_with_the_rest(tmp_path):
    passages(tmp_path / "rows.json", 60)
    said = []
    config = TrainConfig(data=str(tmp_path / "rows.json"), loss="sft")
    found, held_out = load_examples(config, said.append)
    assert len(found) + len(held_out) == 60
    assert 6 <= len(held_out) <= 8
    assert not {one.group for one in found} & {one.group for one in held_out}
    assert said[0] == f"no evaluation data given: cut off {len(held_out)} of the training examples"
    other = TrainConfig(data=config.data, loss="sft", seed=1)
    assert load_examples(other, said.append)[1] != held_out


def test_several_files_are_one_data_set(place, tmp_path):
    lines = place.rows.read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:5]), ("b", lines[5:12]), ("c", lines[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    several = [word for name in "abc" for word in ("--data", str(tmp_path / f"{name}.jsonl"))]
    ways = {
        "one-file": [],
        "several-files": several,
        "by-pattern": ["--data", str(tmp_path / "*.jsonl")],
    }
    for output, words in ways.items():
        finish(*place.train(output, "--measure", "nothing", *words))
    found = [weights(place.folder / output) for output in ways]
    assert same(found[0], found[1]) and same(found[0], found[2])
    settings = record(place.folder / "several-files")["settings"]
    assert settings["data"] == several[1::2]
    # Equal settings are equal after their way through the file, whatever gave them.
    yaml_file = tmp_path / "run.yaml"
    yaml_file.write_text(yaml.safe_dump(settings))
    shown = finish("train", "--config", str(yaml_file), "--resume")
    assert "is finished already" in shown.stderr
    words = place.train("several-files", "--measure", "nothing", *several[:4], "--resume")
    assert "was started with other settings (data [" in error_of(invoke(*words))


def test_texts_alone_are_trained_on_where_something_stands_in_front(place, tmp_path):
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{TEXTS[n % 4]} {n}."}) + "\n" for n in range(20)))
    words = place.train("texts", "--data", str(rows))
    tokenizer = AutoTokenizer.from_pretrained(place.student)
    tokenizer.eos_token = None
    shutil.copytree(place.student, tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    refused = error_of(invoke(*words, "--student", str(tmp_path / "endless")))
    assert "the prompt is empty and the student's tokenizer puts nothing in front of it" in refused
    # A tokenizer that puts nothing in front has an end of sequence, behind which texts begin.
    shown = finish(*words)
    assert "its column 'text' is trained on as a whole, without a prompt" in shown.stderr
    assert "18 training examples, 2 held out" in shown.stderr
    assert all(loss > 0 for loss in logged(place.folder / "texts", "ce"))


def test_documents_are_measured_in_bits_beside_a_control_without_the_loss(place, tmp_path):
    rows, output = tmp_path / "documents.jsonl", place.folder / "documents"
    texts = [" ".join(TEXTS[(n + k) % 4] for k in range(1 + n % 3)) for n in range(24)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [
        *place.train("documents", "--data", str(rows), "--task", "lm", "--loss", "uld"),
        # The teacher's tokens are more, so that it bounds which rows there are.
        *("--max-steps", "12", "--learning-rate", "0.03", "--max-length", "24", "--control"),
        *("--student", str(place.teacher), "--teacher", str(place.student)),
    ]
    shown = finish(*words)
    assert "left out" in shown.stderr
    results, control = record(output)["results"], record(output / "control")
    bits = {
        name: results[name]["bits_per_byte"]
        for name in ("student before", "student after", "control", "teacher")
    }
    assert bits["student before"] > 0.1 + max(bits["student after"], bits["control"])
    assert bits["student after"] != bits["control"]
    assert control["settings"]["loss"] == "sft" and "teacher" not in control["results"]
    assert control["results"]["student before"] == results["student before"]
    assert control["results"]["student after"] == results["control"]
    assert (control["rows"], control["date"]) == (record(output)["rows"], record(output)["date"])
    assert "bits per byte" in shown.stdout and "uld changed bits per byte by" in shown.stdout
    # Without a weight the loss contributes nothing: all else is equal.
    finish(*words, "--kd-weight", "0", "--output", str(place.folder / "weightless"))
    results = record(place.folder / "weightless")["results"]
    assert results["control"] == results["student after"]
    # What is in the way of the control is said before anything is trained.
    (tmp_path / "blocked").mkdir()
    blocked = {**record(output), "results": {}}
    (tmp_path / "blocked" / "ctkd.json").write_text(json.dumps(blocked))
    (tmp_path / "blocked" / "control").write_text("mine")
    refused = error_of(invoke(*words, "--output", str(tmp_path / "blocked"), "--resume"))
    assert "control is a file" in refused
    one = place.folder / "one.jsonl"
    one.write_text(rows.read_text().splitlines()[0])
    again = finish(
        *("evaluate", str(output), "--task", "lm", "--device", "cpu"),
        *("--data", str(one), "--output", str(tmp_path / "bits.jsonl")),
    )
    (line,) = (tmp_path / "bits.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert f"{found['bits'] / found['bytes']:.4g}" in again.stdout
    assert found["bytes"] == len(texts[0].encode())


def test_training_rows_that_are_held_out_as_well_are_counted(place, tmp_path):
    lines = place.rows.read_text().splitlines(keepends=True)
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(lines[:3]) + json.dumps({"prompt": "New?", "answer": " the mat"}))
    said = []
    config = TrainConfig(data=str(place.rows), eval_data=str(held_out), task="text", loss="sft")
    load_examples(config, said.append)
    warned = [line for line in said if line.startswith("warning")]
    assert warned == [
        "warning: 3 of the 20 training examples are held out as well, prompt and answer; what is "
        "measured there may be remembered"
    ]
    # The same prompt with another answer is another row.
    held_out.write_text(lines[0].replace(ANSWER, " the hat"))
    said.clear()
    load_examples(config, said.append)
    assert not [line for line in said if line.startswith("warning")]


def test_the_embedded_set_brings_its_own_test_part():
    said = []
    found, held_out = load_examples(TrainConfig(eval_limit=7), said.append)
    assert len(held_out) == 7
    assert not any("cut off" in line for line in said)
    assert said[0].startswith("held-out examples: the first 7 of ")
    assert not {one.group for one in found} & {one.group for one in held_out}
    named = TrainConfig(eval_limit=7, eval_data="pydocs")
    assert load_examples(named, said.append)[1] == held_out


def test_one_passage_cannot_be_split(tmp_path):
    passages(tmp_path / "rows.json", 3)
    with pytest.raises(DataError, match="name evaluation data of its own"):
        load_examples(TrainConfig(data=str(tmp_path / "rows.json")), print)


def test_only_known_devices_are_chosen():
    with pytest.raises(SettingError, match="one of auto, cpu, cuda, got 'tpu'"):
        training.choose_device("tpu")
    assert training.choose_device("cpu").type == "cpu"


@pytest.mark.slow
def test_a_locale_that_is_not_utf8_loses_nothing(place, tmp_path):
    rows = [
        {"prompt": f"Où est {TEXTS[number % 4]}, 日本{number}?", "answer": " le “chat”"}
        for number in range(12)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "données.jsonl").write_text(text, "utf-8")
    words = place.train("ascii", "--loss", "sft", "--data", str(tmp_path / "données.jsonl"))
    words += ["--max-steps", "1", "--eval-limit", "1"]
    code = (
        "import sys; from ctkd.cli import main; from ctkd.cli.options import show\n"
        "assert sys.getfilesystemencoding() == 'ascii' == sys.stdout.encoding\n"
        "try: main()\n"
        r"finally: show('\u201cchat\u201d')"
    )
    spoken = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **spoken, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    shown = [text.decode("ascii") for text in (done.stdout, done.stderr)]
    assert shown[0].endswith("\\u201cchat\\u201d\n") and "données.jsonl" not in shown[1]
    folder = place.folder / "ascii"
    assert os.fsencode(record(folder)["settings"]["data"]).endswith("données.jsonl".encode())
    answers = (folder / "predictions-student-after.jsonl").read_text("utf-8")
    assert "日本" in answers and "“chat”" in answers
