"""Several processes that train together, as ``torchrun`` and ``accelerate launch`` start them.

The first one prepares, measures, writes and speaks, and the others wait for it. What is here does
nothing but call where there is one process. torch and accelerate are loaded where there are more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from ctkd.distill.devices import is_cpu
from ctkd.errors import SettingError, TrainingError

if TYPE_CHECKING:
    import torch

__all__ = [
    "any_of_all",
    "count",
    "first_before_others",
    "is_first",
    "join",
    "no_bar",
    "noticing_lost_processes",
    "number",
    "of_first",
    "wait_for_all",
]

_Result = TypeVar("_Result")

# The others wait while the first one measures. A process that ends is noticed by what started it.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """The number of this process, from 0; a lone one is the first, whatever its RANK says."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """True in the process that speaks and writes."""
    return number() == 0


def no_bar() -> bool | None:
    """What a progress bar takes as `disable`: the first process shows it, on a terminal."""
    return None if is_first() else True


def join(device: torch.device, dtype: str) -> None:
    """Meet the other processes, if there are any.

    Args:
        device: They work on devices of its type.
        dtype: What the settings say of precision.

    Raises:
        SettingError: If accelerate was told to compute in another precision, or to shard the model:
            the first process, which measures alone, would have a part of it.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", "bf16" if dtype == "bfloat16" else "no"):
        raise SettingError(
            f"accelerate was told to compute in {asked} (mixed_precision), and dtype is {dtype}; "
            "leave precision to ctkd: set mixed_precision to no, and dtype to bfloat16 for bf16"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise SettingError(
                f"a model in parts ({name}) is not trained by the command; start it without, or "
                "write a script with CrossTokenizerTrainer, which takes one"
            )
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=is_cpu(device), timeout=_PATIENCE)


@contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turn what torch says of a process that is gone into a sentence.

    Raises:
        TrainingError: If it is.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has a class for errors of NCCL, and none for those of gloo.
        if count() == 1 or not ("gloo" in f"{error}" or type(error).__name__.startswith("Dist")):
            raise
        raise TrainingError(
            "another process has ended: by an error of its own, which stands above, or killed, as "
            "for want of memory; repeat the command with --resume to go on from the last checkpoint"
        ) from error


def wait_for_all() -> None:
    """Wait until every process is here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def of_first(work: Callable[[], _Result]) -> _Result:
    """What the first process returns, in all of them; no other does the work.

    Raises:
        SystemExit: In the others, if it failed, with 0: a failure of theirs would cut it short.
    """
    if count() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    outcome: list[_Result] = []
    try:
        if is_first():
            outcome = [work()]
    finally:
        (outcome,) = broadcast_object_list([outcome])
    if not outcome:
        raise SystemExit(0)
    return outcome[0]


def first_before_others(work: Callable[[], _Result]) -> _Result:
    """Do work in the first process, then in the others, which find in caches what it prepared.

    Raises:
        SystemExit: As `of_first`.
    """
    done: list[_Result] = []
    of_first(lambda: done.append(work()))
    return done[0] if done else work()


def any_of_all(value: bool) -> bool:
    """True in all processes if it is true in one."""
    if count() == 1:
        return value
    import torch
    from accelerate import PartialState

    found = torch.tensor(int(value), device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)
