"""The documentation is made of the docstrings without a warning, and leaves nothing public out."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

import ctkd
from tests.forks import python

ROOT = Path(__file__).parents[2]
LINKS = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.slow
def test_it_is_made_without_a_warning(tmp_path):
    made = tmp_path / "pages"
    done = subprocess.run(
        [*python(), "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(made)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    losses = (made / "losses.html").read_text(encoding="utf-8")
    for name in ctkd.list_losses():
        assert f'id="{ctkd.get_loss_class(name).__module__}' in losses, name
    pages = "".join(page.read_text(encoding="utf-8") for page in made.glob("*.html"))
    for name in ("Batch", "HeadLogits", "TokenizerPair", "CrossTokenizerTrainer", "Distiller"):
        assert re.search(rf'id="ctkd[\w.]*\.{name}"', pages), name
    options = (made / "command-line.html").read_text(encoding="utf-8")
    assert "--gradient-checkpointing" in options and "ctkd train --help" in options


def test_links_between_files_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in LINKS.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_modules_that_are_named_there_exist():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    modules = re.findall(r"automodule:: (\S+)", text)
    losses = {one.stem for one in (ROOT / "ctkd/losses").glob("[a-z]*.py")}
    assert {f"ctkd.losses.{loss}" for loss in losses} <= set(modules)
    for module in modules:
        importlib.import_module(module)
