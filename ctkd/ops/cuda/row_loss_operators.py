"""Row losses as operators of torch, with what they make and cost."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ctkd.ops.costs import DECLARED
from ctkd.ops.cuda import row_losses
from ctkd.ops.cuda.operators import operator
from ctkd.ops.rows import RowLoss, Rows, RowValues

__all__ = ["row_loss", "serves"]


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


class _Call(NamedTuple):
    """Arguments of every operator here, in their order."""

    student: Tensor
    student_index: Tensor | None
    student_width: int
    teacher: Tensor
    teacher_index: Tensor | None
    teacher_width: int
    per_row: Tensor | None
    out: Tensor | None
    out_index: Tensor | None
    out_width: int
    numbers: list[float]
    ids: list[Tensor]
    differentiate: bool

    def arguments(self, name: str) -> tuple[Any, ...]:
        """Those of the functions of `ctkd.ops.cuda.row_losses`."""
        return (
            Rows(self.student, self.student_index, self.student_width),
            Rows(self.teacher, self.teacher_index, self.teacher_width),
            _settings(name, self.numbers, self.ids),
            self.per_row,
            None if self.out is None else Rows(self.out, self.out_index, self.out_width),
            self.differentiate,
        )


def _register(name: str) -> None:
    """Register the operator of a loss, with its cost."""
    start, cost = getattr(row_losses, name), getattr(row_losses, f"{name}_cost")

    def answers(*args: Any) -> list[Tensor]:
        call = _Call(*args)
        index = call.student_index
        count = call.student.shape[0] if index is None else index.shape[0]
        values = call.student.new_empty((count, _PARTS[name]), dtype=torch.float32)
        if call.per_row is None or not call.differentiate:
            return [values]
        return [values, torch.empty_like(call.per_row)]

    def compute(*args: Any) -> list[Tensor]:
        found: RowValues = start(*_Call(*args).arguments(name))
        given = found.per_row_gradient
        return [found.values] if given is None else [found.values, given]

    compute.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # what a schema is made from
    operator(f"{name}_rows", answers, mutates=("out",))(compute)
    DECLARED[f"{name}_rows"] = lambda *args: cost(*_Call(*args).arguments(name))


_SIGNATURE = Signature(
    [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in get_type_hints(_Call).items()
    ],
    return_annotation=list[Tensor],
)
for _name in _NAMES:
    _register(_name)
