"""The shape of the package, read from its sources: arrows, circles, folders, devices.

`cli` -> `compare` -> `distill` -> `tokenization`, `losses`, `logits` and the rest of the core.
Imports inside functions and those for types alone count like any other.
"""

import ast
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_FILES = 14
MOST_FILES_AT_THE_TOP = 12
# A catalogue, one method in one file.
CATALOGUES = {"ctkd/losses"}
# From the bottom to the top; what is not named is below all of them, and testing knows no layer.
LAYERS = ("distill", "compare", "cli", "__main__")
DEVICE_TYPES = {"cpu", "cuda", "mps"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by name, parsed."""
    found = {}
    for path in sorted((ROOT / "ctkd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every name that a module imports, as a path with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def arrows(parsed: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """The modules of `parsed` that each of them imports, with the packages that are run for it."""
    found = {}
    for name, tree in parsed.items():
        targets = set()
        for path in imported_names(tree):
            known = [one for one in _prefixes(path) if one in parsed]
            # A package that holds the module is being run already, unless it is asked for by name.
            targets |= {*known[-1:], *(set(known) - set(_prefixes(name)))}
        found[name] = targets - {name}
    return found


def _prefixes(path: str) -> list[str]:
    """The path and the packages that hold it, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def circles(graph: Mapping[str, Set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        reached[start] = seen
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }
    return sorted(map(set, groups), key=sorted)


def layer(name: str) -> int:
    part = name.split(".")[1] if "." in name else ""
    return LAYERS.index(part) + 1 if part in LAYERS else 0


def is_testing(name: str) -> bool:
    return name.split(".")[1:2] != [] and name.split(".")[1].startswith("testing")


def device_names(tree: ast.AST) -> list[int]:
    """Lines that name a type of device."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and node.value in DEVICE_TYPES)
        or (isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu", "is_mps"))
        or (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            and node.attr in ("cuda", "mps")
        )
    ]


def backend_names(tree: ast.AST) -> list[int]:
    """Lines that name a type of device, numba or triton, or view a tensor as numpy does."""
    found = device_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if any(name.split(".")[0] in ("numba", "triton") for name in imported_names(node)):
                found.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr == "numpy":
            found.append(node.lineno)
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """The arrows of the package."""
    return arrows(modules())


def test_nothing_knows_what_is_above_it():
    upwards = [
        f"{name} -> {target}"
        for name, targets in graph().items()
        for target in targets
        if layer(target) > layer(name)
    ]
    assert upwards == []


@pytest.mark.parametrize(
    ("part", "knows"),
    [
        ("ops", {"errors", "cache_folder"}),
        ("ot", {"ops", "logits", "batch", "chunks", "errors"}),
        ("logits", {"ops", "errors", "settings"}),
        ("tokenization", {"tokenizers", "cache_folder", "errors", "ops", "settings"}),
    ],
)
def test_parts_of_the_core_know_only_what_is_below_them(part, knows):
    found = {
        target.split(".")[1]
        for name, targets in graph().items()
        if name.split(".")[1:2] == [part]
        for target in targets
        if "." in target
    }
    assert found <= knows | {part}


def test_no_imports_go_in_circles():
    found = circles(graph())
    assert found == []


def test_production_imports_no_testing():
    found = {
        name
        for name, targets in graph().items()
        if not is_testing(name) and any(map(is_testing, targets))
    }
    assert found == set()


def test_folders_hold_few_files():
    files = Counter(
        str(path.parent.relative_to(ROOT).as_posix()) for path in (ROOT / "ctkd").rglob("*.py")
    )
    limits = {folder: MOST_FILES for folder in files} | {"ctkd": MOST_FILES_AT_THE_TOP}
    crowded = {
        folder: count
        for folder, count in files.items()
        if folder not in CATALOGUES and count > limits[folder]
    }
    assert crowded == {}


@pytest.mark.parametrize("part", ["distill", "compare"])
def test_one_file_names_types_of_devices(part):
    found = {
        name
        for name, tree in modules().items()
        if name.startswith(f"ctkd.{part}") and device_names(tree)
    }
    assert found <= {"ctkd.distill.devices"}


def test_the_core_names_no_backend():
    core = [
        name
        for name in modules()
        if layer(name) == 0
        and not is_testing(name)
        and name.split(".")[1:2] not in (["tokenization"], ["ops"], ["ot"])
    ]
    found = {name for name in core if backend_names(modules()[name])}
    assert found == set()


def parsed(**sources: str) -> dict[str, ast.Module]:
    return {name.replace("__", "."): ast.parse(text) for name, text in sources.items()}


def test_circles_are_found_wherever_an_import_stands():
    sources = parsed(
        ctkd="",
        ctkd__a="def late():\n    from ctkd import b",
        ctkd__b="from ctkd.c import thing",
        ctkd__c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ctkd.a",
        ctkd__d="from ctkd.a import late",
    )
    assert circles(arrows(sources)) == [{"ctkd.a", "ctkd.b", "ctkd.c"}]


def test_a_module_that_asks_its_own_package_is_in_a_circle():
    sources = parsed(ctkd="", ctkd__p="from ctkd.p.a import x", ctkd__p__a="from ctkd.p import y")
    assert circles(arrows(sources)) == [{"ctkd.p", "ctkd.p.a"}]


def test_a_package_that_is_run_on_the_way_to_a_module_counts():
    sources = parsed(
        ctkd="",
        ctkd__p="from ctkd.p.first import thing",
        ctkd__p__first="from ctkd.q import other",
        ctkd__q="from ctkd.p.second import more",
        ctkd__p__second="",
    )
    assert circles(arrows(sources)) == [{"ctkd.p", "ctkd.p.first", "ctkd.q"}]


def test_names_of_devices_and_backends_are_found():
    for line, names_device, names_backend in (
        ("device.type == 'cuda'", True, True),
        ("torch.cuda.synchronize()", True, True),
        ("tensor.is_cuda", True, True),
        ("tensor.cpu()", False, False),
        ("'a cuda device'", False, False),
        ("import numba", False, True),
        ("from triton import jit", False, True),
        ("tensor.numpy()", False, True),
    ):
        tree = ast.parse(line)
        assert bool(device_names(tree)) == names_device, line
        assert bool(backend_names(tree)) == names_backend, line
