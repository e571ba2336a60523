"""What holds for all tests."""

import gc
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from logging.handlers import BufferingHandler
from typing import Any

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # Read when torch is imported, also by processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.forks import SERVER, Forks, Server, keep_compiled, python  # noqa: E402
from tests.machines import this_machine  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As shells start what runs in the background; tests interrupt themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_WORKERS = 4

# Files that go to one process, since they share what takes long to make: the server of `forks`, and
# tokenizers of the packaged models.
TOGETHER = {
    f"tests/{file}.py": name
    for name, files in {
        "forks": (
            "compare/run/test_resume",
            "distill/data/test_rows",
            "distill/teachers/test_cache_kill",
            "distill/test_devices",
            "distill/training/test_resume",
            "distill/training/test_trainer",
        ),
        # Files of many tests are begun first, and this one of few takes minutes.
        "kernels": ("losses/test_uld", "ops/test_cuda"),
        "packaged": (
            "distill/data/test_conversations",
            "distill/data/test_encoding",
            "distill/evaluation/test_doctor",
            "distill/models/test_packaged",
            "project/test_readme",
            "tokenization/test_alignment_properties",
            "tokenization/test_token_bytes",
        ),
    }.items()
    for file in files
}


# Of this process, which has no use for what is imported where it starts others.
_servers: list[Server] = []


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the whole suite among processes of one thread; a part of it stays in one process."""
    if IS_WORKER:
        keep_compiled()
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    # None: pytest-xdist is there and was given no -n.
    undecided = config.getoption("numprocesses", 0) is None
    if whole and undecided and not (config.option.usepdb or config.option.collectonly):
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        config.option.dist = "loadfile"
        if sys.platform == "linux":
            _servers.append(Server())
            config.option.tx = [f"popen//python={shlex.join(python())}"] * workers
            if config.option.maxworkerrestart is None:
                config.option.maxworkerrestart = str(MOST_WORKERS)
            return
        config.option.numprocesses = workers
    keep_compiled()


def pytest_unconfigure() -> None:
    while _servers:
        _servers.pop().close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file of tests, and files that belong together, in one process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return Scheduling(config, log) if config.option.dist == "loadfile" else None


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


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Processes that find the slow imports done."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    server = None if SERVER in os.environ else Server()
    yield Forks()
    if server:
        server.close()


@pytest.fixture
def transformers_log() -> Iterator[list[logging.LogRecord]]:
    """Warnings of transformers, as they come."""
    logger, handler = logging.getLogger("transformers"), BufferingHandler(1_000)
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield handler.buffer
    logger.removeHandler(handler)
    logger.setLevel(level)


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
    return f"cpu: {_servers[0].machine if _servers else this_machine()}"
