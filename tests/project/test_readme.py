"""What README and pages say is true: their code runs, tables and commands are those there are."""

import re
from pathlib import Path
from typing import Any

import pytest

import ctkd
from ctkd import registry
from ctkd.distill.models import load_model
from ctkd.testing import check_loss
from tests.distill.tiny_runs import Workplace, finish
from tests.tokenization import real_tokenizers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
IN_ORDER = [README, *(PAGES[page] for page in ("python", "tokenizers", "write-a-loss"))]
PYTHON = list(dict.fromkeys(re.findall(r"```python\n(.*?)```", "".join(IN_ORDER), re.DOTALL)))
SHELL = re.findall(r"```sh\n(.*?)```", "".join([README, *PAGES.values()]), re.DOTALL)


def load_shallow(name):
    """A packaged model without most of its layers, which take most of the time of a step."""
    model = load_model(name)
    del model.model.layers[2:]
    return model


@pytest.mark.models
def test_the_python_code_runs(monkeypatch):
    monkeypatch.setattr("ctkd.distill.models.load_tokenizer", real_tokenizers.packaged)
    monkeypatch.setattr("ctkd.distill.models.load_model", load_shallow)
    monkeypatch.setattr(registry, "_losses", dict(registry._registered()))
    names: dict = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), names)
        if block.startswith("for batch"):
            assert names["output"].value.isfinite() and names["output"].counts.kd > 0
            assert names["student"].get_input_embeddings().weight.grad is None
    assert names["alignment"].coverage == 1
    assert names["student"].get_input_embeddings().weight.grad.isfinite().all()
    assert names["student"].training and not names["teacher"].training
    assert "mean_entropy_gap" in ctkd.list_losses()
    check_loss(ctkd.get_loss("mean_entropy_gap"))


def test_the_loss_that_is_written_there_is_trained_with_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_losses", dict(registry._registered()))
    (block,) = [block for block in PYTHON if "@ctkd.register" in block]
    exec(compile(block, "README.md", "exec"), {"ctkd": ctkd})
    words = ["--loss", "mean_entropy_gap", "--measure", "nothing"]
    shown = finish(*Workplace(tmp_path).train("run", *words))
    assert "kd " in shown.stderr
    assert "entropy of the top 8 entries" in finish("losses", "mean_entropy_gap").stdout


def test_the_loop_is_short():
    loop = next(block for block in PYTHON if block.startswith("for batch"))
    assert len(loop.splitlines()) <= 8
    assert len([line for line in PYTHON[0].splitlines() if line]) <= 10


def test_the_table_lists_every_loss():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| \[(.*?)\].*? \| (.*?) \|$", README, re.MULTILINE)
    expected = []
    for name in ctkd.list_losses():
        facts = ctkd.describe(name)
        needs = ", ".join(sorted(facts.needs)) or "logits"
        expected.append((name, facts.matches, facts.paper.arxiv, needs))
    assert rows == expected


def test_checks_run_as_the_readme_says():
    assert SHELL[1].strip() in (ROOT / ".ci" / "run").read_text()
    assert "-c constraints.txt" in SHELL[0] and "ctkd train --loss shared_kl" in SHELL[0]


def test_examples_of_training_are_no_runs_that_are_refused():
    from ctkd.cli import main
    from ctkd.cli.options import read_settings
    from ctkd.compare.plan.config import CompareConfig
    from ctkd.distill.config import TrainConfig
    from ctkd.distill.preparing import check_student

    def settings(command: str, words: list[str], *kinds: type) -> dict[str, Any]:
        # As the command line does, or another way to ask for help would stay with the command.
        parent = main.make_context("ctkd", [command])
        context = main.commands[command].make_context(command, words, parent=parent)
        return read_settings(None, context.params, *kinds)

    helps = [command.epilog or "" for command in main.commands.values()]
    lines = "\n".join([*SHELL[2:], *helps]).replace("\\\n", " ").splitlines()
    examples = [line.partition("#")[0].split() for line in lines if re.match(" *ctkd", line)]
    examples = [words for words in examples if "--help" not in words]
    trained = [words[2:] for words in examples if words[1] == "train"]
    compared = [words[2:] for words in examples if words[1] == "compare"]
    assert len(trained) > 8 and len(compared) > 6
    for words in trained:
        check_student(TrainConfig.from_mapping(settings("train", words, TrainConfig)))
    for words in compared:
        given_settings = settings("compare", words, CompareConfig, TrainConfig)
        check_student(CompareConfig.from_mapping(given_settings).base)


def test_options_in_the_readme_exist():
    from ctkd.cli import main

    known = {
        option for command in main.commands.values() for p in command.params for option in p.opts
    }
    for block in SHELL[2:]:
        for option in re.findall(r"--[a-z-]+", block):
            assert option in known, option
