"""Runs tests as other machines would run them: vector widths, threads, with and without numba.

    python -m tests.machines                  # files that depend on the machine most
    python -m tests.machines --all            # all tests of the core
    python -m tests.machines tests/losses -k gold

Any two factors meet in every pair of their values, in nine runs of pytest. A table follows, line by
line, then which tests failed where. Paths and options of pytest may be given; without paths, those
above are run. Where the CPU does not have a vector width, torch uses its widest, and the table says
so. ``generic`` is numba for a CPU without extensions such as fused products; ``missing`` is a numba
that cannot be imported, where tests of the compiled loops alone are skipped.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CAPABILITIES = ("default", "avx2", "avx512")
THREADS = (1, 2, 4)
NUMBAS = ("native", "generic", "missing")

FOLDERS = (
    "tests/losses",
    "tests/logits",
    "tests/ops",
    "tests/ot",
    "tests/testing",
    "tests/test_loss.py",
)
NARROW = (
    "tests/logits",
    "tests/ops",
    "tests/losses/test_closed_forms.py",
    "tests/losses/test_gold.py",
    "tests/losses/test_multilevelot.py",
    "tests/losses/test_bpm.py",
    "tests/losses/test_shared_kl.py",
    "tests/losses/test_uld.py",
)
_PROBE = """
import torch
torch.randn(999).exp2().sum()
print(torch.backends.cpu.get_cpu_capability())
"""
ROOT = Path(__file__).resolve().parents[1]


class Machine(NamedTuple):
    """What a process is made to see."""

    capability: str
    threads: int
    numba: str

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables of a process, which keeps compiled loops in a folder of its kind of numba."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if self.numba == "missing":
            paths.insert(0, str(folder / "without_numba"))
        changed = {
            "ATEN_CPU_CAPABILITY": self.capability,
            "OMP_NUM_THREADS": str(self.threads),
            "NUMBA_CACHE_DIR": str(folder / self.numba),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CPU_NAME"}
        if self.numba == "generic":
            changed["NUMBA_CPU_NAME"] = "generic"
        return kept | changed


def machines() -> list[Machine]:
    """A Latin square: any two factors take every pair of values once.

    >>> found = machines()
    >>> [len({(one[i], one[j]) for one in found}) for i, j in ((0, 1), (0, 2), (1, 2))]
    [9, 9, 9]
    """
    return [
        Machine(CAPABILITIES[i], THREADS[j], NUMBAS[(i + j) % 3])
        for i, j in itertools.product(range(3), repeat=2)
    ]


def this_machine() -> str:
    """The CPU: its name, the vector extensions that torch uses, cores and threads."""
    import torch

    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine() or "unknown"
    return (
        f"{name}, torch uses {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )


def main(arguments: list[str]) -> int:
    """Run pytest on every machine; 1 if a test failed on any."""
    selection = list(NARROW)
    if "--all" in arguments:
        arguments.remove("--all")
        selection = list(FOLDERS)
    if any((ROOT / one.split("::")[0]).exists() for one in arguments):
        selection = []
    failures: dict[str, list[Machine]] = {}
    is_bad = False
    print(f"{'capability':<12}{'torch uses':<12}{'threads':<9}{'numba':<9}result", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "without_numba" / "numba.py"
        broken.parent.mkdir()
        broken.write_text('raise ImportError("left out by tests.machines")\n')
        for machine in machines():
            environment = machine.environment(Path(folder))
            code, seen = _output([sys.executable, "-c", _PROBE], environment)
            if code:
                # An illegal instruction: torch believes what it is told.
                del environment["ATEN_CPU_CAPABILITY"]
                _, seen = _output([sys.executable, "-c", _PROBE], environment)
            command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
            code, output = _output([*command, *selection, *arguments], environment)
            result = output.splitlines()[-1] if output else f"exit status {code}"
            capability, threads, numba = machine
            print(f"{capability:<12}{seen.strip():<12}{threads:<9}{numba:<9}{result}", flush=True)
            is_bad |= code != 0
            for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M):
                failures.setdefault(name, []).append(machine)
    for name, where in failures.items():
        print(name, *("/".join(map(str, one)) for one in where))
    return int(is_bad)


def _output(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
