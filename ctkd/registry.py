"""Losses by name: built in, registered at run time, or installed as a plugin.

Those built in are imported when a name is first filed or looked up. A plugin is any installed
package with an entry point in the group ``ctkd.losses``, for example
``my_loss = "my_package:MyLoss"``. Plugins are listed without being imported.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from ctkd.errors import DuplicateLossError, PluginError, SettingError, UnknownLossError
from ctkd.loss import Loss, Measured, Need, Paper, TeacherNeed, Unit, Weights
from ctkd.tokenizers import Pair

__all__ = [
    "LossFacts",
    "describe",
    "get_loss",
    "get_loss_class",
    "list_losses",
    "register",
    "source_fingerprint",
]

ENTRY_POINT_GROUP = "ctkd.losses"
_BUILT_IN = "ctkd.losses"

# Names people ask for that are ways to train, not losses between two models.
_TRAINER_MODES = {
    "sft": "'sft' is cross-entropy alone: leave the distillation loss out of your loop, "
    "or run `ctkd train --loss sft`",
    "seqkd": "'seqkd' is cross-entropy on text that the teacher wrote: generate the answers "
    "first, then train on them as on any data, or run `ctkd train --loss sft --answers teacher`",
}

# What a class has no defaults for.
_FACTS = ("paper", "matches", "unit", "default_weights")

L = TypeVar("L", bound=type[Loss])

_losses: dict[str, type[Loss]] = {}


@dataclass(frozen=True, slots=True)
class LossFacts:
    """Facts about a loss, known without running it."""

    name: str
    matches: str
    paper: Paper
    unit: Unit
    needs: frozenset[Need]
    teacher_needs: TeacherNeed
    default_weights: Weights
    measured: Measured | None
    settings: dict[str, Any]
    doc: str


def register(name: str) -> Callable[[L], L]:
    """Class decorator that files a loss under ``name``.

    Raises:
        SettingError: If this is no name for a loss, or what is filed no subclass of `ctkd.Loss`.
        DuplicateLossError: If another class has the name.
    """
    if not isinstance(name, str) or not name or name.lower() in _TRAINER_MODES:
        raise SettingError(
            f"a loss is filed under a name other than {' and '.join(_TRAINER_MODES)}, got {name!r}"
        )

    def add(cls: L) -> L:
        if not (isinstance(cls, type) and issubclass(cls, Loss)):
            raise SettingError(f"{name!r} must be a subclass of ctkd.Loss, got {cls!r}")
        taken_by = _registered().get(name)
        if taken_by is not None and taken_by is not cls:
            raise DuplicateLossError(f"{name!r} is claimed by {_path(taken_by)} and {_path(cls)}")
        _losses[name] = cls
        return cls

    return add


def list_losses(pattern: str = "*") -> list[str]:
    """Names that match a shell-style pattern, sorted; plugins are included but not imported.

    Example:
        >>> list_losses("multilevelot_*")
        ['multilevelot_released', 'multilevelot_sequence', 'multilevelot_token']
    """
    _plugins.cache_clear()
    names = _registered().keys() | {plugin.name for plugin in _plugins()}
    return sorted(name for name in names if fnmatch(name, pattern))


def get_loss_class(name: str) -> type[Loss]:
    """Return the class filed under ``name``; a plugin is imported at this moment.

    Raises:
        UnknownLossError: If no loss has the name; the message suggests a near one.
        DuplicateLossError: If two claim it.
        PluginError: If the plugin that has it cannot be loaded.
    """
    builtin = _registered().get(name)
    if builtin is None:
        # It may have been installed a moment ago.
        _plugins.cache_clear()
    plugins = [plugin for plugin in _plugins() if plugin.name == name and not _is(builtin, plugin)]
    claims = [_path(cls) for cls in [builtin] if cls] + [plugin.value for plugin in plugins]
    if len(claims) > 1:
        raise DuplicateLossError(f"{name!r} is claimed by {' and '.join(claims)}")
    if builtin is not None:
        return builtin
    if plugins:
        return _load(plugins[0])
    raise UnknownLossError(_unknown(name))


def source_fingerprint(name: str) -> str | None:
    """A hash of the file that defines a loss; None for those of this package, or without a file."""
    cls = get_loss_class(name)
    if cls.__module__.split(".")[0] == "ctkd":
        return None
    try:
        source = Path(inspect.getfile(cls)).read_bytes()
    except (TypeError, OSError):
        return None
    return hashlib.sha256(source).hexdigest()[:16]


def get_loss(name: str, /, *, pair: Pair | None = None, **settings: Any) -> Loss:
    """Build the loss filed under ``name`` with these settings.

    Args:
        name: One of `list_losses`.
        pair: The two tokenizers, for losses that need them; the others do without.
        **settings: The loss's own keyword arguments; `describe` lists them.

    Raises:
        UnknownLossError: If no loss has the name.
        SettingError: If the loss has no such setting, refuses its value, or needs one more.

    Example:
        >>> get_loss("uld", student_temperature=2.0).student_temperature
        2.0
    """
    cls = get_loss_class(name)
    known = _settings(cls)
    for setting in settings:
        if setting not in known:
            close = get_close_matches(setting, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            has = f"It has {', '.join(known)}." if known else "It has no settings."
            raise SettingError(f"the loss {name!r} has no setting {setting!r}.{hint} {has}")
    for setting, default in known.items():
        if default is inspect.Parameter.empty and setting not in settings:
            raise SettingError(f"the loss {name!r} needs the setting {setting!r}")
    takes_pair = inspect.signature(cls).parameters.get("pair")
    if takes_pair is None:
        return cls(**settings)
    if pair is None and takes_pair.default is inspect.Parameter.empty:
        raise SettingError(
            f"the loss {name!r} compares two vocabularies and needs to know both tokenizers: "
            f"get_loss({name!r}, pair=ctkd.tokenization.TokenizerPair(student_tokenizer, "
            "teacher_tokenizer))"
        )
    if pair is not None and not hasattr(pair, "student_size"):
        raise SettingError(
            f"pair must be a ctkd.tokenization.TokenizerPair of both tokenizers, got "
            f"{type(pair).__name__}"
        )
    return cls(pair=pair, **settings)


def describe(name: str) -> LossFacts:
    """Collect the facts of the loss filed under ``name``.

    Raises:
        UnknownLossError: If no loss has the name.
        PluginError: If it cannot be loaded, or does not say one of its facts.

    Example:
        >>> describe("uld").default_weights
        Weights(ce=1.0, kd=1.5)
    """
    cls = get_loss_class(name)
    missing = [one for one in _FACTS if not hasattr(cls, one)]
    if missing:
        raise PluginError(
            f"the loss {name!r} ({_path(cls)}) does not say its {', '.join(missing)}; every loss "
            "has these as attributes of its class"
        )
    return LossFacts(
        name=name,
        matches=cls.matches,
        paper=cls.paper,
        unit=cls.unit,
        needs=cls.needs,
        teacher_needs=cls.teacher_needs,
        default_weights=cls.default_weights,
        # Not one that a class has from the loss that it changes.
        measured=vars(cls).get("measured"),
        settings=_settings(cls),
        doc=inspect.getdoc(cls) or "",
    )


def _registered() -> dict[str, type[Loss]]:
    import_module(_BUILT_IN)
    return _losses


def _settings(cls: type[Loss]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    # A class without a constructor of its own has that of torch's modules, which takes anything.
    anything = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name != "pair" and parameter.kind not in anything
    }


# Every installed package is asked, which takes several milliseconds.
@functools.cache
def _plugins() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _path(cls: type[Loss]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _is(cls: type[Loss] | None, plugin: EntryPoint) -> bool:
    """True if a plugin is the class that is registered, under its own path or another one."""
    if cls is None:
        return False
    try:
        return _path(cls) == plugin.value or plugin.load() is cls
    except Exception:
        return False


def _load(plugin: EntryPoint) -> type[Loss]:
    try:
        cls = plugin.load()
    except Exception as error:
        raise PluginError(
            f"plugin {plugin.name!r} ({plugin.value}) failed to import: {error}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Loss)):
        raise PluginError(f"plugin {plugin.name!r} ({plugin.value}) is not a subclass of ctkd.Loss")
    return cls


def _unknown(name: str) -> str:
    if name.lower() in _TRAINER_MODES:
        return _TRAINER_MODES[name.lower()]
    names = list_losses()
    close = get_close_matches(name.lower().replace("-", "_"), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown loss {name!r}.{hint} Available: {', '.join(names)}"
