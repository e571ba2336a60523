"""Byte-prefix matching (arXiv 2607.22334) by plain loops in float64: the oracle.

A vocabulary is a list of (role, bytes), the bytes empty where the role is not "text".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Vocabulary = Sequence[tuple[str, bytes]]
LEAST_MASS = 1e-4


def begins(token: tuple[str, bytes], other: tuple[str, bytes]) -> bool:
    """Whether a student token begins a teacher token: its bytes, or the same role."""
    (role, piece), (other_role, other_piece) = token, other
    if role == "text" and other_role == "text":
        return piece != b"" and other_piece[: len(piece)] == piece
    return role == other_role and role in ("bos", "eos", "pad")


def longest_prefixes(student: Vocabulary, teacher: Vocabulary) -> list[int]:
    """The longest student token that begins each teacher token, the first of several; or -1."""
    answers = []
    for other in teacher:
        best = -1
        for index, token in enumerate(student):
            longer = best < 0 or len(token[1]) > len(student[best][1])
            if begins(token, other) and longer:
                best = index
        answers.append(best)
    return answers


def divergence(
    student_row: Tensor, teacher_row: Tensor, prefixes: Sequence[int], rest: str, temperature: float
) -> Tensor:
    """KL of the student's classes from the teacher's: one per student token of the image, and one.

    The last class holds the rest of both sides. It is left out, and both sides are divided by what
    remains, if ``rest`` is ``"renormalize"`` or a side has no such tokens.
    """
    s = torch.softmax(student_row.double() / temperature, 0)
    t = torch.softmax(teacher_row.double().detach() / temperature, 0)
    zero = torch.zeros((), dtype=torch.float64)
    image = sorted({prefix for prefix in prefixes if prefix >= 0})
    ours = [s[u] for u in image]
    theirs = [sum((t[v] for v in range(len(t)) if prefixes[v] == u), zero) for u in image]
    has_rest = len(image) < len(s) and any(prefix < 0 for prefix in prefixes)
    if rest == "class" and has_rest:
        ours.append(sum((s[u] for u in range(len(s)) if u not in image), zero))
        theirs.append(sum((t[v] for v in range(len(t)) if prefixes[v] < 0), zero))
    else:
        ours = [prob / sum(ours, zero) for prob in ours]
        theirs = [prob / sum(theirs, zero) for prob in theirs]
    total = zero
    for p, q in zip(theirs, ours, strict=True):
        if p > 0:
            total = total + p * torch.log(p / q)
    return total


def divergence_inside(
    student_row: Tensor,
    teacher_row: Tensor,
    read: bytes,
    student: Vocabulary,
    teacher: Vocabulary,
    temperature: float,
) -> Tensor:
    """KL of the student's whole row from what the teacher expects after a part of its token.

    Of the teacher's text tokens those count that are longer than the part and begin with it, if a
    student token begins what is left; 0 if they have at most `LEAST_MASS`.
    """
    s = torch.softmax(student_row.double() / temperature, 0)
    t = torch.softmax(teacher_row.double().detach() / temperature, 0)
    zero = torch.zeros((), dtype=torch.float64)
    target: dict[int, Tensor] = {}
    for v, (role, piece) in enumerate(teacher):
        if role == "text" and len(piece) > len(read) and piece[: len(read)] == read:
            (u,) = longest_prefixes(student, [("text", piece[len(read) :])])
            if u >= 0:
                target[u] = target.get(u, zero) + t[v]
    mass = sum(target.values(), zero)
    if mass <= LEAST_MASS:
        return 0.0 * s.sum()
    total = zero
    for u, p in target.items():
        if p > 0:
            total = total + p / mass * torch.log(p / mass / s[u])
    return total


def loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_chunks: Sequence[Sequence[int]],
    teacher_chunks: Sequence[Sequence[int]],
    prefixes: Sequence[int],
    *,
    rest: str = "class",
    temperature: float = 1.0,
    ids: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
    vocabularies: tuple[Vocabulary, Vocabulary] | None = None,
) -> tuple[Tensor, int]:
    """Sum over the positions of the chunks that both sides have, divided by their number.

    Args:
        student: B tensors (S_b, V) of logits.
        teacher: B tensors (T_b, W) of logits.
        student_chunks: the chunk of the token that each row predicts, negative for none.
        teacher_chunks: likewise.
        prefixes: the student id that each teacher id is mapped to, -1 for none.
        rest: ``"class"`` or ``"renormalize"``.
        temperature: divides both sides' logits.
        ids: the tokens that the rows of both sides predict, for conditional targets.
        vocabularies: those of student and teacher, likewise.
    """
    total = sum((rows[:0].double().sum() for rows in student), torch.zeros((), dtype=torch.float64))
    count = 0
    for b in range(len(student)):
        ours, theirs = list(student_chunks[b]), list(teacher_chunks[b])
        for chunk in sorted({c for c in ours if c >= 0} & set(theirs)):
            first, teacher_row = ours.index(chunk), teacher[b][theirs.index(chunk)]
            total = total + divergence(student[b][first], teacher_row, prefixes, rest, temperature)
            count += 1
            if ids is None or vocabularies is None:
                continue
            whole = vocabularies[1][ids[1][b][theirs.index(chunk)]][1]
            read = b""
            for i in range(len(ours)):
                if ours[i] != chunk:
                    continue
                if i > first and 0 < len(read) < len(whole) and whole[: len(read)] == read:
                    rows = student[b][i], teacher_row
                    total = total + divergence_inside(*rows, read, *vocabularies, temperature)
                read += vocabularies[0][ids[0][b][i]][1]
    return total / max(count, 1), count
