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
from typing import NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ctkd.distill.models.loading import below_wrappers, evaluating, last_logits
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
            **inputs: ``attention_mask`` and ``position_ids``, where the texts need them. Of an
                encoder-decoder ``decoder_input_ids`` (B, L), whose positions count.
        """
        self._warn_if_gradients_stay_here()
        read = inputs.get("decoder_input_ids", input_ids)
        count = logits_to_keep or read.shape[1]
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
            inputs: As `ctkd.distill.models.loading.last_logits` takes them.
            count: How many positions.
        """
        if self._head is None:
            return DenseLogits(last_logits(model, self.model, inputs, count))
        return self.from_hidden(self.hidden(model, inputs, count))

    def hidden(self, model: nn.Module, inputs: Mapping[str, Tensor], count: int) -> Tensor:
        """What goes into the head at the last positions, (B, count, H), as `read` takes them."""
        # The head's own logits, of one position, are dropped.
        with _head_inputs(self.model, passed_on=1) as hidden:
            last_logits(model, self.model, inputs, count)
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
        weight, bias = _weight_and_bias(self.model)
        return Head(weight, bias, self._head.scale, self._head.softcap)


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why the head of a model cannot be taken apart."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or layer.weight.ndim != 2:
        return f"its head is {type(layer).__name__}, not a plain linear layer"
    if not layer.weight.is_floating_point() or type(layer.weight) is not nn.Parameter:
        return "the weight of its head is not a plain tensor"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return "its head is changed by hooks"
    return None


def _weight_and_bias(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Of the head, with what BART adds to its logits."""
    layer = model.get_output_embeddings()
    bias, added = layer.bias, getattr(model, "final_logits_bias", None)
    if added is not None:
        bias = added[0] if bias is None else bias + added[0]
    return layer.weight, bias


@torch.no_grad()
def _find_head(model: PreTrainedModel) -> _Head | None:
    """The scale and softcap of its configuration that give a model's own logits, if any do."""
    weight, bias = _weight_and_bias(model)
    width = min(weight.shape[0], model.get_input_embeddings().weight.shape[0])
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(_TRIED_TOKENS, device=device).remainder(width).unsqueeze(0)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    # Dropout below the head would not matter, but may write to the state of random numbers.
    with evaluating(model), _head_inputs(model) as hidden:
        # Not by calling the model: hooks of others need not hear of it.
        logits = model.forward(input_ids=ids, **inputs, use_cache=False).logits
    if len(hidden) != 1 or hidden[0].shape[:-1] != ids.shape or not logits.isfinite().all():
        return None
    everything = torch.arange(weight.shape[0], device=device).view(1, 1, -1)
    wanted = DenseLogits(logits).log_probs(everything)
    # Log-probabilities of a row differ by this much if each logit is rounded once.
    tolerance = 8.0 * torch.finfo(logits.dtype).eps * float(logits.abs().max().clamp_min(1))
    fitting = [
        _Head(scale, softcap)
        for scale, softcap in itertools.product(_scales(model), _softcaps(model))
        if _largest_error(
            HeadLogits(hidden[0], weight, bias, scale=scale, softcap=softcap),
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
def _head_inputs(model: PreTrainedModel, *, passed_on: int = 0) -> Iterator[list[Tensor]]:
    """Catch what goes into the head of a model while it runs.

    Args:
        model: The model.
        passed_on: How many of the last positions the head itself sees; 0 for all.
    """
    states: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        hidden, device = inputs[0], inputs[0].device.type
        # What the head itself would do.
        is_cast = torch.is_autocast_enabled(device)
        states.append(hidden.to(torch.get_autocast_dtype(device)) if is_cast else hidden)
        return hidden[:, -passed_on:]

    handle = model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        yield states
    finally:
        handle.remove()
