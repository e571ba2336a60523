"""MinED (FuseLLM, arXiv 2401.10491) and its dense form (DSKD, arXiv 2406.17328): the oracles.

Both carry a row of the teacher over to the student's vocabulary by a map of tokens, which is given
here, and compare rows that are paired, which is given too. Student rows without a partner are
compared with a one-hot row on their label.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ABSENT = -100000.0
CERTAIN = 100.0


def pair_chunks(student_chunks: Sequence[int], teacher_chunks: Sequence[int]) -> list[int | None]:
    """For each student position the teacher position of a chunk that is one token on both sides."""
    return [
        list(teacher_chunks).index(chunk)
        if chunk >= 0
        and list(student_chunks).count(chunk) == 1
        and list(teacher_chunks).count(chunk) == 1
        else None
        for chunk in student_chunks
    ]


def pair_matches(
    student_to_teacher: Sequence[Sequence[int]],
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    mapping: Sequence[int | None],
) -> list[int | None]:
    """Keep what edit distance matched: one teacher token alone, mapped to the student's token."""
    partners: list[int | None] = []
    for student_id, matched in zip(student_ids, student_to_teacher, strict=True):
        kept = len(matched) == 1 and mapping[teacher_ids[matched[0]]] == student_id
        partners.append(matched[0] if kept else None)
    return partners


def carry_top(
    teacher_row: Tensor, mapping: Sequence[int | None], k: int
) -> tuple[list[int], list[float]]:
    """Student ids and logits of the teacher's k largest entries (ties: lower id first).

    Entries without a student token (None) are dropped; of several that have the same one, the first
    is kept.
    """
    values = teacher_row.double().tolist()
    order = sorted(range(len(values)), key=lambda entry: -values[entry])[:k]
    ids: list[int] = []
    logits: list[float] = []
    for entry in order:
        student_id = mapping[entry]
        if student_id is not None and student_id not in ids:
            ids.append(student_id)
            logits.append(values[entry])
    return ids, logits


def carry_row(teacher_row: Tensor, mapping: Sequence[int | None], width: int) -> Tensor:
    """Logits in the student's vocabulary: each id has that of the first teacher id mapped to it."""
    carried = torch.full((width,), ABSENT, dtype=torch.float64)
    for student_id in range(width):
        for teacher_id, target in enumerate(mapping):
            if target == student_id:
                carried[student_id] = teacher_row[teacher_id].double()
                break
    return carried


def one_hot_row(label: int, width: int) -> Tensor:
    """Logits of a row that is as good as certain of its label."""
    row = torch.full((width,), ABSENT, dtype=torch.float64)
    row[label] = CERTAIN
    return row


def _kl(teacher_row: Tensor, student_row: Tensor, temperature: float) -> Tensor:
    target = torch.softmax(teacher_row.detach() / temperature, dim=0)
    log_student = torch.log_softmax(student_row / temperature, dim=0)
    total = torch.zeros((), dtype=torch.float64)
    for entry, probability in enumerate(target.tolist()):
        if probability > 0:
            total = total + probability * (math.log(probability) - log_student[entry])
    return total


def _cross_entropy(ids: list[int], logits: list[float], row: Tensor, temperature: float) -> Tensor:
    target = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, dim=0)
    log_probs = torch.log_softmax(row, dim=0)
    total = torch.zeros((), dtype=torch.float64)
    for entry, probability in zip(ids, target.tolist(), strict=True):
        total = total - probability * log_probs[entry]
    return total


def terms(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    partners: Sequence[Sequence[int | None]],
    mapping: Sequence[int | None],
    *,
    k: int = 10,
    temperature: float = 1.0,
    form: str = "top_k",
) -> dict[str, Tensor]:
    """Sums over the student's rows: ``fused`` over those with a partner, ``label`` over the others.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        labels: the student token that each row predicts.
        partners: the teacher row that each student row is compared with.
        mapping: the student token of each teacher token.
        k: entries taken of the teacher's row in the form "top_k".
        temperature: divides the teacher's logits; in the form "dense" the student's as well.
        form: "top_k" (cross-entropy, FuseLLM) or "dense" (KL, DSKD).
    """
    zero = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    sums = {"fused": zero, "label": zero}
    for b, rows in enumerate(student):
        for position, row in enumerate(rows.double()):
            partner, label = partners[b][position], labels[b][position]
            name = "label" if partner is None else "fused"
            if form == "dense":
                target = (
                    one_hot_row(label, len(row))
                    if partner is None
                    else carry_row(teacher[b][partner], mapping, len(row))
                )
                value = _kl(target, row, temperature)
            elif partner is None:
                value = _cross_entropy([label], [1.0], row, temperature)
            else:
                ids, logits = carry_top(teacher[b][partner], mapping, k)
                value = _cross_entropy(ids, logits, row, temperature)
            sums[name] = sums[name] + value
    return sums


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    partners: Sequence[Sequence[int | None]],
    mapping: Sequence[int | None],
    *,
    k: int = 10,
    temperature: float = 1.0,
    form: str = "top_k",
) -> tuple[Tensor, int]:
    """Mean of :func:`terms` over the student's rows, and their number."""
    sums = terms(
        student, teacher, labels, partners, mapping, k=k, temperature=temperature, form=form
    )
    count = sum(len(rows) for rows in student)
    return (sums["fused"] + sums["label"]) / max(count, 1), count
