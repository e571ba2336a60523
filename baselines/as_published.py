"""The losses that others have published code for, all called alike: what a benchmark compares with.

Each function takes padded logits and labels of both sides, -100 where ignored, and returns a value
of shape () that can be differentiated into the student's logits. An answer begins at the last
ignored label in front of it, whose row predicts its first token; labels that begin at once belong
to rows that predict their own token.

ULD and MultiLevelOT are written anew from descriptions of their authors' files. They do what those
do: softmax of whole tensors, a full sort, loops over the sequences. ULD's file overwrites the
logits that it is given; ours works on a copy, which is one more tensor of logits on either side.
"""

from collections.abc import Callable

from torch import Tensor

from baselines import multilevelot_released, trl_uld
from baselines import uld as uld_baseline

Published = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def uld(
    student_logits: Tensor, student_labels: Tensor, teacher_logits: Tensor, teacher_labels: Tensor
) -> Tensor:
    """ULD as its authors' file computes it, before its weight.

    Equal to the package's ``uld`` where all student answers are equally long and no teacher answer
    is shorter.
    """
    return uld_baseline.as_published(student_logits, student_labels, teacher_logits, teacher_labels)


def multilevelot(
    student_logits: Tensor, student_labels: Tensor, teacher_logits: Tensor, teacher_labels: Tensor
) -> Tensor:
    """MultiLevelOT as its authors' file computes it, before its weight.

    Equal to the package's ``multilevelot_released``, not to the paper's equations.
    """
    return multilevelot_released.terms(
        student_logits, student_labels, teacher_logits, teacher_labels
    )["value"]


PUBLISHED: dict[str, Published] = {
    "multilevelot, as published": multilevelot,
    "uld, as published": uld,
    "uld, TRL": trl_uld.uld,
}
"""By the name that tables have them under."""
