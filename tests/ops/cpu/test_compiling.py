"""Compiled loops are kept in the cache folder, and whatever happens there they can be called."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from filelock import FileLock
from numba.core import caching
from numba.core.compiler import CompileResult

import ctkd
from ctkd.ops.cpu import compiling, numbers
from ctkd.ops.cpu.compiling import compiled

LOADED, COMPILED = (1, 0), (0, 1)
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    # numba reads its variables again where they have changed since it was imported.
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    return tmp_path / "cache" / "kernels"


def add(left, right):
    return left + right


def subtract(left, right):
    return left - right


def call(function=add, expected=3, make=compiled) -> tuple[int, int]:
    """Call a function as a new process does; return how often it was loaded, and compiled."""
    dispatcher = make(function)
    assert dispatcher(2, 1) == expected
    stats = dispatcher.stats
    return sum(stats.cache_hits.values()), sum(stats.cache_misses.values())


def files(folder: Path) -> list[Path]:
    """Compiled code, without the locks of those who compile it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_the_second_process_loads(folder):
    assert call() == COMPILED
    assert call() == LOADED
    (file,) = files(folder)
    assert file.parent.parent == folder
    assert file.parent.name.startswith(f"ctkd-{ctkd.__version__}-numba-{numba.__version__}-")
    assert list((Path(__file__).parent / "__pycache__").glob("*.nb?")) == []


def test_functions_and_types_are_kept_apart(folder):
    assert call() == call(subtract, expected=1) == COMPILED
    assert call(subtract, expected=1) == LOADED
    assert compiled(add)(0.5, 1) == 1.5
    assert compiled(add)(0.5, 1) == 1.5
    assert len(files(folder)) == 3


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (ctkd, "__version__"),
        (compiling, "_SOURCES"),
        (numba, "__version__"),
        (np, "__version__"),
        (sys.implementation, "cache_tag"),
        (numba.config, "CPU_NAME"),
        (numba.config, "USING_SVML"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "python"),
)
def test_what_others_made_is_not_loaded(folder, monkeypatch, where, name):
    assert call() == COMPILED
    with monkeypatch.context() as patched:
        patched.setattr(where, name, "other")
        assert call() == COMPILED
    assert call() == LOADED
    assert len({file.parent for file in files(folder)}) == 2


def test_numba_s_own_variable_comes_first(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "own"))
    assert call() == COMPILED
    assert call() == LOADED
    assert len(files(tmp_path / "own" / "ctkd" / "kernels")) == 1
    assert not folder.exists()


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "file" / "cache"))
    assert call() == call() == COMPILED


def failing(code: int):
    def fail(self, *args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_is_read_only(folder, monkeypatch, code):
    assert call() == COMPILED
    before = files(folder)
    # Bits of a folder do not keep root from writing.
    for name in ("mkdir", "write_bytes", "replace", "unlink"):
        monkeypatch.setattr(Path, name, failing(code))
    monkeypatch.setattr(os, "utime", failing(code))
    assert call() == LOADED
    assert call(subtract, expected=1) == call(subtract, expected=1) == COMPILED
    assert files(folder) == before


@pytest.mark.parametrize("step", ["mkdir", "write_bytes", "replace"])
def test_a_full_disk(folder, monkeypatch, step):
    def half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, step, half if step == "write_bytes" else failing(errno.ENOSPC))
        assert call() == call() == COMPILED
        assert files(folder) == []
    assert call() == COMPILED
    assert call() == LOADED


def signed(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:16],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: signed(b"no pickle"),
        lambda content: signed(pickle.dumps("something else")),
        lambda content: signed(pickle.dumps((*pickle.loads(content[32:])[:2], (1, 2)))),
    ],
    ids="empty short half shorter zeros flipped text other result".split(),
)
def test_a_spoiled_file_is_replaced(folder, spoil):
    assert call() == COMPILED
    (file,) = files(folder)
    file.write_bytes(spoil(file.read_bytes()))
    assert call() == COMPILED
    assert call() == LOADED


def test_a_file_of_another_function_is_replaced(folder):
    assert call() == COMPILED
    (file,) = files(folder)
    assert call(subtract, expected=1) == COMPILED
    (other,) = set(files(folder)) - {file}
    shutil.copy(other, file)
    assert call() == COMPILED
    assert call() == LOADED


@pytest.mark.parametrize("name", ["_reduce", "_rebuild"])
def test_a_numba_that_keeps_things_in_another_way(folder, monkeypatch, name):
    call(subtract, expected=1)
    monkeypatch.delattr(CompileResult, name)
    assert call() == call() == COMPILED


def test_a_numba_without_such_a_cache(folder, monkeypatch):
    monkeypatch.delattr(caching, "NullCache")
    make = runpy.run_path(compiling.__file__)["compiled"]
    assert call(make=make) == call(make=make) == COMPILED
    assert not folder.exists()


def test_old_folders_are_removed(folder):
    names = [f"old{age}" for age in range(compiling._KEPT_FOLDERS + 3)]
    for age, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").touch()
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert call() == COMPILED
    found = {path.name for path in folder.iterdir()}
    assert len(found) == compiling._KEPT_FOLDERS
    assert found - set(names) and found & set(names) == set(names[: len(found) - 1])


def test_a_folder_that_is_read_counts_as_used(folder):
    call()
    (file,) = files(folder)
    os.utime(file.parent, (1e9, 1e9))
    assert call() == LOADED
    assert file.parent.stat().st_mtime > 1e9


def test_a_folder_may_go_while_it_is_used(folder, monkeypatch):
    write_bytes = Path.write_bytes

    def late(path, data):
        shutil.rmtree(folder)
        write_bytes(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", late)
        assert call() == COMPILED
        assert not folder.exists()
    assert call() == COMPILED
    assert call() == LOADED


def _call_at_once(barrier, compilations, types) -> None:
    barrier.wait(30)
    for one in types:
        dispatcher = compiled(add)
        assert dispatcher(one(2), one(1)) == 3
        compilations.put(sum(dispatcher.stats.cache_misses.values()))


def test_processes_share_a_folder(folder):
    types = [np.int32, np.int64, np.float32, np.float64]
    context = multiprocessing.get_context("fork")
    barrier, compilations = context.Barrier(3), context.Queue()
    # Two of them want the same one first.
    orders = [types, types, types[::-1]]
    workers = [
        context.Process(target=_call_at_once, args=(barrier, compilations, order))
        for order in orders
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert len(files(folder)) == len(types)
    counts = [compilations.get(timeout=30) for _ in workers for _ in types]
    assert sum(counts) == len(types)
    for one in types:
        dispatcher = compiled(add)
        assert dispatcher(one(2), one(1)) == 3 and dispatcher.stats.cache_hits


def test_nobody_waits_for_long(folder, monkeypatch):
    assert call() == COMPILED
    (file,) = files(folder)
    file.unlink()
    monkeypatch.setattr(compiling, "_LONGEST_WAIT", 0.1)
    with FileLock(file.with_suffix(".lock")):
        assert call() == COMPILED
    assert call() == LOADED


def test_the_package_s_loops_are_loaded_by_the_next_process(folder):
    # As it is defined, not compiled by this process yet.
    ours = compiled(numbers.exp2.py_func)
    assert ours(np.float32(3)) == 8 and not ours.stats.cache_hits
    assert files(folder)
    code = (
        "import numpy as np; from ctkd.ops.cpu.numbers import exp2\n"
        "assert exp2(np.float32(3)) == 8\n"
        "print(len(exp2.stats.cache_hits), len(exp2.stats.cache_misses))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "NUMBA_CACHE_DIR": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "0"]
