"""Adapters, as peft makes and keeps them: few weights, that change a model from outside."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ctkd.distill.models.checks import one_line, quiet
from ctkd.errors import ModelError, SettingError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = [
    "add_lora",
    "adapted_part",
    "attach",
    "base_of",
    "is_adapted",
    "merged",
    "with_adapters",
]

_BASE = "base_model_name_or_path"


def base_of(source: str) -> str | None:
    """The model that an adapter belongs to, as its configuration names it; None for a whole model.

    Args:
        source: A folder, or a hub id.

    Raises:
        ModelError: If an adapter does not say which it is.
    """
    folder = Path(source)
    if folder.is_dir() and (folder / "config.json").is_file():
        return None
    try:
        file = find_adapter_config_file(source)
    except (OSError, ValueError):
        return None
    if file is None:
        return None
    try:
        name = json.loads(Path(file).read_text("utf-8"))[_BASE]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str) or not name.strip():
        raise ModelError(
            f"{source} is an adapter, but does not say of which model; write its folder or hub id "
            f"as {_BASE} into {file}"
        )
    return name


def attach(base: PreTrainedModel, source: str, name: str, *, trainable: bool) -> PeftModel:
    """Load an adapter onto its model, which is changed.

    Args:
        base: The model.
        source: Folder or hub id of the adapter.
        name: What it was called, for errors.
        trainable: Whether to go on training it.

    Raises:
        ModelError: If it cannot be loaded.
    """
    from peft import PeftModel

    try:
        with quiet(), _warnings_of_peft():
            return PeftModel.from_pretrained(base, source, is_trainable=trainable)
    except Exception as error:
        raise ModelError(
            f"cannot load the adapter {name} onto {base.name_or_path}: {one_line(error)}; its "
            "files may be damaged, or belong to another model"
        ) from error


def merged(model: PeftModel) -> PreTrainedModel:
    """The model below adapters, with what they change made part of it where that is possible.

    It is not for prompts that were learned, which no weight of the model can hold.
    """
    adapter: Any = model.base_model
    if not hasattr(adapter, "merge_and_unload"):
        return model
    with torch.no_grad(), _warnings_of_peft():
        whole: PreTrainedModel = adapter.merge_and_unload()
    return whole


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model has adapters of peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def with_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add adapters, which alone are trained from then on; the model is changed, and frozen.

    Raises:
        ValueError: If peft refuses.
    """
    from peft import get_peft_model

    # Adapters say which model they belong to, wherever they are loaded from.
    if Path(model.name_or_path).is_dir():
        model.name_or_path = str(Path(model.name_or_path).resolve())
    with quiet(), _warnings_of_peft():
        return get_peft_model(model, config)


def adapted_part(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    every = sum(one.numel() for one in model.parameters())
    return f"adapters of {trained:,} parameters are trained, {every - trained:,} stay as they are"


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    seed: int,
) -> PeftModel:
    """Add low-rank adapters (LoRA, arXiv 2106.09685), which alone are trained from then on.

    A linear layer x W becomes x W + (alpha / rank) x A B with A of `rank` columns; B begins at 0,
    so that nothing changes at first.

    Args:
        model: Is changed, and frozen.
        rank: Of A and B.
        alpha: See above.
        dropout: Of what A reads, while training.
        targets: Names of linear layers, or their ends; none for all but the head.
        seed: Of A. The state of torch's random numbers stays as it was.

    Raises:
        SettingError: If the model has no such layers.
    """
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) or "all-linear",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return with_adapters(model, config)
    except ValueError as error:
        known = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        raise SettingError(
            f"{model.name_or_path} has no layers {', '.join(targets)} to adapt, or none of a kind "
            f"that can be; its linear layers are called {', '.join(sorted(known))}"
        ) from error


@contextmanager
def _warnings_of_peft() -> Iterator[None]:
    """Leave out what peft mends by itself, and what is deprecated in its use of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
        yield
