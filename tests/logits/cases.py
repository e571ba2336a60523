"""Logits of every kind, the queries made of them, and the same queries on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctkd.divergences import sorted_l1
from ctkd.logits import DenseLogits, HeadLogits, RowLogits, map_rows
from ctkd.ops import STANDARD_DEVIATION_EPSILON, RowLoss
from tests.rounding import rounding

B, S, V, H = 3, 5, 11, 4
T, W = 4, 8
MASK = torch.arange(S) < torch.tensor([[5], [3], [0]])
KEPT = torch.tensor([[True, False, True, True, False]]).expand(B, S)
COLUMNS = torch.arange(V) % 3 == 1
# Flattened positions: scored ones of the student, each once. The first ones are used, and some
# have no other side.
POSITIONS = torch.tensor([[0, 3], [-1, -1], [2, 0], [1, -1], [-1, 2], [5, 1], [7, 7], [4, 7]])
ALIGNED = (POSITIONS >= 0).all(-1)


class Engine(NamedTuple):
    """Whose arithmetic, and how rows are read."""

    dtype: torch.dtype
    reading: str

    def agree(self, actual: Any, expected: Any, *, narrow: bool = False) -> None:
        """Compare with float64: sums of a few dozen terms, rounded once more if narrow.

        Terms are about as large as the largest result, or 1.
        """
        if isinstance(actual, Tensor):
            actual, expected = [actual], [expected]
        statistics = torch.promote_types(self.dtype, torch.float32)
        relative = rounding(statistics, 8 * V)
        if narrow:
            relative = max(relative, torch.finfo(self.dtype).eps)
        for one, other in zip(actual, expected, strict=True):
            scale = max(1.0, float(other.detach().abs().nan_to_num().max())) if other.numel() else 1
            torch.testing.assert_close(
                one.double(), other.double(), rtol=relative, atol=relative * scale
            )


ENGINES = {
    "float32": Engine(torch.float32, "one_block"),
    "bfloat16": Engine(torch.bfloat16, "one_block"),
    "float64": Engine(torch.float64, "small_blocks"),
    "device": Engine(torch.float32, "device"),
    "device_in_small_blocks": Engine(torch.float64, "device_in_small_blocks"),
}


def in_turn(*factors: Iterable[str], others: Iterable[str]) -> list[tuple[str, ...]]:
    """All combinations of the first factors, each with the next of the others.

    >>> in_turn("ab", "cd", others="xyz")
    [('a', 'c', 'x'), ('a', 'd', 'y'), ('b', 'c', 'z'), ('b', 'd', 'x')]
    """
    combinations: list[tuple[str, ...]] = [()]
    for factor in factors:
        values = list(factor)
        combinations = [(*one, value) for one in combinations for value in values]
    turns = list(others)
    return [(*one, turns[number % len(turns)]) for number, one in enumerate(combinations)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaf_of(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A leaf of a dtype, and one of the same numbers in float64."""
    leaf = values.to(dtype)
    return leaf.requires_grad_(), leaf.detach().double().requires_grad_()


class Naive:
    """What `Logits` answer, from a whole tensor by autograd.

    Args:
        dense: (B, S, V) float64.
        mask: (B, S) bool.
    """

    def __init__(self, dense: Tensor, mask: Tensor) -> None:
        # Garbage behind the mask is looked at by nobody.
        self.dense, self.mask = dense.masked_fill(~mask.unsqueeze(-1), 0.0), mask

    def masked(self, mask: Tensor) -> Naive:
        return Naive(self.dense, mask)

    def _log_probs(self, temperature: float, standardize: bool = False) -> Tensor:
        dense = self.dense
        if standardize:
            dense = dense / (dense.std(-1, keepdim=True) + STANDARD_DEVIATION_EPSILON)
        return (dense / temperature).log_softmax(-1)

    def _cleared(self, values: Tensor) -> Tensor:
        mask = self.mask.view(*self.mask.shape, *[1] * (values.ndim - 2))
        return values.masked_fill(~mask, 0.0)

    def log_probs_at(self, ids, temperatures, *, standardize=False) -> tuple[Tensor, ...]:
        ids = ids.expand(-1, self.mask.shape[1], -1)
        return tuple(
            self._cleared(self._log_probs(t, standardize).gather(2, ids)) for t in temperatures
        )

    def log_probs(self, ids, *, temperature=1.0, standardize=False) -> Tensor:
        return self.log_probs_at(ids, (temperature,), standardize=standardize)[0]

    def log_mass(self, columns, *, temperature=1.0) -> Tensor:
        return self._cleared(self._log_probs(temperature)[..., columns].logsumexp(-1))

    def top_ids(self, k) -> Tensor:
        order = self.dense.sort(dim=-1, descending=True, stable=True).indices
        return self._cleared(order[..., :k])

    def sorted_probs(self, k, *, temperature=1.0) -> Tensor:
        probs = self._log_probs(temperature).exp().sort(-1, descending=True).values
        return self._cleared(probs[..., :k])

    @torch.no_grad()
    def column_mass(self, *, temperature=1.0, standardize=False, prefetch=()) -> Tensor:
        return self._cleared(self._log_probs(temperature, standardize).exp()).sum(1)

    @torch.no_grad()
    def column_distance(self, targets, *, temperature=1.0) -> Tensor:
        gaps = targets.unsqueeze(-1) - self._log_probs(temperature).exp().unsqueeze(2)
        return self._cleared(gaps.abs()).sum(1)


def teacher_values() -> Tensor:
    """Logits (B, T, W) that every dtype holds."""
    return randn(B, T, W, seed=9).bfloat16().double()


