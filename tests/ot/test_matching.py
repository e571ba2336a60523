"""Which columns are compared, against the oracle and by rules worked out by hand."""

import itertools

import pytest
import torch
from torch import Tensor

from baselines import multilevelot
from ctkd.batch import Batch
from ctkd.chunks import align_positions
from ctkd.errors import BatchError
from ctkd.losses.multilevelot import MultiLevelOT
from ctkd.ot.matching import (
    MATCHINGS,
    match_by_assignment,
    match_by_mass,
    match_greedily,
    match_top_by_assignment,
)
from tests.ragged_batches import answer_rows, ragged_inputs, side_of

MATCHERS = {
    "mass": (match_by_mass, {}),
    "greedy": (match_greedily, {}),
    "assignment": (match_by_assignment, {"max_columns": 100}),
    "assignment_topk": (match_top_by_assignment, {"candidates": 6}),
}
by_matching = pytest.mark.parametrize("matching", MATCHINGS)


def from_probs(student: list[list[float]], teacher: list[list[float]]) -> Batch:
    """One sequence, from probabilities that are exact in binary."""
    return Batch(
        student=side_of(torch.tensor(student, dtype=torch.float64).log()),
        teacher=side_of(torch.tensor(teacher, dtype=torch.float64).log()),
    )


def match(matching: str, batch: Batch, **settings):
    function, own = MATCHERS[matching]
    return function(batch, **{"temperature": 1.0, **own, **settings})


def long_inputs(seed: int, **settings) -> dict:
    """Enough positions that a best assignment is unique."""
    lengths = {"student_lengths": (14, 12), "teacher_lengths": (13, 15)}
    return ragged_inputs(seed, **{**lengths, **settings})


