"""Options: fields of settings that carry their own help, and the ways to read their values.

A field made by `option` says once what its setting is for. Command lines are made from such fields,
and YAML files are read into the same dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from ctkd.errors import SettingError

__all__ = [
    "check_names",
    "check_types",
    "closest",
    "default_of",
    "default_text",
    "option",
    "own_name",
    "parse_column",
    "parse_loss_option",
    "read_config_file",
    "same_as",
]

_FACTORIES = (dict, list)
# What TRL and transformers call a setting.
_OTHER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "dataset_name": "data",
    "dataset_streaming": "streaming",
    "gradient_accumulation_steps": "grad_accumulation",
    "hub_private_repo": "hub_private",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "max_completion_length": "max_new_tokens",
    "model_name_or_path": "student",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "per_device_train_batch_size": "batch_size",
    "teacher_model_name_or_path": "teacher",
    "warmup_ratio": "warmup",
}
# What a word of a name is called.
_SYNONYMS = {"lr": "learning rate", "val": "eval", "validation": "eval"}


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    unset: str | None = None,
    metavar: str | None = None,
    repeated: bool = False,
    choice: bool = False,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field of a settings dataclass that is an option of the command line as well.

    Args:
        default: The setting where none is given; a mutable one is made anew for each instance.
        help: One sentence on the setting.
        flag: The option's name; by default the field's, ``--like-this``.
        unset: Shown in place of a default of None.
        metavar: Shown in place of the value.
        repeated: The option may be given several times; values that `parse` makes key and value of
            become a mapping.
        choice: The command line itself refuses any but the values of the field's `Literal`.
        parse: Reads a value from text.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     rate: float = option(5e-5, "Peak learning rate.")
        >>> Settings(), default_text(Settings, "rate")
        (Settings(rate=5e-05), '5e-5')
    """
    metadata = {
        "help": help,
        "flag": flag,
        "unset": unset,
        "metavar": metavar,
        "repeated": repeated,
        "choice": choice,
        "parse": parse,
    }
    return _field(default, metadata)


def same_as(settings: type, name: str, **changes: Any) -> Any:
    """The option of another dataclass once more, perhaps with another default or help.

    A default of None stands for "as there": the default there is still the one that is shown.

    Args:
        settings: The other dataclass.
        name: The field.
        **changes: Arguments of `option` that differ.
    """
    original = _fields(settings)[name]
    default = default_of(settings, name)
    if "default" in changes:
        default = changes.pop("default")
        if default is None:
            changes.setdefault("unset", default_text(settings, name))
    return _field(default, {**original.metadata, **changes})


