"""Row losses as operators of torch, with what they make and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ctkd.ops.costs import DECLARED, Cost
from ctkd.ops.cuda import row_losses
from ctkd.ops.cuda.operators import operator
from ctkd.ops.rows import RowLoss, Rows, RowValues

__all__ = ["row_loss", "serves"]

_Settings = Mapping[str, Any]


def serves(loss: RowLoss, student: Rows, teacher: Rows) -> bool:
    """True if there is a kernel for this loss and these rows."""
    return loss.name in _NAMES and (loss.name != "gold" or row_losses.can_count(student, teacher))


def row_loss(
    loss: RowLoss,
    student: Rows,
    teacher: Rows,
    per_row: Tensor | None,
    out: Rows | None,
    differentiate: bool,
) -> RowValues:
    """See `ctkd.ops.reference.row_loss`."""
    target = (None, None, 0) if out is None else (out.tensor, out.index, out.width)
    numbers, ids = [], []
    for name in _NAMES[loss.name]:
        value = loss.settings[name]
        if isinstance(value, Tensor):
            ids.append(value)
        elif value is not None:
            numbers.append(float(value))
    answers = getattr(torch.ops.ctkd, f"{loss.name}_rows")(
        *(student.tensor, student.index, student.width),
        *(teacher.tensor, teacher.index, teacher.width),
        per_row,
        *target,
        numbers,
        ids,
        differentiate,
    )
    return RowValues(answers[0], answers[1] if len(answers) > 1 else None)


_IDS = {"student_ids", "teacher_ids", "student_others", "teacher_others"}
_IDS |= {"student_columns", "teacher_columns"}
# Settings of a loss, of which those that are ids may be None, all the last ones of them.
_NAMES: dict[str, tuple[str, ...]] = {
    "uld": ("student_temperature", "teacher_temperature"),
    "shared_kl": (
        "student_ids",
        "teacher_ids",
        "student_others",
        "teacher_others",
        "temperature",
        "beta",
        "lowest_logit",
        "log_floor",
    ),
    "gold": (
        "student_columns",
        "teacher_columns",
        "shared",
        "student_temperature",
        "teacher_temperature",
        "beta",
        "matched_weight",
        "unmatched_weight",
        "log_floor",
    ),
}
_PARTS = {"uld": 1, "shared_kl": 1, "gold": 2}


def _settings(name: str, numbers: list[float], ids: list[Tensor]) -> dict[str, Any]:
    of_ids, of_numbers = iter(ids), iter(numbers)
    settings: dict[str, Any] = {}
    for one in _NAMES[name]:
        settings[one] = next(of_ids, None) if one in _IDS else next(of_numbers)
    if "shared" in settings:
        settings["shared"] = int(settings["shared"])
    return settings


def _register(name: str, start: Callable[..., RowValues], cost: Callable[..., Cost]) -> None:
    def arguments(
        student: Tensor,
        student_index: Tensor | None,
        student_width: int,
        teacher: Tensor,
        teacher_index: Tensor | None,
        teacher_width: int,
        per_row: Tensor | None,
        out: Tensor | None,
        out_index: Tensor | None,
        out_width: int,
        numbers: list[float],
        ids: list[Tensor],
        differentiate: bool,
    ) -> tuple[Any, ...]:
        return (
            Rows(student, student_index, student_width),
            Rows(teacher, teacher_index, teacher_width),
            _settings(name, numbers, ids),
            per_row,
            None if out is None else Rows(out, out_index, out_width),
            differentiate,
        )

    def answers(
        student: Tensor,
        student_index: Tensor | None,
        student_width: int,
        teacher: Tensor,
        teacher_index: Tensor | None,
        teacher_width: int,
        per_row: Tensor | None,
        out: Tensor | None,
        out_index: Tensor | None,
        out_width: int,
        numbers: list[float],
        ids: list[Tensor],
        differentiate: bool,
    ) -> list[Tensor]:
        count = student.shape[0] if student_index is None else student_index.shape[0]
        values = student.new_empty((count, _PARTS[name]), dtype=torch.float32)
        if per_row is None or not differentiate:
            return [values]
        return [values, torch.empty_like(per_row)]

    def compute(
        student: Tensor,
        student_index: Tensor | None,
        student_width: int,
        teacher: Tensor,
        teacher_index: Tensor | None,
        teacher_width: int,
        per_row: Tensor | None,
        out: Tensor | None,
        out_index: Tensor | None,
        out_width: int,
        numbers: list[float],
        ids: list[Tensor],
        differentiate: bool,
    ) -> list[Tensor]:
        found = start(
            *arguments(
                student, student_index, student_width, teacher, teacher_index, teacher_width,
                per_row, out, out_index, out_width, numbers, ids, differentiate,
            )
        )  # fmt: skip
        given = found.per_row_gradient
        return [found.values] if given is None else [found.values, given]

    # Of a function in a function, annotations are text that nobody could read.
    compute.__annotations__ = _TYPES
    operator(f"{name}_rows", answers, mutates=("out",))(compute)
    DECLARED[f"{name}_rows"] = lambda *args, **kwargs: cost(*arguments(*args, **kwargs))


_TYPES: dict[str, Any] = {
    "student": Tensor,
    "student_index": Tensor | None,
    "student_width": int,
    "teacher": Tensor,
    "teacher_index": Tensor | None,
    "teacher_width": int,
    "per_row": Tensor | None,
    "out": Tensor | None,
    "out_index": Tensor | None,
    "out_width": int,
    "numbers": list[float],
    "ids": list[Tensor],
    "differentiate": bool,
    "return": list[Tensor],
}

for _name in _NAMES:
    _register(_name, getattr(row_losses, _name), getattr(row_losses, f"{_name}_cost"))
