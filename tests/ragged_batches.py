"""Random batches of two models with prompts, padding, ragged answers and unequal lengths."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctkd import Batch, Side


def ragged_inputs(
    seed: int,
    *,
    student_lengths: tuple[int, ...] = (6, 3, 4),
    teacher_lengths: tuple[int, ...] = (4, 5, 0),
    V: int = 11,
    W: int = 8,
    head: int = 2,
    ties: bool = False,
    chunks: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Keyword arguments of `Batch.from_causal_lm`; a length is that of one scored answer.

    Prompts of 1 to 3 tokens come first, at least one row of padding last. The student's logits
    have ``head`` columns too many. ``ties`` rounds the logits to halves.
    """
    rs = np.random.RandomState(seed)
    inputs: dict[str, Any] = {"student_vocab_size": V}
    sides = (("student", student_lengths, V, head), ("teacher", teacher_lengths, W, 0))
    for side, lengths, width, extra in sides:
        prompts = [1 + (b + (side == "teacher")) % 3 for b in range(len(lengths))]
        size = max(map(sum, zip(prompts, lengths, strict=True))) + 1
        logits = 2.0 * rs.standard_normal((len(lengths), size, width + extra))
        labels = np.full((len(lengths), size), -100)
        for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            labels[b, prompt : prompt + length] = rs.randint(0, width, size=length)
        if ties:
            logits = np.round(2.0 * logits) / 2.0
        inputs[f"{side}_logits"] = torch.from_numpy(logits).to(dtype)
        inputs[f"{side}_labels"] = torch.from_numpy(labels)
    if chunks:
        _add_chunks(inputs, seed)
    return inputs


def _add_chunks(inputs: dict[str, Any], seed: int) -> None:
    """Number chunks of one or more tokens on each side; some tokens are in none."""
    rs = np.random.RandomState(seed + 1)
    for side in ("student", "teacher"):
        inputs[f"{side}_chunk_ids"] = torch.full_like(inputs[f"{side}_labels"], -1)
    for b in range(len(inputs["student_labels"])):
        scored = {
            side: (inputs[f"{side}_labels"][b] != -100).nonzero().flatten()
            for side in ("student", "teacher")
        }
        chunks = max(min(map(len, scored.values())) - rs.randint(2), 0)
        for side, positions in scored.items():
            # Every chunk takes one token, the tokens left over join some chunk or none (the last).
            extra = rs.randint(0, chunks + 1, size=len(positions) - chunks)
            numbers = np.sort(np.concatenate([np.arange(chunks), extra]))
            numbers[numbers == chunks] = -1
            inputs[f"{side}_chunk_ids"][b, positions] = torch.from_numpy(numbers)


def answer_rows(inputs: dict[str, Any], side: str) -> list[Tensor]:
    """The rows of logits that predict the answer, one tensor per sequence, without extra columns.

    They are differentiable views of the logits, found by a loop over the labels.
    """
    width = inputs.get(f"{side}_vocab_size")
    rows = []
    for logits, labels in zip(inputs[f"{side}_logits"], inputs[f"{side}_labels"], strict=True):
        scored = [i for i in range(1, len(labels)) if labels[i] != -100]
        rows.append(logits[[i - 1 for i in scored]][:, :width])
    return rows


def chunk_starts(inputs: dict[str, Any]) -> dict[str, list[list[int]]]:
    """For each side and sequence the answer positions that begin a chunk both sides have."""
    found: dict[str, list[list[int]]] = {"student": [], "teacher": []}
    for b in range(len(inputs["student_labels"])):
        chunks = {
            side: [
                int(chunk)
                for chunk, label in zip(
                    inputs[f"{side}_chunk_ids"][b], inputs[f"{side}_labels"][b], strict=True
                )
                if label != -100
            ]
            for side in found
        }
        shared = sorted((set(chunks["student"]) & set(chunks["teacher"])) - {-1})
        for side, starts in found.items():
            starts.append([chunks[side].index(chunk) for chunk in shared])
    return found


def side_of(*sequences: Tensor) -> Side:
    """A side whose positions are all scored, from rows of logits padded to one length."""
    longest = max(len(rows) for rows in sequences)
    logits = torch.stack(
        [
            torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows)), value=9.0)
            for rows in sequences
        ]
    )
    lengths = torch.tensor([len(rows) for rows in sequences])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    return Side(logits=logits, token_ids=torch.zeros_like(mask, dtype=torch.int64), mask=mask)


def loss_and_gradient(
    loss: torch.nn.Module, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, count and gradient with respect to the student's logits."""
    logits = inputs["student_logits"].detach().clone().requires_grad_()
    output = loss(Batch.from_causal_lm(**{**inputs, "student_logits": logits}))
    (gradient,) = torch.autograd.grad(output.value, logits)
    return output.value.detach(), output.count, gradient
