"""Operators of torch that start kernels, with what they make and cost: registration, and rows.

They are registered whether triton is there or not: tensors without values are given what an
operator would make. It is chosen elsewhere what goes to them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.rows import Packed, Rows

__all__ = [
    "DEVICES",
    "STANDARDIZED",
    "Call",
    "GradientForm",
    "Matrix",
    "Place",
    "Softmax",
    "Targets",
    "Term",
    "chosen_entries",
    "clear_rows",
    "column_distances",
    "greedy_partners",
    "kernel_cost",
    "kernels",
    "mass_of_columns",
    "nbytes",
    "operator",
    "pack_scored",
    "place_of",
    "power_of_two",
    "row_bytes",
    "row_gradients",
    "row_statistics",
    "row_top",
]

STANDARDIZED = 4
"""Statistics of a standardized row at a temperature."""
DEVICES = {"meta"}
"""Types of devices on whose tensors kernels run, or nothing does because they have no values."""
if importlib.util.find_spec("triton") is not None:
    DEVICES.add("cuda")
    # The interpreter runs kernels on a CPU, for tests.
    if os.environ.get("TRITON_INTERPRET") == "1":
        DEVICES.add("cpu")

# Lanes of a tile that are read at once, and warps of a program.
_LANES = 1024
_WARPS = 4
# A program that turns gradients through a deviation holds more than four warps have registers for.
_MOST_WARPS = 8
# Targets that columns are compared with at once, and these columns.
_MOST_TARGETS, _TARGET_LANES = 32, 256


class Call(Protocol):
    """A call of an operator: a dataclass whose fields are the arguments, tensors first."""

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def answers(self) -> Any:
        """The tensors that are made, without their values; None if there are none."""

    def start(self, answers: Any) -> None:
        """Start the kernels that fill them."""

    def cost(self) -> Cost:
        """What that costs."""


def operator(name: str, call: type[Call], *, mutates: tuple[str, ...] = ()) -> Any:
    """Register an operator of torch with its cost, and return it.

    `torch.library.custom_op` would load the compiler, which takes seconds, when it is called.
    """

    def compute(first: Any, *others: Any, **named: Any) -> Any:
        this = call(first, *others, **named)
        # Triton starts kernels on the current device, wherever the tensors lie.
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            answers = this.answers()
            this.start(answers)
            return answers

    given, made = (inspect.signature(one, eval_str=True) for one in (call, call.answers))
    # What a schema is made from.
    compute.__signature__ = given.replace(  # type: ignore[attr-defined]
        return_annotation=made.return_annotation
    )
    schema = torch.library.infer_schema(compute, mutates_args=mutates)
    torch.library.define(f"ctkd::{name}", schema)
    torch.library.impl(f"ctkd::{name}", ("cpu", "cuda"), compute)
    torch.library.register_fake(
        f"ctkd::{name}", lambda *args, **named: call(*args, **named).answers()
    )
    DECLARED[name] = lambda *args, **named: call(*args, **named).cost()
    return getattr(torch.ops.ctkd, name)


def kernels(name: str) -> ModuleType:
    """A module of kernels; importing it imports triton."""
    return importlib.import_module(f"ctkd.ops.cuda.{name}")


class Place(NamedTuple):
    """Rows as kernels are given them, to read or to write.

    Attributes:
        tensor: What holds them; None if there are none.
        numbers: (N,) int64, number of each row, -1 for none; None where all rows are meant.
        length: Rows of a sequence, L.
        outer: Entries from a sequence to the next.
        inner: Entries from a row to the next.
        width: Columns that count.
    """

    tensor: Tensor | None
    numbers: Tensor | None
    length: int
    outer: int
    inner: int
    width: int

    @property
    def is_aligned(self) -> bool:
        """Whether all rows begin at entries of which 16 bytes can be read at once."""
        return self.outer % 16 == 0 and self.inner % 16 == 0


def place_of(rows: Rows | None) -> Place:
    """Where rows of a tensor (R, V') or (B, L, V') lie, if there are any."""
    if rows is None:
        return Place(None, None, 0, 0, 0, 0)
    tensor = rows.tensor.detach()
    outer = 0 if tensor.ndim == 2 else tensor.stride(0)
    length = max(tensor.shape[-2], 1)
    return Place(tensor, rows.index, length, outer, tensor.stride(-2), rows.width)


class Matrix(NamedTuple):
    """Numbers (B, S) as kernels are given them.

    Attributes:
        tensor: What holds them.
        outer: Entries from a row to the next.
        inner: Entries from a number to the next.
    """

    tensor: Tensor
    outer: int
    inner: int

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        return cls(tensor, *tensor.stride())


def row_bytes(rows: Rows) -> int:
    """What it takes to read rows once."""
    index = 0 if rows.index is None else rows.index.nbytes
    return len(rows) * rows.width * rows.tensor.element_size() + index


def power_of_two(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(count - 1, 0).bit_length()


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes that lie behind tensors; what is expanded counts once."""
    total = 0
    for one in tensors:
        if one is not None and one.numel():
            sizes = (n for n, stride in zip(one.shape, one.stride(), strict=True) if stride)
            total += math.prod(sizes) * one.element_size()
    return total


