"""Hidden states with the heads that make logits of them, and how these are read."""

import pytest
import torch
from torch import Tensor

from ctkd import rows as rows_module

H, V = 4, 11
READINGS = ("one_block", "small_blocks", "padding_too", "padding_too_in_small_blocks")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 0.25, "softcap": 2.0},
}
Leaves = dict[str, Tensor]


def read_by(monkeypatch: pytest.MonkeyPatch, reading: str) -> None:
    """Read in one block or several, with or without rows that are not scored."""
    if "small" in reading:
        # Three rows in a product, two in a block.
        monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * (V + 2) + 3})
        monkeypatch.setattr(rows_module, "HEAD_BLOCK_ELEMENTS", {"cpu": 3 * (V + 2) + 3})
    if "padding" in reading:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_leaves(hidden: Tensor, width: int, *, bias: bool, seed: int = 0) -> Leaves:
    leaves = {"hidden": hidden, "weight": randn(width, hidden.shape[-1], seed=seed + 50)}
    if bias:
        leaves["bias"] = randn(width, seed=seed + 51)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def materialised(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    raw = torch.einsum("blh,vh->blv", hidden, weight)
    raw = scale * (raw if bias is None else raw + bias)
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def numbers_of(head: str) -> dict[str, float]:
    return {name: value for name, value in HEADS[head].items() if name != "bias"}
