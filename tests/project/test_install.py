"""What the README's first two commands leave behind, one after the other, in one environment."""

import os
import shutil
import subprocess
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from tests.distill.tiny_runs import Workplace, record

ROOT = Path(__file__).parents[2]
USE = """
import torch, ctkd
from ctkd import ops
chunks = torch.tensor([[-1, 0, 1, 2]])
batch = ctkd.Batch.from_causal_lm(
    student_logits=torch.randn(1, 4, 50),
    student_labels=torch.randint(50, (1, 4)),
    student_chunk_ids=chunks,
    teacher_logits=torch.randn(1, 4, 60),
    teacher_labels=torch.randint(60, (1, 4)),
    teacher_chunk_ids=chunks,
)
with ops.use_backend("reference"):
    assert ctkd.get_loss("alm")(batch).value.isfinite()
# The kernel that is compiled in the least time.
rows = ops.Rows(torch.randn(4, 50), torch.arange(4), 50)
assert ops.log_normalizers(rows, [1.0]).isfinite().all()
print(ctkd.__file__)
"""


BUILD = "import sys, setuptools.build_meta as it; print(it.build_sdist(sys.argv[1]))"


@pytest.mark.slow
def test_an_editable_install_after_one_of_a_source_distribution(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = programs / ("python.exe" if os.name == "nt" else "python")
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # All that ctkd needs, pip and setuptools too, without the ctkd that may be installed there.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "ctkd", checkout / "ctkd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "distill", checkout / "tests" / "distill")
    shutil.copy(ROOT / "tests" / "test_batch.py", checkout / "tests")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "PYTHONPATH")
    }
    environment["CTKD_CACHE"] = str(tmp_path / "cache")

    def run(*arguments: str, cwd: Path, program: Path = python) -> str:
        done = subprocess.run(
            [program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    install = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation")
    # Of what setuptools says and what it returns, the last line is the name.
    source = elsewhere / run("-c", BUILD, str(elsewhere), cwd=checkout).splitlines()[-1]
    with tarfile.open(source) as archive:
        parts = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert parts == {
        "CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "ctkd", "ctkd.egg-info",
        "pyproject.toml", "setup.cfg",
    }  # fmt: skip
    assert source.stat().st_size < 1e6
    run(*install, str(source), cwd=elsewhere)
    assert Path(run("-c", USE, cwd=elsewhere)).is_relative_to(packages)
    # Nothing that a command needs was left behind in the repository.
    ctkd = programs / "ctkd"
    assert "multilevelot" in run("losses", cwd=elsewhere, program=ctkd)
    assert "--teacher" in run("doctor", "--help", cwd=elsewhere, program=ctkd)
    place = Workplace(tmp_path / "models")
    environment["CTKD_BACKEND"] = "reference"
    run(*place.train("run", "--loss", "uld"), cwd=elsewhere, program=ctkd)
    assert record(place.folder / "run")["results"]["steps"] == 2
    del environment["CTKD_BACKEND"]
    run(*install, "-e", ".", cwd=checkout)
    assert Path(run("-c", USE, cwd=elsewhere)).is_relative_to(checkout)
    assert list((tmp_path / "cache" / "kernels").iterdir())
