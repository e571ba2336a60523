"""General On-policy Logit Distillation, the hybrid loss per chunk: the oracle.

Written from the description of the method: distributions of aligned groups of tokens, merged in one
of three ways; a generalised Jensen-Shannon divergence on the tokens both vocabularies have, entry
by entry; an L1 distance between what is left, sorted. Loops over entries; speed is no concern.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def groups_of(chunk_ids: Sequence[int]) -> dict[int, list[int]]:
    """Positions of each chunk; negative numbers are no chunk."""
    groups: dict[int, list[int]] = {}
    for position, chunk in enumerate(chunk_ids):
        if chunk >= 0:
            groups.setdefault(chunk, []).append(position)
    return groups


def merge_first(probs: Tensor, ids: Sequence[int], group: Sequence[int]) -> Tensor:
    """The distribution at the first position of the group."""
    return probs[group[0]]


def merge_observed(probs: Tensor, ids: Sequence[int], group: Sequence[int]) -> Tensor:
    """The first distribution times the probability of each later token of the group."""
    merged = probs[group[0]]
    for position in group[1:]:
        merged = merged * probs[position, ids[position]]
    return merged


def merge_bayesian(probs: Tensor, ids: Sequence[int], group: Sequence[int]) -> Tensor:
    """The last distribution times the probability of each earlier token of the group."""
    merged = probs[group[-1]]
    for position in group[:-1]:
        merged = merged * probs[position, ids[position]]
    return merged


MERGES = {"first": merge_first, "observed": merge_observed, "bayesian": merge_bayesian}


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """sum_i beta t log(t/m) + (1 - beta) s log(s/m), with m = beta t + (1 - beta) s.

    At beta 0 sum_i t log(t/s) - t + s, at beta 1 the same with the sides exchanged.
    """
    total = student.sum() * 0
    for s, t in zip(student, teacher, strict=True):
        if beta in (0, 1):
            p, q = (t, s) if beta == 0 else (s, t)
            total = total + p * torch.log(p / q) - p + q
        else:
            m = beta * t + (1 - beta) * s
            total = total + beta * t * torch.log(t / m) + (1 - beta) * s * torch.log(s / m)
    return total


def ranked_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_k |s_(k) - t_(k)|, largest first (ties: lower id), the narrower side padded with 0."""
    ranked = []
    for side in (student, teacher):
        values = side.tolist()
        order = sorted(range(len(values)), key=lambda entry, values=values: -values[entry])
        ranked.append([side[entry] for entry in order])
    total = student.sum() * 0
    for k in range(max(map(len, ranked))):
        s, t = (side[k] if k < len(side) else torch.tensor(0.0).double() for side in ranked)
        total = total + (s - t).abs()
    return total


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_ids: Sequence[Sequence[int]],
    teacher_ids: Sequence[Sequence[int]],
    student_chunks: Sequence[Sequence[int]],
    teacher_chunks: Sequence[Sequence[int]],
    student_matched: Sequence[int],
    teacher_matched: Sequence[int],
    *,
    beta: float = 0.5,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    merging: str = "first",
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
) -> tuple[Tensor, int]:
    """Mean over the chunks that both sides have, and their number.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        student_ids: the token that each row predicts.
        teacher_ids: likewise.
        student_chunks: the chunk of each of these tokens, negative for none.
        teacher_chunks: likewise.
        student_matched: student ids of the tokens that both vocabularies have.
        teacher_matched: their teacher ids, in the same order.
        beta: weight of the teacher in the mixture.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        merging: one of `MERGES`.
        matched_weight: of the divergence; by default matched tokens / W.
        unmatched_weight: of the distance; by default the rest to 1.
    """
    student_width, teacher_width = student[0].shape[1], teacher[0].shape[1]
    if matched_weight is None or unmatched_weight is None:
        matched_weight = len(teacher_matched) / teacher_width
        unmatched_weight = 1 - matched_weight
    student_rest = [i for i in range(student_width) if i not in set(student_matched)]
    teacher_rest = [i for i in range(teacher_width) if i not in set(teacher_matched)]
    total = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    count = 0
    for b in range(len(student)):
        student_probs = torch.softmax(student[b].double() / student_temperature, dim=-1)
        teacher_probs = torch.softmax(teacher[b].double() / teacher_temperature, dim=-1).detach()
        ours, theirs = groups_of(student_chunks[b]), groups_of(teacher_chunks[b])
        for chunk in sorted(set(ours) & set(theirs)):
            s = MERGES[merging](student_probs, student_ids[b], ours[chunk])
            t = MERGES[merging](teacher_probs, teacher_ids[b], theirs[chunk])
            matched = divergence(s[list(student_matched)], t[list(teacher_matched)], beta)
            unmatched = ranked_distance(s[student_rest], t[teacher_rest])
            total = total + matched_weight * matched + unmatched_weight * unmatched
            count += 1
    return total / max(count, 1), count


def jsd_by_hand(student: Sequence[float], teacher: Sequence[float], beta: float) -> float:
    """The divergence of plain numbers, zeros allowed."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        m = beta * t + (1 - beta) * s
        total += beta * t * math.log(t / m) if t else 0.0
        total += (1 - beta) * s * math.log(s / m) if s else 0.0
    return total
