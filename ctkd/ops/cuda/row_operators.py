"""Operators of torch that start the kernels of this package, with what they make and cost.

They are registered whether triton is there or not: tensors without values are given what an
operator would make. It is chosen elsewhere what goes to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctkd.ops.costs import Cost
from ctkd.ops.cuda.operators import (
    Matrix,
    Place,
    kernel_cost,
    kernels,
    operator,
    place_of,
    power_of_two,
    row_bytes,
)
from ctkd.ops.rows import Packed, Rows

__all__ = [
    "GradientForm",
    "Softmax",
    "Term",
    "chosen_entries",
    "clear_rows",
    "mass_of_columns",
    "pack_scored",
    "row_gradients",
    "row_statistics",
    "row_top",
]

# Lanes of a tile that are read at once, and warps of a program.
_LANES = 1024
_WARPS = 4
# A program that turns gradients through a deviation holds more than four warps have registers for.
_MOST_WARPS = 8


class Softmax(NamedTuple):
    """What makes probabilities of logits x: ``exp(x * inverse - normalizer)``.

    Attributes:
        normalizers: (T, N) at all temperatures.
        deviations: (N,) what logits are divided by before, or None.
        inverses: 1 over each temperature.
    """

    normalizers: Tensor
    deviations: Tensor | None
    inverses: tuple[float, ...]


class Term(NamedTuple):
    """A `ctkd.ops.SoftmaxTerm` as `gradient_rows` is given it.

    Attributes:
        normalizers: (N,) of each row.
        totals: (N,) weight of the probabilities of each row.
        inverse: 1 over the temperature.
        width: Columns that have a probability.
        columns: (V,) bool, those of them that count, or None.
        ids: (N, size) columns that a weight is added to.
        weights: (N, size) these weights.
        size: How many there are of each row.
    """

    normalizers: Tensor
    totals: Tensor
    inverse: float
    width: int
    columns: Tensor | None
    ids: Tensor
    weights: Tensor
    size: int


class GradientForm(NamedTuple):
    """What `gradient_rows` is compiled for.

    Attributes:
        aligned: Whether rows of all tensors begin at aligned entries.
        congruent: Whether they begin equally far behind one, as well as those that are written.
        sizes: Ids of each term, rounded up.
        standardize: Whether a term's rows are divided by their deviations.
        any_standardized: Whether those of any are.
    """

    aligned: bool
    congruent: bool
    sizes: tuple[int, ...]
    standardize: tuple[bool, ...]
    any_standardized: bool

    @property
    def registers(self) -> int | None:
        """Most registers of a thread; None leaves them to the assembler.

        Left to itself, it spills one to three numbers of some forms to fit more programs. With
        these bounds it spills none and fits as many as of like forms.
        """
        if self.aligned:
            return 64 if self.any_standardized else None
        if len(self.sizes) < 2:
            return None
        return 128 if self.any_standardized else 168


def _inverses(temperatures: Sequence[float]) -> tuple[float, ...]:
    return tuple(1.0 / one for one in temperatures)


def _row_stride(tensor: Tensor) -> int | None:
    """Entries from each row to the next, if all are as far apart."""
    if (
        tensor.ndim == 3
        and tensor.shape[0] > 1
        and tensor.stride(0) != (tensor.shape[1] * tensor.stride(1))
    ):
        return None
    return tensor.stride(-2)


@dataclass(frozen=True)
class _OfRows:
    """Arguments of all operators that read rows."""

    tensor: Tensor
    index: Tensor | None
    width: int

    @property
    def rows(self) -> Rows:
        return Rows(self.tensor, self.index, self.width)

    @property
    def place(self) -> Place:
        return place_of(self.rows)


@dataclass(frozen=True)
class _Statistics(_OfRows):
    """Log-normalizers (T, N) and, if wanted, standard deviations (N,)."""

    temperatures: Sequence[float]
    standardize: bool
    columns: Tensor | None
    deviations: bool

    def answers(self) -> tuple[Tensor, Tensor]:
        count, make = len(self.rows), self.tensor.new_empty
        return (
            make(len(self.temperatures), count, dtype=torch.float32),
            make(count if self.deviations else 0, dtype=torch.float32),
        )

    def start(self, answers: tuple[Tensor, Tensor]) -> None:
        if len(self.rows):
            normalizers, deviations = answers
            moments = self.standardize or self.deviations
            kernels("row_kernels").statistics[(len(self.rows),)](
                self.place,
                self.columns,
                normalizers,
                deviations if self.deviations else None,
                _inverses(self.temperatures),
                ALIGNED=self.place.is_aligned,
                STANDARDIZE=self.standardize,
                TILE=(2 if moments else 4, _LANES),
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        reads = (self.standardize or self.deviations) + bool(self.temperatures)
        written = 4 * len(self.rows) * (len(self.temperatures) + self.deviations)
        return Cost(1, reads * row_bytes(self.rows) + written, 0)


@dataclass(frozen=True)
class _Mass(_OfRows):
    """Probabilities summed over the rows of each sequence, (B, V)."""

    sequence: Tensor
    sequences: int
    normalizers: Tensor
    deviations: Tensor | None
    temperature: float

    def answers(self) -> Tensor:
        return self.tensor.new_empty(self.sequences, self.width, dtype=torch.float32)

    def start(self, answers: Tensor) -> None:
        if self.sequences:
            kernels("row_kernels").mass_of_columns[(-(-self.width // _LANES), self.sequences)](
                self.place,
                self.sequence,
                Softmax(self.normalizers, self.deviations, _inverses([self.temperature])),
                answers,
                len(self.rows),
                ALIGNED=self.place.is_aligned,
                C=_LANES,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        tiles = -(-self.width // _LANES)
        per_row = 4 * (4 if self.deviations is None else 5) * tiles * len(self.rows)
        return Cost(1, row_bytes(self.rows) + per_row + 4 * self.sequences * self.width, 0)


@dataclass(frozen=True)
class _Top(_OfRows):
    """Columns and values of the largest entries, (N, k)."""

    k: int

    def answers(self) -> tuple[Tensor, Tensor]:
        size = len(self.rows), self.k
        # Where there is no row, zeros are expected.
        make = self.tensor.new_empty if self.index is None else self.tensor.new_zeros
        return make(size, dtype=torch.int64), make(size, dtype=torch.float32)

    def start(self, answers: tuple[Tensor, Tensor]) -> None:
        if answers[0].numel():
            size = power_of_two(max(self.k, 2))
            kernels("row_kernels").largest[(len(self.rows),)](
                self.place,
                *answers,
                self.k,
                ALIGNED=self.place.is_aligned,
                K=size,
                C=max(_LANES, size),
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        cleared = 0 if self.index is None else 2
        written = len(self.rows) * (1 + (cleared > 0)) * 12 * self.k
        return Cost(1 + cleared, row_bytes(self.rows) + written, 0)


@dataclass(frozen=True)
class _Gradients:
    """Write the gradient of rows, see `ctkd.ops.reference.softmax_backward`."""

    tensor: Tensor
    index: Tensor | None
    out: Tensor
    out_index: Tensor | None
    out_width: int
    _: KW_ONLY
    known: Tensor | None
    known_index: Tensor | None
    known_width: int
    known_weights: Tensor | None
    temperatures: Sequence[float]
    standardize: Sequence[bool]
    widths: Sequence[int]
    columns: Sequence[Tensor | None]
    normalizers: Sequence[Tensor]
    totals: Sequence[Tensor]
    ids: Sequence[Tensor]
    weights: Sequence[Tensor]

    @property
    def rows(self) -> Rows:
        """As wide as what is written."""
        return Rows(self.tensor, self.index, self.out_width)

    @property
    def target(self) -> Rows:
        return Rows(self.out, self.out_index, self.out_width)

    @property
    def known_rows(self) -> Rows | None:
        if self.known is None:
            return None
        return Rows(self.known, self.known_index, self.known_width)

    def answers(self) -> None:
        """Nothing: what is given is written to."""

    def start(self, answers: None) -> None:
        if not len(self.rows):
            return
        places = [place_of(one) for one in (self.rows, self.target, self.known_rows)]
        is_aligned = all(one.is_aligned for one in places)
        # Rows of one number begin equally far behind an aligned entry in both tensors.
        stride = _row_stride(self.tensor)
        is_same = stride is not None and stride == _row_stride(self.out)
        is_same &= (self.index is None) == (self.out_index is None)
        sizes = [one.shape[1] for one in self.ids]
        form = GradientForm(
            aligned=is_aligned,
            congruent=is_aligned or is_same,
            sizes=tuple(power_of_two(one) if one else 0 for one in sizes),
            standardize=tuple(map(bool, self.standardize)),
            any_standardized=any(self.standardize),
        )
        normalizers, totals, ids, weights = (
            list(map(Tensor.contiguous, some))
            for some in (self.normalizers, self.totals, self.ids, self.weights)
        )
        of_terms = (
            (normalizers, totals, _inverses(self.temperatures), self.widths)
            + (self.columns, ids, weights, sizes)
        )  # fmt: skip
        standardized = zip(self.widths, self.standardize, strict=True)
        kernels("row_kernels").gradient_rows[(len(self.rows),)](
            *places,
            self.known_weights,
            tuple(Term(*one) for one in zip(*of_terms, strict=True)),
            max((width for width, is_one in standardized if is_one), default=0),
            FORM=form,
            C=2 * _LANES,
            num_warps=_MOST_WARPS if form.any_standardized else _WARPS,
            maxnreg=form.registers,
        )

    def cost(self) -> Cost:
        # Once more for the moments, and for what changes along the row.
        reads = 3 if any(self.standardize) else 1
        moved = reads * row_bytes(self.rows) + row_bytes(self.target)
        if self.known_rows is not None:
            moved += row_bytes(self.known_rows)
        # Ids and weights are read to find equal ids, and once more where one is written.
        of_ids = 2 * sum(one.nbytes for one in (*self.ids, *self.weights))
        of_rows = sum(one.nbytes for one in (*self.normalizers, *self.totals))
        masks = sum(one.nbytes for one in self.columns if one is not None)
        given = *self.normalizers, *self.totals, *self.ids, *self.weights
        return kernel_cost(moved + of_ids + of_rows + masks, *given)


@dataclass(frozen=True)
class _Clear:
    """Write zeros to the rows of a tensor that an index does not name; -1 is the last one."""

    tensor: Tensor
    index: Tensor

    def answers(self) -> None:
        """Nothing: what is given is written to."""

    def start(self, answers: None) -> None:
        rows, width = self.tensor.shape
        kernels("row_kernels").clear_rows[(rows,)](
            self.tensor,
            self.index.contiguous(),
            self.index.shape[0],
            self.tensor.stride(0),
            width,
            C=_LANES,
            num_warps=_WARPS,
        )

    def cost(self) -> Cost:
        # A row is written here or where its gradient is, whatever the index holds. For each row
        # the index is read.
        rows = self.tensor.shape[0]
        rest = max(rows - self.index.shape[0], 0)
        return Cost(1, rows * self.index.nbytes + rest * self.tensor[0].nbytes, 0)


@dataclass(frozen=True)
class _Chosen:
    """Log-probabilities (B, S, K) of ids (B, S or 1, K), 0 where there is no row."""

    tensor: Tensor
    index: Tensor
    ids: Tensor
    positions: int
    normalizers: Tensor
    temperatures: Sequence[float]
    deviations: Tensor | None

    def answers(self) -> list[Tensor]:
        size = self.ids.shape[0], self.positions, self.ids.shape[2]
        return list(map(self.normalizers.new_empty, [size] * len(self.temperatures)))

    def start(self, answers: list[Tensor]) -> None:
        if answers[0].numel():
            count, (_, positions, k) = self.index.shape[0], self.ids.shape
            kernels("row_kernels").chosen_entries[(-(-count * k // _LANES),)](
                place_of(Rows(self.tensor, self.index, self.tensor.shape[-1])),
                Matrix(self.ids.contiguous(), positions * k, 0 if positions == 1 else k),
                Softmax(self.normalizers, self.deviations, _inverses(self.temperatures)),
                tuple(answers),
                count,
                self.positions,
                k,
                C=_LANES,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        entries = self.index.shape[0] * self.ids.shape[2]
        answers = 4 * len(self.temperatures) * entries
        moved = self.index.nbytes + self.ids.nbytes + self.normalizers.nbytes
        moved += entries * self.tensor.element_size() + answers
        return Cost(1, moved + (0 if self.deviations is None else self.deviations.nbytes), 0)


@dataclass(frozen=True)
class _Pack:
    """Rows, mask, ids, chunk numbers and flattened rows of scored positions, each (B, S)."""

    targets: Tensor
    chunk_ids: Tensor | None
    size: int
    length: int
    ignored: int

    def answers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        make, shape = self.targets.new_empty, (self.targets.shape[0], self.size)
        return (
            make(shape),
            make(shape, dtype=torch.bool),
            make(shape),
            make(shape if self.chunk_ids is not None else (0, 0)),
            make(self.targets.shape[0] * self.size),
            make(self.targets.shape[0] * self.size),
        )

    def start(self, answers: tuple[Tensor, ...]) -> None:
        if answers[0].numel():
            batch, positions = self.targets.shape
            kernels("row_kernels").pack_scored[(batch,)](
                Matrix.of(self.targets),
                None if self.chunk_ids is None else Matrix.of(self.chunk_ids),
                Packed(*answers),
                positions,
                self.size,
                self.length,
                self.ignored,
                C=_LANES,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        chunks = 0 if self.chunk_ids is None else self.chunk_ids.nbytes
        written = self.targets.shape[0] * self.size * (33 + 8 * (self.chunk_ids is not None))
        return Cost(1, 2 * self.targets.nbytes + chunks + written, 0)


row_statistics = operator("row_statistics", _Statistics)
mass_of_columns = operator("mass_of_columns", _Mass)
row_top = operator("row_top", _Top)
row_gradients = operator("row_gradients", _Gradients, mutates=("out",))
clear_rows = operator("clear_rows", _Clear, mutates=("tensor",))
chosen_entries = operator("chosen_entries", _Chosen)
pack_scored = operator("pack_scored", _Pack)
