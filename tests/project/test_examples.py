"""The examples run as they are, on tiny models, and are as short as they look."""

import ast
import importlib
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import ctkd
from ctkd.distill.config import TrainConfig
from ctkd.distill.models import load_model, load_tokenizer
from ctkd.distill.options import read_config_file
from ctkd.distill.training import Distiller
from ctkd.errors import SettingError
from ctkd.testing import check_loss
from tests.distill.tiny_runs import Workplace, finish

EXAMPLES = Path(__file__).parents[2] / "examples"
FEWER_THAN = 25
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
WITHOUT_ACCELERATOR = "ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("place"))


def code_lines(file: Path) -> int:
    """Lines of a file that are neither blank nor of a docstring."""
    text = file.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    docstrings = [node.body[0] for node in nodes if ast.get_docstring(node)]
    beyond = {n for one in docstrings for n in range(one.lineno, one.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return len([line for number, line in lines if line.strip() and number not in beyond])


def run(name: str, place: Workplace, monkeypatch, folder: Path) -> dict:
    """The variables that an example leaves."""
    monkeypatch.chdir(folder)
    words = [f"{name}.py", str(place.student), str(place.teacher)]
    monkeypatch.setattr(sys, "argv", words)
    return runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")


def first_loss(place: Workplace, rows) -> dict[str, float]:
    """What the models that an example begins with are apart."""
    tokenizers = map(load_tokenizer, (str(place.student), str(place.teacher)))
    distiller = Distiller("multilevelot", *tokenizers, k=20)
    batch = distiller.collate(list(rows))
    with torch.no_grad():
        student = load_model(str(place.student))(**distiller.student_inputs(batch))
        teacher = load_model(str(place.teacher))(**distiller.teacher_inputs(batch))
        output = distiller.loss(student, teacher, batch)
    return {"loss": float(output.value), **{name: float(one) for name, one in output.parts.items()}}


def has_learned(student, place: Workplace) -> bool:
    before, after = load_model(str(place.student)).state_dict(), student.state_dict()
    return any(not torch.equal(before[name], after[name].cpu()) for name in before)


@pytest.mark.filterwarnings(WITHOUT_ACCELERATOR)
def test_examples_that_need_nothing_else(place, monkeypatch, tmp_path, capsys):
    found = run("bare_pytorch", place, monkeypatch, tmp_path)
    expected = first_loss(place, found["rows"])
    assert has_learned(found["student"], place)
    printed = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == pytest.approx({name: expected[name] for name in printed}, abs=1e-4)
    assert printed.keys() == expected.keys() - {"loss"}
    for name in ("trainer", "transformers_trainer"):
        found = run(name, place, monkeypatch, tmp_path)
        log = found["trainer"].state.log_history[0]
        assert log["loss"] == pytest.approx(first_loss(place, found["rows"])["loss"], rel=1e-4)
        assert has_learned(found["trainer"].model, place)


@pytest.mark.filterwarnings("ignore")  # what other packages say of each other
def test_examples_of_other_trainers(place, monkeypatch, tmp_path):
    for name in ("trl_sft", "lightning_module"):
        found = run(name, place, monkeypatch, tmp_path)
        expected = first_loss(place, found["rows"])
        if name == "trl_sft":
            log = found["trainer"].state.log_history[0]
            assert log["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        else:
            logged = {one: float(part) for one, part in found["trainer"].logged_metrics.items()}
            assert logged.keys() == expected.keys() - {"loss"}
            # Of the second step.
            assert expected["ce"] > logged["ce"] == pytest.approx(expected["ce"], rel=0.05)
        assert has_learned(found["student"], place)


def test_examples_are_short_and_recipes_are_settings():
    counts = {file.name: code_lines(file) for file in sorted(EXAMPLES.rglob("*.py"))}
    print(counts)
    assert len(counts) == 6 and max(counts.values()) < FEWER_THAN, counts
    recipes = sorted(EXAMPLES.glob("recipes/*.yaml"))
    outputs = set()
    for recipe in recipes:
        config = TrainConfig.from_mapping(read_config_file(recipe), source=recipe.name)
        outputs.add(config.output)
        assert recipe.read_text().startswith("# ") and config.data != "pydocs"
    assert len(outputs) == len(recipes) >= 5
    assert (
        TrainConfig.from_mapping(
            read_config_file(EXAMPLES / "recipes/from_sft_teacher.yaml")
        ).teacher
        in outputs
    )
    with pytest.raises(SettingError, match="unknown"):
        TrainConfig.from_mapping({**read_config_file(recipes[0]), "epoch_s": 1})


def test_the_plugin_is_found_by_its_entry_point(monkeypatch, tmp_path):
    shutil.copytree(EXAMPLES / "plugin", tmp_path / "plugin")
    (tmp_path / "installed").mkdir()
    # What an installer does with its pyproject.toml.
    code = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel(argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", f"from sys import argv; {code}", str(tmp_path / "installed")],
        cwd=tmp_path / "plugin",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shutil.copy(EXAMPLES / "plugin" / "answer_likelihood.py", tmp_path / "installed")
    assert "answer_likelihood" not in ctkd.list_losses()
    monkeypatch.syspath_prepend(tmp_path / "installed")
    importlib.invalidate_caches()
    assert version("answer-likelihood") == "0.1.0"
    try:
        assert "answer_likelihood" in finish("losses").stdout
        assert "log-likelihood of the whole answer" in finish("losses", "answer_likelihood").stdout
        check_loss(ctkd.get_loss("answer_likelihood"))
    finally:
        sys.modules.pop("answer_likelihood", None)
