"""KL divergence on a shared vocabulary where both models have read the same bytes: the oracle.

At the first token of each chunk the two distributions are cut down to the tokens both vocabularies
have, and either divided by their sum or completed by one class that holds the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def first_position(chunk_ids: Sequence[int]) -> dict[int, int]:
    """The first position of each chunk; negative numbers are no chunk."""
    first: dict[int, int] = {}
    for position, chunk in enumerate(chunk_ids):
        if chunk >= 0 and chunk not in first:
            first[chunk] = position
    return first


def shared_classes(probs: Tensor, shared: Sequence[int], rest: str) -> list[Tensor]:
    """Probabilities of the shared tokens, renormalized or with the rest as one more class."""
    kept = [probs[i] for i in shared]
    others = [probs[i] for i in range(len(probs)) if i not in set(shared)]
    if rest == "class":
        return [*kept, sum(others, torch.zeros((), dtype=torch.float64))]
    total = sum(kept, torch.zeros((), dtype=torch.float64))
    return [prob / total for prob in kept]


def kl(p: Sequence[Tensor], q: Sequence[Tensor]) -> Tensor:
    """sum_i p_i log(p_i / q_i)."""
    total = torch.zeros((), dtype=torch.float64)
    for p_i, q_i in zip(p, q, strict=True):
        total = total + p_i * (torch.log(p_i) - torch.log(q_i))
    return total


def divergence(student: Sequence[Tensor], teacher: Sequence[Tensor], direction: str) -> Tensor:
    """KL(t || s), KL(s || t), or the mean of both to their mean."""
    if direction == "forward":
        return kl(teacher, student)
    if direction == "reverse":
        return kl(student, teacher)
    middle = [(s + t) / 2 for s, t in zip(student, teacher, strict=True)]
    return (kl(teacher, middle) + kl(student, middle)) / 2


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_chunks: Sequence[Sequence[int]],
    teacher_chunks: Sequence[Sequence[int]],
    student_shared: Sequence[int],
    teacher_shared: Sequence[int],
    *,
    rest: str = "renormalize",
    direction: str = "forward",
    temperature: float = 1.0,
) -> tuple[Tensor, int]:
    """Mean over the chunks that both sides have, and their number.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        student_chunks: the chunk of the token that each row predicts, negative for none.
        teacher_chunks: likewise.
        student_shared: student ids of the tokens that both vocabularies have.
        teacher_shared: their teacher ids, in the same order.
        rest: ``"renormalize"`` or ``"class"``, which needs a rest on both sides.
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        temperature: divides both sides' logits.
    """
    total = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    count = 0
    for b in range(len(student)):
        ours, theirs = first_position(student_chunks[b]), first_position(teacher_chunks[b])
        for chunk in sorted(set(ours) & set(theirs)):
            student_row = student[b][ours[chunk]].double()
            teacher_row = teacher[b][theirs[chunk]].double().detach()
            s = shared_classes(torch.softmax(student_row / temperature, 0), student_shared, rest)
            t = shared_classes(torch.softmax(teacher_row / temperature, 0), teacher_shared, rest)
            total = total + divergence(s, t, direction)
            count += 1
    return total / max(count, 1), count
