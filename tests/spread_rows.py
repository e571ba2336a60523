"""Rows of which the largest entries and the label are known, worked out number by number."""

import math
import statistics

import torch
from torch import Tensor


def spread_row(
    logits: list[float], label: int, k: int, temperature: float, standardise: bool = False
) -> tuple[list[float], set[int]]:
    """Log-probabilities of one row, and the columns that keep their own.

    Kept are the k largest, of equal ones the first, and the label. The other columns share what
    is left evenly.
    """
    if standardise:
        deviation = statistics.stdev(logits) + 1e-4
        logits = [x / deviation for x in logits]
    by_size = sorted(range(len(logits)), key=lambda column: (-logits[column], column))
    known = {*by_size[:k], label}
    scaled = [x / temperature for x in logits]
    total = _log_sum(scaled)
    others = [x for column, x in enumerate(scaled) if column not in known]
    share = _log_sum(others) - math.log(len(others)) if others else 0.0
    return [(x if column in known else share) - total for column, x in enumerate(scaled)], known


def _log_sum(logs: list[float]) -> float:
    largest = max(logs)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(x - largest) for x in logs))


def spread_rows(
    logits: Tensor,
    mask: Tensor,
    labels: Tensor,
    k: int,
    temperature: float,
    standardise: bool = False,
) -> tuple[Tensor, Tensor]:
    """`spread_row` at every scored position of (B, S, V): log-probabilities, float64, and known."""
    log_probs = torch.zeros(logits.shape, dtype=torch.float64)
    known = torch.zeros(logits.shape, dtype=torch.bool)
    for b, i in mask.nonzero().tolist():
        row = [float(x) for x in logits[b, i]]
        found, columns = spread_row(row, int(labels[b, i]), k, temperature, standardise)
        log_probs[b, i] = torch.tensor(found, dtype=torch.float64)
        known[b, i, list(columns)] = True
    return log_probs, known
