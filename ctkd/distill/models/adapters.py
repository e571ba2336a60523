"""Adapters, as peft makes and keeps them: few weights, that change a model from outside."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
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
    "mergeable",
    "merged",
    "quiet_peft",
    "with_adapters",
]

_BASE = "base_model_name_or_path"
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def base_of(source: str) -> str | None:
    """The model that an adapter belongs to, as its configuration names it; None for a whole model.

    Args:
        source: A folder, or a hub id.

    Raises:
        ModelError: If an adapter does not say which it is, or is none for language models.
    """
    if not Path(source).is_dir() and isinstance(try_to_load_from_cache(source, "config.json"), str):
        # A model of the hub that is here: there is nobody to ask.
        return None
    try:
        file = find_adapter_config_file(source)
    except (OSError, ValueError):
        return None
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}; restore it") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file} must hold the settings of an adapter by name; restore it")
    task = settings.get("task_type")
    if task not in (None, *_TASKS):
        raise ModelError(
            f"{source} is an adapter for {task}, not for text that is generated from left to right "
            f"({' or '.join(_TASKS)}); give one that is"
        )
    name = settings.get(_BASE)
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
        ModelError: If it cannot be loaded, or lacks weights.
    """
    from peft import PeftConfig, PeftModel

    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("adapter_model.*")):
        raise ModelError(f"{name} is an adapter without its weights, adapter_model.safetensors")
    try:
        with quiet(), quiet_peft():
            warnings.filterwarnings("error", "Found missing adapter keys")
            kind = PeftConfig.from_pretrained(source)
            if kind.is_prompt_learning or kind.is_adaption_prompt:
                raise ModelError(
                    f"{name} holds prompts that were learned ({kind.peft_type.value}); only "
                    "adapters that change layers are taken, such as LORA"
                )
            model = PeftModel.from_pretrained(base, source, is_trainable=trainable)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot load the adapter {name} onto {base.name_or_path}: {one_line(error)}; its "
            "files may be damaged, or belong to another model"
        ) from error
    # Where it is saved again, it names the model wherever it is read.
    for settings in model.peft_config.values():
        if Path(settings.base_model_name_or_path or "").is_dir():
            settings.base_model_name_or_path = str(Path(base.name_or_path).resolve())
    return model


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model has adapters of peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merged(model: PeftModel) -> PreTrainedModel:
    """The model below adapters, with what they change made part of it where `mergeable`."""
    if not mergeable(model):
        return model
    adapter: Any = model.base_model
    with torch.no_grad(), quiet_peft():
        whole: PreTrainedModel = adapter.merge_and_unload()
    return whole


def mergeable(model: PeftModel) -> bool:
    """Tell whether weights can hold what adapters change.

    Not where embeddings and head are one weight, and one of them is adapted.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(one, BaseTunerLayer) for one in layers):
        return True
    below = [one.get_base_layer() if isinstance(one, BaseTunerLayer) else one for one in layers]
    return below[0].weight is not below[1].weight


def with_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add adapters, which alone are trained from then on; the model is changed, and frozen.

    Raises:
        SettingError: If peft refuses, or there are adapters already.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(config, PeftConfig):
        raise SettingError(
            f"peft_config must be one of peft, such as LoraConfig, got {type(config).__name__}"
        )
    if is_adapted(model):
        raise SettingError("the model has adapters already; give it without them")
    # Adapters say which model they belong to, wherever they are loaded from.
    if Path(model.name_or_path).is_dir():
        model.name_or_path = str(Path(model.name_or_path).resolve())
    try:
        with quiet(), quiet_peft():
            return get_peft_model(model, config)
    except ValueError as error:
        raise SettingError(f"peft cannot adapt {model.name_or_path}: {one_line(error)}") from error


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
        SettingError: If the model has no such layers, or peft cannot adapt it.
    """
    from peft import LoraConfig

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"
    }
    unknown = [
        one
        for one in targets
        if not any(name.endswith(f".{one}") or name == one for name in layers)
    ]
    if unknown:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise SettingError(
            f"{model.name_or_path} has no layer {' and no '.join(unknown)} to adapt; its layers "
            f"are called {', '.join(known)}"
        )
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) or "all-linear",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_adapters(model, config)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out what peft says of what it does or mends by itself, and its use of old names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
        yield
