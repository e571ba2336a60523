"""Every loss on a device: against float64, repeated, recomputed, captured, and on streams."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ctkd
from benchmarks.peak_process import Heads
from tests.cuda.device import (
    ALIGNED,
    DEVICE,
    ODD,
    ON_CUDA,
    answers,
    assert_equal,
    loss_for,
    make_inputs,
    moved,
)

pytestmark = pytest.mark.cuda

CPU = torch.device("cpu")
FORMS = [(name, {}) for name in ctkd.list_losses()]
FORMS += [
    ("uld", {"top_k": 30}),
    ("multilevelot", {"pairing": "chunk"}),
    ("shared_kl", {"rest": "class", "direction": "jsd"}),
]
by_form = pytest.mark.parametrize(("name", "settings"), FORMS, ids=str)
by_name = pytest.mark.parametrize("name", ctkd.list_losses())
on_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")

# A gradient is rounded to its dtype once, and once more when it is weighted.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# An exponential of logits up to 24 is off by 2^-24 times as many, and more in sums and in Sinkhorn
# with its twenty iterations on costs over a regularization of 0.1.
RELATIVE = 1e-4


def assert_near(gradient, exact, dtype) -> None:
    """Entries may be off by their own rounding, and by a part of the largest of their row."""
    largest = exact.abs().amax(-1, keepdim=True)
    # Sums of all of a row's terms, which may cancel, are right to a unit of float32; float16 has
    # its smallest numbers there.
    allowed = ROUNDING[dtype] * exact.abs() + RELATIVE * largest + 2.0**-23
    error = (gradient.cpu().double() - exact).abs()
    is_wrong = error > allowed
    assert not is_wrong.any(), (error.max(), largest.max(), is_wrong.nonzero()[:8])


@by_form
def test_values_and_gradients_are_those_of_float64(name, settings):
    for vocabularies, dtype in (
        (ALIGNED, torch.bfloat16),
        (ODD, torch.float32),
        (ODD, torch.float16),
    ):
        inputs = make_inputs(vocabularies, dtype, tokens=4, device=CPU)
        exact = moved(inputs, CPU, torch.float64)
        expected = answers(loss_for(exact, name, **settings), exact)
        inputs = moved(inputs, DEVICE, dtype)
        found = answers(loss_for(inputs, name, **settings), inputs)
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one.cpu().double(), other, rtol=RELATIVE, atol=1e-6)
        assert_near(found[2], expected[2], dtype)


@by_name
def test_gradients_of_a_head_are_those_of_float64(name):
    found = []
    for device, dtype in ((CPU, torch.float64), (DEVICE, torch.float32)):
        heads = Heads(ODD, 2, 4, 32, torch.float32)
        for tensors in (heads.hidden, heads.weights):
            tensors[:] = [one.detach().to(device, dtype).requires_grad_() for one in tensors]
        heads.labels = [one.to(device) for one in heads.labels]
        heads.chunk_ids = heads.chunk_ids.to(device)
        value = heads.in_blocks(name)
        value.backward()
        found.append((value.detach(), heads.hidden[0].grad, heads.weights[0].grad))
    expected, (value, *gradients) = found
    torch.testing.assert_close(value.cpu().double(), expected[0], rtol=RELATIVE, atol=1e-6)
    for one, other in zip(gradients, expected[1:], strict=True):
        assert_near(one.flatten(), other.flatten(), torch.float32)


@by_name
def test_repeated_runs_are_equal(name):
    for vocabularies, dtype in ((ALIGNED, torch.bfloat16), (ODD, torch.float32)):
        inputs = make_inputs(vocabularies, dtype)
        loss = loss_for(inputs, name)
        first = answers(loss, inputs)
        for _ in range(3):
            assert_equal(answers(loss, inputs), first)


@by_name
def test_what_is_recomputed_is_equal(name):
    inputs = make_inputs(ALIGNED, torch.bfloat16)
    loss, logits = loss_for(inputs, name), inputs.student_logits
    value, _, gradient = answers(loss, inputs)

    def run(_):
        return loss(inputs.batch(stored=False)).value

    for use_reentrant in (False, True):
        again = checkpoint(run, logits, use_reentrant=use_reentrant)
        again.backward()
        found, logits.grad = logits.grad, None
        assert_equal((again.detach(), found), (value, gradient))


@on_cuda
@by_name
def test_a_captured_step_can_be_replayed(name):
    inputs, others = (make_inputs(ALIGNED, torch.bfloat16, seed=seed) for seed in (0, 1))
    loss = loss_for(inputs, name)
    others = replace(
        inputs, student_logits=others.student_logits, teacher_logits=others.teacher_logits
    )
    expected = answers(loss, others)
    # As before every capture: once on another stream, where kernels are compiled.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        answers(loss, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    # Built before, but not asked before: it keeps what it was asked.
    batch = inputs.batch(stored=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(batch).value
        value.backward()
    with torch.no_grad():
        inputs.student_logits.copy_(others.student_logits)
        inputs.teacher_logits.copy_(others.teacher_logits)
    graph.replay()
    assert_equal((value.detach(), inputs.student_logits.grad), (expected[0], expected[2]))


@on_cuda
@by_name
def test_streams_do_not_disturb_each_other(name):
    both = [make_inputs(ALIGNED, torch.bfloat16, seed=seed) for seed in (0, 1)]
    losses = [loss_for(both[0], name), loss_for(both[1], "multilevelot")]
    expected = [answers(loss, inputs) for loss, inputs in zip(losses, both, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = [[], []]
    for _ in range(4):
        for kept, stream, loss, inputs in zip(found, streams, losses, both, strict=True):
            with torch.cuda.stream(stream):
                kept.append(answers(loss, inputs))
    torch.cuda.synchronize()
    for kept, one in zip(found, expected, strict=True):
        for again in kept:
            assert_equal(again, one)


@on_cuda
@by_name
def test_a_backward_pass_may_be_started_on_another_stream(name):
    inputs = make_inputs(ALIGNED, torch.bfloat16)
    loss = loss_for(inputs, name)
    expected = answers(loss, inputs)
    stream = torch.cuda.Stream()
    value = loss(inputs.batch(stored=False)).value
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value.backward()
    # Autograd has the leaf's gradient ready for the stream that asked for it.
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal((value.detach(), inputs.student_logits.grad), (expected[0], expected[2]))
