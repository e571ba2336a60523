"""Methods: a loss with settings of its own, and the grid that is tried for it."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ctkd.distill.config import SFT, TrainConfig
from ctkd.distill.options import closest, parse_loss_option
from ctkd.errors import SettingError, UnknownLossError

__all__ = [
    "SEQKD",
    "Method",
    "check_equal_trials",
    "check_setting",
    "did_you_mean",
    "parse_method",
    "parse_sweep",
    "with_grids",
]

SEQKD = "seqkd"

_OF_TRAINING = ("learning_rate", "warmup", "weight_decay", "ce_weight", "kd_weight", "score_eos")
_OF_DISTILLATION = ("kd_weight", "score_eos")
_NAME = re.compile(r"[^,:=./\\\s]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to train, with settings of its own.

    Args:
        name: What tables call it.
        loss: A registered loss, "sft", or "seqkd": "sft" on what the teacher writes.
        settings: Its own, by name: some of `TrainConfig`, the rest the loss's.
        grid: Settings that are tried, each with its values; every combination is one trial.

    Example:
        >>> Method(name="uld", loss="uld", grid={"kd_weight": (0.15, 1.5)}).points()
        [{'kd_weight': 0.15}, {'kd_weight': 1.5}]
    """

    name: str
    loss: str
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def distils(self) -> bool:
        """True if there is a loss between two models."""
        return self.loss not in (SFT, SEQKD)

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid; one, with nothing in it, where there is no grid."""
        names = list(self.grid)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(self.grid[name] for name in names))
        ]

    def training(self, varied: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for `TrainConfig` at one point of the grid."""
        own = {**self.settings, **varied}
        return {
            "loss": self.loss if self.distils else SFT,
            "answers": "teacher" if self.loss == SEQKD else "data",
            "loss_options": {name: own[name] for name in own if name not in _OF_TRAINING},
            **{name: own[name] for name in own if name in _OF_TRAINING},
        }


def parse_method(text: str) -> Method:
    """Read ``[NAME=]LOSS[:SETTING=VALUE]...``, values as YAML has them.

    Raises:
        SettingError: If it is not of that form, or the loss or a setting is unknown.

    Example:
        >>> parse_method("uld:kd_weight=1.5").name
        'uld kd_weight=1.5'
        >>> parse_method("strong=uld:kd_weight=1.5:top_k=64")
        Method(name='strong', loss='uld', settings={'kd_weight': 1.5, 'top_k': 64}, grid={})
    """
    head, *given = text.strip().split(":")
    name, separator, loss = head.rpartition("=")
    if separator and not _NAME.fullmatch(name):
        raise SettingError(
            f"{text!r}: a method's own name has no spaces and none of , : = . / \\, got {name!r}; "
            "write NAME=LOSS:SETTING=VALUE, such as strong=uld:kd_weight=1.5"
        )
    _check_loss(loss)
    settings = {}
    for one in given:
        setting, equals, _ = one.partition("=")
        if not equals:
            raise SettingError(
                f"{text!r}: a method's setting is SETTING=VALUE, got {one!r}; write it as in "
                "uld:kd_weight=1.5"
            )
        setting, value = parse_loss_option(one)
        if setting in settings:
            raise SettingError(f"{text!r} gives {setting} twice; give it once")
        check_setting(loss, setting)
        settings[setting] = value
    return Method(name=name or " ".join((loss, *given)), loss=loss, settings=settings)


def parse_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
    """Read ``METHOD.SETTING=VALUE,VALUE,...``, or ``SETTING=...`` for all methods.

    Raises:
        SettingError: If it is not of that form.

    Example:
        >>> parse_sweep("uld.kd_weight=0.15,1.5")
        ('uld.kd_weight', (0.15, 1.5))
    """
    # A method may be named after its settings, and values hold no "=".
    key, separator, values = text.rpartition("=")
    if not separator or not key.strip() or not values.strip():
        raise SettingError(
            f"a sweep is METHOD.SETTING=VALUE,VALUE, such as uld.kd_weight=0.15,1.5, got {text!r}"
        )
    return key.strip(), tuple(parse_loss_option(f"value={one}")[1] for one in values.split(","))


