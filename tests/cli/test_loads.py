"""Heavy packages are loaded where they are used, not where a module is imported."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys

def check(*names):
    loaded = sorted(set(names) & set(sys.modules))
    assert not loaded, loaded

from click.testing import CliRunner
from ctkd.cli import main
for words in ([], ["--help"], ["--version"], *([name, "--help"] for name in main.commands)):
    assert CliRunner().invoke(main, words).exit_code in (0, 2), words
check("torch", "numpy", "transformers", "datasets", "matplotlib")

import ctkd.tokenization.alignment, ctkd.tokenization.token_bytes
check("transformers", "datasets", "tokenizers", "scipy")
for words in (["losses"], ["losses", "uld"]):
    assert CliRunner().invoke(main, words).exit_code == 0, words
check("transformers", "datasets", "matplotlib")

from ctkd.distill.evaluation.metrics import score
score(["a"], [["a"]])
check("transformers")

import ctkd.compare.report.report
from ctkd.distill.training.curves import plot_curves
check("matplotlib", "transformers")
plot_curves([{"step": 1, "ce": 1.0}], sys.argv[1])
assert "matplotlib" in sys.modules
check("matplotlib.pyplot")
"""


@pytest.mark.slow
def test_each_part_loads_no_more_than_it_needs(tmp_path):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "curves.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
