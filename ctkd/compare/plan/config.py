"""The settings of a comparison, checked before anything is read or loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctkd.compare.plan.methods import (
    SEQKD,
    Method,
    check_equal_trials,
    did_you_mean,
    parse_method,
    parse_sweep,
    with_grids,
)
from ctkd.distill.config import SFT, TrainConfig, simplify_sources
from ctkd.distill.data.tasks import get_task
from ctkd.distill.options import option
from ctkd.errors import CtkdError, SettingError
from ctkd.settings import check_count

# As for `TrainConfig`.
if TYPE_CHECKING:
    from ctkd.loss import Loss
    from ctkd.tokenizers import Pair

__all__ = [
    "DEFAULT_LOSSES",
    "DEMONSTRATION_STEPS",
    "NOT_SHARED",
    "SAVE_STEPS",
    "CompareConfig",
]

DEFAULT_LOSSES = ("sft", "uld", "multilevelot", "shared_kl")

SAVE_STEPS = 20
"""Steps between checkpoints, unless they are given: the most that a kill makes repeated."""

DEMONSTRATION_STEPS = 124
"""Most steps on the embedded texts, unless a length is given: two passes, ten minutes in all."""

TOP_K = 256
"""Entries that a cache keeps per position, unless they are given."""

NOT_SHARED = {
    "loss": "name the losses in losses",
    "loss_options": "give them to a method, as in uld:top_k=64",
    "kd_weight": "give it to a method, as in uld:kd_weight=1.5",
    "answers": "compare the method seqkd",
    "teacher_cache": "name the folder in cache",
    "output": "it is a setting of the comparison",
    "measure": "the comparison measures by itself",
    "control": "compare the method sft",
    "eval_steps": "set curve_points",
    "streaming": "its runs share rows that are read once",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_private"), "send the folder of a run (`hf upload`)"
    ),
}
"""Settings of a run that its comparison sets, and the way to set them there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Everything that is needed to repeat a comparison.

    Each field's help says what it is for. `common` holds the settings of `TrainConfig` that all
    runs share: ``eval_data`` is the test split, ``eval_limit`` the most examples of each split that
    are measured, and ``save_steps`` is `SAVE_STEPS` unless it is given. Without data of your own,
    ``max_steps`` and ``epochs``, a run ends after `DEMONSTRATION_STEPS` at the latest. The sweep is
    a mapping, ``{"uld.kd_weight": (0.15, 1.5)}``. The method "seqkd" leaves out the rows to which
    the teacher writes nothing.

    Raises:
        SettingError: If a setting is unknown or out of range, or methods would be tried with
            unequal numbers of settings.

    Example:
        >>> [method.name for method in CompareConfig(losses=("sft", "uld:kd_weight=1.5")).methods]
        ['sft', 'uld kd_weight=1.5']
    """

    losses: tuple[str, ...] = option(
        DEFAULT_LOSSES,
        "Each [NAME=]LOSS[:SETTING=VALUE]..., where LOSS is one of `ctkd losses`, sft, or seqkd: "
        "sft on what the teacher writes.",
        metavar="METHOD,METHOD,...",
    )
    seeds: int = option(1, "Runs of each method. From 2 on methods are tested.")
    sweep: dict[str, tuple[Any, ...]] = option(
        {},
        "Settings to choose from on a development split; SETTING=... for all methods. Each method "
        "needs as many as the others. Repeatable.",
        metavar="METHOD.SETTING=VALUE,VALUE",
        repeated=True,
        parse=parse_sweep,
    )
    baseline: str | None = option(
        None, "Method that the others are compared with.", unset="sft, else the first"
    )
    metric: str | None = option(
        None,
        "f1, exact_match, rouge_lsum or given_bits_per_byte; bits_per_byte for lm.",
        unset="f1 for qa, bits_per_byte for lm, else rouge_lsum",
    )
    common: dict[str, Any] = field(default_factory=dict)
    dev_data: str | list[str] | None = option(
        None,
        "To choose settings on. Default: a part of --data, by passage. Repeatable.",
        repeated=True,
    )
    dev_fraction: float = option(0.1, "How large a part, with --sweep.")
    output: str = option("comparison", "Folder of the comparison.")
    cache: str | None = option(
        None,
        "Folder of `ctkd cache`. Default: one is made in the output, unless the teacher is live.",
        flag="--teacher-cache",
    )
    live_teacher: bool = option(
        False,
        "Ask the teacher itself. So it is anyway if a loss needs whole rows of its logits and "
        "there is neither a cache nor --top-k.",
        flag="--live-teacher",
    )
    top_k: int | None = option(
        None, "Largest logits that the cache keeps per position.", unset=f"{TOP_K}"
    )
    curve_points: int = option(4, "Held-out losses while training, at most.")
    published: tuple[str, ...] = option(
        (),
        "A published table to show beside the results. Repeatable.",
        metavar="FILE",
        repeated=True,
    )
    published_task: str | None = option(
        None,
        "Name of this data in those tables, such as fairytaleqa. Default: other data than theirs, "
        "so no number of this comparison stands beside.",
        metavar="TASK",
    )
    keep_models: bool = option(False, "Keep all trained weights.", flag="--keep-models")

    def __post_init__(self) -> None:
        simplify_sources(self, "dev_data")
        self._check_types()
        self._check_common()
        methods = self.methods
        names = [one.name for one in methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingError(
                f"two methods are called {twice[0]!r}; leave one out, or give it a name of its "
                f"own: NAME={twice[0].split()[0]}:SETTING=VALUE"
            )
        if self.baseline_name not in names:
            raise SettingError(
                f"the baseline {self.baseline!r} is not compared"
                f"{did_you_mean(self.baseline or '', names)}; methods: {', '.join(names)}"
            )
        metrics = get_task(self.base.task).metrics
        if self.metric is not None and self.metric not in metrics:
            raise SettingError(
                f"task {self.base.task} has no metric {self.metric!r}"
                f"{did_you_mean(self.metric, metrics)}; metrics: {', '.join(metrics)}"
            )
        check_equal_trials(methods, self.base.learning_rate)
        distils = False
        for method in methods:
            for varied in method.points():
                try:
                    distils |= self.train_config(method, varied, self.seed_values[-1]).distils
                except CtkdError as error:
                    raise SettingError(f"method {method.name}: {error}") from error
        templates = self.base.student_template, self.base.teacher_template
        if distils and templates == ("chat", "plain"):
            raise SettingError(
                "answers stand without the space in front in a chat, and with it where any side is "
                "asked in plain text, so that methods without a teacher would learn other texts; "
                "ask the teacher in a chat as well, or the student in plain text"
            )

    @classmethod
    def from_mapping(
        cls, settings: Mapping[str, Any], *, source: str = "settings"
    ) -> CompareConfig:
        """Build a configuration from names and values, as a file or options give them.

        Args:
            settings: Fields of this class but ``common``, whose entries stand beside them. Lists
                of one may be given without the list.
            source: What an error message calls them.

        Raises:
            SettingError: If a name is unknown or a value is of the wrong kind.
        """
        own = [entry.name for entry in fields(cls) if entry.name != "common"]
        shared = [entry.name for entry in fields(TrainConfig) if entry.name not in NOT_SHARED]
        given: dict[str, Any] = {"common": {}}
        for name, value in settings.items():
            if name in own:
                lists = name in ("losses", "published")
                given[name] = _as_tuple(value) if lists else value
            elif name in shared:
                given["common"][name] = value
            elif name in NOT_SHARED:
                raise SettingError(
                    f"{source}: {name} is no setting of a comparison; {NOT_SHARED[name]}"
                )
            else:
                known = [*own, *shared]
                raise SettingError(
                    f"{source}: unknown setting {name!r}{did_you_mean(str(name), known)}; "
                    f"known: {', '.join(known)}"
                )
        if isinstance(given.get("sweep"), Mapping):
            given["sweep"] = {key: _as_tuple(value) for key, value in given["sweep"].items()}
        return cls(**given)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, each with its grid."""
        return with_grids([parse_method(text) for text in self.losses], self.sweep)

    @property
    def base(self) -> TrainConfig:
        """Settings that all runs share, as those of plain training."""
        return TrainConfig(loss=SFT, **self._shared)

    @property
    def teacher_base(self) -> TrainConfig:
        """Settings that all runs share, as those of a run that queries the teacher on every row."""
        return TrainConfig(loss="uld", **self._shared)

    @property
    def seed_values(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        first = self.common.get("seed", 0)
        return tuple(range(first, first + self.seeds))

    @property
    def metric_name(self) -> str:
        """The metric that methods are compared by."""
        return self.metric or get_task(self.base.task).metrics[0]

    @property
    def is_live(self) -> bool:
        """Whether losses ask the teacher itself, and no cache of its logits."""
        if self.live_teacher or self.cache is not None or self.top_k is not None:
            return self.live_teacher
        return any(loss.teacher_needs == "rows" for _, loss in self.made_losses())

    def made_losses(self, pair: Pair | None = None) -> Iterator[tuple[str, Loss]]:
        """Every loss of every trial, with a name for messages."""
        for method in self.methods:
            for varied in method.points() if method.distils else []:
                loss = self.train_config(method, varied, self.seed_values[0]).make_loss(pair)
                if loss is not None:
                    yield method.name, loss

    @property
    def baseline_name(self) -> str:
        """The method that differences are taken to."""
        names = [one.name for one in self.methods]
        if self.baseline is None:
            return SFT if SFT in names else names[0]
        # As it stands in the table, or as it was given.
        return dict(zip(self.losses, names, strict=True)).get(self.baseline, self.baseline)

    @property
    def folder(self) -> Path:
        """Where the comparison writes."""
        return Path(self.output).expanduser()

    def train_config(
        self, method: Method, varied: Mapping[str, Any], seed: int, **places: Any
    ) -> TrainConfig:
        """The settings of one run.

        Args:
            method: What is trained.
            varied: A point of its grid.
            seed: Of the run.
            **places: Further settings of `TrainConfig`, which override all others.
        """
        return TrainConfig(**{**self._shared, **method.training(varied), "seed": seed, **places})

    @property
    def most_steps(self) -> int | None:
        """Bound on the steps of a run that nobody has given a length."""
        is_demonstration = not {"data", "max_steps", "epochs"} & self.common.keys()
        return DEMONSTRATION_STEPS if is_demonstration else None

    @property
    def _shared(self) -> dict[str, Any]:
        return {"save_steps": SAVE_STEPS, "control": False, **self.common}

    def _check_types(self) -> None:
        for name in ("losses", "published"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
                shown = list(value) if isinstance(value, tuple) else value
                raise SettingError(f"{name} must be a list of texts, got {shown!r}")
        if not self.losses:
            raise SettingError("there is nothing to compare; name at least one loss")
        for name in ("sweep", "common"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(one, str) for one in value):
                raise SettingError(f"{name} must be a mapping of names to values, got {value!r}")
        check_count("seeds", self.seeds)
        check_count("top_k", TOP_K if self.top_k is None else self.top_k)
        points = self.curve_points
        if isinstance(points, bool) or not isinstance(points, int) or points < 0:
            raise SettingError(f"curve_points must be a whole number of at least 0, got {points!r}")
        fraction = self.dev_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise SettingError(f"dev_fraction must be a number, got {fraction!r}")
        if not 0 < fraction < 1:
            raise SettingError(f"dev_fraction is a share between 0 and 1, got {fraction}")
        for name in ("live_teacher", "keep_models"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.live_teacher and self.top_k is not None:
            raise SettingError(
                f"top_k {self.top_k} says how much of the teacher is kept, and live_teacher keeps "
                "nothing of it; leave one of them out"
            )
        for name in ("output", "baseline", "metric", "dev_data", "cache", "published_task"):
            value = getattr(self, name)
            entries = value if name == "dev_data" and isinstance(value, list) else [value]
            if not entries or not all(isinstance(one, str) for one in entries):
                if value is not None or name == "output":
                    raise SettingError(f"{name} must be text, got {value!r}")

    def _check_common(self) -> None:
        names = [entry.name for entry in fields(TrainConfig)]
        for name in self.common:
            if name in NOT_SHARED:
                raise SettingError(
                    f"{name} is not shared by the runs of a comparison; {NOT_SHARED[name]}"
                )
            if name not in names:
                raise SettingError(
                    f"common: unknown setting {name!r}{did_you_mean(name, names)}; "
                    f"known: {', '.join(one for one in names if one not in NOT_SHARED)}"
                )
        base = self.base
        if base.on_long == "cut":
            raise SettingError(
                "on_long cut would cut rows at other places for sft than for a loss with a "
                "teacher; use drop or refuse"
            )
        if (
            base.teacher_shots
            and self.seeds > 1
            and not (self.live_teacher and all(one.loss != SEQKD for one in self.methods))
        ):
            raise SettingError(
                "teacher_shots draws other examples for every seed, and a cache holds what the "
                "teacher says and writes after one draw; use one seed, no shots, or live_teacher "
                "without seqkd"
            )
        for one in fields(self):
            name = one.name
            if name.startswith("dev_") and getattr(self, name) != one.default and not self.sweep:
                raise SettingError(
                    f"{name} serves to choose settings, but there is no sweep; add one, or leave "
                    f"{name} out"
                )


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(one.strip() for one in value.split(","))
    if isinstance(value, Sequence):
        return tuple(value)
    if isinstance(value, int | float):
        return (value,)
    return value
