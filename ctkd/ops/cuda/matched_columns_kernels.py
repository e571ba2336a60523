# mypy: ignore-errors
"""Kernels of the terms of matched columns, for `ctkd.ops.cuda.matched_columns`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fused_target", "matched_columns", "matched_columns_backward"]


@triton.jit
def _probs(log_probs, places, here):
    return tl.exp(tl.load(log_probs + places, mask=here, other=float("-inf")).to(tl.float32))


@triton.jit
def _scored(matched, problem, numbers):
    """Which of these positions count."""
    places = matched.valid + problem * matched.positions + numbers
    return tl.load(places, mask=numbers < matched.positions, other=0) != 0


@triton.jit
def _rows(side, problem, numbers, scored):
    """Rows of a side at positions of a sequence."""
    place = side.at + problem * side.outer + numbers * side.inner
    return problem * side.length + tl.load(place, mask=scored, other=0)


@triton.jit
def _gone(matched, problem, columns):
    """Columns without a partner."""
    places = matched.missing + problem * matched.width + columns
    return tl.load(places, mask=columns < matched.width, other=1) != 0


@triton.jit
def matched_columns(student, teacher, matched, sums, weights, TILE: tl.constexpr):
    """Weighted sums over the aligned positions of a sequence: |t - s| and -t log s.

    Args:
        student: A `ctkd.ops.cuda.matched_columns.Side`.
        teacher: A `ctkd.ops.cuda.matched_columns.Side`.
        matched: A `ctkd.ops.cuda.matched_columns.Matched`.
        sums: (B,) of each term, what is written.
        weights: Of each term.
        TILE: Positions and columns at a time.
    """
    POSITIONS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    width = matched.width
    problem = tl.program_id(0).to(tl.int64)
    differences = tl.zeros((POSITIONS,), tl.float32)
    log_losses = tl.zeros((POSITIONS,), tl.float32)
    for start in range(0, matched.positions, POSITIONS):
        numbers = start + tl.arange(0, POSITIONS)
        scored = _scored(matched, problem, numbers)
        ours = _rows(student, problem, numbers, scored)
        theirs = _rows(teacher, problem, numbers, scored)
        for first in range(0, width, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = scored[:, None] & (columns < width)[None, :]
            gone = _gone(matched, problem, columns)
            at_student = ours[:, None] * width + columns[None, :]
            at_teacher = theirs[:, None] * width + columns[None, :]
            s = tl.where(gone[None, :], 0.0, _probs(student.log_probs, at_student, here))
            differences += tl.sum(tl.abs(_probs(teacher.log_probs, at_teacher, here) - s), 1)
            t = tl.where(gone[None, :], 0.0, _probs(teacher.others, at_teacher, here))
            log_s = tl.load(student.others + at_student, mask=here, other=0.0).to(tl.float32)
            log_losses -= tl.sum(t * tl.where(t == 0.0, 0.0, log_s), 1)
    tl.store(sums[0] + problem, weights[0] * tl.sum(differences, 0))
    tl.store(sums[1] + problem, weights[1] * tl.sum(log_losses, 0))


@triton.jit
def _upstream(term, problem):
    """What the gradient of a term is multiplied by; no gradient: 0."""
    factor = tl.zeros((), tl.float32)
    if term.upstream is not None:
        factor = tl.load(term.upstream + problem * term.stride).to(tl.float32)
        factor *= term.weight
    return factor


@triton.jit
def matched_columns_backward(student, teacher, matched, terms, TILE: tl.constexpr):
    """Gradients of the student's log-probabilities at aligned positions; others are 0 already.

    Args:
        student: As of `matched_columns`.
        teacher: As of `matched_columns`.
        matched: As of `matched_columns`.
        terms: Two `ctkd.ops.cuda.matched_columns.Term`; where the second has nothing to write to,
            both go to the first's.
        TILE: As of `matched_columns`.
    """
    POSITIONS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    difference, log_loss = terms
    width = matched.width
    problem = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    scored = _scored(matched, problem, numbers)
    here = scored[:, None] & (columns < width)[None, :]
    gone = _gone(matched, problem, columns)
    at_student = _rows(student, problem, numbers, scored)[:, None] * width + columns[None, :]
    at_teacher = _rows(teacher, problem, numbers, scored)[:, None] * width + columns[None, :]
    s = tl.where(gone[None, :], 0.0, _probs(student.log_probs, at_student, here))
    t = _probs(teacher.log_probs, at_teacher, here)
    first = tl.where(s > t, s, tl.where(s < t, -s, 0.0)) * _upstream(difference, problem)
    t = tl.where(gone[None, :], 0.0, _probs(teacher.others, at_teacher, here))
    second = -t * _upstream(log_loss, problem)
    if log_loss.gradient is None:
        tl.store(difference.gradient + at_student, first + second, mask=here)
    else:
        tl.store(difference.gradient + at_student, first, mask=here)
        tl.store(log_loss.gradient + at_student, second, mask=here)


@triton.jit
def fused_target(entries, names, teacher_of, labels, target, length, WIDTH: tl.constexpr):
    """Ids and probabilities of a student's position: the teacher's renamed, or its label alone.

    Args:
        entries: Ids and log-probabilities (B, T, K), largest first, and T and K.
        names: (W,) what becomes of an id.
        teacher_of: (B, S) position of the teacher, -1 for none.
        labels: (B, S) ids.
        target: Ids and probabilities (B, S, K), what is written.
        length: S.
        WIDTH: K, rounded up.
    """
    ids, log_probs, positions, width = entries
    number = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    sequence = number // length
    place = sequence * teacher_of.outer + (number % length) * teacher_of.inner
    place = tl.load(teacher_of.tensor + place)
    at = (sequence * positions + place) * width + columns
    there = inside & (place >= 0)
    name = tl.load(names + tl.load(ids + at, mask=there, other=0), mask=there, other=-1)
    is_earlier = columns[:, None] < columns[None, :]
    is_repeated = tl.max((is_earlier & (name[:, None] == name[None, :])).to(tl.int32), 0) != 0
    x = tl.load(log_probs + at, mask=there, other=float("-inf")).to(tl.float32)
    x = tl.where(is_repeated, float("-inf"), x)
    # Where there is no teacher, the first entry is the label.
    x = tl.where(place < 0, tl.where(columns == 0, 0.0, float("-inf")), x)
    weights = tl.exp(x - tl.max(x, 0))
    written = number * width + columns
    chosen = tl.where(place < 0, tl.load(labels + number), name)
    tl.store(target[0] + written, chosen, mask=inside)
    tl.store(target[1] + written, weights / tl.sum(weights, 0), mask=inside)
