"""Which backend serves which rows, and how a user overrides the choice."""

import importlib
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ctkd import ops
from ctkd.errors import SettingError
from ctkd.logits import DenseLogits
from ctkd.ops import Rows, backend_for, choice, reference, use_backend


@pytest.fixture(autouse=True)
def no_word_of_the_user(monkeypatch):
    monkeypatch.setattr(choice, "chosen", "auto")


def rows_of(dtype=torch.float32, device="cpu") -> Rows:
    return Rows(torch.zeros(2, 3, dtype=dtype, device=device), None, 3)


needs_numba = pytest.mark.usefixtures("numba")


@pytest.fixture
def numba():
    return pytest.importorskip("numba", exc_type=ImportError)


def name_of(*arguments) -> str:
    return backend_for(*arguments).__name__.removeprefix("ctkd.ops.")


@needs_numba
@pytest.mark.parametrize("operation", ["log_normalizers", "top_k", "uld", "gold", "shared_kl"])
def test_float32_and_bfloat16_on_a_cpu_have_kernels(operation):
    for dtype in (torch.float32, torch.bfloat16):
        assert name_of(operation, rows_of(dtype)) == "cpu"
        assert name_of(operation, rows_of(dtype), rows_of(torch.float32)) == "cpu"


@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        ("top_k", rows_of(torch.float64)),
        ("top_k", rows_of(torch.float16)),
        ("top_k", Rows(torch.zeros(3, 4).t(), None, 3)),
        ("no kernel of that name", rows_of()),
        # A plugin's function has no name.
        ("", rows_of()),
        # These are no operations on rows.
        ("row_loss", rows_of()),
        ("share", rows_of()),
    ],
)
def test_everything_else_goes_to_the_reference(operation, rows):
    assert backend_for(operation, rows) is reference


def test_tensors_without_values_go_the_way_of_a_device():
    assert name_of("top_k", rows_of(device="meta")) == "cuda"
    assert name_of("top_k", rows_of(torch.float64, "meta")) == "reference"


@needs_numba
def test_all_rows_have_to_be_served():
    assert backend_for("uld", rows_of(), rows_of(torch.float64)) is reference


@needs_numba
def test_what_a_backend_lacks_goes_to_the_reference():
    rows, targets = rows_of(), rows_of()
    loss = ops.RowLoss("no such kernel", lambda student, teacher: (student - teacher).sum(-1))
    with use_backend("cpu"):
        assert backend_for(loss.name, rows, targets) is reference
        assert (ops.row_loss(loss, rows, targets).values == 0.0).all()


@needs_numba
def test_use_backend_overrides_and_gives_back():
    for _ in range(2):
        with use_backend("reference"):
            assert name_of("top_k", rows_of()) == "reference"
            with use_backend("auto"):
                assert name_of("top_k", rows_of()) == "cpu"
            assert name_of("top_k", rows_of()) == "reference"
        assert name_of("top_k", rows_of()) == "cpu"
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert name_of("top_k", rows_of()) == "cpu"


@needs_numba
def test_use_backend_reaches_other_threads():
    """The backward pass on a device runs in threads of torch's own."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(rows_of).result()
        with use_backend("reference"):
            assert pool.submit(name_of, "top_k", rows_of()).result() == "reference"
        assert pool.submit(name_of, "top_k", rows_of()).result() == "cpu"


@needs_numba
def test_the_variable_chooses_and_the_context_goes_first(monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "reference")
    importlib.reload(choice)
    assert name_of("top_k", rows_of()) == "reference"
    with use_backend("cpu"):
        assert name_of("top_k", rows_of()) == "cpu"


def test_unknown_backends_are_refused(monkeypatch):
    with (
        pytest.raises(SettingError, match="one of auto, reference, cpu, cuda, got 'gpu'"),
        use_backend("gpu"),
    ):
        raise RuntimeError("never reached")
    monkeypatch.setenv(ops.VARIABLE, "fast")
    importlib.reload(choice)
    with pytest.raises(SettingError, match="CTKD_BACKEND must be one of .*, got 'fast'"):
        backend_for("top_k", rows_of())


def test_without_numba_everything_goes_to_the_reference_and_that_is_told_once(monkeypatch):
    for name in list(sys.modules):
        if name == "ctkd.ops.cpu" or name.startswith("ctkd.ops.cpu."):
            monkeypatch.delitem(sys.modules, name)
    # What numba itself raises where numpy is too new for it is an ImportError as well.
    monkeypatch.setitem(sys.modules, "numba", None)
    ops._cpu.cache_clear()
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0))
    try:
        with pytest.warns(UserWarning, match="numba cannot be imported .*; install"):
            assert backend_for("top_k", rows_of()) is reference
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = DenseLogits(logits).log_probs(torch.zeros(1, 2, 1, dtype=torch.int64))
        torch.testing.assert_close(answer, logits.log_softmax(-1)[..., :1])
    finally:
        ops._cpu.cache_clear()


@pytest.mark.slow
def test_without_numba_its_tests_are_left_out(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('left out')")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/ops"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "tests/ops/test_reference.py" in done.stdout
    assert "tests/ops/cpu/" not in done.stdout and "test_cpu.py" not in done.stdout
