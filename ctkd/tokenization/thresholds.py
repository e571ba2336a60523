"""What an examination of two tokenizers asks for; read with the options of a command."""

from __future__ import annotations

from dataclasses import dataclass, field

from ctkd.errors import SettingError

__all__ = ["Thresholds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Below which a pair is unsound.

    Args:
        min_coverage: Of the share of the answers' bytes in chunks, from 0 to 1.
        min_one_to_one: Of the share of the chunks with one token on both sides, from 0 to 1.

    Raises:
        SettingError: If one lies outside its range.
    """

    min_coverage: float = field(
        default=0.95,
        metadata={"help": "Unsound if less of the answers' bytes is spelled alike on both sides."},
    )
    min_one_to_one: float = field(
        default=0.05,
        metadata={"help": "Unsound if fewer of the chunks are one token on both sides."},
    )

    def __post_init__(self) -> None:
        for name in ("min_coverage", "min_one_to_one"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SettingError(f"{name} must be from 0 to 1, got {value}")
