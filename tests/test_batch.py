"""Sides and batches: the one place that shifts and packs, and what it refuses."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctkd.batch import IGNORE_INDEX, Batch, Side
from ctkd.errors import BatchError
from ctkd.logits import DenseLogits
from ctkd.testing import make_inputs

# One row per layout: prompt and padding on the right, padding on the left, an answer with a hole
# (a dialogue of two turns), nothing scored, everything scored but position 0.
LABELS = torch.tensor(
    [
        [-100, -100, 3, 4, 2, -100],
        [-100, -100, -100, -100, 1, 5],
        [-100, 6, 2, -100, -100, 3],
        [-100, -100, -100, -100, -100, -100],
        [5, 1, 2, 3, 4, 5],
    ]
)
SIZES = LABELS.shape
# Shifted: logits[i] predicts labels[i + 1].
CAUSAL_ROWS = [[1, 2, 3], [3, 4], [0, 1, 4], [], [0, 1, 2, 3, 4]]
PLAIN_ROWS = [[2, 3, 4], [4, 5], [1, 2, 5], [], [0, 1, 2, 3, 4, 5]]
BUILDERS = [(Side.from_causal_lm, CAUSAL_ROWS, 1), (Side.from_encoder_decoder, PLAIN_ROWS, 0)]
by_builder = pytest.mark.parametrize(
    ("build", "rows", "shift"), BUILDERS, ids=["causal_lm", "encoder_decoder"]
)


def make_logits(width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*SIZES, width, generator=generator, dtype=torch.float64)


def a_side(**changes) -> dict:
    arguments = {
        "logits": torch.zeros(2, 3, 5),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64),
        "mask": torch.tensor([[True, True, False], [False, False, False]]),
    }
    return {**arguments, **changes}


@by_builder
def test_scored_rows_are_shifted_and_packed_in_order(build, rows, shift):
    logits = make_logits()
    chunk_ids = torch.arange(SIZES[1]).expand(SIZES) + 10 * torch.arange(SIZES[0]).unsqueeze(1)
    hidden = torch.randn(*SIZES, 3)
    side = build(logits, LABELS, chunk_ids=chunk_ids, hidden=hidden)
    assert side.logits.shape == (*side.mask.shape, 7)
    assert side.mask.shape == (SIZES[0], SIZES[1] - shift)
    every_id = torch.arange(7).expand(SIZES[0], 1, 7)
    log_probs = side.logits.log_probs(every_id)
    for b, row in enumerate(rows):
        n = len(row)
        predicted = [i + shift for i in row]
        assert side.mask[b].tolist() == [True] * n + [False] * (side.mask.shape[1] - n)
        assert side.token_ids[b].tolist() == [*LABELS[b, predicted], *[0] * (len(side.mask[b]) - n)]
        assert side.chunk_ids[b, :n].tolist() == chunk_ids[b, predicted].tolist()
        assert (side.chunk_ids[b, n:] == -1).all()
        assert torch.equal(side.hidden[b, :n], hidden[b, row])
        torch.testing.assert_close(log_probs[b, :n], logits[b, row].log_softmax(-1))
        assert (log_probs[b, n:] == 0).all()


@by_builder
def test_the_gradient_returns_to_the_rows_it_came_from(build, rows, shift):
    logits = make_logits().requires_grad_()
    side = build(logits, LABELS)
    side.logits.log_probs(side.token_ids.unsqueeze(-1)).sum().backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert [row.nonzero().flatten().tolist() for row in touched] == rows
    for b, row in enumerate(rows):
        for i in row:
            target = torch.nn.functional.one_hot(LABELS[b, i + shift], 7)
            torch.testing.assert_close(logits.grad[b, i], target - logits[b, i].softmax(-1))


@by_builder
def test_max_scored_is_the_number_of_positions(build, rows, shift):
    longest = max(map(len, rows))
    for max_scored in (longest, longest + 1, 100):
        side = build(make_logits(), LABELS, max_scored=max_scored)
        assert side.mask.shape[1] == min(max_scored, SIZES[1] - shift)
        assert side.mask.sum(1).tolist() == [len(row) for row in rows]
    message = f"a sequence scores {longest} tokens, max_scored is {longest - 1}; give the largest"
    with pytest.raises(BatchError, match=message):
        build(make_logits(), LABELS, max_scored=longest - 1)


def test_the_label_of_position_0_is_never_predicted():
    labels = torch.full((1, 4), -100)
    changed = labels.clone()
    changed[0, 0] = 3
    for row in (labels, changed):
        assert not Side.from_causal_lm(torch.zeros(1, 4, 5), row).mask.any()


def test_logits_are_indexed_not_copied():
    logits = make_logits(9)
    side = Side.from_causal_lm(logits, LABELS, vocab_size=7)
    assert side.logits.tensor is logits
    assert side.logits.shape[2] == 7


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_of_another_vocabulary_are_refused(wrong):
    labels = LABELS.clone()
    labels[0, 2] = wrong
    with pytest.raises(BatchError, match="but the logits have 7 columns; these labels belong to"):
        Side.from_causal_lm(make_logits(), labels)
    with pytest.raises(BatchError, match="but the logits have 7 columns; these labels belong to"):
        Side.from_causal_lm(make_logits(9), labels, vocab_size=7)


def test_labels_are_left_alone():
    labels = LABELS.clone()
    Side.from_causal_lm(make_logits(), labels)
    assert torch.equal(labels, LABELS)
    assert IGNORE_INDEX == -100


def test_where_a_look_would_wait_nothing_is_checked():
    side = Side.from_causal_lm(make_logits().to("meta"), LABELS.to("meta"), max_scored=1)
    assert side.mask.shape == (SIZES[0], 1)
    Side(**{name: value.to("meta") for name, value in a_side().items()})


def test_a_batch_from_four_tensors_is_that_of_its_sides():
    teacher_labels = LABELS.flip(0)
    settings = {"chunk_ids": LABELS, "hidden": torch.randn(*SIZES, 2), "max_scored": 5}
    batch = Batch.from_causal_lm(
        student_logits=make_logits(8),
        student_labels=LABELS,
        teacher_logits=make_logits(9),
        teacher_labels=teacher_labels,
        **{f"student_{name}": value for name, value in settings.items()},
        student_vocab_size=7,
        teacher_vocab_size=8,
        teacher_max_scored=6,
        num_chunks=8,
    )
    student = Side.from_causal_lm(make_logits(8), LABELS, vocab_size=7, **settings)
    for field in ("token_ids", "mask", "chunk_ids", "hidden"):
        assert torch.equal(getattr(batch.student, field), getattr(student, field))
    assert batch.student.logits.shape == (5, 5, 7)
    assert batch.teacher.logits.shape == (5, 5, 8)
    assert batch.teacher.mask.sum(1).tolist() == [5, 0, 3, 2, 3]
    assert batch.teacher.chunk_ids is None and batch.teacher.hidden is None
    assert batch.num_chunks == 8


def test_there_are_at_most_as_many_chunks_as_positions_on_the_longer_side():
    sides = {
        "student": Side.from_causal_lm(make_logits(), LABELS, max_scored=5),
        "teacher": Side.from_causal_lm(make_logits()[:, :4], LABELS[:, :4]),
    }
    assert Batch(**sides).num_chunks == 5
    assert Batch(**sides, num_chunks=2).num_chunks == 2


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_chunk_numbers_past_the_last_chunk_are_refused(side):
    inputs = make_inputs()
    inputs[f"{side}_chunk_ids"][0, 4] = 3
    with pytest.raises(BatchError, match=f"the {side}'s chunk_ids go up to 3, but num_chunks is 3"):
        Batch.from_causal_lm(**inputs)


def test_the_teacher_has_its_own_chunks_and_hidden_states():
    hidden = torch.randn(*SIZES, 2)
    batch = Batch.from_causal_lm(
        student_logits=make_logits(),
        student_labels=LABELS,
        teacher_logits=make_logits(),
        teacher_labels=LABELS,
        teacher_chunk_ids=LABELS,
        teacher_hidden=hidden,
        num_chunks=8,
    )
    assert batch.student.chunk_ids is None and batch.student.hidden is None
    assert torch.equal(batch.teacher.chunk_ids[0, :3], torch.tensor([3, 4, 2]))
    assert torch.equal(batch.teacher.hidden[0, :3], hidden[0, 1:4])


def test_a_side_takes_a_tensor_or_logits():
    arguments = a_side()
    plain = Side(**arguments)
    assert torch.equal(plain.logits.mask, arguments["mask"])
    wrapped = Side(**a_side(logits=DenseLogits(arguments["logits"], vocab_size=4)))
    assert wrapped.logits.shape == (2, 3, 4)
    assert torch.equal(wrapped.logits.mask, arguments["mask"])
    same_mask = DenseLogits(arguments["logits"], mask=arguments["mask"])
    assert Side(**a_side(logits=same_mask, mask=arguments["mask"])).logits is same_mask


def test_sides_and_batches_are_frozen_and_take_names_only():
    side = Side(**a_side())
    batch = Batch(student=side, teacher=side)
    for thing, field in ((side, "mask"), (batch, "student")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
    with pytest.raises(TypeError):
        Batch(side, side)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2, 3)}, "mask must be a bool tensor, got torch.float32"),
        (
            {"mask": torch.tensor([[True, True, False], [True, False, True]])},
            "mask must be True on the first positions of each row .* Side.from_causal_lm packs",
        ),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be .*\(2, 3\), got \(2, 4\)"),
        ({"token_ids": torch.zeros(2, 3)}, "token_ids must be int64, got torch.float32"),
        (
            {"token_ids": torch.zeros(2, 2, dtype=torch.int64)},
            r"token_ids must be \(B, S\) with .* \(2, 3\), got \(2, 2\)",
        ),
        (
            {"token_ids": torch.zeros(2, 3, 1, dtype=torch.int64)},
            r"token_ids must be \(B, S\) with .* \(2, 3\), got \(2, 3, 1\)",
        ),
        ({"chunk_ids": torch.zeros(2, 3)}, "chunk_ids must be int64, got torch.float32"),
        ({"chunk_ids": torch.zeros(3, 3).long()}, r"chunk_ids must be \(B, S\) with"),
        ({"hidden": torch.zeros(2, 3)}, r"hidden must be \(B, S, H\) with .* got \(2, 3\)"),
        ({"hidden": torch.zeros(2, 4, 8)}, r"hidden must be \(B, S, H\) with .* got \(2, 4, 8\)"),
        (
            {"token_ids": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            "token_ids is on meta, the logits on cpu; move both to one device",
        ),
        ({"logits": torch.zeros(2, 3, 5, device="meta")}, "mask is on cpu, the logits on meta"),
        ({"logits": torch.zeros(2, 3)}, r"logits must be \(B, S, V\), got \(2, 3\)"),
    ],
)
def test_a_side_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(BatchError, match=message):
        Side(**a_side(**changes))


@by_builder
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(5, 5, 7)}, r"logits must be \(B, L, V\) and labels \(B, L\), got"),
        ({"logits": torch.zeros(5, 6)}, r"got \(5, 6\) and \(5, 6\)"),
        ({"labels": LABELS[0]}, r"got \(5, 6, 7\) and \(6,\)"),
        ({"labels": LABELS.int()}, "labels must be int64, got torch.int32"),
        ({"chunk_ids": LABELS[:, 1:]}, r"chunk_ids must be laid out as the labels, \(5, 6\), got"),
        ({"hidden": torch.zeros(5, 5, 2)}, "hidden must be laid out as the labels"),
        ({"vocab_size": 8}, "the tokenizer has 8 tokens, but the logits only 7 columns"),
    ],
)
def test_labels_that_do_not_fit_are_refused(build, rows, shift, changes, message):
    with pytest.raises(BatchError, match=message):
        build(**{"logits": make_logits(), "labels": LABELS, **changes})


def test_sides_that_do_not_belong_together_are_refused():
    side = Side(**a_side())
    first = Side(**{name: value[:1] for name, value in a_side().items()})
    with pytest.raises(BatchError, match="must hold the same sequences, got 2 and 1"):
        Batch(student=side, teacher=first)
    elsewhere = Side(**{name: value.to("meta") for name, value in a_side().items()})
    with pytest.raises(BatchError, match="the student is on cpu, the teacher on meta; move both"):
        Batch(student=side, teacher=elsewhere)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((1, 3, 5))}, "logits must be a torch.Tensor or ctkd.HeadLogits, got"),
        ({"logits": [[0.0]]}, "got list; make one with torch.as_tensor"),
        ({"logits": SimpleNamespace(logits=1)}, "got SimpleNamespace; give its .logits"),
        (
            {"labels": [[1, 2, 3]]},
            "labels must be a torch.Tensor, got list; make one",
        ),
        ({"labels": None}, "labels must be a torch.Tensor, got NoneType$"),
        ({"chunk_ids": [[0, 0, 1]]}, "chunk_ids must be a torch.Tensor, got list"),
        ({"hidden": "hidden"}, "hidden must be a torch.Tensor, got str"),
    ],
)
@pytest.mark.parametrize("build", [Side.from_causal_lm, Side.from_encoder_decoder])
def test_what_is_no_tensor_is_named(build, changes, message):
    given = {"logits": torch.zeros(1, 3, 5), "labels": torch.ones(1, 3, dtype=torch.int64)}
    with pytest.raises(BatchError, match=message):
        build(**{**given, **changes})
