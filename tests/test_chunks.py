"""What tensors say of chunks, against loops over one token after the other."""

import pytest
import torch

from ctkd.batch import Batch
from ctkd.chunks import (
    align_positions,
    chunk_sums,
    chunk_table,
    chunk_tables,
    chunks_on_both_sides,
)
from ctkd.errors import BatchError
from tests.ragged_batches import ragged_inputs

SEEDS = range(6)


def a_batch(seed: int) -> Batch:
    return Batch.from_causal_lm(**ragged_inputs(seed, student_lengths=(6, 3, 4)))


def positions_of(side, b: int, chunk: int) -> list[int]:
    return [
        i
        for i in range(side.mask.shape[1])
        if bool(side.mask[b, i]) and int(side.chunk_ids[b, i]) == chunk
    ]


def every_chunk(batch: Batch):
    for b in range(len(batch.student.mask)):
        for chunk in range(batch.num_chunks):
            sides = batch.student, batch.teacher
            yield b, chunk, *(positions_of(side, b, chunk) for side in sides)


@pytest.mark.parametrize("seed", SEEDS)
def test_sizes_ends_and_sums(seed):
    batch = a_batch(seed)
    for which, side in ((0, batch.student), (1, batch.teacher)):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(side.mask.shape, generator=generator, dtype=torch.float64)
        values[~side.mask] = torch.nan
        values.requires_grad_()
        sizes, first, last = chunk_table(side, batch.num_chunks)
        sums, counts = chunk_sums(side, values, batch.num_chunks)
        assert torch.equal(counts, sizes)
        for b, chunk, *both in every_chunk(batch):
            found = both[which]
            assert sizes[b, chunk] == len(found)
            expected = sum((float(values[b, i].detach()) for i in found), 0.0)
            torch.testing.assert_close(sums[b, chunk].item(), expected)
            assert first[b, chunk] == (found[0] if found else 0)
            assert last[b, chunk] == (found[-1] if found else 0)
        (gradient,) = torch.autograd.grad(sums.sum(), values)
        in_chunk = side.mask & (side.chunk_ids >= 0)
        assert torch.equal(gradient, in_chunk.double())


@pytest.mark.parametrize("seed", SEEDS)
def test_what_both_sides_have(seed):
    batch = a_batch(seed)
    shared, tables = chunks_on_both_sides(batch), chunk_tables(batch)
    rows = align_positions(batch, "chunk").flattened(batch).view(*shared.shape, 2)
    width = [side.mask.shape[1] for side in (batch.student, batch.teacher)]
    seen = 0
    for b, chunk, student, teacher in every_chunk(batch):
        assert shared[b, chunk] == bool(student and teacher)
        assert [one.sizes[b, chunk] for one in tables] == [len(student), len(teacher)]
        if student and teacher:
            seen += 1
            assert rows[b, chunk].tolist() == [b * width[0] + student[0], b * width[1] + teacher[0]]
        else:
            assert rows[b, chunk].tolist() == [-1, -1]
    assert seen > 0


def test_equal_positions_are_aligned():
    batch = a_batch(0)
    aligned = align_positions(batch)
    assert aligned.valid.sum(1).tolist() == [4, 3, 0]
    assert torch.equal(aligned.student, aligned.teacher)
    assert aligned.student[0].tolist()[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("pairing", ["position", "chunk"])
def test_values_go_from_positions_to_aligned_and_back(pairing):
    batch = a_batch(1)
    aligned = align_positions(batch, pairing)
    size = batch.student.mask.shape[1]
    values = torch.arange(1.0, 1 + 3 * size).view(3, size, 1).expand(-1, -1, 2)
    picked = aligned.of_student(values)
    for b in range(3):
        for p in range(aligned.valid.shape[1]):
            if aligned.valid[b, p]:
                assert torch.equal(picked[b, p], values[b, aligned.student[b, p]])
    back = aligned.at_student_positions(picked, size)
    used = aligned.at_student_positions(aligned.valid, size)
    partner = aligned.teacher_of_student(size)
    assert torch.equal(partner >= 0, used)
    for b, p in aligned.valid.nonzero().tolist():
        assert partner[b, aligned.student[b, p]] == aligned.teacher[b, p]
    assert used.sum() == aligned.valid.sum() > 0
    assert torch.equal(back[used], values[used]) and (back[~used] == 0).all()


def test_an_empty_side_has_no_aligned():
    inputs = ragged_inputs(2)
    inputs["teacher_labels"].fill_(-100)
    batch = Batch.from_causal_lm(**inputs, teacher_max_scored=0)
    for pairing in ("position", "chunk"):
        aligned = align_positions(batch, pairing)
        assert not aligned.valid.any() and (aligned.flattened(batch) == -1).all()
        assert aligned.of_teacher(torch.zeros(3, 0, 4)).shape == (*aligned.valid.shape, 4)


def test_a_batch_without_chunks_says_how_to_get_them():
    inputs = ragged_inputs(3)
    del inputs["teacher_chunk_ids"]
    with pytest.raises(BatchError, match=r"no chunk_ids; align the two sides with .*TokenizerPair"):
        chunks_on_both_sides(Batch.from_causal_lm(**inputs))
