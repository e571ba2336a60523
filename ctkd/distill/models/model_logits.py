"""Logits of a model at the last positions of a batch: blocks of its head's, or all of them.

Most models end in one linear layer, perhaps scaled or bounded. There its hidden states are taken
instead, and a loss computes logits a block at a time. Whether that gives the model's own logits is
not concluded from its configuration but tried out, once, on a few tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ctkd.distill.models.loading import (
    below_wrappers,
    evaluating,
    last_logits,
    supports_logits_to_keep,
)
from ctkd.errors import ModelError
from ctkd.logits import DenseLogits, HeadLogits, RowLogits

__all__ = ["Head", "ModelLogits"]

_TRIED_TOKENS = 6


@dataclass(frozen=True, slots=True)
class _Head:
    """Scale and bound of the head's logits; the layer itself is fetched when needed."""

    scale: float
    softcap: float | None


class Head(NamedTuple):
    """The last layer of a model, as `HeadLogits` takes it."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class ModelLogits:
    """Reads the logits of a model at the last positions of a batch.

    In a loop of your own it stands for ``model(input_ids).logits``, on several processes too: it
    calls the wrapper it was given, whose forward pass is what has gradients reduced. Logits come as
    `HeadLogits`, or as `DenseLogits` where a head cannot be taken apart, as with sharded weights.

    Args:
        model: The model, with its adapters if it has any; for a loop of your own as it is called
            there, perhaps in ``DistributedDataParallel`` or after ``fully_shard``.
        refuse: Why its head must not be taken apart; None if it may.

    Attributes:
        why_whole: Why all logits are computed; None where they come a block at a time.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(
        ...         vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
        ...         num_key_value_heads=1, intermediate_size=4,
        ...     )
        ... )
        >>> logits = ModelLogits(model)(torch.tensor([[1, 5, 2]]))
        >>> type(logits).__name__, logits.shape
        ('HeadLogits', (1, 3, 9))
    """

    def __init__(self, model: nn.Module, *, refuse: str | None = None) -> None:
        self._called = model
        while isinstance(inner := getattr(model, "module", None), nn.Module):
            if not isinstance(model, DistributedDataParallel):
                refuse = refuse or f"the model is wrapped in {type(model).__name__}"
            elif model.static_graph:
                # Its reduction waits for a gradient of what its forward pass returns.
                refuse = refuse or "the graph of DistributedDataParallel is static"
            model = inner
        self.model = cast(PreTrainedModel, below_wrappers(model))
        self._head: _Head | None = None
        if any("_orig_mod" in module._modules for module in model.modules()):
            refuse = refuse or "the model is compiled"
        self.why_whole = refuse or _obstacle(self.model)
        if self.why_whole is None:
            self._head = _find_head(self.model)
            if self._head is None:
                self.why_whole = "its logits are more than a linear layer of its hidden states"

    def __call__(
        self, input_ids: Tensor, *, logits_to_keep: int | None = None, **inputs: Tensor
    ) -> RowLogits:
        """Logits at all positions, (B, L, V'), or at the last ones.

        Args:
            input_ids: (B, L).
            logits_to_keep: How many of the last positions; default all.
            **inputs: ``attention_mask`` and ``position_ids``, where the texts need them.
        """
        self._warn_if_gradients_stay_here()
        count = logits_to_keep or input_ids.shape[1]
        return self.read(self._called, {"input_ids": input_ids, **inputs}, count)

    def _warn_if_gradients_stay_here(self) -> None:
        """Warn where several processes train a model that nothing wraps."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        trained = [one for one in self.model.parameters() if one.requires_grad]
        alone = self._called is self.model and not hasattr(next(iter(trained), None), "full_tensor")
        if distributed.get_world_size() > 1 and torch.is_grad_enabled() and trained and alone:
            warnings.warn(
                f"{distributed.get_world_size()} processes train this model, but nothing reduces "
                "its gradients: give ModelLogits the DistributedDataParallel that wraps it",
                stacklevel=3,
            )

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor], count: int) -> RowLogits:
        """Logits at the last positions, (B, count, V').

        Args:
            model: What is called: the model, perhaps wrapped for training on several devices.
            inputs: ``input_ids``, and ``attention_mask`` and ``position_ids`` if there are such.
            count: How many positions.
        """
        if self._head is None:
            return DenseLogits(last_logits(model, self.model, inputs, count))
        return self.from_hidden(self.hidden(model, inputs, count))

    def hidden(self, model: nn.Module, inputs: Mapping[str, Tensor], count: int) -> Tensor:
        """What goes into the head at the last positions, (B, count, H), as `read` takes them."""
        with _hidden_states(self.model) as hidden:
            # The head's own logits, of one position, are dropped.
            last_logits(model, self.model, inputs, 1)
        return hidden[0][:, -count:]

    def from_hidden(
        self, hidden: Tensor, *, mask: Tensor | None = None, vocab_size: int | None = None
    ) -> HeadLogits:
        """Logits of what `hidden` returned, perhaps earlier.

        Raises:
            ModelError: If the head cannot be taken apart; `why_whole` says why.
        """
        return HeadLogits(hidden, **self.head()._asdict(), mask=mask, vocab_size=vocab_size)

    def head(self) -> Head:
        """What makes logits of hidden states.

        Raises:
            ModelError: If it cannot be taken apart; `why_whole` says why.
        """
        if self._head is None:
            raise ModelError(f"the head cannot be taken apart: {self.why_whole}")
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, self._head.scale, self._head.softcap)


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why the head of a model cannot be taken apart."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or layer.weight.ndim != 2:
        return f"its head is {type(layer).__name__}, not a plain linear layer"
    if not layer.weight.is_floating_point() or type(layer.weight) is not nn.Parameter:
        return "the weight of its head is not a plain tensor"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return "its head is changed by hooks"
    if not supports_logits_to_keep(model):
        return f"{type(model).__name__} cannot leave out logits"
    if model.base_model is model:
        return f"{type(model).__name__} has no part below its head"
    return None