def mapped(logits: RowLogits | Naive, loss: RowLoss, per_row: Tensor | None = None) -> Tensor:
    """Values and parts (N, 1 + P) of a function of aligned rows."""
    if isinstance(logits, Naive):
        student = logits.dense.flatten(0, 1)[POSITIONS[ALIGNED, 0]]
        teacher = teacher_values().flatten(0, 1)[POSITIONS[ALIGNED, 1]]
        numbers = [] if per_row is None else [per_row[ALIGNED]]
        answers = loss.function(student, teacher, *numbers).view(len(student), -1)
        parts = answers.new_zeros(len(POSITIONS), answers.shape[1])
        parts = parts.index_put((ALIGNED.nonzero().squeeze(-1),), answers)
        return torch.cat([parts.sum(-1, keepdim=True), parts.detach()], dim=-1)
    teacher = DenseLogits(teacher_values().to(logits.source.inputs[0]))
    positions = POSITIONS.to(logits.mask.device)
    values, parts = map_rows(logits, teacher, positions, loss, per_row=per_row)
    assert not parts.requires_grad
    return torch.cat([values.unsqueeze(-1), parts], dim=-1)


def squares(student: Tensor, teacher: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Two parts that depend on everything, and not linearly."""
    scale = 1.0 if numbers is None else numbers[:, :1].exp()
    gaps = (scale * student.softmax(-1)[:, :W] - teacher.softmax(-1)).square().sum(-1)
    return torch.stack([gaps, (student * teacher.sum(-1, keepdim=True)).tanh().mean(-1)], dim=-1)


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    return sorted_l1((student / 1.5).softmax(-1), (teacher / 0.5).softmax(-1))


ULD = RowLoss("uld", uld, settings={"student_temperature": 1.5, "teacher_temperature": 0.5})


def ids_of(rows: int, logits: RowLogits | Naive) -> Tensor:
    """Columns (B, rows, 4), one of them twice."""
    ids = torch.randint(V, (B, rows, 4), generator=torch.Generator().manual_seed(3))
    ids[..., 3] = ids[..., 1]
    return ids.to(logits.mask.device)


def numbers_of_rows(logits: RowLogits | Naive) -> Tensor:
    """Numbers for each aligned position that come from the logits themselves."""
    return logits.log_probs(ids_of(1, logits))[..., :2].flatten(0, 1)[: len(POSITIONS)]


Query = Callable[[Any], Tensor]
DIFFERENTIABLE: dict[str, Query] = {
    "log_probs": lambda x: torch.cat(x.log_probs_at(ids_of(1, x), (1.0, 0.5, 2.0)), -1),
    "log_probs_per_position": lambda x: x.log_probs(ids_of(S, x), temperature=3.0),
    "same_temperature_twice": lambda x: torch.cat(x.log_probs_at(ids_of(S, x), (0.7, 0.7)), -1),
    "standardized": lambda x: torch.cat(
        x.log_probs_at(ids_of(1, x), (0.7, 1.4), standardize=True), -1
    ),
    "log_mass": lambda x: x.log_mass(COLUMNS.to(x.mask.device), temperature=0.7),
    "sorted_probs": lambda x: x.sorted_probs(4, temperature=2.0),
    "all_sorted_probs": lambda x: x.sorted_probs(V),
    "two_parts": lambda x: mapped(x, RowLoss("", squares, parts=2)),
    "per_row": lambda x: mapped(x, RowLoss("", squares, parts=2), numbers_of_rows(x)),
    "uld": lambda x: mapped(x, ULD),
}
WITHOUT_GRADIENT: dict[str, Query] = {
    "top_ids": lambda x: x.top_ids(4),
    "column_mass": lambda x: x.column_mass(prefetch=(2.0, 1.0)),
    "standardized_column_mass": lambda x: x.masked(x.mask & KEPT.to(x.mask.device)).column_mass(
        temperature=0.7, standardize=True, prefetch=(2.0,)
    ),
    "column_distance": lambda x: x.masked(x.mask & KEPT.to(x.mask.device)).column_distance(
        randn(B, S, 3, seed=2).abs().to(x.mask.device), temperature=1.5
    ),
}
QUERIES = {**DIFFERENTIABLE, **WITHOUT_GRADIENT}

HEADS: dict[str, dict[str, float]] = {
    "plain": {},
    "bias": {},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all_bias": {"scale": 0.25, "softcap": 2.0},
}


def head_leaves(head: str, dtype: torch.dtype = torch.float64, width: int = V) -> list[Tensor]:
    """Hidden states, weight and bias, as leaves."""
    values = [randn(B, S, H), randn(width, H, seed=50)]
    if "bias" in head:
        values.append(randn(width, seed=51))
    return [value.to(dtype).requires_grad_() for value in values]


def materialized(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The logits of a head, whole."""
    raw = torch.einsum("blh,vh->blv", hidden, weight)
    raw = scale * (raw if bias is None else raw + bias)
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


KINDS = ("tensor", "head")


def leaves_of(kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A tensor of logits, or hidden states and a weight."""
    if kind == "head":
        return head_leaves("plain", dtype)
    return [(2.0 * randn(B, S, V)).to(dtype).requires_grad_()]


def logits_of(leaves: list[Tensor], **settings: Any) -> RowLogits:
    return DenseLogits(*leaves, **settings) if len(leaves) == 1 else HeadLogits(*leaves, **settings)


def weighed(answer: Tensor) -> Tensor:
    """One number that all of an answer has a part in."""
    return (answer * randn(*answer.shape, seed=7)).sum()
