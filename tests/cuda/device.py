"""The device that tests run on, and two models' logits of the same texts there."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.loss_inputs import TINY, VOCABULARIES, Inputs, SharingPair, Vocabularies
from ctkd.loss import Loss
from ctkd.registry import get_loss

DEVICE = torch.device(os.environ.get("CTKD_TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
# Rows that are read 16 bytes at a time, and rows that begin anywhere.
ALIGNED, ODD = (
    (VOCABULARIES["wide"], VOCABULARIES["narrow"]._replace(teacher=31_999))
    if ON_CUDA
    else (TINY._replace(student=96, teacher=64), Vocabularies("odd", 79, 61, 0.5))
)
# Enough to keep every multiprocessor at work.
TOKENS = 64 if ON_CUDA else 4


def make_inputs(
    vocabularies: Vocabularies,
    dtype: torch.dtype,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    device: torch.device = DEVICE,
) -> Inputs:
    """Logits of eight texts; the last is shorter, and differs in length between the sides.

    In each row eight entries stand far above the others, and apart from each other: columns whose
    masses are as good as equal would be ranked by roundoff.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = 8, tokens
    logits, labels = [], []
    for width in (vocabularies.student, vocabularies.teacher):
        rows = torch.empty(*size, width, dtype=dtype, device=device)
        rows.normal_(0.0, 3.0, generator=generator)
        ids = torch.randint(width, (*size, 8), generator=generator, device=device)
        heights = torch.rand(ids.shape, generator=generator, device=device)
        heights += 15.0 + 1.25 * torch.arange(8, device=device)
        logits.append(rows.scatter_(2, ids, heights.to(dtype)))
        labels.append(torch.randint(width, size, generator=generator, device=device))
        labels[-1][-1, tokens // 2 + len(labels) :] = -100
    return Inputs(
        student_logits=logits[0].requires_grad_(),
        student_labels=labels[0],
        teacher_labels=labels[1],
        chunk_ids=torch.arange(tokens, device=device).expand(size),
        pair=SharingPair(vocabularies, seed),
        teacher_logits=logits[1],
        stored=None,
    )


def moved(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The same on a device, as a leaf of its own."""
    student_logits = inputs.student_logits.detach().to(device, dtype, copy=True)
    return replace(
        inputs,
        student_logits=student_logits.requires_grad_(),
        teacher_logits=inputs.teacher_logits.to(device, dtype),
        student_labels=inputs.student_labels.to(device),
        teacher_labels=inputs.teacher_labels.to(device),
        chunk_ids=inputs.chunk_ids.to(device),
    )


def loss_for(inputs: Inputs, name: str, **settings: object) -> Loss:
    return get_loss(name, pair=inputs.pair, **settings).to(inputs.student_labels.device)


def answers(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Value, parts and gradient; the latter is taken from the leaf."""
    output = loss(inputs.batch(stored=False))
    output.value.backward()
    gradient, inputs.student_logits.grad = inputs.student_logits.grad, None
    parts = [output.parts[name] for name in sorted(output.parts)]
    return output.value.detach(), torch.stack(parts), gradient


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
