"""Every operation in torch, a block of rows at a time: any device, any dtype.

This is what an operation means; tests hold the other backends to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.ops.rows import (
    STANDARD_DEVIATION_EPSILON,
    Packed,
    RowLoss,
    Rows,
    RowValues,
    SoftmaxTerm,
    Which,
)

__all__ = [
    "add_column_distance_",
    "column_mass",
    "greedy_partners",
    "log_normalizers",
    "pack_scored",
    "row_loss",
    "softmax_backward",
    "top_k",
]

_FLIP_ALL_BUT_SIGN = 0x7FFFFFFF


def log_normalizers(
    rows: Rows,
    temperatures: Sequence[float],
    *,
    standardize: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    r"""Logs of the softmax denominators, ``log sum_v exp(x_v / tau)``.

    Shape:
        (T, N) for T temperatures, in the dtype of statistics; undefined where there is no row. Of
        standardized rows (T, E, N): after each its row's standard deviation, and what else the
        backend needs for their gradient.

    Args:
        rows: The logits.
        temperatures: Each above 0.
        standardize: First divide each row by its standard deviation (unbiased) plus 1e-4.
        columns: (V,) bool, sum over these alone; minus infinity where none has any probability.
    """
    answers = rows.zeros(len(temperatures), *[2] * standardize, len(rows))
    for which, block in rows.blocks():
        answers[..., which] = _statistics(block, temperatures, standardize, columns)[1]
    return answers


def pack_scored(
    targets: Tensor, ignored: int, size: int, length: int, chunk_ids: Tensor | None = None
) -> Packed:
    """Put the scored positions of each sequence first.

    Args:
        targets: (B, L) ids that are predicted.
        ignored: What stands where none is.
        size: S, positions to keep.
        length: Rows of a sequence of logits.
        chunk_ids: (B, L) chunks of the targets.
    """
    scored = targets != ignored
    rows = torch.argsort((~scored).to(torch.int8), dim=1, stable=True)[:, :size]
    mask = scored.gather(1, rows)
    ids = targets.gather(1, rows).masked_fill(~mask, 0)
    if chunk_ids is not None:
        chunk_ids = chunk_ids.gather(1, rows).masked_fill(~mask, -1)
    first = torch.arange(targets.shape[0], device=targets.device).unsqueeze(1) * length
    all_rows = (first + rows).flatten()
    index = all_rows.masked_fill(~mask.flatten(), -1)
    return Packed(rows, mask, ids, chunk_ids, index, all_rows)


def column_mass(
    rows: Rows,
    sequence: Tensor,
    sequences: int,
    temperatures: Sequence[float],
    *,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Probabilities at the first temperature, summed over the rows of each sequence.

    Shape:
        (B, V), and the `log_normalizers` at all temperatures.

    Args:
        rows: The logits; -1 adds nothing.
        sequence: (N,) int64, ascending.
        sequences: B.
        temperatures: Each above 0.
        standardize: As in `log_normalizers`.
    """
    mass = rows.zeros(sequences, rows.width)
    answers = rows.zeros(len(temperatures), *[2] * standardize, len(rows))
    for which, block in rows.blocks():
        logits, some = _statistics(block, temperatures, standardize)
        answers[..., which] = some
        normalizer = some[(0, *[0] * standardize)].unsqueeze(-1)
        probs = (logits / temperatures[0] - normalizer).exp_()
        _add_rows_(mass, sequence[which], _cleared(probs, rows, which))
    return mass, answers


def add_column_distance_(
    distance: Tensor,
    rows: Rows,
    sequence: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    temperature: float,
) -> None:
    """Add L1 distances of each column's probabilities to targets, over the rows of each sequence.

    Args:
        distance: (B, K, V), added to.
        rows: The logits; -1 adds nothing.
        sequence: (N,) int64, ascending.
        targets: (N, K) values that each column is compared with.
        normalizers: (N,) log-normalizers at the temperature.
        temperature: Divides the logits.
    """
    for which, block in rows.blocks():
        probs = (block / temperature - normalizers[which].unsqueeze(-1)).exp_()
        for number, target in enumerate(targets[which].unbind(-1)):
            gap = (probs - target.unsqueeze(-1)).abs_()
            _add_rows_(distance[:, number], sequence[which], _cleared(gap, rows, which))


def greedy_partners(distance: Tensor) -> tuple[Tensor, Tensor]:
    """Let each of K targets, in their order, take the nearest column that is still free.

    Shape:
        (B, K, V) distances, infinite where a column is no partner, are overwritten. Columns
        (B, K), ties to the lower one, and whether there was any, (B, K) bool.
    """
    columns, has_partner = [], []
    for rank in range(distance.shape[1]):
        least, nearest = distance[:, rank].min(-1, keepdim=True)
        columns.append(nearest)
        has_partner.append(least < torch.inf)
        distance.scatter_(2, nearest.unsqueeze(1).expand(-1, distance.shape[1], -1), torch.inf)
    return torch.cat(columns, -1), torch.cat(has_partner, -1)


