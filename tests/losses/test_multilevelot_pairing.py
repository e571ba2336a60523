"""MultiLevelOT between positions at which both models have read the same bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ctkd
from baselines import multilevelot, sinkhorn
from tests.ragged_batches import answer_rows, chunk_starts, loss_and_gradient, ragged_inputs

WEIGHTS = {"had_weight": 0.7, "sl_weight": 0.3, "sd_weight": 0.2}


def oracle(inputs: dict, matching: str) -> Tensor:
    """HAD and SL over the starts of chunks, SD over all positions, per student token."""
    starts = chunk_starts(inputs)
    total = torch.zeros((), dtype=torch.float64)
    sides = answer_rows(inputs, "student"), answer_rows(inputs, "teacher")
    for student, teacher, *pairs in zip(*sides, starts["student"], starts["teacher"], strict=True):
        if len(student) == 0 or len(teacher) == 0:
            continue
        student_probs, teacher_probs = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
        columns, partners = multilevelot.match(
            student_probs, teacher_probs, k=4, matching=matching, candidates=6, pairs=tuple(pairs)
        )
        had = multilevelot.absolute_difference(
            teacher_probs[pairs[1]][:, columns],
            multilevelot.student_kept(student_probs[pairs[0]], partners),
        )
        sl = multilevelot.cross_entropy(
            teacher_probs[pairs[1]][:, columns],
            F.log_softmax(student, dim=1)[pairs[0]],
            partners,
        )
        cost = multilevelot.sequence_cost(
            F.softmax(teacher / 2.0, dim=1)[:, columns],
            multilevelot.student_kept(F.softmax(student / 2.0, dim=1), partners),
        )
        sd = (sinkhorn.plan(cost, 0.1, 20) * cost).sum()
        total = total + 0.7 * had + 0.3 * sl + 0.2 * sd
    return total / (inputs["student_labels"] != -100).sum()


@pytest.mark.parametrize("matching", ["mass", "greedy", "assignment", "assignment_topk"])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_are_paired_as_the_oracle_pairs_them(matching, seed):
    inputs = ragged_inputs(seed, student_lengths=(14, 9, 4), teacher_lengths=(12, 11, 0), V=9, W=7)
    settings = {**WEIGHTS, "k": 4, "matching": matching, "candidates": 6}
    loss = ctkd.get_loss("multilevelot", pairing="chunk", **settings)
    value, _, gradient = loss_and_gradient(loss, inputs)
    inputs["student_logits"].requires_grad_()
    expected = oracle(inputs, matching)
    (expected_gradient,) = torch.autograd.grad(expected, inputs["student_logits"])
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    by_position = ctkd.get_loss("multilevelot", **settings)
    assert loss_and_gradient(by_position, inputs)[0] != value


def test_the_sequence_term_has_no_positions_to_pair():
    inputs = ragged_inputs(0)
    values = [
        loss_and_gradient(ctkd.get_loss("multilevelot_sequence", pairing=pairing), inputs)[0]
        for pairing in ("position", "chunk")
    ]
    assert values[0] == values[1]