def check_setting(loss: str, name: str) -> None:
    """Refuse what is no setting of a method's own.

    Raises:
        SettingError: If a method that trains with the loss has no such setting.
    """
    known = _settings(loss)
    if name in known:
        return
    if loss not in (SFT, SEQKD) or name not in _OF_TRAINING:
        shared = [entry.name for entry in fields(TrainConfig) if entry.name not in _OF_TRAINING]
        if name in shared:
            raise SettingError(
                f"{name} cannot differ between methods, it is shared by all of them; leave it out "
                f"of {loss}"
            )
    raise SettingError(
        f"{loss} has no setting {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}"
    )


def with_grids(methods: Sequence[Method], sweep: Mapping[str, Sequence[Any]]) -> tuple[Method, ...]:
    """Give each method what the sweep tries for it.

    Raises:
        SettingError: If the sweep names an unknown method or setting, or has no values.
    """
    grids: dict[str, dict[str, tuple[Any, ...]]] = {one.name: {} for one in methods}
    for key, values in sweep.items():
        # A method may be called "uld kd_weight=1.5"; no setting has a dot.
        name, dot, setting = key.rpartition(".")
        chosen = [one for one in methods if not dot or one.name == name]
        if not chosen:
            raise SettingError(
                f"the sweep {key!r} names no method of this comparison"
                f"{did_you_mean(name, grids)}; methods: {', '.join(grids)}"
            )
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise SettingError(
                f"the sweep {key!r} needs a list of values, such as [0.15, 1.5], got {values!r}"
            )
        if any(value in values[:place] for place, value in enumerate(values)):
            raise SettingError(f"the sweep {key!r} tries a value twice: {_list(values)}")
        for one in chosen:
            check_setting(one.loss, setting)
            if setting in one.settings:
                raise SettingError(
                    f"{one.name} has {setting}={one.settings[setting]} already; sweep another "
                    "setting, or leave it out of the method"
                )
            if setting in grids[one.name]:
                raise SettingError(f"{setting} of {one.name} is swept twice; sweep it once")
            grids[one.name][setting] = tuple(values)
    return tuple(
        Method(name=one.name, loss=one.loss, settings=one.settings, grid=grids[one.name])
        for one in methods
    )


def check_equal_trials(methods: Sequence[Method], learning_rate: float) -> None:
    """Refuse to look harder for good settings of one method than of another.

    Raises:
        SettingError: If the numbers of trials differ; the message says what to add.
    """
    counts = {one.name: len(one.points()) for one in methods}
    most = max(counts.values())
    if set(counts.values()) == {most}:
        return
    rates = ",".join(f"{learning_rate * 2**power:g}" for power in range(most))
    missing = [
        f"--sweep {shlex.quote(f'{name}.learning_rate={rates}')}"
        for name, count in counts.items()
        if count == 1
    ]
    raise SettingError(
        "every method must be tried with as many settings as the others, but there are "
        + ", ".join(f"{count} of {name}" for name, count in counts.items())
        + (f"; add {' '.join(missing)}" if missing else "; try as many values for each")
    )


def _check_loss(loss: str) -> None:
    if loss in (SFT, SEQKD):
        return
    from ctkd.registry import get_loss_class, list_losses

    try:
        get_loss_class(loss)
    except UnknownLossError:
        # All names are looked up only now: that reads the metadata of every installed package.
        known = [SFT, SEQKD, *list_losses()]
        raise SettingError(
            f"unknown loss {loss!r}{did_you_mean(loss, known)}; available: {', '.join(known)}"
        ) from None


def _settings(loss: str) -> list[str]:
    """Names of the settings that a method with this loss may have for itself."""
    if loss in (SFT, SEQKD):
        return [name for name in _OF_TRAINING if name not in _OF_DISTILLATION]
    from ctkd.registry import describe

    return [*_OF_TRAINING, *describe(loss).settings]


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A suggestion to put behind an unknown name, or nothing."""
    close = closest(name, known)
    return f", did you mean {close[0]!r}?" if close else ""


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
