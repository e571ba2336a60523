"""Rows of raw logits that are made of hidden states and the head of a model when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ctkd.compiled import RowArray, is_readable, readable
from ctkd.powers import Workspace
from ctkd.row_sources import FillArray, FillGradient, RowSource
from ctkd.rows import block_rows, head_block_rows, skips_padding, statistics_dtype

__all__ = ["HeadRows"]


class HeadRows(RowSource):
    """Rows that a model's head makes of hidden states, when they are read.

    Args:
        hidden: (B, L, H).
        weight: (V', H).
        bias: (V',).
        scale: Multiplies what the head says.
        softcap: Bounds it then, by ``softcap * tanh(x / softcap)``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight, self.bias = weight, bias
        self.inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
        self.shape = (hidden.shape[0], hidden.shape[1], weight.shape[0])
        self.dtype = statistics_dtype(hidden.dtype)
        self.scale, self.softcap = scale, softcap

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        workspace = Workspace()
        for which, raw in self._chunks(rows):
            size = block_rows(self.shape[2], self.device)
            for start in range(0, raw.shape[0], size):
                some = slice(which.start + start, min(which.start + start + size, which.stop))
                block = raw[start : start + size]
                yield some, workspace.converted("rows", block, self.dtype)

    def read(self, rows: Tensor, workspace: Workspace | None = None) -> Tensor:
        raw = self._raw(rows, self.weight.detach().to(self.hidden.dtype))
        return (workspace or Workspace()).converted("rows", raw, self.dtype)

    @property
    def rows_at_once(self) -> int:
        return head_block_rows(self.shape[2], self.device)

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        size = max(1, block_rows(self.hidden.shape[2] * max(ids.shape[1], 1), self.device))
        picked = torch.empty(ids.shape, dtype=self.dtype, device=self.device)
        for start in range(0, rows.shape[0], size):
            some = slice(start, start + size)
            weight = self.weight.detach()[ids[some]].to(self.hidden.dtype)
            with _dtypes_as_given(self.device):
                raw = (weight @ self._hidden_rows(rows[some]).unsqueeze(-1)).squeeze(-1)
            picked[some] = self._finished(raw, self._bias_at(ids[some])).to(self.dtype)
        return picked

    def pick_shared(self, rows: Tensor, ids: Tensor) -> Tensor:
        hidden = self._hidden_rows(rows.flatten()).view(*rows.shape, self.hidden.shape[2])
        weight = self.weight.detach()[ids].to(self.hidden.dtype)
        with _dtypes_as_given(self.device):
            raw = torch.bmm(hidden, weight.transpose(1, 2))
        bias = self._bias_at(ids)
        return self._finished(raw, None if bias is None else bias.unsqueeze(1)).to(self.dtype)

    def row_buffer(self, rows: Tensor) -> None:
        return None

    def array(self, rows: Tensor, workspace: Workspace | None = None) -> RowArray:
        return RowArray.of(readable(self._raw(rows, self.weight.detach().to(self.hidden.dtype))))

    def carry_back(
        self, rows: Tensor, fill: FillGradient, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        size, workspace = block_rows(self.shape[2], self.device), Workspace()

        def replace(which: slice, raw: Tensor) -> None:
            for start in range(0, raw.shape[0], size):
                part = raw[start : start + size]
                block = workspace.converted("rows", part, self.dtype)
                gradient = workspace.rows("gradient", block, block.shape[1])
                fill(slice(which.start + start, which.start + start + len(part)), block, gradient)
                if self.softcap is not None:
                    gradient.mul_(1.0 - (block / self.softcap).square_())
                if self.scale != 1.0:
                    gradient.mul_(self.scale)
                part.copy_(gradient)

        return self._carried_back(rows, replace)

    @property
    def carries_arrays(self) -> bool:
        # A scale is applied before rounding to a narrow dtype.
        is_exact = self.scale == 1.0 or self.hidden.dtype == self.dtype
        return self.softcap is None and is_exact and is_readable(self.hidden)

    def carry_back_arrays(
        self, rows: Tensor, fill: FillArray, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        def replace(which: slice, raw: Tensor) -> None:
            array = RowArray.of(raw)
            fill(which, array, array)
            if self.scale != 1.0:
                raw.mul_(self.scale)

        return self._carried_back(rows, replace)

    def _carried_back(
        self, rows: Tensor, replace: Callable[[slice, Tensor], None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs.

        Args:
            rows: As in `carry_back`.
            replace: Puts the gradient of a chunk of rows in place of what the head says of them,
                times what comes of the scale and the bound.
        """
        hidden_gradient = self.hidden.new_zeros(self.num_rows + 1, self.hidden.shape[2])
        weight = self.weight.detach().to(self.hidden.dtype)
        wants_weight = self.weight.requires_grad
        weight_gradient = torch.zeros_like(self.weight) if wants_weight else None
        bias_gradient = None
        if self.bias is not None and self.bias.requires_grad:
            bias_gradient = torch.zeros_like(self.bias, dtype=self.dtype)
        for which, raw in self._chunks(rows):
            some = rows[which]
            replace(which, raw)
            with _dtypes_as_given(self.device):
                hidden_gradient[some] = raw @ weight
                if weight_gradient is not None:
                    _add_product_(weight_gradient, raw, self._hidden_rows(some))
            if bias_gradient is not None:
                bias_gradient += raw.sum(0, dtype=self.dtype)
        shape = self.inputs[0].shape
        answers: list[Tensor | None] = [hidden_gradient[:-1].view(shape), weight_gradient]
        if self.bias is not None:
            answers.append(None if bias_gradient is None else bias_gradient.to(self.bias.dtype))
        return tuple(answers)

    def _chunks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits of as many rows as make a matrix product worthwhile; each is used up."""
        size = head_block_rows(self.shape[2], self.device)
        weight = self.weight.detach().to(self.hidden.dtype)
        for start in range(0, rows.shape[0], size):
            which = slice(start, min(start + size, rows.shape[0]))
            yield which, self._raw(rows[which], weight)

    def _raw(self, rows: Tensor, weight: Tensor) -> Tensor:
        with _dtypes_as_given(self.device):
            raw = self._hidden_rows(rows) @ weight.t()
        return self._finished(raw, None if self.bias is None else self.bias.detach())

    def _hidden_rows(self, rows: Tensor) -> Tensor:
        real = rows.clamp_max(max(self.num_rows - 1, 0))
        length = max(self.shape[1], 1)
        hidden = self.hidden.detach()[real // length, real % length]
        if not skips_padding(self.device):
            # No row, but 0 times what is there must not be nan.
            hidden.masked_fill_((rows >= self.num_rows).unsqueeze(-1), 0.0)
        return hidden

    def _bias_at(self, ids: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.detach()[ids]

    def _finished(self, raw: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            raw += bias.to(raw.dtype)
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw


def _dtypes_as_given(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which may be on in the forward pass and off in the backward pass."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _add_product_(weight_gradient: Tensor, rows_gradient: Tensor, hidden: Tensor) -> None:
    """Add what a block of rows says of the head's weight, (n, V') and (n, H) to (V', H)."""
    if weight_gradient.dtype == rows_gradient.dtype:
        weight_gradient.addmm_(rows_gradient.t(), hidden)
        return
    # A product of another dtype needs room of its own: a part of the vocabulary at a time.
    size = 1 << 14
    for start in range(0, weight_gradient.shape[0], size):
        columns = slice(start, start + size)
        weight_gradient[columns] += rows_gradient[:, columns].t() @ hidden
