"""The package as a whole: what importing it costs, what is public, what every loss states."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from types import ModuleType

import pytest

import ctkd
from ctkd.loss import Loss, Paper, Weights

# What needs more than torch, or is not part of the core.
ELSEWHERE = ("ctkd.distill", "ctkd.compare", "ctkd.tokenization", "ctkd.cli", "ctkd.__main__")
CORE = [
    module.name
    for module in pkgutil.walk_packages(ctkd.__path__, "ctkd.")
    if not module.name.startswith(ELSEWHERE)
]
HEAVY = (
    "transformers",
    "datasets",
    "matplotlib",
    "click",
    "rouge_score",
    "accelerate",
    "scipy",
    "numba",
    "torch._dynamo",
)
KERNELS = "ctkd.ops.cpu"
LOSSES = {name: ctkd.get_loss_class(name) for name in ctkd.list_losses()}
by_loss = pytest.mark.parametrize("cls", LOSSES.values(), ids=LOSSES.keys())


def loaded_by(code: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running some code."""
    report = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def test_importing_ctkd_loads_nothing_heavy():
    # One process for all of it: torch alone takes seconds to load.
    # Kernels are loaded when they are first used.
    light = [name for name in CORE if not name.startswith(KERNELS)]
    modules = ", ".join(["ctkd", *light])
    assert loaded_by(f"import {modules}; ctkd.get_loss('multilevelot')") == []


def test_the_search_for_heavy_packages_finds_them():
    assert loaded_by("import click, scipy") == ["click", "scipy"]


def test_the_core_is_known():
    known = "batch errors logits loss losses losses.uld ops ot.sinkhorn registry testing".split()
    assert {f"ctkd.{name}" for name in known} <= set(CORE)


def modules() -> list[ModuleType]:
    """Modules of the core, without those that cannot be there without numba."""
    try:
        importlib.import_module("numba")
    except ImportError:
        names = [name for name in CORE if not name.startswith(KERNELS)]
    else:
        names = CORE
    return [ctkd, *map(importlib.import_module, names)]


def public_definitions(module) -> list[str]:
    """Names of classes and functions that a module defines and does not mark as private."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def test_what_is_public_is_listed():
    for module in modules():
        # A package may hold nothing but its modules.
        names = getattr(module, "__all__", [])
        # Constants first, then classes, then the rest.
        order = sorted(set(names), key=lambda n: (not n.isupper(), not n[0].isupper(), n))
        assert names == order, module.__name__
        assert [name for name in names if not hasattr(module, name)] == [], module.__name__
        # The checks are public by way of `CHECKS`.
        checks = {check.__name__ for check in getattr(module, "CHECKS", [])}
        assert set(public_definitions(module)) - checks <= set(names), module.__name__


def test_ctkd_exports_what_its_users_need():
    for name in ("Batch", "Side", "Loss", "LossOutput", "get_loss", "list_losses", "register"):
        assert name in ctkd.__all__
    assert {"Logits", "DenseLogits", "TopK", "TopKLogits"} <= set(ctkd.__all__)
    exported = {value for name in ctkd.__all__ if inspect.isclass(value := getattr(ctkd, name))}
    assert all(cls.__module__.startswith("ctkd.") for cls in exported)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", ctkd.__version__)


def undocumented(module: ModuleType) -> list[str]:
    """What is public in a module and has no docstring."""
    found = [] if module.__doc__ else [module.__name__]
    for definition in public_definitions(module):
        value = getattr(module, definition)
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        # A dataclass or a named tuple without one gets its signature for a docstring.
        if not own or not own.strip() or own.startswith(f"{definition}("):
            found.append(f"{module.__name__}.{definition}")
        if not inspect.isclass(value) or issubclass(value, Loss) and value is not Loss:
            continue
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                if not inspect.getdoc(getattr(value, method)):
                    found.append(f"{module.__name__}.{definition}.{method}")
    return found


def test_everything_public_is_documented():
    assert [name for module in modules() for name in undocumented(module)] == []


def test_what_has_no_docstring_is_found():
    module = ModuleType("m")
    exec("def f(): pass\nclass C:\n    'It.'\n    def g(self): pass", vars(module))
    module.f.__module__ = module.C.__module__ = "m"
    assert undocumented(module) == ["m", "m.f", "m.C.g"]


@by_loss
def test_a_loss_s_docstring_has_every_section(cls):
    doc = inspect.getdoc(cls)
    first, blank, *_ = doc.splitlines()
    assert first.endswith(".") and blank == ""
    sections = re.findall(r"^(\w[\w ]*):$", doc, flags=re.MULTILINE)
    for section in ("Shape", "Args", "Raises", "Example", "References"):
        assert section in sections, f"{section} is missing"
    assert ".. math::" in doc
    assert ">>> " in doc.split("Example:")[1]
    assert "arXiv:" in doc.split("References:")[1]


@by_loss
def test_a_loss_s_docstring_explains_every_setting(cls):
    section = inspect.getdoc(cls).split("Args:")[1].split("\n\n")[0]
    explained = re.findall(r"^    (\w+): ", section, flags=re.MULTILINE)
    assert explained == list(inspect.signature(cls).parameters)


@by_loss
def test_a_loss_states_its_facts(cls):
    assert issubclass(cls, Loss) and cls.__module__.startswith("ctkd.losses.")
    assert isinstance(cls.paper, Paper) and all((cls.paper.title, cls.paper.equation))
    assert re.fullmatch(r"\d{4}\.\d{5}", cls.paper.arxiv)
    assert cls.paper.arxiv in inspect.getdoc(cls)
    assert cls.matches and "\n" not in cls.matches and not cls.matches.endswith(".")
    assert cls.unit in ("position", "chunk", "sequence")
    assert cls.teacher_needs in ("rows", "top_k", "observed")
    assert isinstance(cls.needs, frozenset) and cls.needs <= {"chunks", "hidden", "pair"}
    assert isinstance(cls.default_weights, Weights)
    assert cls.default_weights.ce >= 0 and cls.default_weights.kd > 0
    assert cls.__name__ in importlib.import_module("ctkd.losses").__all__


def test_the_papers_weights():
    weights = {name: tuple(cls.default_weights) for name, cls in LOSSES.items()}
    for name in ("multilevelot", "multilevelot_token", "multilevelot_sequence"):
        assert weights[name] == (1.0, 0.15)
    assert weights["uld"] == weights["multilevelot_released"] == (1.0, 1.5)


def test_the_papers_settings():
    assert ctkd.describe("multilevelot").settings == {
        "had_weight": 1.0,
        "sl_weight": 0.1,
        "sd_weight": 0.1,
        "k": 50,
        "temperature": 1.0,
        "sl_temperature": 1.0,
        "sd_temperature": 2.0,
        "regularization": 0.1,
        "iterations": 20,
        "matching": "mass",
        "candidates": 256,
        "max_columns": 4096,
        "pairing": "position",
    }
    both = {"student_temperature": 1.0, "teacher_temperature": 1.0}
    assert ctkd.describe("uld").settings == {**both, "top_k": None, "pairing": "position"}
    assert ctkd.describe("multilevelot_released").settings == both
    whole = ctkd.describe("multilevelot").settings
    for name in ("multilevelot_token", "multilevelot_sequence"):
        assert ctkd.describe(name).settings.items() <= whole.items()
