"""What asks for rows in descending order: the distance between ranks, and the largest entries.

Ties go to the lower column, on every device and in every dtype.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctkd.compiled import RowArray, has_kernels, readable
from ctkd.errors import BatchError
from ctkd.threads import over_rows

__all__ = ["ranked_l1", "stable_top_ids", "top_of"]


def ranked_l1(
    student_probs: Tensor, teacher_probs: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Distance between the sorted rows of two blocks, and its derivative.

    .. math:: \sum_k |s_{(k)} - t_{(k)}|, \quad s_{(1)} \ge s_{(2)} \ge \dots

    The narrower side is padded with zeros. The rows need not sum to 1, and may be empty.
    `ctkd.kernels.ranks` does the same on a CPU without sorting.

    Shape:
        (N, V) and (N, W) give (N, 1) float64, and the derivative with respect to log s, (N, V):
        each entry times the sign of the difference at its rank, 0 where there is none.

    Args:
        student_probs: At least 0, in any order. A row with nan gives nan.
        teacher_probs: At least 0, in any order.
        out: Takes the derivative.

    Example:
        >>> ranked_l1(torch.tensor([[0.1, 0.3]]), torch.tensor([[0.1, 0.2, 0.1]]))
        (tensor([[0.2000]], dtype=torch.float64), tensor([[0.0000, 0.3000]]))
    """
    if out is None:
        out = torch.empty_like(student_probs, memory_format=torch.contiguous_format)
    student, teacher = (
        one.sort(dim=-1, descending=True, stable=True) for one in (student_probs, teacher_probs)
    )
    width, other_width = student_probs.shape[1], teacher_probs.shape[1]
    gap = F.pad(student.values, (0, max(other_width - width, 0)))
    gap[:, :other_width] -= teacher.values
    out.scatter_(1, student.indices, gap[:, :width].sign().mul_(student.values))
    return gap.abs_().sum(-1, keepdim=True, dtype=torch.float64), out


def stable_top_ids(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of each row, largest first, ties to the lower index.

    Shape:
        ``values`` (N, V); the answer is (N, k) int64.

    Raises:
        BatchError: If k is above V.

    Example:
        >>> stable_top_ids(torch.tensor([[1.0, 3.0, 3.0]]), 2)
        tensor([[1, 2]])
    """
    _check_count(k, values.shape[-1])
    if values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    if has_kernels(values.device, torch.float32):
        return top_of(RowArray.of(readable(values)), values.shape[1], k)[0]
    bits = (values.float() + 0.0).view(torch.int32)
    # Read as integers, negative floats run backwards: flip all but their sign.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    width = values.shape[-1]
    tie_break = torch.arange(width - 1, -1, -1, device=values.device)
    return ((ordered << 32) | tie_break).topk(k, dim=-1).indices


def top_of(rows: RowArray, width: int, k: int) -> tuple[Tensor, Tensor]:
    """Do what `stable_top_ids` does, by compiled loops, for the first columns of rows.

    Shape:
        The columns (n, k) int64, and what stands there, (n, k) float32.

    Args:
        rows: n of them.
        width: V.
        k: How many of each.

    Raises:
        BatchError: If k is above V.
    """
    from ctkd.kernels.top import put_top

    _check_count(k, width)
    shape = len(rows.starts), k
    found, found_entries = np.empty(shape, np.int64), np.empty(shape, np.float32)

    def put(some: slice) -> None:
        put_top(rows.values, rows.starts, some.start, some.stop, width, found, found_entries)

    if k:
        over_rows(len(found), put)
    return torch.from_numpy(found), torch.from_numpy(found_entries)


def _check_count(k: int, width: int) -> None:
    if k > width:
        raise BatchError(f"each row has {width} entries, of which the largest {k} cannot be taken")