# Any two of matching, k, temperature and widths meet in all their values.
@pytest.mark.parametrize(
    ("matching", "k", "temperature", "widths"),
    [
        (
            matching,
            k,
            (1.0, 1.7)[(i + j) % 2],
            ({"V": 11, "W": 8}, {"V": 8, "W": 11})[(i + j // 2) % 2],
        )
        for i, matching in enumerate(MATCHINGS)
        for j, k in enumerate((1, 4, 8))
    ],
)
def test_the_oracle_finds_the_same_columns(matching, k, temperature, widths):
    for seed in (1, 2, 3):
        inputs = long_inputs(seed, **widths)
        result = match(matching, Batch.from_causal_lm(**inputs), k=k, temperature=temperature)
        for b, (student, teacher) in enumerate(
            zip(answer_rows(inputs, "student"), answer_rows(inputs, "teacher"), strict=True)
        ):
            teacher_ids, student_ids = multilevelot.match(
                (student / temperature).softmax(-1),
                (teacher / temperature).softmax(-1),
                k=k,
                matching=matching,
                candidates=6,
            )
            assert result.teacher_ids[b].tolist() == teacher_ids
            matched = [
                j if known else None
                for j, known in zip(result.student_ids[b].tolist(), result.matched[b], strict=True)
            ]
            assert matched == student_ids


@by_matching
def test_the_widest_teacher_meets_padding_only_in_the_full_assignment(matching):
    result = match(matching, Batch.from_causal_lm(**long_inputs(2, V=6, W=14)), k=6)
    assert result.matched.all() == (matching != "assignment")


def test_mass_ranks_each_side_alone_and_gives_ties_to_the_lower_id():
    student = [[0.25, 0.5, 0.125, 0.125], [0.25, 0.0, 0.375, 0.375]]
    batch = from_probs(student, [[0.125, 0.125, 0.5, 0.25]])
    result = match_by_mass(batch, k=4, temperature=1.0)
    assert result.student_ids.tolist() == [[0, 1, 2, 3]]
    assert result.teacher_ids.tolist() == [[2, 3, 0, 1]]
    assert result.matched.all()


def test_mass_counts_every_scored_position_not_only_paired_ones():
    batch = from_probs([[0.75, 0.25], [0.0, 1.0]], [[0.5, 0.5]])
    assert match_by_mass(batch, k=1, temperature=1.0).student_ids.tolist() == [[1]]


def test_greedy_takes_the_nearest_free_column_in_rank_order():
    # Teacher ranks: 0 (0.5), then 1 (0.375). Both are nearest to the student's column 2.
    batch = from_probs([[0.125, 0.0, 0.5, 0.375]], [[0.5, 0.375, 0.125]])
    assert match_greedily(batch, k=1, temperature=1.0).student_ids.tolist() == [[2]]
    assert match_greedily(batch, k=3, temperature=1.0).student_ids.tolist() == [[2, 3, 0]]
    # Equally near: the lower id, then the next.
    ties = from_probs([[0.25, 0.25, 0.25, 0.25]], [[0.5, 0.375, 0.125]])
    assert match_greedily(ties, k=3, temperature=1.0).student_ids.tolist() == [[0, 1, 2]]


def test_greedy_looks_at_paired_positions_only():
    # On the second student position, which has no partner, column 0 would be the nearest.
    batch = from_probs([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], [[0.5, 0.25, 0.25]])
    assert match_greedily(batch, k=1, temperature=1.0).student_ids.tolist() == [[1]]


def cost_of(result, student: Tensor, teacher: Tensor) -> float:
    gaps = teacher[:, result.teacher_ids[0]] - student[:, result.student_ids[0]]
    return gaps.abs().sum().item()


def test_assignments_are_the_best_of_all_choices():
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(9, 5, generator=generator, dtype=torch.float64).softmax(-1)
    teacher = torch.randn(9, 5, generator=generator, dtype=torch.float64).softmax(-1)
    batch = Batch(student=side_of(student.log()), teacher=side_of(teacher.log()))
    full = match_by_assignment(batch, k=5, temperature=1.0, max_columns=5)
    best = min(
        (teacher - student[:, list(order)]).abs().sum().item()
        for order in itertools.permutations(range(5))
    )
    assert cost_of(full, student, teacher) == pytest.approx(best, rel=1e-12)
    kept = match_by_assignment(batch, k=2, temperature=1.0, max_columns=5)
    assert torch.equal(kept.student_ids, full.student_ids[:, :2])
    topk = match_top_by_assignment(batch, k=2, temperature=1.0, candidates=5)
    best = min(
        (teacher[:, topk.teacher_ids[0]] - student[:, list(pair)]).abs().sum().item()
        for pair in itertools.permutations(range(5), 2)
    )
    assert cost_of(topk, student, teacher) == pytest.approx(best, rel=1e-12)


def test_candidates_are_the_heaviest_student_columns_and_at_least_k():
    batch = from_probs([[0.5, 0.25, 0.125, 0.125]], [[0.125, 0.875]])
    for candidates, expected in ((1, [[0, 1]]), (2, [[0, 1]]), (4, [[0, 2]])):
        result = match_top_by_assignment(batch, k=2, temperature=1.0, candidates=candidates)
        assert result.teacher_ids.tolist() == [[1, 0]]
        assert result.student_ids.tolist() == expected


def test_the_assignment_refuses_what_it_cannot_solve():
    batch = from_probs([[0.5, 0.25, 0.25]], [[0.5, 0.5]])
    message = "solves a 3 x 3 problem per sequence, max_columns allows 2; use matching 'greedy'"
    with pytest.raises(BatchError, match=message):
        match_by_assignment(batch, k=1, temperature=1.0, max_columns=2)
    with pytest.raises(BatchError, match=message):
        MultiLevelOT(matching="assignment", max_columns=2)(batch)
    assert match_by_assignment(batch, k=1, temperature=1.0, max_columns=3).matched.all()


@by_matching
def test_a_sequence_is_matched_as_if_alone(matching):
    inputs = long_inputs(4)
    whole = match(matching, Batch.from_causal_lm(**inputs), k=5)
    for b in range(2):
        alone = {n: v[b : b + 1] if isinstance(v, Tensor) else v for n, v in inputs.items()}
        single = match(matching, Batch.from_causal_lm(**alone), k=5)
        for field in ("student_ids", "teacher_ids", "matched"):
            assert torch.equal(getattr(whole, field)[b : b + 1], getattr(single, field))


@by_matching
def test_no_gradient_is_needed_and_none_is_made(matching):
    inputs = long_inputs(5)
    plain = match(matching, Batch.from_causal_lm(**inputs), k=5)
    for side in ("student", "teacher"):
        inputs[f"{side}_logits"].requires_grad_()
    result = match(matching, Batch.from_causal_lm(**inputs), k=5)
    assert torch.equal(result.student_ids, plain.student_ids)


@by_matching
def test_an_empty_side_is_matched_somehow(matching):
    """Nothing is compared there, so any columns will do, but their ids must be valid."""
    inputs = ragged_inputs(6, teacher_lengths=(0, 5, 0), student_lengths=(6, 0, 0))
    result = match(matching, Batch.from_causal_lm(**inputs), k=4)
    for ids, width in ((result.student_ids, 11), (result.teacher_ids, 8)):
        assert ids.shape == (3, 4) and (ids >= 0).all() and (ids < width).all()
        assert all(len(set(row)) == 4 for row in ids[result.matched.all(1)].tolist())


@by_matching
def test_a_device_that_reads_padding_finds_the_same(matching, monkeypatch, uninspected):
    batch = Batch.from_causal_lm(**long_inputs(7))
    expected = match(matching, batch, k=6)
    monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", "30")
    with uninspected():
        result = match(matching, Batch.from_causal_lm(**long_inputs(7)), k=6)
    assert torch.equal(result.student_ids, expected.student_ids)
    assert torch.equal(result.teacher_ids, expected.teacher_ids)


def test_paired_positions_are_the_first_of_both_sides():
    inputs = ragged_inputs(8, student_lengths=(6, 3, 4), teacher_lengths=(4, 5, 0))
    batch = Batch.from_causal_lm(**inputs)
    paired = align_positions(batch).valid
    assert paired.shape[1] == min(batch.student.mask.shape[1], batch.teacher.mask.shape[1])
    assert [row.nonzero().flatten().tolist() for row in paired] == [[0, 1, 2, 3], [0, 1, 2], []]


def test_every_matching_can_be_asked_for():
    assert set(MATCHERS) == set(MATCHINGS)
    batch = Batch.from_causal_lm(**long_inputs(9))
    for matching in MATCHINGS:
        loss = MultiLevelOT(k=5, matching=matching, candidates=6, max_columns=100)
        result = loss.match(batch)
        assert torch.equal(result.student_ids, match(matching, batch, k=5).student_ids)
