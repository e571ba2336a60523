"""Plants faults one by one in a copy of the working tree and runs tests there."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults import warm
from tests.faults.listing import Fault

PACKAGES = ("torch", "numba", "numpy", "transformers", "pytest")
# The style of a faulty line, and that the list no longer fits, say nothing about behavior. Tests
# on packaged models would fetch them for every fault, as caches are not shared between faults.
_LEFT_OUT = (
    "--ignore=tests/faults",
    "--ignore=tests/project/test_style.py",
    "-m",
    "not models and not cuda",
)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    fault: Fault
    outcome: str
    by: str
    seconds: float


class Copy:
    """A copy of the tracked working tree, with a cache of its own for each run of tests."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree, self.caches = folder / "tree", folder / "caches"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
        # Of all copies: compiled kernels are kept by a hash of all their sources.
        self.kernels = folder.parent / "kernels"
        for name in filter(None, listed):
            if (root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.tree / name)
        self._planted = 0

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = self.tree / fault.file
        before, times = path.read_bytes(), path.stat()
        self._planted += 1
        path.write_text(fault.planted(before.decode()), encoding="utf-8")
        # Python takes compiled code for that of a file with this time and size.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + self._planted * 10**9))
        try:
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def run(self, tests: Sequence[str], timeout: float, fault: Fault | None = None) -> Result:
        shutil.rmtree(self.caches, ignore_errors=True)
        environment = {
            "PYTHONPATH": str(self.tree),
            "CTKD_CACHE": str(self.caches / "ctkd"),
            "NUMBA_CACHE_DIR": str(self.kernels),
        }
        started = time.perf_counter()
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *_LEFT_OUT]
        code, output = warm.run(self.tree, [*options, *tests], environment, timeout)
        if code is None:
            return Result(fault=fault, outcome="timeout", by="", seconds=timeout)
        outcome, by = _outcome(code, output)
        return Result(fault=fault, outcome=outcome, by=by, seconds=time.perf_counter() - started)


def _outcome(code: int, output: str) -> tuple[str, str]:
    failed = _FAILED.findall(output)
    if code == 0:
        return "survived", ""
    if code == 1 and failed:
        return "caught", failed[0]
    if code < 0:
        return "caught", f"crash by signal {-code}"
    # Tests could not be collected or found: the faulty package cannot be imported.
    return "error", " ".join(output.split())[-300:]


def measure(
    copy: Copy,
    fault: Fault,
    *,
    timeout: float,
    whole: bool = False,
    whole_timeout: float = 7200.0,
    say: Callable[[str], None] = print,
) -> Result:
    with copy.planted(fault):
        result = copy.run(fault.first, timeout, fault)
        if result.outcome == "survived" and whole:
            say(f"{fault.id} survived {' '.join(fault.first)}; the whole suite is run")
            result = copy.run([], whole_timeout, fault)
        return result


def versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *found, platform.machine()])


def commit_of(root: Path) -> str:
    """The short hash of what is measured, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()
