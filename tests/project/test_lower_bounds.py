"""The lower bounds that pyproject.toml promises are the versions that can be tested."""

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.project.test_architecture import imported_names, modules

ROOT = Path(__file__).parents[2]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in found}


def versions(one: Requirement, operator: str) -> list[Version]:
    return [Version(part.version) for part in one.specifier if part.operator == operator]


def test_the_lowest_versions_are_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = requirements([line for line in lines if not line.startswith("#")])
    bounds = {
        name: versions(one, ">=")
        for name, one in requirements(project["dependencies"]).items()
        if one.specifier
    }
    assert bounds == {name: versions(one, "==") for name, one in lowest.items()}


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = set(requirements(project["dependencies"]))
    installed = packages_distributions()
    imported = {path.split(".")[0] for tree in modules().values() for path in imported_names(tree)}
    lacking = {
        name
        for name in imported - sys.stdlib_module_names - {"ctkd"}
        # What is not installed, as numba may not be, is declared under the name it is imported by.
        if not declared & {canonicalize_name(one) for one in installed.get(name, [name])}
    }
    # llvmlite is what numba is made of, and is imported beside it alone. A torch for CUDA brings
    # triton, and without it no kernel is started.
    assert lacking <= {"llvmlite", "triton"}
