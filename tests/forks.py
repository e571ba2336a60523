"""Processes that find the slow imports done: forks of one server, which is started when needed.

A process of its own costs a test some ten seconds of imports otherwise.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Without numba there are no kernels. The last is what transformers loads when it is first used.
_PRELOADED = [
    "ctkd.ops.cpu",
    "ctkd.cli",
    "ctkd.compare.run.runner",
    "ctkd.distill.training.run",
    "rouge_score.rouge_scorer",
    "pytest",
    "transformers.models.llama.modeling_llama",
]


class Forks:
    """Starts functions of test modules in processes of one thread."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None

    def start(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        output: Path,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Call a function with arguments that JSON can hold; return the number of the process.

        What it prints goes to a file.
        """
        request = {
            "module": function.__module__,
            "function": function.__name__,
            "arguments": arguments,
            "output": str(output),
            "environment": {**os.environ, **(environment or {})},
        }
        return int(self._answer(request))

    def wait(self, process: int, *, seconds: float = 300.0) -> int:
        """Return the exit code of a process, or minus the signal that it died of."""
        try:
            return int(self._answer({"wait": process}, seconds))
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            self._read()
            raise

    def run(self, function: Callable[..., Any], *arguments: Any, output: Path) -> int:
        """Call a function and wait for its end."""
        return self.wait(self.start(function, *arguments, output=output))

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
            self._server = None

    def _answer(self, request: dict[str, Any], seconds: float | None = None) -> str:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.forks"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"no end of {request} within {seconds} s")
        return self._read()

    def _read(self) -> str:
        return self._server.stdout.readline()


def _serve() -> None:
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _call(request)
        print(answer, flush=True)


def _call(request: dict[str, Any]) -> None:
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, output, output)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        module = importlib.import_module(request["module"])
        getattr(module, request["function"])(*request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
