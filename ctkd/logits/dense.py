"""Logits that exist as a tensor."""

from __future__ import annotations

from torch import Tensor

from ctkd.errors import BatchError
from ctkd.logits.base import check_rows, sharded
from ctkd.logits.rows import RowLogits
from ctkd.logits.sources import TensorRows

__all__ = ["DenseLogits"]


class DenseLogits(RowLogits):
    """Logits that exist as a tensor.

    Args:
        tensor: (B, L, V') raw logits, any floating dtype.
        mask: (B, S) bool, scored positions; default all of them.
        rows: (B, S) int64, the row of ``tensor`` that holds each position, none for two scored
            ones; default its own index.
        vocab_size: Columns to keep, V; default all of them.

    Raises:
        BatchError: If the shapes do not fit, the dtype is not floating, the tensor is a DTensor,
            ``vocab_size`` exceeds the columns there are, or scored positions have no row of their
            own.

    Example:
        >>> import torch
        >>> logits = DenseLogits(torch.tensor([[[0.0, 0.0, 9.0]]]), vocab_size=2)
        >>> logits.log_probs(torch.tensor([[[1]]])).exp()
        tensor([[[0.5000]]])
    """

    def __init__(
        self,
        tensor: Tensor,
        *,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if tensor.ndim != 3:
            raise BatchError(f"logits must be (B, S, V), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise BatchError(f"logits must be floating point, got {tensor.dtype}")
        if hasattr(tensor, "full_tensor"):
            raise sharded("the tensor of logits", "give its full_tensor()")
        super().__init__(TensorRows(tensor), mask=mask, rows=rows, vocab_size=vocab_size)
        if rows is not None:
            check_rows(rows, self.mask, tensor.shape[1])

    @property
    def tensor(self) -> Tensor:
        """The raw logits, (B, L, V')."""
        return self.source.inputs[0]
