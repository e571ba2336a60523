"""Training runs, on top of `transformers.Trainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctkd.distill.training.trainer import CrossTokenizerTrainer

__all__ = ["CrossTokenizerTrainer"]


def __getattr__(name: str) -> Any:
    # `transformers.Trainer` takes seconds to load, and curves are drawn without it.
    if name in __all__:
        from ctkd.distill.training.trainer import CrossTokenizerTrainer

        return CrossTokenizerTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
