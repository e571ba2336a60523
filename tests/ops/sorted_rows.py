"""Rows with no, some or nothing but ties, and their stable sort."""

import torch
from torch import Tensor

INFINITY = float("inf")
SPECIAL = [0.0, -0.0, 1e-43, -1e-43, 1e-38, -1e-38, INFINITY, -INFINITY, 1.0, 1.0 + 2**-20]
KINDS = ("smooth", "ties", "bfloat16", "special", "constant", "narrow")


def rows_of(kind: str, width: int, seed: int, count: int = 2) -> Tensor:
    """float32 rows of any sign."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3.0 * torch.randn(count, width, generator=generator)
    if kind == "ties":
        return rows.round()
    if kind == "bfloat16":
        return rows.bfloat16().float()
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), rows.shape, generator=generator)]
    if kind == "constant":
        return torch.full_like(rows, -2.5)
    # All in one class, and no two alike.
    return 1.0 + 1e-4 * rows if kind == "narrow" else rows


def probs_of(kind: str, width: int, seed: int, count: int = 2) -> Tensor:
    """float32 rows from 0 to 2."""
    if kind == "special":
        return rows_of(kind, width, seed, count).abs().clamp_max(1.0)
    rows = rows_of(kind, width, seed, count).softmax(-1)
    return rows.bfloat16().float() if kind == "bfloat16" else rows


def stable(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values and columns, descending, ties to the lower column."""
    return rows.sort(dim=-1, descending=True, stable=True)
