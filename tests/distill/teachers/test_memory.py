"""A remembered teacher says what the live one says, and is asked once."""

from dataclasses import replace

import pytest
import torch

from ctkd.batch import Side
from ctkd.distill.data.collator import padded_sides, padding_id, stored_side
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.teachers.memory import KnownStates, TeacherMemory, memory_bytes
from tests.distill.tiny import Setup


@pytest.mark.parametrize("score_eos", [False, True])
def test_its_log_probabilities_are_the_live_teachers(score_eos):
    setup = Setup(5, score_eos=score_eos)
    # The student's head is wider than its tokenizer, which makes it the harder teacher.
    model, sides = setup.student, [row.student for row in setup.rows]
    pad, width = padding_id(setup.student_tokenizer), len(setup.student_tokenizer)
    logits = ModelLogits(model)
    memory = TeacherMemory(
        logits, sides, pad_id=pad, score_eos=score_eos, vocab_size=width, batch_size=2
    )
    # In another order and beside other rows than they were read.
    chosen = [sides[4], sides[0], sides[3]]
    inputs, labels = padded_sides(chosen, pad, with_eos=score_eos)
    with torch.no_grad():
        whole = model(**inputs).logits[:, -labels.shape[1] :]
        live = Side.from_causal_lm(whole, labels, vocab_size=width)
        kept = memory.batch(chosen, labels.shape[1] - 1)
        stored = stored_side(memory, kept, labels)
        every = torch.arange(width).expand(*live.mask.shape, width)
        expected = live.logits.log_probs(every)[live.mask]
        found = stored.logits.log_probs(every)[stored.mask]
    assert torch.equal(live.mask, stored.mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    positions = sum(
        len(side.answer_ids) + (score_eos and side.eos_id is not None) for side in sides
    )
    # The same ids with and without an end are two rows.
    cut = replace(sides[0], eos_id=None)
    both = TeacherMemory(logits, [sides[0], cut], pad_id=pad, score_eos=score_eos)
    longest = len(cut.answer_ids) + score_eos
    ends = both.batch([sides[0], cut], longest)["hidden"][:, -1].abs().sum(-1) > 0
    assert ends.tolist() == [True, not score_eos]
    assert memory_bytes(model, sides, score_eos=score_eos) == positions * 16 * 8


def test_rows_are_read_once_by_memories_that_know_of_each_other(monkeypatch):
    setup = Setup(5)
    sides, read = [row.student for row in setup.rows], []
    logits = ModelLogits(setup.student)
    hidden = ModelLogits.hidden
    monkeypatch.setattr(ModelLogits, "hidden", lambda *a: read.append(len(a[2])) or hidden(*a))
    known = KnownStates()
    pad = padding_id(setup.student_tokenizer)

    def states(sides, batch_size):
        memory = TeacherMemory(logits, sides, pad_id=pad, batch_size=batch_size, known=known)
        return memory.batch(sides[:2], 4)["hidden"]

    first = states(sides, 2)
    assert torch.equal(states(sides, 2), first) and len(read) == 3
    # Other rows, or other batches, are read anew, and one set is kept.
    for others, batch_size, passes in ((sides[:4], 2, 2), (sides, 2, 3), (sides, 5, 1)):
        read.clear()
        states(others, batch_size)
        assert len(read) == passes and len(known.states) == len(others)
    # A reading that was stopped leaves nothing behind.
    monkeypatch.setattr(ModelLogits, "hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        states(sides[1:], 2)
    assert states(sides, 5).shape == first.shape


def test_whole_rows_are_made_once_for_states_and_a_head(tmp_path, monkeypatch):
    setup = Setup(5)
    sides, pad = [row.student for row in setup.rows], padding_id(setup.student_tokenizer)
    logits, width = ModelLogits(setup.student), len(setup.student_tokenizer)

    def rows(folder):
        known = KnownStates(rows_folder=folder)
        memory = TeacherMemory(logits, sides, pad_id=pad, vocab_size=width, known=known)
        # A row twice, and places for more tokens than the last row has.
        chosen = [sides[3], sides[4], sides[3]]
        sizes = torch.tensor([len(side.answer_ids) for side in chosen])
        mask = torch.arange(9) < sizes.unsqueeze(1)
        every = torch.arange(width).expand(3, 9, width)
        kept = memory.logits(memory.batch(chosen, 9), mask)
        assert torch.equal(kept.mask, mask)
        return kept.log_probs(every)[mask]

    expected = rows(None)
    torch.testing.assert_close(rows(tmp_path), expected, rtol=0, atol=1e-12)
    made = {one for one in tmp_path.iterdir() if one.is_dir()}
    assert len(made) == 1
    # Another process, or a later run, finds them.
    with monkeypatch.context() as patch:
        patch.setattr("ctkd.distill.teachers.memory.building", lambda _: 1 / 0)
        torch.testing.assert_close(rows(tmp_path), expected, rtol=0, atol=1e-12)
    # What was damaged is made again.
    (file,) = tmp_path.glob("rows-*/logits")
    file.write_bytes(file.read_bytes()[:-8])
    torch.testing.assert_close(rows(tmp_path), expected, rtol=0, atol=1e-12)
    # Rows of another head are others.
    with torch.no_grad():
        setup.student.get_output_embeddings().weight.mul_(2.0)
    torch.testing.assert_close(rows(tmp_path), rows(None), rtol=0, atol=1e-12)
    assert len([one for one in tmp_path.iterdir() if one.is_dir()]) == 2
