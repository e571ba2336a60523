"""What the README's first two commands leave behind, one after the other, in one environment."""

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_an_editable_install_after_a_plain_one(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # All that ctkd needs, pip and setuptools too, without the ctkd that may be installed there.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "ctkd", checkout / "ctkd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "PYTHONPATH")
    }
    environment["CTKD_CACHE"] = str(tmp_path / "cache")

    def run(*arguments: str, cwd: Path) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    install = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation")
    run(*install, ".", cwd=checkout)
    assert Path(run("-c", USE, cwd=elsewhere)).is_relative_to(packages)
    run(*install, "-e", ".", cwd=checkout)
    assert Path(run("-c", USE, cwd=elsewhere)).is_relative_to(checkout)
    assert list((tmp_path / "cache" / "kernels").iterdir())
