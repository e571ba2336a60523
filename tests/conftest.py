"""What holds for all tests."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # Read when torch is imported, also by processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from ctkd.cache_folder import cache_dir  # noqa: E402
from tests.machines import this_machine  # noqa: E402

# Many tests have a cache folder of their own. Compiled loops are kept in one place all the same,
# also by processes that tests start. numba reads this when it is imported.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "tests"))

MOST_WORKERS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the whole suite among processes of one thread; a part of it stays in one process."""
    if IS_WORKER:
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    # None: pytest-xdist is there and was given no -n.
    undecided = config.getoption("numprocesses", 0) is None
    if whole and undecided and not (config.option.usepdb or config.option.collectonly):
        config.option.numprocesses = min(MOST_WORKERS, os.cpu_count() or 1)
        config.option.dist = "loadfile"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Keep what a file of tests left behind, mostly imported code, out of later collections.

    The trainer collects garbage after each run, which takes a second in a process with much of it.
    """
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    """Keep the tests themselves out of it too."""
    gc.freeze()


@pytest.fixture
def uninspected(monkeypatch) -> Callable[[], AbstractContextManager[None]]:
    """A context in which no value may be looked at: as on a device that one would wait for."""

    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for module in ("ctkd.ops", "ctkd.ops.rows"):
                patch.setattr(f"{module}.can_inspect", lambda _: False)
            yield

    return context


def pytest_report_header() -> str:
    """The machine, because vector extensions and threads change the last digits of results."""
    return f"cpu: {this_machine()}"
