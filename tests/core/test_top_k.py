"""What `TopK` keeps, and what `TopK` and `TopKLogits` refuse."""

import math
import re

import pytest
import torch

from ctkd.dense_logits import DenseLogits
from ctkd.errors import BatchError, SettingError
from ctkd.row_pairs import map_row_pairs
from ctkd.top_k import TopK
from ctkd.top_k_logits import TopKLogits

PROBS = [[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]
LABELS = torch.tensor([[3, 0]])


def dense(**settings) -> DenseLogits:
    return DenseLogits(torch.tensor([PROBS], dtype=torch.float64).log(), **settings)


def kept(k: int = 2, temperatures=(1.0, 2.0)) -> TopK:
    return TopK.of(dense(), LABELS, k, temperatures)


def test_what_is_kept_of_a_row():
    found = kept()
    assert found.k == 2 and found.vocab_size == 4 and found.temperatures == (1.0, 2.0)
    assert found.ids.tolist() == [[[0, 2], [0, 1]]]
    torch.testing.assert_close(found.values[0, 0].exp().tolist(), [0.5, 0.3])
    torch.testing.assert_close(found.label_values.exp().tolist(), [[0.1, 0.25]])
    assert torch.equal(found.label_ids, LABELS)
    # Of the first row one column is left, of the second, whose label is kept, two.
    plain = found.log_rests[0, :, 0, 0].exp().tolist()
    torch.testing.assert_close(plain, [0.1, 0.5])
    root = math.sqrt(0.1) / (math.sqrt(0.5) + math.sqrt(0.3) + 2 * math.sqrt(0.1))
    torch.testing.assert_close(found.log_rests[0, 0, 0, 1].exp().item(), root)
    torch.testing.assert_close(found.log_normalisers[0, :, 0, 0].tolist(), [0.0, 0.0])
    torch.testing.assert_close(found.deviations, dense().tensor.std(-1))


def test_the_default_temperatures():
    assert TopK.of(dense(), LABELS, 1).temperatures == (1.0, 2.0)


def test_rows_that_are_not_scored_become_zeros():
    logits = torch.full((2, 3, 4), torch.nan)
    logits[0, :2] = torch.tensor(PROBS)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    labels = torch.tensor([[1, 1, -100], [-100, 99, -1]])
    found = TopK.of(DenseLogits(logits, mask=mask), labels, 3)
    for name, tensor in found.tensors().items():
        assert (tensor[~mask] == 0).all(), name
        assert tensor.isfinite().all(), name
    assert set(found.tensors()) == {
        "ids",
        "values",
        "label_ids",
        "label_values",
        "deviations",
        "log_normalisers",
        "log_rests",
    }


def test_a_padded_head_and_packed_rows_are_looked_through():
    wide = torch.full((1, 3, 6), 50.0, dtype=torch.float64)
    wide[0, [2, 0], :4] = dense().tensor[0]
    packed = DenseLogits(wide, rows=torch.tensor([[2, 0]]), mask=dense().mask, vocab_size=4)
    found = TopK.of(packed, LABELS, 2)
    for name, tensor in kept().tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    assert found.vocab_size == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_kept_in_float32(dtype):
    narrow = dense().tensor.to(dtype)
    found = TopK.of(DenseLogits(narrow), LABELS, 2)
    for name, tensor in found.tensors().items():
        assert tensor.dtype == (torch.int64 if "ids" in name else torch.float32), name
    assert TopKLogits(found).dtype == torch.float32
    assert torch.equal(found.values, narrow.float().gather(2, found.ids))


def test_other_rows_with_the_same_settings():
    found = kept()
    again = found.with_tensors({name: one[:, :1] for name, one in found.tensors().items()})
    assert (again.k, again.vocab_size, again.temperatures) == (2, 4, (1.0, 2.0))
    assert again.label_ids.tolist() == [[3]]


@pytest.mark.parametrize("k", [-1, 5, True, 2.0, "2", None])
def test_k_is_a_number_of_columns(k):
    with pytest.raises(
        SettingError, match=r"from 0 to the 4 columns .*, got " + re.escape(repr(k))
    ):
        TopK.of(dense(), LABELS, k)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan"), True, "1"])
def test_temperatures_are_above_zero(temperature):
    with pytest.raises(SettingError, match="a temperature to store must be a finite number above"):
        TopK.of(dense(), LABELS, 1, [1.0, temperature])


def test_a_temperature_is_needed():
    with pytest.raises(SettingError, match="at least one temperature must be stored, such as 1.0"):
        TopK.of(dense(), LABELS, 1, [])


@pytest.mark.parametrize("labels", [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2)])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(BatchError, match=r"label_ids must be \(B, S\) int64 .*\(1, 2\), got"):
        TopK.of(dense(), labels, 1)


@pytest.mark.parametrize("name", list(kept().tensors()))
@pytest.mark.parametrize("change", ["a position more", "a dimension more", "a sequence more"])
def test_kept_tensors_that_do_not_fit(name, change):
    tensors = kept().tensors()
    one = tensors[name]
    tensors[name] = {
        "a position more": torch.cat([one, one], dim=1),
        "a dimension more": one.unsqueeze(-1),
        "a sequence more": torch.cat([one, one], dim=0),
    }[change]
    with pytest.raises(BatchError, match="must begin with one .* got {'ids'"):
        TopKLogits(kept().with_tensors(tensors))


