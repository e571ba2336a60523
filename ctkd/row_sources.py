"""Where rows of raw logits come from: a tensor, or what `ctkd.head_rows` makes when asked.

A source knows rows by one number, b * L + i, and nothing of masks, temperatures or losses. It
reads a block of rows at a time, and carries a gradient back the same way. Number B * L stands for
no row: what is read there is some row, and what is written there is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctkd.compiled import RowArray, is_readable, readable
from ctkd.powers import Workspace
from ctkd.rows import block_rows, place_of_rows, skips_padding, statistics_dtype

__all__ = ["Anchored", "FillArray", "FillGradient", "Memo", "RowSource", "TensorRows"]

FillGradient = Callable[[slice, Tensor, Tensor], None]
"""Which rows (n of them), their raw logits (n, V'), and where to put their gradient (n, V')."""

FillArray = Callable[[slice, RowArray, RowArray], None]
"""Which rows, their raw logits, and where to put their gradient: both (n, V'), maybe the same."""


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
        """Read rows block by block: which of them, and a block that must not be written to.

        A block may be gone when the next one is asked for.
        """

    @abstractmethod
    def read(self, rows: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Rows (n, V') in one piece, which must not be written to.

        They may be gone when more is read into the workspace.
        """

    @property
    @abstractmethod
    def rows_at_once(self) -> int:
        """How many rows `read` should be asked for at a time."""

    def array(self, rows: Tensor, workspace: Workspace | None = None) -> RowArray:
        """Rows as compiled loops take them; they may be gone when `read` says so."""
        return RowArray.of(readable(self.read(rows, workspace)))

    @property
    def rows_per_array(self) -> int:
        """How many rows `array` should be asked for at a time."""
        return self.rows_at_once

    def arrays(self, rows: Tensor) -> Iterator[tuple[slice, RowArray]]:
        """Do what `blocks` does for compiled loops."""
        size, workspace = max(self.rows_per_array, 1), Workspace()
        for start in range(0, rows.shape[0], size):
            which = slice(start, min(start + size, rows.shape[0]))
            yield which, self.array(rows[which], workspace)

    @abstractmethod
    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Some entries of each row, (N,) and (N, K) give (N, K)."""

    @abstractmethod
    def pick_shared(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The same entries of several rows, (G, N) and (G, K) give (G, N, K)."""

    @abstractmethod
    def row_buffer(self, rows: Tensor) -> Tensor | None:
        """Room for a gradient of all rows, and one more; None where it would be large.

        Args:
            rows: (N,) int64, what the caller fills in; all others are 0.
        """

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

    @property
    def carries_arrays(self) -> bool:
        """Whether there is `carry_back_arrays`."""
        return False

    def carry_back_arrays(
        self, rows: Tensor, fill: FillArray, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Do what `carry_back` does, with gradients that are put by compiled loops.

        Args:
            rows: As in `carry_back`.
            fill: Puts the gradient of rows in its place.
            buffer: As in `carry_back`.
        """
        raise NotImplementedError(f"{type(self).__name__} carries blocks only")


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
        size, workspace = block_rows(self.shape[2], self.device), Workspace()
        for start in range(0, rows.shape[0], size):
            which = slice(start, start + size)
            yield which, self.read(rows[which], workspace)

    def read(self, rows: Tensor, workspace: Workspace | None = None) -> Tensor:
        return (workspace or Workspace()).converted("rows", self._read(rows), self.dtype)

    @property
    def rows_at_once(self) -> int:
        return block_rows(self.shape[2], self.device)

    def array(self, rows: Tensor, workspace: Workspace | None = None) -> RowArray:
        if not self.carries_arrays:
            return super().array(rows, workspace)
        return RowArray.of(self.tensor, self._real(rows))

    @property
    def rows_per_array(self) -> int:
        return self.num_rows + 1 if self.carries_arrays else self.rows_at_once

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        rows = self._real(rows)
        if self._flat is not None and isinstance(place := place_of_rows(rows), slice):
            return self._flat[place].gather(1, ids).to(self.dtype)
        rows = rows.unsqueeze(-1)
        return self.tensor[self._sequence(rows), self._position(rows), ids].to(self.dtype)

    def pick_shared(self, rows: Tensor, ids: Tensor) -> Tensor:
        return self.pick(rows.flatten(), ids.repeat_interleave(rows.shape[1], 0)).view(
            *rows.shape, ids.shape[1]
        )

    def row_buffer(self, rows: Tensor) -> Tensor:
        buffer = self.tensor.new_empty(self.num_rows + 1, self.shape[2])
        others = torch.ones(len(buffer), dtype=torch.bool, device=rows.device)
        others = others.index_fill(0, rows, False)
        if skips_padding(self.device):
            # Torch would look at every entry if it were given the mask.
            return buffer.index_fill_(0, others.nonzero().squeeze(-1), 0.0)
        return buffer.masked_fill_(others.unsqueeze(-1), 0.0)

    def carry_back(
        self, rows: Tensor, fill: FillGradient, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        gradient = self.row_buffer(rows) if buffer is None else buffer
        workspace = Workspace()
        for which, block in self.blocks(rows):
            place = place_of_rows(rows[which])
            is_run = isinstance(place, slice)
            if is_run and gradient.dtype == self.dtype:
                fill(which, block, gradient[place])
                continue
            part = workspace.rows("gradient", block, block.shape[1])
            if buffer is not None:
                part.copy_(gradient[place])
            fill(which, block, part)
            gradient[place] = part if is_run else part.to(gradient.dtype)
        return (gradient[:-1].view(self.shape),)

    @property
    def carries_arrays(self) -> bool:
        return is_readable(self.tensor)

    def carry_back_arrays(
        self, rows: Tensor, fill: FillArray, buffer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        gradient = self.row_buffer(rows) if buffer is None else buffer
        fill(slice(0, rows.shape[0]), self.array(rows), RowArray.of(gradient, rows))
        return (gradient[:-1].view(self.shape),)

    def _read(self, rows: Tensor) -> Tensor:
        place = place_of_rows(rows)
        if isinstance(place, slice) and place.stop <= self.num_rows:
            if self._flat is not None:
                return self._flat[place]
            sequence, position = divmod(place.start, self.shape[1])
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
