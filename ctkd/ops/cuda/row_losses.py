"""The row losses `uld`, `gold` and `shared_kl`: what is started for them, and what it costs.

Rows on the meta device start nothing, so that what a call makes and costs is known without values.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ctkd.ops.costs import Cost
from ctkd.ops.rows import Rows, RowValues

__all__ = ["shared_kl", "shared_kl_cost"]

# Entries of a tile that a lane has, and lanes that are read at once.
_TILE = 2, 2048
_WARPS = 8
_PAIRS = 1024


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
        target = student if out is None else out
        _kernels("divergence_kernels").shared_kl_rows[(count,)](
            values,
            *_place(student),
            *_place(teacher),
            *_place(target),
            partners,
            student.width,
            teacher.width,
            target.width,
            temperature,
            math.log2(math.e) / temperature,
            float(beta),
            settings["lowest_logit"],
            settings["log_floor"],
            STUDENT_INDEXED=student.index is not None,
            TEACHER_INDEXED=teacher.index is not None,
            OUT_INDEXED=target.index is not None,
            WRITES=out is not None,
            REST=_has_rest(settings),
            KIND=_kind(beta),
            R=_TILE[0],
            C=_TILE[1],
            num_warps=_WARPS,
            num_stages=1,
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
        _kernels("divergence_kernels").pair_columns[(-(-ids.shape[0] // _PAIRS),)](
            ids, teacher_ids, partners, ids.shape[0], student.width, BLOCK=_PAIRS
        )
    return partners


def _kernels(name: str) -> ModuleType:
    """Kernels; importing them imports triton."""
    return importlib.import_module(f"ctkd.ops.cuda.{name}")


def _place(rows: Rows) -> tuple[Any, ...]:
    """Where rows lie, for a kernel: tensor, index, rows of a sequence and strides."""
    tensor = rows.tensor.detach()
    if tensor.ndim == 2:
        length, outer, inner = max(tensor.shape[0], 1), 0, tensor.stride(0)
    else:
        length, (outer, inner) = max(tensor.shape[1], 1), tensor.stride()[:2]
    return tensor, tensor if rows.index is None else rows.index, length, outer, inner


def _read(rows: Rows, width: int) -> int:
    """Bytes of some columns of all rows."""
    return len(rows) * width * rows.tensor.element_size()
