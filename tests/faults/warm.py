"""Runs tests in a process that finds the slow imports done: most of the time of a short run."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

# Nothing of this project, and nothing that reads its settings from the environment when imported.
_PRELOADED = ["torch", "scipy.optimize", "transformers.trainer", "pytest"]
_OWN = {"ctkd", "baselines", "benchmarks", "tests"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


def run(
    tree: Path, arguments: list[str], environment: dict[str, str], timeout: float
) -> tuple[int | None, str]:
    """Exit code of pytest in a tree, None where it took too long, and what it wrote."""
    output = tree.parent / "output"
    # Read when the server imports torch, with the first run.
    os.environ["OMP_NUM_THREADS"] = "1"
    process = _context.Process(target=_run, args=(tree, arguments, environment, output))
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code, output.read_text(errors="replace") if output.exists() else ""


def _run(tree: Path, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(tree)
    os.environ.update(environment)
    root = str(Path(__file__).parents[2])
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", root))]
    for name in [name for name in sys.modules if name.split(".")[0] in _OWN]:
        del sys.modules[name]
    import pytest

    # transformers imports a package that brings a plugin.
    arguments = ["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]
    sys.argv = ["pytest", *arguments]
    code = int(pytest.main(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for threads and temporary files that tests have left.
    os._exit(code)