def default_of(settings: type, name: str) -> Any:
    """The default of a field."""
    field = _fields(settings)[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def default_text(settings: type, name: str) -> str | None:
    """The default of a field as help shows it; None where there is nothing to show."""
    default = default_of(settings, name)
    if default is None:
        unset: str | None = _fields(settings)[name].metadata.get("unset")
        return unset
    return _text(default) or None


def check_types(config: Any) -> None:
    """Check that every field of a dataclass holds what its annotation says, and no text is blank.

    Raises:
        SettingError: If one does not.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for name in _fields(kind):
        _check_type(name, getattr(config, name), hints[name])


# Each annotation is compiled and evaluated, and a comparison makes many configurations.
_hints = functools.cache(typing.get_type_hints)


def check_names(settings: Mapping[str, Any], kind: type, source: str) -> None:
    """Check that names are those of a dataclass's fields.

    Raises:
        SettingError: If one is not; the message suggests another.
    """
    names = list(_fields(kind))
    for name in settings:
        if name not in names:
            close = closest(str(name), names)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SettingError(
                f"{source}: unknown setting {name!r}.{hint} Known: {', '.join(names)}"
            )


def own_name(name: str) -> str:
    """The name of a setting that was given as other tools call it, or with dashes.

    Example:
        >>> own_name("per_device_train_batch_size"), own_name("batch-size")
        ('batch_size', 'batch_size')
    """
    name = name.replace("-", "_")
    return _OTHER_NAMES.get(name, name)


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Names that somebody may have meant, the nearest first, at most three.

    They are compared word by word, and as initials.

    Example:
        >>> closest("--lr-schedule", ["--learning-rate", "--loss", "--help"])
        ['--learning-rate']
        >>> closest("--wd", ["--warmup", "--weight-decay"])
        ['--weight-decay']
    """
    given = _words(name)

    def nearness(one: str) -> float:
        words = _words(one)
        if len(words) > 1 and given == ["".join(word[0] for word in words)]:
            return 2.0
        same = sum(any(_alike(word, other) for other in words) for word in given)
        whole = difflib.SequenceMatcher(None, "-".join(given), "-".join(words)).ratio()
        return same / max(len(given), len(words), 1) + whole

    found = sorted(((nearness(one), one) for one in known), reverse=True)
    # Less than 0.6 is nothing, as it is to difflib; what is nearly as near as the first may be it.
    return [one for near, one in found[:3] if near >= max(0.6, found[0][0] - 0.2)]


def parse_column(text: str) -> tuple[str, str]:
    """Split ``FIELD=COLUMN``.

    Raises:
        SettingError: If it is not of that form.

    Example:
        >>> parse_column("context=passage")
        ('context', 'passage')
    """
    field, separator, column = text.partition("=")
    if not separator or not field or not column:
        raise SettingError(f"a column is FIELD=COLUMN, such as context=passage, got {text!r}")
    return field, column


def parse_loss_option(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE`` and read the value as YAML does: numbers, words, true and null.

    Raises:
        SettingError: If there is no ``=``, or the value is not YAML.

    Example:
        >>> parse_loss_option("sl_weight=0.1"), parse_loss_option("matching=greedy")
        (('sl_weight', 0.1), ('matching', 'greedy'))
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise SettingError(f"a loss option is KEY=VALUE, such as k=20, got {text!r}")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingError(
            f"cannot read the value of loss option {text!r}; write a number, a word, true or null"
        ) from error


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        SettingError: If the file cannot be read or does not hold names and values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise SettingError(
            f"cannot read the configuration {path}: {cause}; name a YAML file of settings"
        ) from error
    try:
        settings = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SettingError(
            f"{path} is not YAML: {what}{where}; write settings as 'name: value' lines"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SettingError(
            f"{path} holds a value that cannot be read ({error}); write it in quotes"
        ) from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingError(f"{path} must hold settings as 'name: value' lines")
    known: dict[str, Any] = {}
    for name, value in settings.items():
        own = own_name(name) if isinstance(name, str) else name
        if own in known:
            raise SettingError(f"{path} gives {own} twice, once as {name}; leave one of them out")
        known[own] = value
    return known


class _Loader(yaml.SafeLoader):
    """YAML takes 1e-6 for text and 2026-03-01 for a date; here they are a number and text.

    It also takes the last of two values for one name; here that is an error.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: list[Any] = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if isinstance(key.value, str) and key.value in names[:place]:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}


def _check_type(name: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is types.UnionType:
        kinds = typing.get_args(hint)
    else:
        kinds = (hint,)
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise SettingError(
            f"{name} must be a name or a word, got {value!r}; leave it out, or give one"
        )
    if any(_is_a(value, kind) for kind in kinds):
        return
    choices = [choice for kind in kinds for choice in typing.get_args(kind) if kind is not dict]
    if choices and all(isinstance(choice, str) for choice in choices):
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    raise SettingError(f"{name} must be {wanted}, got {value!r}")


_KINDS = {
    bool: "true or false",
    dict[str, Any]: "a mapping of names to values",
    dict[str, str]: "a mapping of names to names",
    float: "a number",
    int: "a whole number",
    list[str]: "a list of texts",
    str: "text",
    type(None): "nothing",
}


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        of_names, of_values = typing.get_args(kind)
        return isinstance(value, dict) and all(
            isinstance(name, of_names) and (of_values is Any or isinstance(entry, of_values))
            for name, entry in value.items()
        )
    if kind == list[str]:
        return (
            isinstance(value, list) and value != [] and all(isinstance(one, str) for one in value)
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(name: str) -> list[str]:
    words = re.findall(r"[^\W_]+", name.lower())
    if words == ["model"]:
        return ["student"]
    parts = [part for word in words for part in _SYNONYMS.get(word, word).split()]
    return [part for part in parts if part != "model"]


def _alike(word: str, other: str) -> bool:
    short, long = sorted((word, other), key=len)
    return short == long or (len(short) > 2 and long.startswith(short))


def _fields(settings: type) -> dict[str, dataclasses.Field[Any]]:
    return {one.name: one for one in dataclasses.fields(settings)}


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(default, _FACTORIES):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, tuple) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if isinstance(value, tuple):
        return " and ".join(map(_text, value))
    return str(value) if not isinstance(value, _FACTORIES) else ""