def top_k(rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Columns and values of the k largest entries, (N, k) each, largest first.

    Ties go to the lower column. Zeros where there is no row; k is at most V.
    """
    values = rows.zeros(len(rows), k)
    ids = torch.zeros_like(values, dtype=torch.int64)
    for which, block in rows.blocks():
        largest = _stable_top_ids(block, k)
        ids[which], values[which] = largest, block.gather(1, largest)
    return ids, values


def softmax_backward(
    rows: Rows,
    terms: Sequence[SoftmaxTerm],
    out: Rows,
    known: Rows | None = None,
    weights: Tensor | None = None,
) -> None:
    """Write the gradient of N rows: the sum of terms, and a weighted known gradient.

    Args:
        rows: The logits.
        terms: Terms to add up.
        out: Output, all of its columns. May be the rows.
        known: A gradient to add. May be ``out``.
        weights: (N,) factors of ``known``; 0 ignores a row, even nan.
    """
    for which, block in rows.blocks():
        gradient = block.new_zeros(block.shape[0], out.width)
        if known is not None and weights is not None:
            weight = weights[which].unsqueeze(-1)
            # A row of weight 0 may be uninitialized memory.
            gradient += (known.read(which) * weight).masked_fill_(weight == 0, 0.0)
        for term in terms:
            gradient[:, : term.width] += _softmax_gradient(block[:, : term.width], term, which)
        out.write(which, gradient)


def row_loss(
    loss: RowLoss,
    student: Rows,
    teacher: Rows,
    per_row: Tensor | None = None,
    out: Rows | None = None,
    differentiate: bool = False,
) -> RowValues:
    """A function of whole rows of both sides, with its gradient.

    Args:
        loss: The function, and the name of its kernel.
        student: N rows, none twice.
        teacher: N rows; none where the student has none.
        per_row: (N, E) numbers that belong to each, or None.
        out: Output, the gradient of the sum of a row's parts with respect to the student's logits;
            None if none is wanted.
        differentiate: Also return the gradient with respect to ``per_row``.
    """
    values = student.zeros(len(student), loss.parts)
    per_row_gradient = torch.zeros_like(per_row) if per_row is not None and differentiate else None
    for which, block in student.blocks(teacher.width):
        logits, inputs = block.detach().requires_grad_(out is not None), []
        if per_row is not None:
            inputs = [per_row[which].detach().requires_grad_(differentiate)]
        with torch.set_grad_enabled(out is not None or differentiate):
            answers = loss.function(logits, teacher.read(which), *inputs)
            answers = answers.view(block.shape[0], loss.parts)
            total = answers.sum()
        # What was read where there is no row may be garbage.
        values[which] = _cleared(answers.detach().to(values.dtype), student, which)
        wanted = [logits] * (out is not None) + inputs * differentiate
        gradients = list(torch.autograd.grad(total, wanted)) if wanted else []
        if out is not None:
            gradient = _cleared(gradients.pop(0), student, which)
            out.write(which, F.pad(gradient, (0, out.width - gradient.shape[1])))
        if per_row_gradient is not None:
            per_row_gradient[which] = _cleared(gradients.pop(0), student, which)
    return RowValues(values, per_row_gradient)


def _add_rows_(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to the indexed row of the sums, in one order for all columns: ties stay ties."""
    # index_add_ is atomic on CUDA, so in no order; this sorts first.
    sums.index_put_((index,), rows, accumulate=True)


def _statistics(
    block: Tensor, temperatures: Sequence[float], standardize: bool, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits as the softmax takes them, and the `log_normalizers` of a block."""
    logits, deviation = block, None
    if standardize:
        deviation = block.std(-1)
        logits = _divided(block, deviation)
    if columns is not None:
        logits = logits.masked_fill(~columns, -torch.inf)
    normalizers = torch.stack([(logits / one).logsumexp(-1) for one in temperatures])
    if deviation is not None:
        normalizers = torch.stack([normalizers, deviation.expand_as(normalizers)], 1)
    return logits, normalizers


def _divided(block: Tensor, deviation: Tensor) -> Tensor:
    return block / (deviation.unsqueeze(-1) + STANDARD_DEVIATION_EPSILON)


def _softmax_gradient(block: Tensor, term: SoftmaxTerm, which: Which) -> Tensor:
    logits, normalizer = block, term.log_normalizers[..., which]
    if term.standardize:
        logits, normalizer = _divided(block, normalizer[1]), normalizer[0]
    if term.columns is not None:
        logits = logits.masked_fill(~term.columns, -torch.inf)
    probs = (logits / term.temperature - normalizer.unsqueeze(-1)).exp_()
    gradient = probs.mul_(-term.totals[which].unsqueeze(-1))
    gradient.scatter_add_(1, term.ids[which], term.weights[which])
    gradient.div_(term.temperature)
    return _through_deviation(block, gradient) if term.standardize else gradient


def _through_deviation(block: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of rows from that of rows divided by their own deviation."""
    deviation, mean = torch.std_mean(block, -1, keepdim=True)
    divisor = deviation + STANDARD_DEVIATION_EPSILON
    spread = (block - mean) / (deviation * (block.shape[-1] - 1))
    # A constant row has no direction in which its deviation grows.
    spread = spread.masked_fill(deviation == 0, 0.0)
    along = (gradient * block).sum(-1, keepdim=True) / divisor.square()
    return gradient / divisor - spread * along


def _stable_top_ids(block: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row, largest first, ties to the lower column."""
    if block.dtype == torch.float64:
        return block.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # A negative zero is a zero.
    bits = (block.float() + 0.0).view(torch.int32)
    # Read as integers, negative floats run backwards: flip all but their sign.
    ordered = torch.where(bits < 0, bits ^ _FLIP_ALL_BUT_SIGN, bits).to(torch.int64)
    tie_break = torch.arange(block.shape[-1] - 1, -1, -1, device=block.device)
    return ((ordered << 32) | tie_break).topk(k, dim=-1).indices


def _cleared(block: Tensor, rows: Rows, which: Which) -> Tensor:
    """A block with zeros where there is no row, whatever was read there."""
    if rows.index is None:
        return block
    return block.masked_fill((rows.index[which] < 0).unsqueeze(-1), 0.0)