@pytest.mark.parametrize("name", ["ids", "values", "log_normalisers", "log_rests"])
def test_kept_tensors_of_another_width(name):
    tensors = kept().tensors()
    tensors[name] = tensors[name][..., :1]
    with pytest.raises(BatchError, match="2 and 2 temperatures; got"):
        TopKLogits(kept().with_tensors(tensors))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 3, dtype=torch.bool),
        torch.ones(1, 2),
        torch.ones(1, 2, dtype=torch.bool, device="meta"),
    ],
)
def test_masks_that_do_not_fit(mask):
    with pytest.raises(BatchError, match=r"mask must be \(B, S\) bool .*\(1, 2\) on cpu, got"):
        TopKLogits(kept(), mask=mask)


def test_without_a_mask_every_position_is_scored():
    assert TopKLogits(kept()).mask.tolist() == [[True, True]]


QUESTIONS = {
    "log_probs_at": lambda logits: logits.log_probs(LABELS.unsqueeze(-1), temperature=3.0),
    "log_mass": lambda logits: logits.log_mass(
        torch.ones(4, dtype=torch.bool), temperature=3.0, spread_tail=True
    ),
    "sorted_probs": lambda logits: logits.sorted_probs(1, temperature=3.0),
    "column_mass": lambda logits: logits.column_mass(temperature=3.0, standardise=True),
    "column_distance": lambda logits: logits.column_distance(torch.zeros(1, 2, 1), temperature=3.0),
    "whole_rows": lambda logits: logits.whole_rows(
        LABELS[0] * 0, LABELS[0] * 0, temperature=3.0, spread_tail=True
    ),
}


@pytest.mark.parametrize("k", [0, 2, 4])
@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_another_temperature_is_refused(question, k):
    message = (
        "the teacher is asked at temperature 3, but was stored at 1, 2; cache it again with "
        "--temperature 3, or use the live teacher"
    )
    if k == 0 and question is QUESTIONS["sorted_probs"]:
        message = "--k 1 or more"
    with pytest.raises(BatchError, match=re.escape(message)):
        question(TopKLogits(kept(k)))
    question(TopKLogits(kept(max(k, 1), (1, 3))))


def test_more_of_the_largest_than_are_stored():
    logits = TopKLogits(kept())
    message = (
        "the largest 3 entries of each position are needed, but only 2 are stored; cache the "
        "teacher again with --k 3 or more, or use the live teacher"
    )
    for question in (logits.top_ids, logits.sorted_probs):
        assert question(2).shape == (1, 2, 2)
        with pytest.raises(BatchError, match=message):
            question(3)


def test_what_needs_whole_rows_says_so():
    columns, first = torch.ones(4, dtype=torch.bool), torch.tensor([0])
    message = (
        "whole rows of the teacher's logits are needed, but only 2 of 4 entries of each are "
        "stored; use the live teacher, or cache it again with --k 4"
    )
    with pytest.raises(BatchError, match=message):
        TopKLogits(kept()).whole_rows(first, first)
    with pytest.raises(BatchError, match=message):
        TopKLogits(kept()).log_mass(columns)
    whole = TopKLogits(kept(4))
    torch.testing.assert_close(whole.log_mass(columns), torch.zeros(1, 2, dtype=torch.float64))
    assert torch.equal(whole.whole_rows(first, first), dense().tensor[:, 0])


@pytest.mark.parametrize("columns", [torch.ones(5, dtype=torch.bool), torch.ones(4)])
def test_columns_of_another_shape_are_refused(columns):
    with pytest.raises(BatchError, match=r"columns must be a bool tensor of \(4,\), one for each"):
        TopKLogits(kept()).log_mass(columns, spread_tail=True)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1, 3), (1, 3, 3)])
def test_ids_of_another_shape_are_refused(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    for question in (TopKLogits(kept()).log_probs, TopKLogits(kept()).is_stored):
        with pytest.raises(BatchError, match=r"ids must be \(1, 2, K\) or \(1, 1, K\), got"):
            question(ids)


@pytest.mark.parametrize("wrong", [-1, 4, 5])
def test_ids_without_a_column_are_refused_where_they_are_scored(wrong):
    ids = torch.tensor([[[0], [wrong]]])
    message = re.escape(f"ids go from {min(0, wrong)} to {max(0, wrong)}, but the stored logits")
    with pytest.raises(BatchError, match=message):
        TopKLogits(kept()).log_probs(ids)
    narrow = TopKLogits(kept(), mask=torch.tensor([[True, False]]))
    answer = narrow.log_probs(ids)
    torch.testing.assert_close(answer.exp().flatten().tolist(), [0.5, 1.0])


def test_as_a_student_it_is_refused():
    logits = TopKLogits(kept())
    with pytest.raises(BatchError, match="as a tensor or from its head, got TopKLogits"):
        map_row_pairs(logits, logits, torch.tensor([[0, 0]]), lambda student, _: student.sum(-1))


@pytest.mark.parametrize("k", [0, 1, 4])
def test_pairs_of_rows_are_differentiated_by_the_student_alone(k):
    leaf = torch.tensor([PROBS], dtype=torch.float64).requires_grad_()
    values = map_row_pairs(
        DenseLogits(leaf),
        TopKLogits(kept(k)),
        torch.tensor([[0, 1], [1, 0], [-1, -1]]),
        lambda student, teacher: (student * (teacher / 2.0).softmax(-1)).sum(-1),
        teacher_temperature=2.0,
        spread_tail=True,
    )
    values.sum().backward()
    everything = torch.arange(4).view(1, 1, 4)
    probs = TopKLogits(kept(k)).log_probs(everything, temperature=2.0).exp()
    torch.testing.assert_close(leaf.grad, probs.flip(1))
