"""Where rows of raw logits come from: a tensor, or hidden states and the head of a model.

A source knows rows by one number, b * L + i, and nothing of masks, temperatures or losses. It
reads a block of rows at a time, and carries a gradient back the same way. Number B * L stands for
no row: what is read there is some row, and what is written there is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctkd.rows import block_rows, head_block_rows, skips_padding, statistics_dtype

__all__ = ["Anchored", "FillGradient", "HeadRows", "Memo", "RowSource", "TensorRows"]

FillGradient = Callable[[slice, Tensor, Tensor], None]
"""Which rows (n of them), their raw logits (n, V'), and where to put their gradient (n, V')."""


class Anchored(NamedTuple):
    """What stands for a source in the graph of autograd, see `ctkd.row_gradients`."""

    anchor: Tensor
    requests: dict[Any, Any]
    state: Any


class Memo:
    """What was found out about the rows of a source, shared by all who look at it."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._tables: dict[Hashable, Tensor] = {}
        self._complete: list[tuple[Hashable, Tensor | None]] = []

    def tables(
        self, source: RowSource, keys: Sequence[Hashable], rows: Tensor, view: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tables (B * L + 1,) of a number per row, and which rows of each are to be filled in.

        Args:
            source: Whose memo this is.
            keys: What the numbers are.
            rows: (N,) rows that the caller needs, and fills in if they are missing.
            view: What tells these rows from those of others, where they cannot be looked at.
        """
        version = source.version
        if version is None or torch.is_inference_mode_enabled():
            # What is found out here could be out of date later, or not be written to.
            return [_unknown(source) for _ in keys], [rows for _ in keys]
        if version != self._version:
            self._tables, self._complete, self._version = {}, [], version
        for key in keys:
            if key not in self._tables:
                self._tables[key] = _unknown(source)
        tables = [self._tables[key] for key in keys]
        if skips_padding(source.device):
            return tables, [rows[table[rows].isnan()] for table in tables]
        known = [any(key == one and view is other for one, other in self._complete) for key in keys]
        return tables, [rows[:0] if one else rows for one in known]

    def filled_in(self, source: RowSource, keys: Sequence[Hashable], view: Tensor | None) -> None:
        """Note that all rows of a view are in these tables now."""
        can_be_looked_at = skips_padding(source.device)
        if not (can_be_looked_at or torch.is_inference_mode_enabled()):
            self._complete += [(key, view) for key in keys]


def _unknown(source: RowSource) -> Tensor:
    return torch.full((source.num_rows + 1,), torch.nan, dtype=source.dtype, device=source.device)


class RowSource(ABC):
    """B * L rows of V' raw logits, read in the dtype of statistics.

    Attributes:
        shape: (B, L, V').
        dtype: float64 or float32.
        inputs: The tensors that gradients flow into.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]

    def __init__(self) -> None:
        self.anchored: Anchored | None = None
        self.memo = Memo()

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def num_rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def version(self) -> int | None:
        """Changes with the inputs; None where changes cannot be told."""
        if any(tensor.is_inference() for tensor in self.inputs):
            return None
        return sum(tensor._version for tensor in self.inputs)

    @abstractmethod
    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Read rows block by block: which of them, and a block that must not be written to."""

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """Rows (n, V') in one piece, which must not be written to."""

    @property
    @abstractmethod
    def rows_at_once(self) -> int:
        """How many rows `read` should be asked for at a time."""

    @abstractmethod
    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Some entries of each row, (N,) and (N, K) give (N, K)."""

    @abstractmethod
    def pick_shared(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The same entries of several rows, (G, N) and (G, K) give (G, N, K)."""

    @abstractmethod
    def row_buffer(self) -> Tensor | None:
        """Room for a gradient of all rows, and one more; None where it would be large."""

    @abstractmethod
    def carry_back(
        self, rows: Tensor, fill: FillGradient, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, from the gradient of each row.

        Args:
            rows: (N,) int64, no row twice. All others get no gradient.
            fill: Puts the gradient of a block of rows in its place, or adds it to the buffer's.
            buffer: From `row_buffer`; what it holds is part of the gradient. It is used up.
        """


class TensorRows(RowSource):
    """Rows of a tensor.

    Args:
        tensor: (B, L, V').
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.inputs = (tensor,)
        self.shape = (tensor.shape[0], tensor.shape[1], tensor.shape[2])
        self.dtype = statistics_dtype(tensor.dtype)
        # Strides that let all rows be seen as one matrix.
        self._flat = tensor.view(-1, self.shape[2]) if tensor.is_contiguous() else None

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        size = block_rows(self.shape[2], self.device)
        for start in range(0, rows.shape[0], size):
            which = slice(start, start + size)
            yield which, self._read(rows[which]).to(self.dtype)

    def read(self, rows: Tensor) -> Tensor:
        return self._read(rows).to(self.dtype)

    @property
    def rows_at_once(self) -> int:
        return block_rows(self.shape[2], self.device)

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        rows = self._real(rows).unsqueeze(-1)
        return self.tensor[self._sequence(rows), self._position(rows), ids].to(self.dtype)

    def pick_shared(self, rows: Tensor, ids: Tensor) -> Tensor:
        return self.pick(rows.flatten(), ids.repeat_interleave(rows.shape[1], 0)).view(
            *rows.shape, ids.shape[1]
        )

    def row_buffer(self) -> Tensor:
        return self.tensor.new_zeros(self.num_rows + 1, self.shape[2])

    def carry_back(
        self, rows: Tensor, fill: FillGradient, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        gradient = buffer
        if gradient is None:
            gradient = self.tensor.new_empty(self.num_rows + 1, self.shape[2])
            others = torch.ones(len(gradient), dtype=torch.bool, device=rows.device)
            others = others.index_fill(0, rows, False)
            if skips_padding(self.device):
                gradient[others] = 0.0
            else:
                gradient.masked_fill_(others.unsqueeze(-1), 0.0)
        for which, block in self.blocks(rows):
            some = rows[which]
            first = _start_of_run(some)
            place: Tensor | slice = some
            if first is not None:
                place = slice(first, first + len(some))
                if gradient.dtype == self.dtype:
                    fill(which, block, gradient[place])
                    continue
            part = torch.empty_like(block) if buffer is None else gradient[place].to(self.dtype)
            fill(which, block, part)
            gradient[place] = part.to(gradient.dtype)
        return (gradient[:-1].view(self.shape),)

    def _read(self, rows: Tensor) -> Tensor:
        first = _start_of_run(rows)
        if first is not None and first + len(rows) <= self.num_rows:
            if self._flat is not None:
                return self._flat[first : first + len(rows)]
            sequence, position = divmod(first, self.shape[1])
            if position + len(rows) <= self.shape[1]:
                return self.tensor[sequence, position : position + len(rows)]
        rows = self._real(rows)
        if self._flat is not None:
            return self._flat.index_select(0, rows)
        return self.tensor[self._sequence(rows), self._position(rows)]

    def _real(self, rows: Tensor) -> Tensor:
        return rows.clamp_max(max(self.num_rows - 1, 0))

    def _sequence(self, rows: Tensor) -> Tensor:
        return rows // max(self.shape[1], 1)

    def _position(self, rows: Tensor) -> Tensor:
        return rows % max(self.shape[1], 1)


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
        for which, raw in self._chunks(rows):
            size = block_rows(self.shape[2], self.device)
            for start in range(0, raw.shape[0], size):
                some = slice(which.start + start, min(which.start + start + size, which.stop))
                yield some, raw[start : start + size].to(self.dtype)

    def read(self, rows: Tensor) -> Tensor:
        return self._raw(rows, self.weight.detach().to(self.hidden.dtype)).to(self.dtype)

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

    def row_buffer(self) -> None:
        return None

    def carry_back(
        self, rows: Tensor, fill: FillGradient, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        hidden_gradient = self.hidden.new_zeros(self.num_rows + 1, self.hidden.shape[2])
        weight = self.weight.detach().to(self.hidden.dtype)
        wants_weight = self.weight.requires_grad
        weight_gradient = torch.zeros_like(self.weight) if wants_weight else None
        bias_gradient = None
        if self.bias is not None and self.bias.requires_grad:
            bias_gradient = torch.zeros_like(self.bias, dtype=self.dtype)
        size = block_rows(self.shape[2], self.device)
        for which, raw in self._chunks(rows):
            some = rows[which]
            for start in range(0, raw.shape[0], size):
                part = raw[start : start + size]
                block = part.to(self.dtype)
                gradient = torch.empty_like(block)
                fill(slice(which.start + start, which.start + start + len(part)), block, gradient)
                if self.softcap is not None:
                    gradient.mul_(1.0 - (block / self.softcap).square_())
                if self.scale != 1.0:
                    gradient.mul_(self.scale)
                part.copy_(gradient)
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


def _start_of_run(rows: Tensor) -> int | None:
    """The first of some rows that follow each other; None elsewhere than on the CPU."""
    if not skips_padding(rows.device) or not rows.shape[0]:
        return None
    first = int(rows[0])
    return first if rows.tolist() == list(range(first, first + rows.shape[0])) else None