@torch.no_grad()
def _find_head(model: PreTrainedModel) -> _Head | None:
    """The scale and softcap of its configuration that give a model's own logits, if any do."""
    layer = model.get_output_embeddings()
    width = min(layer.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(_TRIED_TOKENS, device=device).remainder(width).unsqueeze(0)
    # Dropout below the head would not matter, but may write to the state of random numbers.
    with evaluating(model), _hidden_states(model) as hidden:
        # Not by calling the model: hooks of others need not hear of it.
        logits = model.forward(input_ids=ids, use_cache=False).logits
    if not hidden or hidden[0].shape[-1] != layer.weight.shape[1] or not logits.isfinite().all():
        return None
    everything = torch.arange(layer.weight.shape[0], device=device).view(1, 1, -1)
    wanted = DenseLogits(logits).log_probs(everything)
    # Log-probabilities of a row differ by this much if each logit is rounded once.
    tolerance = 8.0 * torch.finfo(logits.dtype).eps * float(logits.abs().max().clamp_min(1))
    fitting = [
        _Head(scale, softcap)
        for scale, softcap in itertools.product(_scales(model), _softcaps(model))
        if _largest_error(
            HeadLogits(hidden[0], layer.weight, layer.bias, scale=scale, softcap=softcap),
            everything,
            wanted,
        )
        <= tolerance
    ]
    # Where the logits are so small that two forms give them, they may part later.
    return fitting[0] if len(fitting) == 1 else None


def _largest_error(logits: HeadLogits, ids: Tensor, expected: Tensor) -> float:
    return float((logits.log_probs(ids) - expected).abs().max())


def _scales(model: PreTrainedModel) -> list[float]:
    """1, and what Cohere (a factor) and Granite (a divisor) keep in their configurations."""
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling")]
    factors = [float(one) for one in named if isinstance(one, int | float) and one > 0]
    return sorted({1.0, *factors, *(1.0 / one for one in factors)})


def _softcaps(model: PreTrainedModel) -> list[float | None]:
    """None, and what Gemma 2 keeps in its configuration."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return [None, float(cap)] if isinstance(cap, int | float) and cap > 0 else [None]


@contextmanager
def _hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Catch what goes into the head of a model while it runs."""
    states: list[Tensor] = []

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        hidden = output[0] if hidden is None else hidden
        if torch.is_autocast_enabled(hidden.device.type):
            # What the head itself would do.
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        states.append(hidden)

    handle = model.base_model.register_forward_hook(catch)
    try:
        yield states
    finally:
        handle.remove()