def kernel_cost(moved: int, *given: Tensor | None) -> Cost:
    """What a kernel costs that moves so many bytes, with copies of what is not contiguous."""
    apart = [one for one in given if one is not None and not one.is_contiguous()]
    made = sum(one.numel() * one.element_size() for one in apart)
    return Cost(1 + len(apart), moved + nbytes(*apart) + made, made)


class Softmax(NamedTuple):
    """What makes probabilities of logits x: ``exp(x * inverse - normalizer)``.

    Attributes:
        normalizers: (T, N) at all temperatures.
        stride: Entries from a temperature to the next.
        deviations: (N,) what logits are divided by before, or None.
        inverses: 1 over each temperature.
    """

    normalizers: Tensor
    stride: int
    deviations: Tensor | None
    inverses: tuple[float, ...]


class Targets(NamedTuple):
    """What columns are compared with.

    Attributes:
        entries: (N, K) at each row.
        distance: (B, K, V) that is added to.
        size: K.
    """

    entries: Tensor
    distance: Tensor
    size: int


class Term(NamedTuple):
    """A `ctkd.ops.SoftmaxTerm` as `gradient_rows` is given it.

    Attributes:
        normalizers: (N,) of each row, (4, N) of those that are divided by their deviations.
        totals: (N,) weight of the probabilities of each row.
        inverse: 1 over the temperature.
        width: Columns that have a probability.
        columns: (V,) bool, those of them that count, or None.
        ids: (N, size) columns that a weight is added to.
        outer: Entries of them from a row to the next.
        weights: (N, size) these weights.
        size: How many there are of each row.
    """

    normalizers: Tensor
    totals: Tensor
    inverse: float
    width: int
    columns: Tensor | None
    ids: Tensor
    outer: int
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
    def count(self) -> int:
        return self.tensor.shape[0] if self.index is None else self.index.shape[0]

    @property
    def rows(self) -> Rows:
        return Rows(self.tensor, self.index, self.width)

    @property
    def place(self) -> Place:
        return place_of(self.rows)


