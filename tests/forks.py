"""Processes that find the slow imports done: forks of one server.

A process of its own costs some ten seconds of imports otherwise. As a script, this is a Python for
``-c CODE`` and ``-m MODULE`` whose process is such a fork; `python` names it where a server runs.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The variable that names the server's socket.
SERVER = "CTKD_TESTS_SERVER"
# Of the numbers that come from the socket.
_DIGITS = 12

# Without numba there are no kernels. torch and transformers load parts when they are first used.
_PRELOADED = [
    "ctkd.ops.cpu",
    "ctkd.cli",
    "ctkd.compare.run.runner",
    "ctkd.distill.training.run",
    "rouge_score.rouge_scorer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pytest",
    "torch._dynamo.backends.common",
    "torch._inductor.pattern_matcher",
    "torch.distributed.tensor.experimental",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
]


def keep_compiled() -> None:
    """Keep compiled loops in one place, also by processes that tests start.

    Many tests have a cache folder of their own. Where it can be, the place is that of the user's
    commands, which may have compiled some. numba reads this when it is imported.
    """
    from ctkd.cache_folder import cache_dir

    folder = cache_dir()
    # Below the folder that is named loops lie in one called ctkd.
    place = folder.parent if folder.name == "ctkd" else folder / "tests"
    os.environ.setdefault("NUMBA_CACHE_DIR", str(place))


def python() -> list[str]:
    """The beginning of a command: a Python with the imports done if there is a server."""
    return [sys.executable, *(["-I", "-S", __file__] if os.environ.get(SERVER) else [])]


class Server:
    """Imports, and forks for whoever asks at its socket, until it is closed."""

    def __init__(self) -> None:
        import subprocess
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        address = Path(self._folder.name) / "server"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(address)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.machine = self._process.stdout.readline().strip()
        if not self.machine:
            raise RuntimeError("the server of forks ended; see above")
        os.environ[SERVER] = str(address)

    def close(self) -> None:
        """End it, and what it started."""
        del os.environ[SERVER]
        self._process.communicate()
        self._folder.cleanup()


class Forks:
    """Starts functions of test modules in processes of one thread."""

    def __init__(self) -> None:
        self._started: dict[int, socket.socket] = {}

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
        called = json.dumps([function.__module__, function.__name__, arguments])
        code = f"import json; from tests.forks import call; call(*json.loads({called!r}))"
        with open(os.devnull) as nothing, open(output, "w") as file:
            files = [nothing.fileno(), file.fileno(), file.fileno()]
            process, connection = _fork(["-c", code], files, {**os.environ, **(environment or {})})
        self._started[process] = connection
        return process

    def wait(self, process: int, *, seconds: float = 300.0) -> int:
        """Return the exit code of a process, or minus the signal that it died of."""
        # What is closed without an answer is killed.
        with self._started.pop(process) as connection:
            connection.settimeout(seconds)
            return _number(connection)

    def run(self, function: Callable[..., Any], *arguments: Any, output: Path) -> int:
        """Call a function and wait for its end."""
        return self.wait(self.start(function, *arguments, output=output))


def call(module: str, function: str, arguments: list[Any]) -> None:
    """Call a function of a module of tests."""
    import importlib

    getattr(importlib.import_module(module), function)(*arguments)


def _fork(
    arguments: list[str], files: list[int], environment: Mapping[str, str]
) -> tuple[int, socket.socket]:
    """Start a process with these three files; its exit code will come from the socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SERVER])
    socket.send_fds(connection, [b"3"], files)
    request = [arguments, dict(environment), os.getcwd()]
    connection.sendall(json.dumps(request).encode() + b"\n")
    return _number(connection), connection


def _number(connection: socket.socket) -> int:
    return int(connection.recv(_DIGITS))


def _main(arguments: list[str]) -> None:
    """Be a process that the server starts: wait for its end, and end as it did."""
    _, connection = _fork(arguments, [0, 1, 2], os.environ)
    for file in range(3):
        os.close(file)
    code = _number(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve(address: str) -> None:
    import contextlib
    import gc
    import importlib
    import select
    import warnings

    keep_compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in _PRELOADED:
            # An error is raised again where tests import it.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    from tests.machines import this_machine

    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print(this_machine(), flush=True)
    # An interrupt from the keyboard is for those who asked: they close this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Something to be read from whenever a process has ended.
    ended, ends = socket.socketpair()
    for one in (ended, ends):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ends.fileno(), warn_on_full_buffer=False)
    running: dict[socket.socket, int] = {}
    while True:
        ready = select.select([0, listener, ended, *running], [], [])[0]
        if 0 in ready:
            break
        for connection in set(ready) & set(running):
            os.kill(running[connection], signal.SIGKILL)
            os.waitpid(running.pop(connection), 0)
            connection.close()
        if listener in ready:
            connection, _ = listener.accept()
            files = socket.recv_fds(connection, 1, 3)[1]
            with connection.makefile("rb") as lines:
                request = json.loads(lines.readline())
            process = os.fork()
            if process == 0:
                for one in (listener, ended, ends, connection, *running):
                    one.close()
                _become(files, *request)
            for file in files:
                os.close(file)
            running[connection] = process
            _tell(connection, process)
        if ended in ready:
            ended.recv(1000)
            for connection, process in list(running.items()):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    del running[connection]
                    _tell(connection, os.waitstatus_to_exitcode(status))
                    connection.close()
    for process in running.values():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _tell(connection: socket.socket, number: int) -> None:
    import contextlib

    with contextlib.suppress(OSError):
        connection.sendall(f"{number:{_DIGITS}}".encode())


def _become(
    files: list[int], arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    """Do in this process what Python does with these arguments, and end it."""
    import atexit
    import runpy
    import traceback
    import types

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, closefd=False)  # noqa: SIM115
            for number, mode in enumerate("rww")
        )
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        while arguments[0] in ("-u", "-B"):
            sys.dont_write_bytecode |= arguments.pop(0) == "-B"
        option, what, *rest = arguments
        sys.argv = [option, *rest]
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(what, vars(sys.modules["__main__"]))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if SERVER in os.environ:
        _main(sys.argv[1:])
    _serve(sys.argv[1])
