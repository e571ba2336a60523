"""Options of the command line, made from the fields of settings.

A field that `ctkd.distill.options.option` made, or that has "help" in its metadata, is an option.
None is given where an option is left out, so that a file or the dataclass decides.
"""

from __future__ import annotations

import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import click

from ctkd.distill.options import default_text, read_config_file

__all__ = [
    "config_option",
    "given",
    "options_of",
    "quieten",
    "read_settings",
    "say",
    "show",
    "writable",
]

config_option = click.option(
    "--config", "config_file", metavar="FILE.yaml", help="Settings; options override it."
)


def options_of(
    settings: type,
    names: Sequence[str] | None = None,
    *,
    help: Mapping[str, str] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Callable[[Any], Any]:
    """Add the options of a settings dataclass to a command.

    Args:
        settings: The dataclass.
        names: Its fields that are options here; by default all that can be.
        help: Sentences for fields that mean something else to this command.
        defaults: Defaults shown for fields that have another one in this command.
    """
    known, hints = _options(settings), typing.get_type_hints(settings)
    chosen = []
    for name in known if names is None else names:
        sentence = (help or {}).get(name, known[name].metadata["help"])
        default = (defaults or {}).get(name, default_text(settings, name))
        text = sentence if default is None else f"{sentence} [{default}]"
        chosen.append(_option(known[name], hints[name], text))

    def add(function: Any) -> Any:
        for one in reversed(chosen):
            function = one(function)
        return function

    return add


def given(options: Mapping[str, Any], settings: type) -> dict[str, Any]:
    """The settings among a command's options that were given, read as their fields say.

    Raises:
        SettingError: If one cannot be read.
    """
    values, hints = {}, typing.get_type_hints(settings)
    for name, field in _options(settings).items():
        value = options.get(name)
        if value is None or value == ():
            continue
        parse = field.metadata.get("parse")
        if field.metadata.get("repeated") and parse is not None:
            entries = [parse(one) for one in value]
            value = dict(entries) if isinstance(entries[0], tuple) else tuple(entries)
        elif field.metadata.get("repeated") and len(value) == 1 and _may_be_text(hints[name]):
            value = value[0]
        values[name] = value
    return values


def read_settings(
    config_file: str | None, options: Mapping[str, Any], *kinds: type
) -> dict[str, Any]:
    """The settings of a file, overridden by options; of mappings, entry by entry.

    Args:
        config_file: A YAML file, if there is one.
        options: A command's.
        *kinds: The dataclasses that its options were made from.

    Raises:
        SettingError: If the file or an option cannot be read.
    """
    settings = {} if config_file is None else read_config_file(config_file)
    chosen = {name: value for kind in kinds for name, value in given(options, kind).items()}
    if "epochs" in chosen:
        # Steps override epochs, but an option overrides the file.
        settings.pop("max_steps", None)
    for name, value in chosen.items():
        before = settings.get(name)
        if not isinstance(value, dict) or before is None:
            settings[name] = value
        elif isinstance(before, dict):
            settings[name] = {**before, **value}
    return settings


def _options(settings: type) -> dict[str, Field[Any]]:
    return {one.name: one for one in fields(settings) if "help" in one.metadata}


def _option(field: Field[Any], hint: Any, help: str) -> Callable[[Any], Any]:
    kind = _without_none(hint)
    flag = field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"
    arguments: dict[str, Any] = {
        "help": help,
        "metavar": field.metadata.get("metavar"),
        "multiple": field.metadata.get("repeated", False),
        "default": None,
    }
    if kind is bool:
        arguments["is_flag"] = True
        if not field.metadata.get("flag"):
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif field.metadata.get("choice"):
        arguments["type"] = click.Choice(typing.get_args(kind))
    elif kind in (int, float):
        arguments["type"] = kind
    elif field.metadata.get("parse") is float:
        arguments["type"] = float
    return click.option(flag, field.name, **arguments)


def _may_be_text(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and str in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) is not types.UnionType:
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else hint


def show(text: str, *, err: bool = False) -> None:
    """Print, whatever the encoding of the terminal or file is."""
    click.echo(writable(text, err=err), err=err)


def writable(text: str, *, err: bool = False) -> str:
    """A text in which backslashes stand for what the output cannot encode.

    File names may hold such characters in any encoding: Python reads bytes that it cannot decode as
    halves of surrogate pairs.
    """
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(line: str) -> None:
    """Print a line of progress where it does not mix with results."""
    show(line, err=True)


def quieten() -> None:
    """Leave the terminal to our own lines: libraries report errors alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
