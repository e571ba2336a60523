"""Whatever goes wrong on the command line is one line with a way out; what goes right is shown."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
from transformers import BertConfig

import ctkd
from ctkd import registry
from ctkd.cli import main
from ctkd.distill.config import TrainConfig
from ctkd.distill.models import loading as models
from ctkd.distill.training import run as training
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace, error_of, finish, invoke, save
from tests.testing.broken_losses import Good


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """With what can be given wrongly: data, models, files and folders."""
    place = Workplace(tmp_path_factory.mktemp("place"))
    folder = place.folder
    good = {"prompt": "Who?", "answer": "I"}
    files = {
        "no-answer.jsonl": f'{json.dumps(good)}\n{{"prompt": "What?"}}\n',
        "malformed.jsonl": f'{json.dumps(good)}\n{{"prompt": \n',
        "malformed.json": "[1, 2",
        "empty.jsonl": "",
        "deep.json": "[" * 100_000,
        "notes.txt": "not a folder",
        "unknown-key.yaml": "losss: uld\n",
        "broken.yaml": "loss: [uld\n",
        "bad-options.yaml": "loss_options: [1]\n",
        "bad-columns.yaml": "columns: prompt\n",
        "home/thesis.tex": "years of work",
        "home/deep/notes.txt": "more work",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "old-run").mkdir()
    (folder / "old-run" / "ctkd.json").write_text('{"settings": {"loss": "sft"}, "results": {}}')
    (folder / "old-run" / "model.safetensors").write_text("weights")
    save(folder / "narrow", vocabulary=280, padded=0, hidden=8, seed=1)
    tiny.tokenizer(330).save_pretrained(folder / "narrow")
    BertConfig(vocab_size=280, hidden_size=24).save_pretrained(folder / "bert")
    tiny.tokenizer(280).save_pretrained(folder / "bert")
    return place


def contents(folder) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "multilevelott"], "unknown loss 'multilevelott'. Did you mean 'multilevelot'?"),
        (["--loss-option", "k=-1"], "k must be a whole number of at least 1, got -1"),
        (["--loss-option", "kk=3"], "has no setting 'kk'. Did you mean 'k'?"),
        (["--loss-option", "k=many"], "k must be a whole number of at least 1, got 'many'"),
        (["--loss-option", "k"], "a loss option is KEY=VALUE, such as k=20, got 'k'"),
        (["--loss-option", "k=[1"], "cannot read the value of loss option 'k=[1'"),
        (["--loss-option", "matching=best"], "matching must be one of mass, greedy"),
        (["--loss", "sft", "--loss-option", "k=3"], "'sft' is cross-entropy alone"),
        (["--data", "HERE/rows.json"], "rows.json does not exist; did you mean HERE/rows.jsonl?"),
        (["--eval-data", "HERE/none.jsonl"], "none.jsonl does not exist"),
        (["--data", "HERE/no-answer.jsonl"], "no-answer.jsonl row 2 has no answer"),
        (["--eval-data", "HERE/no-answer.jsonl"], "no-answer.jsonl row 2 has no answer"),
        (["--data", "HERE/malformed.jsonl"], "malformed.jsonl line 2 is not JSON"),
        (["--data", "HERE/malformed.json"], "malformed.json is not JSON"),
        (["--data", "HERE/empty.jsonl"], "has no rows; expected at least one"),
        (["--data", "HERE/nothing-*.jsonl"], "no file matches the pattern HERE/nothing-*.jsonl"),
        (["--data", "HERE/deep.json"], "deep.json is nested too deep; expected objects of plain"),
        (
            ["--data", "HERE/rows.jsonl", "--data", "HERE/no-answer.jsonl"],
            "no-answer.jsonl row 2 has no answer",
        ),
        (["--data", "HERE/home"], "is a folder that save_to_disk did not write"),
        (["--task", "qaa"], "unknown task 'qaa', did you mean 'qa'?"),
        (["--task", "qa"], "rows.jsonl has no column 'context'"),
        (["--column", "promt=prompt"], "task text has no field 'promt', did you mean 'prompt'?"),
        (["--column", "prompt=promt"], "has no column 'promt' for 'prompt', did you mean 'prompt'"),
        (["--column", "prompt"], "a column is FIELD=COLUMN, such as context=passage, got 'prompt'"),
        (["--student", "HERE/narrow"], "token ids out of a model's range"),
        (["--teacher", "HERE/narrow"], "token ids out of a model's range"),
        (["--student", "./no-such-model"], "there is no folder ./no-such-model; check the path"),
        (["--student", "HERE/bert"], "has no causal language-model head (it is of the kind bert)"),
        (["--student", "HERE/home"], "has no tokenizer: expected tokenizer.json"),
        (["--teacher", "gemma-3-271m"], "did you mean gemma-3-270m?"),
        (["--output", "HERE/home"], "holds no ctkd.json, so it is not a run of ctkd; choose"),
        (["--output", "HERE/home", "--overwrite"], "holds no ctkd.json, so it is not a run"),
        (["--output", "HERE/home", "--resume"], "holds no ctkd.json, so it is not a run"),
        (["--output", "HERE/old-run"], "go on with --resume, replace it with --overwrite, or"),
        (["--output", "HERE/old-run", "--resume"], "loss 'sft' -> 'multilevelot'"),
        (["--output", "HERE/notes.txt"], "HERE/notes.txt is a file; choose a folder with --output"),
        (["--output", "HERE/notes.txt/run"], "HERE/notes.txt is a file; choose a folder"),
        (["--resume", "--overwrite"], "--resume and --overwrite contradict each other"),
        (["--config", "HERE/unknown-key.yaml"], "unknown setting 'losss'. Did you mean 'loss'?"),
        (["--config", "HERE/broken.yaml"], "broken.yaml is not YAML: expected ',' or ']'"),
        (["--config", "HERE/none.yaml"], "none.yaml: No such file or directory; name a YAML file"),
        (["--config", "HERE/bad-options.yaml"], "loss_options must be a mapping of names"),
        (
            ["--config", "HERE/bad-options.yaml", "--loss-option", "k=3"],
            "loss_options must be a mapping of names to values, got [1]",
        ),
        (
            ["--config", "HERE/bad-columns.yaml", "--column", "prompt=prompt"],
            "columns must be a mapping of names to names, got 'prompt'",
        ),
        (["--device", "cuda"], "device cuda was asked for, but torch finds none; use --device cpu"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--dtype", "float16"], "dtype must be one of float32, bfloat16, bfloat16-pure"),
        (["--report-to", "notebook", "--report-to", "none"], "report_to 'notebook' is no tracker"),
        (["--max-steps", "0"], "max_steps must be a finite number above 0, got 0"),
        (["--epochs", "nan"], "epochs must be a finite number above 0, got nan"),
        (["--learning-rate", "-1"], "learning_rate must be a finite number of at least 0"),
        (["--seed", "-1"], "seed must lie between 0 and"),
        (["--max-length", "5"], "all 18 examples are longer than 5 tokens"),
        (["--max-new-tokens", "127"], "max_new_tokens 127 leaves no room for a prompt"),
    ],
)
def test_what_is_wrong_is_one_line_and_touches_nothing(place, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def out_of_reach(*arguments, **settings):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(models.HfApi, "model_info", out_of_reach)
    before = contents(place.folder)
    here = str(place.folder)
    said = error_of(invoke(*place.train("new", *(word.replace("HERE", here) for word in words))))
    assert message.replace("HERE", here) in said
    assert contents(place.folder) == before


def test_a_loss_on_hidden_states_is_refused_before_anything_is_loaded(place, monkeypatch):
    class OnHiddenStates(Good):
        needs = frozenset({"hidden"})

    monkeypatch.setattr(registry, "_losses", {**registry._registered(), "states": OnHiddenStates})
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    before = contents(place.folder)
    for words in (
        place.train("new", "--loss", "states"),
        place.evaluate(str(place.student), "--loss", "states"),
        ["compare", "--losses", "sft,states", "--output", str(place.folder / "new")],
    ):
        said = error_of(invoke(*words))
        assert "the loss 'states' needs hidden, which ctkd does not give to it in training" in said
        assert "Batch.from_causal_lm takes student_hidden and teacher_hidden" in said
    assert contents(place.folder) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--los", "uld"], "No such option '--los'. Did you mean --loss?"),
        (["train", "--lr", "1e-5"], "No such option '--lr'. Did you mean --learning-rate?"),
        (["train", "--max-steps", "many"], "'many' is not a valid integer"),
        (["train", "--learning-rate", "fast"], "'fast' is not a valid float"),
        (["train", "rows.jsonl"], "Got unexpected extra argument (rows.jsonl)"),
        (["trian"], "No such command 'trian'"),
        (["evaluate", "--format", "xml"], "'xml' is not one of 'table', 'json'"),
    ],
)
def test_a_wrong_option_is_named(words, message):
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in error_of(result)
    assert "Try 'ctkd" in result.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_named(place):
    said = error_of(invoke(*place.train("new", "--output", "/proc/ctkd-run")))
    assert said.startswith("cannot write to /proc/ctkd-run: ")
    assert "choose another --output" in said


@pytest.mark.parametrize("what", ["student", "teacher", "data", "eval-data"])
def test_overwriting_deletes_nothing_that_the_run_needs(place, tmp_path, what):
    (tmp_path / "ctkd.json").write_text('{"settings": {}, "results": {}}')
    source = place.rows if "data" in what else place.student
    (tmp_path / "copy").mkdir()
    needed = tmp_path / "copy" / source.name
    if source.is_dir():
        needed.mkdir()
        for file in source.iterdir():
            (needed / file.name).write_bytes(file.read_bytes())
    else:
        needed.write_bytes(source.read_bytes())
    before = contents(tmp_path)
    words = ["--output", str(tmp_path), "--overwrite", f"--{what}", str(needed)]
    said = error_of(invoke(*place.train("new", *words)))
    assert f"{needed} lies in the output folder {tmp_path}, which --overwrite empties" in said
    assert contents(tmp_path) == before


def test_what_nobody_expected_is_one_line_too(place, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("the first line\n  and another")

    monkeypatch.setattr(training, "train", broken)
    assert error_of(invoke(*place.train("new"))) == (
        "unexpected RuntimeError: the first line and another (set CTKD_TRACEBACK=1 to see where)"
    )
    result = invoke(*place.train("new"), environment={"CTKD_TRACEBACK": "1"})
    assert isinstance(result.exception, RuntimeError)
    result = invoke(*place.train("new", "--device", "tpu"), environment={"CTKD_TRACEBACK": "1"})
    assert isinstance(result.exception, ctkd.CtkdError)


def test_a_full_disk_is_named_whoever_meets_it(place, monkeypatch):
    full = [OSError(28, "No space left on device"), RuntimeError("basic_ios: iostream error")]
    for error in full:
        monkeypatch.setattr(training, "train", mock.Mock(side_effect=error))
        said = error_of(invoke(*place.train("new")))
        assert said.startswith("no space is left on a disk") and "make room and repeat" in said


def test_lines_of_an_error_are_joined(place, monkeypatch):
    def refused(*arguments, **settings):
        raise ctkd.CtkdError("the first line\n  and another")

    monkeypatch.setattr(training, "train", refused)
    assert error_of(invoke(*place.train("new"))) == "the first line and another"


def test_a_reader_that_leaves_is_no_error_of_ours(monkeypatch):
    def closed(*arguments, **settings):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("ctkd.registry.list_losses", closed)
    result = invoke("losses")
    assert result.exit_code == 1
    assert "unexpected" not in result.output


def test_the_version_is_shown():
    assert finish("--version").stdout == f"ctkd, version {ctkd.__version__}\n"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ([], ["Start here:", "  ctkd train                          a small model learns"]),
        (["train"], ["Examples:", "  ctkd train\n", "--overwrite  "]),
        (["evaluate"], ["Examples:", "  ctkd evaluate --predictions answers.jsonl\n"]),
        (["losses"], ["Examples:", "  ctkd losses multilevelot\n"]),
    ],
)
def test_help_has_examples(words, lines):
    shown = finish(*words, "--help").stdout
    assert shown.startswith("Usage: ctkd")
    assert "\\b" not in shown
    for line in lines:
        assert f"  {line}" in shown


def test_help_names_the_defaults():
    words = {
        "weight_decay": "0",
        **dict.fromkeys(
            off := (
                *("score_eos", "keep_checkpoints", "lora_merge", "gradient_checkpointing"),
                *("streaming", "torch_compile"),
                *("teacher_load_in_4bit", "teacher_load_in_8bit", "push_to_hub", "hub_private"),
            ),
            "no",
        ),
        "teacher_memory": "1",
        "task": "lm for pydocs, else qa",
        "epochs": "1, or 4 from random weights",
        "learning_rate": "5e-5, 2e-4 with --lora-rank, or 2e-3 from random weights",
        "control": "from random weights yes, else no",
        "student_template": "plain, but chat for task chat",
        "teacher_template": "plain, but chat for task chat",
    }
    options = {option.name: option.help for option in main.commands["train"].params}
    for name, value in TrainConfig().as_dict().items():
        if value is not None and value != {}:
            assert f"[{words.get(name, value)}]" in options[name], name
    assert not any(getattr(TrainConfig(), name) for name in off)


def test_a_student_from_random_weights_is_trained_longer_and_beside_a_control():
    settings = ("task", "epochs", "learning_rate", "control")
    for config, expected in (
        (TrainConfig(), ("lm", 4.0, 2e-3, True)),
        (TrainConfig(loss="sft"), ("lm", 4.0, 2e-3, False)),
        (TrainConfig(student="mine", data="rows.jsonl"), ("qa", 1.0, 5e-5, False)),
        (TrainConfig(student_config="c.json", data="rows.jsonl"), ("qa", 4.0, 2e-3, True)),
        (TrainConfig(student="mine", control=True, epochs=2.0), ("lm", 2.0, 5e-5, True)),
        (TrainConfig(learning_rate=1e-3, task="text"), ("text", 4.0, 1e-3, True)),
    ):
        assert tuple(getattr(config, name) for name in settings) == expected
        # As a file of settings keeps them.
        assert TrainConfig.from_mapping(config.as_dict()) == config


def test_losses_are_listed_with_what_they_match():
    lines = finish("losses").stdout.splitlines()
    assert lines[0].split() == ["loss", "matches", "paper", "needs", "of", "the", "gap"]
    lines = lines[2 : lines.index("")]
    assert [line.split()[0] for line in lines] == ctkd.list_losses()
    (uld,) = (line for line in lines if line.startswith("uld "))
    assert ctkd.describe("uld").matches in uld
    assert "arXiv:2402.12030" in uld
    assert uld.endswith("nothing seen") and "  logits  " in uld


def test_all_that_is_known_of_a_loss_is_shown():
    for name in ctkd.list_losses():
        shown = finish("losses", name).stdout
        facts = ctkd.describe(name)
        assert shown.startswith(f"{name}: {facts.matches}\n{facts.paper.title}, arXiv:")
        assert f"ce {facts.default_weights.ce:g}, kd {facts.default_weights.kd:g}" in shown
        stored = {"rows": "whole rows", "top_k": "top k", "observed": "observed tokens"}
        assert f"; teacher: {stored[facts.teacher_needs]}; default weights: " in shown
        assert all(f"\n{setting}  " in shown for setting in facts.settings)
        # Formulas and words in plain characters; the rest of the text is the docstring's.
        for mark in ("`", "\\", ".. math"):
            assert mark not in shown, mark
        assert "\n    L = " in shown
        words = [line for line in facts.doc.splitlines() if not re.search(r"[`\\]|\.\. |_\{", line)]
        assert len(words) > 10 and set(words) <= set(shown.splitlines())


def test_an_unknown_loss_is_named():
    assert error_of(invoke("losses", "nope")).startswith("unknown loss 'nope'. Available: alm")
    assert "Did you mean 'uld'?" in error_of(invoke("losses", "ulf"))