@dataclass(frozen=True)
class _Statistics(_OfRows):
    """Log-normalizers (T, N), with what `gradient_rows` needs of standardized rows (T, 4, N)."""

    temperatures: Sequence[float]
    standardize: bool
    columns: Tensor | None

    def answers(self) -> Tensor:
        size = len(self.temperatures), *[STANDARDIZED] * self.standardize, self.count
        return self.tensor.new_empty(size, dtype=torch.float32)

    def start(self, answers: Tensor) -> None:
        if answers.numel():
            kernels("row_kernels").statistics[(self.count,)](
                self.place,
                self.columns,
                answers,
                _inverses(self.temperatures),
                ALIGNED=self.place.is_aligned,
                STANDARDIZE=self.standardize,
                TILE=(2 if self.standardize else 4, _LANES),
                num_warps=_WARPS,
                # Left to itself, the assembler spills a few numbers to fit more programs.
                maxnreg=255 if self.standardize and not self.place.is_aligned else None,
            )

    def cost(self) -> Cost:
        # A deviation is known when all of a row has been read.
        reads, numbers = (2, STANDARDIZED) if self.standardize else (1, 1)
        written = 4 * self.count * len(self.temperatures) * numbers
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
                Softmax(self.normalizers, 0, self.deviations, _inverses([self.temperature])),
                answers,
                self.count,
                ALIGNED=self.place.is_aligned,
                C=_LANES,
                num_warps=_WARPS,
            )

    def cost(self) -> Cost:
        tiles = -(-self.width // _LANES)
        per_row = 4 * (4 if self.deviations is None else 5) * tiles * self.count
        return Cost(1, row_bytes(self.rows) + per_row + 4 * self.sequences * self.width, 0)


@dataclass(frozen=True)
class _Distances(_OfRows):
    """Add L1 distances of columns to targets, over the rows of each sequence."""

    sequence: Tensor
    targets: Tensor
    normalizers: Tensor
    temperature: float
    distance: Tensor

    def answers(self) -> None:
        """Nothing: what is given is written to."""

    def start(self, answers: None) -> None:
        batch, k, width = self.distance.shape
        if batch * k:
            targets = min(power_of_two(k), _MOST_TARGETS)
            grid = -(-width // _TARGET_LANES), -(-k // targets), batch
            kernels("row_kernels").column_distances[grid](
                self.place,
                self.sequence,
                Softmax(self.normalizers, 0, None, _inverses([self.temperature])),
                Targets(self.targets.contiguous(), self.distance, k),
                self.count,
                ALIGNED=self.place.is_aligned,
                K=targets,
                C=_TARGET_LANES,
                # Where rows begin anywhere, a thread has the addresses of all of its entries.
                num_warps=_WARPS if self.place.is_aligned else 2 * _WARPS,
            )

    def cost(self) -> Cost:
        _, k, width = self.distance.shape
        reads = -(-k // min(power_of_two(k), _MOST_TARGETS))
        tiles = -(-width // _TARGET_LANES)
        # Each tile looks at the numbers of all rows.
        per_row = tiles * (20 * reads + 4 * k) * self.count
        moved = reads * row_bytes(self.rows) + per_row + 2 * self.distance.nbytes
        return kernel_cost(moved, self.targets)


@dataclass(frozen=True)
class _Greedy:
    """The nearest free column of each target, in their order, and whether there was one."""

    distance: Tensor

    def answers(self) -> tuple[Tensor, Tensor]:
        size, make = self.distance.shape[:2], self.distance.new_empty
        return make(size, dtype=torch.int64), make(size, dtype=torch.bool)

    def start(self, answers: tuple[Tensor, Tensor]) -> None:
        batch, k, width = self.distance.shape
        if batch * k:
            kernels("row_kernels").greedy_partners[(batch,)](
                self.distance,
                *answers,
                k,
                width,
                K=power_of_two(k),
                C=4 * _LANES,
                num_warps=_MOST_WARPS,
            )

    def cost(self) -> Cost:
        batch, k, _ = self.distance.shape
        return Cost(1, self.distance.nbytes + batch * k * (4 * k + 9), 0)


@dataclass(frozen=True)
class _Top(_OfRows):
    """Columns and values of the largest entries, (N, k)."""

    k: int

    def answers(self) -> tuple[Tensor, Tensor]:
        size = self.count, self.k
        # Where there is no row, zeros are expected.
        make = self.tensor.new_empty if self.index is None else self.tensor.new_zeros
        return make(size, dtype=torch.int64), make(size, dtype=torch.float32)

    def start(self, answers: tuple[Tensor, Tensor]) -> None:
        if answers[0].numel():
            size = power_of_two(max(self.k, 2))
            kernels("row_kernels").largest[(self.count,)](
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
        written = self.count * (1 + (cleared > 0)) * 12 * self.k
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
        normalizers, totals, weights = (
            list(map(Tensor.contiguous, some))
            for some in (self.normalizers, self.totals, self.weights)
        )
        ids = [one if one.stride(1) == 1 else one.contiguous() for one in self.ids]
        of_terms = (
            (normalizers, totals, _inverses(self.temperatures), self.widths, self.columns)
            + (ids, [one.stride(0) for one in ids], weights, sizes)
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
        moved = row_bytes(self.rows) + row_bytes(self.target)
        if self.known_rows is not None:
            moved += row_bytes(self.known_rows)
        # Ids and weights are read to find equal ids, and once more where one is written.
        of_ids = 2 * (nbytes(*self.ids) + sum(one.nbytes for one in self.weights))
        of_rows = sum(one.nbytes for one in (*self.normalizers, *self.totals))
        masks = sum(one.nbytes for one in self.columns if one is not None)
        # Rows may share their ids, which are read where they lie.
        apart = [one for one in self.ids if one.stride(1) != 1]
        given = *self.normalizers, *self.totals, *apart, *self.weights
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

    def answers(self) -> list[Tensor]:
        size = self.ids.shape[0], self.positions, self.ids.shape[2]
        return list(map(self.normalizers.new_empty, [size] * len(self.temperatures)))

    def start(self, answers: list[Tensor]) -> None:
        if answers[0].numel():
            count, (_, positions, k) = self.index.shape[0], self.ids.shape
            kernels("row_kernels").chosen_entries[(-(-count * k // _LANES),)](
                place_of(Rows(self.tensor, self.index, self.tensor.shape[-1])),
                Matrix(self.ids.contiguous(), positions * k, 0 if positions == 1 else k),
                Softmax(
                    self.normalizers,
                    self.normalizers.stride(0),
                    self.normalizers[0, 1] if self.normalizers.ndim == 3 else None,
                    _inverses(self.temperatures),
                ),
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
        numbers = len(self.temperatures) + (self.normalizers.ndim == 3)
        moved = self.index.nbytes + self.ids.nbytes + 4 * self.index.shape[0] * numbers
        return Cost(1, moved + entries * self.tensor.element_size() + answers, 0)


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
column_distances = operator("column_distances", _Distances, mutates=("distance",))
greedy_partners = operator("greedy_partners", _Greedy, mutates=("distance",))
row_top = operator("row_top", _Top)
row_gradients = operator("row_gradients", _Gradients, mutates=("out",))
clear_rows = operator("clear_rows", _Clear, mutates=("tensor",))
chosen_entries = operator("chosen_entries", _Chosen)
pack_scored = operator("pack_scored", _Pack)
