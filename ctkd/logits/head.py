"""Logits that a model's head makes of hidden states, a block of rows at a time."""

from __future__ import annotations

from torch import Tensor

from ctkd.errors import BatchError
from ctkd.logits.base import check_rows, sharded
from ctkd.logits.rows import RowLogits
from ctkd.logits.sources import HeadRows
from ctkd.settings import check_positive

__all__ = ["HeadLogits"]


class HeadLogits(RowLogits):
    r"""Logits as hidden states and the head that makes them, a few rows at a time.

    .. math:: x = c \tanh \frac{a (h W^\top + b)}{c}

    with the softcap c and the scale a; without a softcap, x is the numerator. Taken wherever a
    tensor of logits is. Gradients flow into the hidden states, the weight and the bias. All
    queries of one object, by cross-entropy and by a loss, share one backward pass.

    On several processes gradients are reduced only if the wrapper of the model has run:
    ``ddp.module.model(ids)`` passes by the forward pass of ``DistributedDataParallel``, and every
    process then trains a model of its own, without an error. `ctkd.distill.models.ModelLogits`
    calls the wrapper, and gives such an object wherever the model's head allows.

    The forward pass of a loss computes the logits once or twice and its backward pass once more, a
    block of rows at a time; a loss that compares whole rows works through them in both. Where B * L
    * V' is at most 2^24, such a loss keeps its gradient, of the hidden states' dtype, instead.

    Shape:
        ``hidden`` (B, L, H), ``weight`` (V', H), ``bias`` (V',).

    Args:
        hidden: Last hidden states, as the head takes them: after the final norm.
        weight: Of the head.
        bias: Of the head.
        scale: Multiplies the logits: ``logit_scale`` of Cohere, one over ``logits_scaling`` of
            Granite.
        softcap: ``final_logit_softcapping`` of Gemma 2.
        mask: (B, S) bool, scored positions; default all of them.
        rows: (B, S) int64, the row of ``hidden`` that holds each position, none for two scored
            ones; default its own index.
        vocab_size: Columns to keep, V; default all of them.

    Raises:
        BatchError: If shapes, dtypes or devices do not fit, a tensor is a DTensor (FSDP2), or
            scored positions have no row of their own.
        SettingError: If ``scale`` or ``softcap`` is not above 0.

    Example:
        >>> import torch
        >>> hidden, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.0, 0.0], [1.0, -0.5]])
        >>> HeadLogits(hidden, weight).log_probs(torch.tensor([[[1]]])).exp()
        tensor([[[0.5000]]])
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> None:
        check_positive("scale", scale)
        if softcap is not None:
            check_positive("softcap", softcap)
        _check_shapes(hidden, weight, bias)
        source = HeadRows(hidden, weight, bias, scale=scale, softcap=softcap)
        super().__init__(source, mask=mask, rows=rows, vocab_size=vocab_size)
        if rows is not None:
            check_rows(rows, self.mask, hidden.shape[1])


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[2] != weight.shape[1]:
        raise BatchError(
            "hidden states must be (B, L, H) and the head's weight (V, H), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise BatchError(
            f"the head's bias must be (V,), {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )
    for name, tensor in (("hidden states", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if hasattr(tensor, "full_tensor"):
            raise sharded(
                "the head's weight" if name == "weight" else f"the {name}",
                "give the logits that the model itself computes, calling what holds the shards "
                "(model(ids).logits), as ctkd.distill.models.ModelLogits does",
            )
        if not tensor.is_floating_point():
            raise BatchError(f"the {name} must be floating point, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise BatchError(
                f"the {name} is on {tensor.device}, the hidden states on {hidden.device}; "
                "move both to one device"
            )
