"""Checks of settings, for constructors."""

from __future__ import annotations

from ctkd.errors import SettingError

__all__ = [
    "check_choice",
    "check_count",
    "check_flag",
    "check_positive",
    "check_some_weight",
    "check_weight",
]


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number above 0."""
    if not (_is_number(value) and 0 < value < float("inf")):
        raise SettingError(f"{name} must be a finite number above 0, got {value!r}")


def check_weight(name: str, value: float) -> None:
    """Refuse a weight that is not a finite number of at least 0."""
    if not (_is_number(value) and 0 <= value < float("inf")):
        raise SettingError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_some_weight(**weights: float) -> None:
    """Refuse weights below 0, and weights that are all 0."""
    for name, weight in weights.items():
        check_weight(name, weight)
    if not any(weights.values()):
        raise SettingError(f"at least one of {', '.join(weights)} must be above 0")


def check_count(name: str, value: int) -> None:
    """Refuse a setting that is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Refuse a setting that is neither True nor False."""
    if not isinstance(value, bool):
        raise SettingError(f"{name} must be true or false, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is not one of the choices."""
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
