"""The row losses `uld`, `gold`, `shared_kl` and `bpm`: what is started for them, and what it costs.

Rows on the meta device start nothing, so that what a call makes and costs is known without values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctkd.ops.blocks import block_rows
from ctkd.ops.costs import Cost
from ctkd.ops.cuda.operators import Place, kernels, place_of
from ctkd.ops.rows import Rows, RowValues

__all__ = [
    "BPMForm",
    "BPMSettings",
    "Classes",
    "Counted",
    "CountingForm",
    "GOLDSettings",
    "Lists",
    "SharedKLForm",
    "SharedKLSettings",
    "Sorted",
    "bpm",
    "bpm_cost",
    "can_count",
    "gold",
    "gold_cost",
    "shared_kl",
    "shared_kl_cost",
    "uld",
    "uld_cost",
]

# Entries of a tile that a lane has, and lanes that are read at once.
_TILE = 2, 2048
_WARPS = 8
_PAIRS = 1024
# Entries whose classes are added up at once.
_ENTRIES = 1024
# Of kernels that count classes: columns (half of them where there is more to do with each) and
# classes at a time, and entries that are compared with each other.
_COLUMNS = 4096
_CLASSES = 1024
_GROUP = 64
# Of equal rows every probability is computed by the same operations, so that they are equal.
_RANKED = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
_WIDE = {"num_warps": 8, "maxnreg": 255}
_COUNTING = {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 128}
# Bytes for the scratch memory of all programs, of which there is one for each multiprocessor; and
# how many there are of an unknown device.
_SCRATCH = 30 << 20
_PROGRAMS = 132


class _Format(NamedTuple):
    """Floating-point numbers of 16 bits."""

    mantissa: int
    bias: int
    infinity: int

    def bits(self, exponent: int) -> int:
        """Bits of a power of two."""
        if exponent > self.bias:
            return self.infinity
        if exponent > -self.bias:
            return (exponent + self.bias) << self.mantissa
        return 1 << max(exponent + self.bias + self.mantissa - 1, 0)


_FORMATS = {torch.bfloat16: _Format(7, 127, 0x7F80), torch.float16: _Format(10, 15, 0x7C00)}


class Classes(NamedTuple):
    """Classes of 16-bit logits, as ``rank_kernels`` has them.

    Attributes:
        low: Bits of the largest number that is as good as 0.
        half: Classes above 0 that are not the last.
        far: The smallest number of the last class.
        size: Classes, rounded up.
    """

    low: int
    half: int
    far: float
    size: int

    @classmethod
    def of(cls, dtype: torch.dtype, temperature: float) -> Classes:
        form = _FORMATS[dtype]
        # From here on the next smaller number is below by more than 104 temperatures, of which no
        # exponential is left in float32.
        exponent = math.ceil(math.log2(temperature)) + form.mantissa + 8
        low = form.bits(math.floor(math.log2(temperature)) - 20)
        half = max(form.bits(exponent) - 1 - low, 0)
        far = math.inf if exponent > form.bias else 2.0**exponent
        return cls(low, half, far, -(-(2 * half + 2) // _CLASSES) * _CLASSES)

    @property
    def steps(self) -> int:
        """Steps of a search among them: log2 of their number, rounded up."""
        return (2 * self.half + 2).bit_length()


class Counted(NamedTuple):
    """A side as kernels are given it that count classes.

    Attributes:
        rows: Where they lie.
        classes: What their entries are counted in.
        temperature: Of the side.
        scale: log2(e) over the temperature.
    """

    rows: Place
    classes: Classes
    temperature: float
    scale: float


class CountingForm(NamedTuple):
    """What kernels that count classes are compiled for.

    Attributes:
        tile: Columns at a time.
        classes: Classes at a time.
        group: Entries that are compared with each other.
        steps: Of a search among the student's and among the teacher's classes.
        kind: Of the divergence, see `_kind`.
    """

    tile: int
    classes: int
    group: int
    steps: tuple[int, int]
    kind: int


class GOLDSettings(NamedTuple):
    """What `gold_rows` reads beside the rows.

    Attributes:
        partners: As `pair_columns` writes them.
        log_scales: (N, 2), added to both sides' log-probabilities, or None.
        beta: Of the divergence.
        floor: What lower log-probabilities are raised to.
        lowest: None: no logit is raised.
        matched_weight: Of the divergence, None where it is left out.
        unmatched_weight: Of the ranked distance, None where it is left out.
    """

    partners: Tensor
    log_scales: Tensor | None
    beta: float
    floor: float
    lowest: None
    matched_weight: float | None
    unmatched_weight: float | None


class Sorted(NamedTuple):
    """A side as `sorted_uld_rows` is given it.

    Attributes:
        entries: (N, V) float32, descending.
        order: (N, V) columns that they come from, or None.
        numbers: (N,) as of a `Place`, of which only -1 matters.
        width: V.
        temperature: Of the side.
        scale: log2(e) over the temperature.
    """

    entries: Tensor
    order: Tensor | None
    numbers: Tensor | None
    width: int
    temperature: float
    scale: float


class SharedKLSettings(NamedTuple):
    """Numbers of `shared_kl_rows`.

    Attributes:
        temperature: Of both sides.
        scale: log2(e) over the temperature.
        beta: Of the divergence.
        lowest: What lower logits are raised to.
        floor: What lower log-probabilities are raised to.
    """

    temperature: float
    scale: float
    beta: float
    lowest: float
    floor: float


class SharedKLForm(NamedTuple):
    """What `shared_kl_rows` is compiled for.

    Attributes:
        kind: Of the divergence, see `_kind`.
        rest: Whether columns that are not shared are a class of their own.
        tile: Rows and columns that a row is folded to.
    """

    kind: int
    rest: bool
    tile: tuple[int, int]


class Lists(NamedTuple):
    """What teacher tokens are which class, as of `ctkd.losses.BPM`.

    Attributes:
        ranges: (N, 2) int64, the entries of a row: the first and the last plus one.
        teacher_ids: (L,) int32, tokens of the entries.
        student_ids: (L,) int32, their classes, of which V is the rest.
        in_image: (V,) bool, columns that are a class where nothing was read.
    """

    ranges: Tensor
    teacher_ids: Tensor
    student_ids: Tensor
    in_image: Tensor


class BPMSettings(NamedTuple):
    """Numbers of `bpm_rows`.

    Attributes:
        temperature: Of both sides.
        scale: log2(e) over the temperature.
        least_mass: Probability of a row's entries below which it does not count.
        lowest: What lower logits are raised to.
        floor: What lower log-probabilities are raised to.
    """

    temperature: float
    scale: float
    least_mass: float
    lowest: float
    floor: float


class BPMForm(NamedTuple):
    """What `bpm_rows` is compiled for.

    Attributes:
        rest: Whether what is no class is one of its own.
        tile: Rows and columns that a row is folded to.
        entries: Entries at a time.
    """

    rest: bool
    tile: tuple[int, int]
    entries: int


def bpm(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """Divergence from the teacher's probabilities of classes of its tokens.

    Args:
        student: N rows of logits.
        teacher: N rows of logits.
        settings: As of `ctkd.losses.BPM`.
        per_row: (N, 2) ranges of entries.
        out: As of `ctkd.ops.reference.row_loss`.
        differentiate: Not read.
    """
    count = len(student)
    values = student.tensor.new_empty((count, 1), dtype=torch.float32)
    if count and values.device.type != "meta" and per_row is not None:
        temperature = settings["temperature"]
        ids = (settings[name] for name in ("teacher_ids", "student_ids", "in_image"))
        kernels("divergence_kernels").bpm_rows[(count,)](
            values,
            place_of(student),
            place_of(teacher),
            place_of(out),
            Lists(per_row.contiguous(), *ids),
            BPMSettings(
                temperature,
                math.log2(math.e) / temperature,
                settings["least_mass"],
                settings["lowest_logit"],
                settings["log_floor"],
            ),
            FORM=BPMForm(bool(settings["has_rest"]), _TILE, _ENTRIES),
            num_warps=_WARPS,
            num_stages=1,
            maxnreg=168,
        )
    return RowValues(values, None)


def bpm_cost(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> Cost:
    """Cost of `bpm` with these arguments, if all of the teacher's tokens may follow.

    The student is read for its normalizer, and the teacher for that and the classes; both once more
    to write the gradient. Lists stay in the device's cache.
    """
    lists = sum(settings[name].nbytes for name in ("teacher_ids", "student_ids", "in_image"))
    moved = lists + _read(student, student.width) + 2 * _read(teacher, teacher.width)
    if out is not None:
        moved += _read(student, student.width) + _read(teacher, teacher.width)
        moved += _read(out, out.width)
    return Cost(1, moved + 20 * len(student), 0)


def shared_kl(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """Divergence on shared columns and, if there are others, the class of the rest.

    Args:
        student: N rows of logits.
        teacher: N rows of logits.
        settings: As of `ctkd.losses.SharedKL`.
        per_row: Not read.
        out: As of `ctkd.ops.reference.row_loss`.
        differentiate: Not read.
    """
    count = len(student)
    values = student.tensor.new_empty((count, 1), dtype=torch.float32)
    if count and values.device.type != "meta":
        partners = _partners(student, teacher, settings["student_ids"], settings["teacher_ids"])
        beta, temperature = settings["beta"], settings["temperature"]
        kernels("divergence_kernels").shared_kl_rows[(count,)](
            values,
            place_of(student),
            place_of(teacher),
            place_of(out),
            partners,
            SharedKLSettings(
                temperature,
                math.log2(math.e) / temperature,
                float(beta),
                settings["lowest_logit"],
                settings["log_floor"],
            ),
            FORM=SharedKLForm(_kind(beta), _has_rest(settings), _TILE),
            num_warps=_WARPS,
            num_stages=1,
            # Left to itself, the assembler spills a few numbers to fit more programs.
            maxnreg=168,
        )
    return RowValues(values, None)


def shared_kl_cost(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> Cost:
    """Cost of `shared_kl` with these arguments.

    Each side is read for its normalizer and, on shared columns, for the terms; once more where the
    sum of their derivatives is not known to be 0.
    """
    count = len(student)
    shared = settings["student_ids"].shape[0]
    widths = (student.width, teacher.width) if _has_rest(settings) else (shared, shared)
    first = _read(student, widths[0]) + _read(teacher, widths[1])
    again = _read(student, shared) + _read(teacher, shared)
    is_forward = _kind(settings["beta"]) == 0
    passes = (is_forward or out is not None) + (not is_forward)
    maps = 4 * (student.width + teacher.width)
    moved = first + passes * again + (0 if out is None else _read(out, out.width))
    if out is not None and _has_rest(settings):
        moved += _read(student, student.width - shared)
    return Cost(3, moved + 2 * maps + 4 * count + 16 * shared, maps)


def uld(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """L1 distance between probabilities in descending order.

    Args:
        student: N rows of logits.
        teacher: N rows of logits or, with numbers per row, of probabilities.
        settings: As of `ctkd.losses.ULD`.
        per_row: (N, 2) one more probability of the teacher, and how often it occurs.
        out: As of `ctkd.ops.reference.row_loss`.
        differentiate: Return zeros: the numbers are the teacher's.
    """
    count = len(student)
    values = student.tensor.new_empty((count, 1), dtype=torch.float32)
    per_row_gradient = torch.zeros_like(per_row) if per_row is not None and differentiate else None
    if count and values.device.type == "meta":
        return RowValues(values, per_row_gradient)
    if count and not (per_row is None and can_count(student, teacher)):
        _sorted_uld(student, teacher, settings, per_row, out, values)
    elif count:
        grid, *args, form = _counting(student, teacher, settings, out, _COLUMNS)
        kernels("rank_kernels").uld_rows[grid](values, *args, FORM=form, **_COUNTING)
    return RowValues(values, per_row_gradient)


def gold(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """Weighted divergence on shared columns, and ranked L1 distance on the others.

    Args:
        student: N rows of 16-bit logits.
        teacher: N rows of 16-bit logits.
        settings: As of `ctkd.losses.GOLD`.
        per_row: (N, 2), added to the log-probabilities of either side.
        out: As of `ctkd.ops.reference.row_loss`.
        differentiate: Return the gradient by the student's; 0 for the teacher's.
    """
    count = len(student)
    values = student.tensor.new_empty((count, 2), dtype=torch.float32)
    per_row_gradient = torch.zeros_like(per_row) if per_row is not None and differentiate else None
    if count and values.device.type != "meta":
        shared, beta = settings["shared"], settings["beta"]
        ids = settings["student_columns"][:shared], settings["teacher_columns"][:shared]
        grid, *args, form = _counting(student, teacher, settings, out, _COLUMNS // 2)
        # A weight of 0 leaves a term out, even if it is not finite.
        weights = (settings[name] or None for name in ("matched_weight", "unmatched_weight"))
        kernels("rank_kernels").gold_rows[grid](
            (values, per_row_gradient),
            *args,
            GOLDSettings(
                _partners(student, teacher, *ids),
                None if per_row is None else per_row.detach().contiguous(),
                float(beta),
                settings["log_floor"],
                None,
                *weights,
            ),
            FORM=form._replace(kind=_kind(beta)),
            **_COUNTING | _WIDE,
        )
    return RowValues(values, per_row_gradient)


def gold_cost(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> Cost:
    """Cost of `gold` with these arguments.

    Each side is read for its normalizer and the classes, its shared columns for the divergence, and
    once more with the student's others to write the gradient.
    """
    count, shared = len(student), settings["shared"]
    maps = 4 * (student.width + teacher.width)
    programs, size = _programs(student, *_both_classes(student, teacher, settings), _COLUMNS // 2)
    moved = _read(student, student.width) + _read(teacher, teacher.width) + 8 * count
    if settings["matched_weight"]:
        moved += (1 + (out is not None)) * _read(teacher, shared) + _read(student, shared)
    if out is not None:
        moved += _read(student, student.width) + _read(out, out.width)
    launches = 3 + (per_row is not None and differentiate)
    return Cost(launches, moved + 2 * maps + 16 * shared, maps + 4 * programs * size)


def _both_classes(
    student: Rows, teacher: Rows, settings: Mapping[str, Any]
) -> tuple[Classes, Classes]:
    first, second = _temperatures(settings)
    return Classes.of(student.tensor.dtype, first), Classes.of(teacher.tensor.dtype, second)


def _counting(
    student: Rows, teacher: Rows, settings: Mapping[str, Any], out: Rows | None, columns: int
) -> tuple[tuple[int], Counted, Counted, Place, Tensor, int, CountingForm]:
    """The grid, arguments and the form of kernels that count classes."""
    both = _both_classes(student, teacher, settings)
    programs, size = _programs(student, *both, columns)
    student_side, teacher_side = (
        Counted(place_of(rows), classes, float(temperature), math.log2(math.e) / temperature)
        for rows, classes, temperature in zip(
            (student, teacher), both, _temperatures(settings), strict=True
        )
    )
    return (
        (programs,),
        student_side,
        teacher_side,
        place_of(out),
        torch.empty(programs * size, dtype=torch.int32, device=student.tensor.device),
        len(student),
        CountingForm(columns, _CLASSES, _GROUP, (both[0].steps, both[1].steps), 0),
    )


def _temperatures(settings: Mapping[str, Any]) -> tuple[float, float]:
    return settings["student_temperature"], settings["teacher_temperature"]


def can_count(student: Rows, teacher: Rows) -> bool:
    """True if there are few values on either side; `gold` takes no others."""
    return {student.tensor.dtype, teacher.tensor.dtype} <= _FORMATS.keys()


def _sorted_uld(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    tails: Tensor | None,
    out: Rows | None,
    values: Tensor,
) -> None:
    """Write what `uld` returns, of rows that torch sorts, a block at a time."""
    temperatures = _temperatures(settings)
    scales = [math.log2(math.e) / one for one in temperatures]
    size = block_rows(max(student.width, teacher.width), values.device)
    for start in range(0, len(student), size):
        which = slice(start, start + size)
        # Of equal entries, those in lower columns come first.
        ranked = student.read(which).sort(dim=-1, descending=True, stable=True)
        others = teacher.read(which).sort(dim=-1, descending=True).values
        kernels("rank_kernels").sorted_uld_rows[(others.shape[0],)](
            values[which],
            Sorted(*ranked, student[which].index, student.width, float(temperatures[0]), scales[0]),
            Sorted(
                others,
                None,
                teacher[which].index,
                teacher.width,
                float(temperatures[1]),
                scales[1],
            ),
            None if tails is None else tails[which].to(torch.float32).contiguous(),
            place_of(None if out is None else out[which]),
            TILE=_COLUMNS,
            **_RANKED,
        )


def _programs(rows: Rows, classes: Classes, others: Classes, columns: int) -> tuple[int, int]:
    """Programs that count classes, and entries of the scratch memory of each."""
    size = 2 * classes.size + others.size + columns
    most = _PROGRAMS
    if rows.tensor.device.type == "cuda":
        most = torch.cuda.get_device_properties(rows.tensor.device).multi_processor_count
    return max(1, min(len(rows), most, _SCRATCH // (4 * size))), size


def uld_cost(
    student: Rows,
    teacher: Rows,
    settings: Mapping[str, Any],
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> Cost:
    """Cost of `uld` with these arguments.

    Of 16-bit rows each side is read once, and the student once more to write the gradient; scratch
    memory stays in the device's cache. Others are sorted, which is counted as what goes into
    operators of torch and comes out of them.
    """
    count = len(student)
    if per_row is not None or not can_count(student, teacher):
        return _sorted_cost(student, teacher, out)
    programs, size = _programs(student, *_both_classes(student, teacher, settings), _COLUMNS)
    moved = _read(student, student.width) + _read(teacher, teacher.width) + 4 * count
    if out is not None:
        moved += _read(student, student.width) + _read(out, out.width)
    return Cost(1, moved, 4 * programs * size)


def _sorted_cost(student: Rows, teacher: Rows, out: Rows | None) -> Cost:
    count, width = len(student), max(student.width, teacher.width)
    size = block_rows(width, student.tensor.device)
    # Of each side, rows are widened, read and written by a sort that also writes int64 columns, and
    # read by each pass of the kernel.
    columns = student.width + teacher.width
    moved = _read(student, student.width) + _read(teacher, teacher.width)
    moved += count * columns * (4 + 4 + 12 + 4 + 4) + 4 * count
    if out is not None:
        moved += count * (4 * columns + 8 * student.width) + _read(out, out.width)
    # A block is chosen by up to five operators for each side, widened, sorted and compared.
    blocks = -(-count // size)
    return Cost(15 * blocks, moved, min(count, size) * columns * (4 + 4 + 8))


def _has_rest(settings: Mapping[str, Any]) -> bool:
    others = settings["student_others"]
    return others is not None and others.shape[0] > 0


def _kind(beta: float) -> int:
    """What a divergence is compiled for: one of the two KL, or a mixture."""
    return {0.0: 0, 1.0: 1}.get(float(beta), 2)


def _partners(student: Rows, teacher: Rows, ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """Of each of the V and W columns the shared column of the other side, or -1, int32."""
    size = student.width + teacher.width
    partners = torch.full((size,), -1, dtype=torch.int32, device=ids.device)
    if ids.shape[0]:
        kernels("divergence_kernels").pair_columns[(-(-ids.shape[0] // _PAIRS),)](
            ids, teacher_ids, partners, ids.shape[0], student.width, BLOCK=_PAIRS
        )
    return partners


def _read(rows: Rows, width: int) -> int:
    """Bytes of some columns of all rows."""
    return len(rows) * width * rows.tensor.element_size()
