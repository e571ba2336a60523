"""TRL's ``ULDLoss``, called as the other published losses are. TRL is imported when it is used.

Its own alignment of tokens is left out (``use_extended_uld=False``), and so is cross-entropy: what
remains is the k-th token against the k-th, which is the faster of its two ways.
"""

import importlib.util
import os
from types import SimpleNamespace

from torch import Tensor

IGNORE_INDEX = -100
HOW_TO_INSTALL = (
    "this needs the package trl, whose ULDLoss and GOLDTrainer were last seen to work in 1.16; "
    'install it with pip install "trl>=1.16,<2", or leave it out'
)


class TrlMissingError(ImportError):
    """TRL is not installed, or has no ``ULDLoss`` where 1.16 has it."""


def is_installed() -> bool:
    """Whether there is a TRL; it is not imported to find out."""
    return importlib.util.find_spec("trl") is not None


def load() -> type:
    """Import ``ULDLoss``.

    Raises:
        TrlMissingError: If there is none; the message says how to install it.
    """
    # TRL warns of everything in its experimental half unless told not to.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError as error:
        raise TrlMissingError(f"{HOW_TO_INSTALL} ({error})") from error
    return ULDLoss


def uld(
    student_logits: Tensor, student_labels: Tensor, teacher_logits: Tensor, teacher_labels: Tensor
) -> Tensor:
    """Mean over sequences of the sorted L1 distance per position, as TRL computes it.

    Equal to the package's ``uld`` where all student answers are equally long and no teacher answer
    is shorter. TRL takes the rows that stand where the answer stands, not those that predict it, so
    a label in front of the answer is moved by one here.

    Raises:
        TrlMissingError: If TRL is not installed.
    """
    loss = load()(
        SimpleNamespace(
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            use_extended_uld=False,
            uld_token_merge_strategy="observed",
        )
    )
    student_labels, teacher_labels = _predicting(student_labels), _predicting(teacher_labels)
    return loss(
        student_logits,
        teacher_logits,
        student_labels,
        teacher_labels,
        student_labels,
        teacher_labels,
    )


def _predicting(labels: Tensor) -> Tensor:
    """Labels at the rows that predict them, as the published files find these rows.

    Where the first label of a row is ignored, the whole row moves one place to the front.
    """
    moved = labels.roll(-1, dims=1)
    moved[:, -1] = IGNORE_INDEX
    return moved.where(labels[:, :1] == IGNORE_INDEX, labels)
