"""Row losses as operators of torch, with what they make and cost."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctkd.ops.costs import Cost
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
        None if out is None else out.tensor,
        out_index=None if out is None else out.index,
        out_width=0 if out is None else out.width,
        per_row=per_row,
        numbers=numbers,
        ids=ids,
        differentiate=differentiate,
    )
    return RowValues(answers[0], answers[1] if len(answers) > 1 else None)


_IDS = {"student_ids", "teacher_ids", "student_others", "teacher_others"}
_IDS |= {"student_columns", "teacher_columns", "in_image"}
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
    "bpm": (
        "teacher_ids",
        "student_ids",
        "in_image",
        "has_rest",
        "temperature",
        "least_mass",
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
_PARTS = {"uld": 1, "shared_kl": 1, "gold": 2, "bpm": 1}


def _settings(name: str, numbers: list[float], ids: list[Tensor]) -> dict[str, Any]:
    of_ids, of_numbers = iter(ids), iter(numbers)
    settings: dict[str, Any] = {}
    for one in _NAMES[name]:
        settings[one] = next(of_ids, None) if one in _IDS else next(of_numbers)
    if "shared" in settings:
        settings["shared"] = int(settings["shared"])
    return settings


@dataclass(frozen=True)
class _Call:
    """A call of the operator of a loss, see `ctkd.ops.reference.row_loss`."""

    name: ClassVar[str]

    student: Tensor
    student_index: Tensor | None
    student_width: int
    teacher: Tensor
    teacher_index: Tensor | None
    teacher_width: int
    out: Tensor | None
    _: KW_ONLY
    out_index: Tensor | None
    out_width: int
    per_row: Tensor | None
    numbers: list[float]
    ids: list[Tensor]
    differentiate: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of the functions of `ctkd.ops.cuda.row_losses`."""
        return (
            Rows(self.student, self.student_index, self.student_width),
            Rows(self.teacher, self.teacher_index, self.teacher_width),
            _settings(self.name, self.numbers, self.ids),
            self.per_row,
            None if self.out is None else Rows(self.out, self.out_index, self.out_width),
            self.differentiate,
        )

    def answers(self) -> list[Tensor]:
        index = self.student_index
        count = self.student.shape[0] if index is None else index.shape[0]
        values = self.student.new_empty((count, _PARTS[self.name]), dtype=torch.float32)
        if self.per_row is None or not self.differentiate:
            return [values]
        return [values, torch.empty_like(self.per_row)]

    def start(self, answers: list[Tensor]) -> None:
        found: RowValues = getattr(row_losses, self.name)(*self.arguments)
        answers[:] = [one for one in found if one is not None]

    def cost(self) -> Cost:
        cost: Cost = getattr(row_losses, f"{self.name}_cost")(*self.arguments)
        return cost


for _name in _NAMES:
    operator(f"{_name}_rows", type(_name, (_Call,), {"name": _name}), mutates=("out",))
