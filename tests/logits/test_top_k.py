"""`TopK` keeps the largest logits, the label and the mass of the rest."""

import math
import re

import pytest
import torch

from ctkd.errors import BatchError, SettingError
from ctkd.logits import DenseLogits, TopK, TopKLogits, map_rows
from tests.ops.reading import read_by

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
    torch.testing.assert_close(found.log_normalizers[0, :, 0, 0].tolist(), [0.0, 0.0])
    torch.testing.assert_close(found.deviations, dense().tensor.std(-1))


def test_the_default_temperatures():
    assert TopK.of(dense(), LABELS, 1).temperatures == (1.0, 2.0)


@pytest.mark.parametrize("reading", ["one_block", "device"])
def test_rows_that_are_not_scored_become_zeros(reading, monkeypatch):
    read_by(monkeypatch, reading)
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
        "log_normalizers",
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
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


def test_k_is_a_number_of_columns():
    for k in (-1, 5, True, 2.0, "2", None):
        message = r"from 0 to the 4 columns .*, got " + re.escape(repr(k))
        with pytest.raises(SettingError, match=message):
            TopK.of(dense(), LABELS, k)


def test_temperatures_are_above_zero():
    message = "a temperature to store must be a finite number above"
    for temperature in (0.0, -1.0, float("inf"), float("nan"), True, "1"):
        with pytest.raises(SettingError, match=message):
            TopK.of(dense(), LABELS, 1, [1.0, temperature])


def test_a_temperature_is_needed():
    with pytest.raises(SettingError, match="at least one temperature must be stored, such as 1.0"):
        TopK.of(dense(), LABELS, 1, [])


@pytest.mark.parametrize("labels", [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2)])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(BatchError, match=r"label_ids must be \(B, S\) int64 .*\(1, 2\), got"):
        TopK.of(dense(), labels, 1)


def test_kept_tensors_that_do_not_fit():
    for name, one in kept().tensors().items():
        # A position, a sequence and a dimension more.
        for other in (torch.cat([one, one], 1), torch.cat([one, one], 0), one.unsqueeze(-1)):
            with pytest.raises(BatchError, match="must begin with one .* got {'ids'"):
                TopKLogits(kept().with_tensors({**kept().tensors(), name: other}))


@pytest.mark.parametrize("name", ["ids", "values", "log_normalizers", "log_rests"])
def test_kept_tensors_of_another_width(name):
    tensors = kept().tensors()
    tensors[name] = tensors[name][..., :1]
    with pytest.raises(BatchError, match="2 and 2 temperatures; got"):
        TopKLogits(kept().with_tensors(tensors))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(1, 3, dtype=torch.bool),
            r"must be \(B, S\) of the logits, \(1, 2\), got \(1, 3\)",
        ),
        (torch.ones(1, 2), "must be a bool tensor, got torch.float32"),
        (torch.ones(1, 2, dtype=torch.bool, device="meta"), "is on meta, the logits on cpu"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(BatchError, match=f"mask {message}"):
        TopKLogits(kept(), mask=mask)


def test_without_a_mask_every_position_is_scored():
    assert TopKLogits(kept()).mask.tolist() == [[True, True]]


FIRST = torch.tensor([0])
QUERIES = {
    "log_probs_at": lambda logits: logits.log_probs(LABELS.unsqueeze(-1), temperature=3.0),
    "log_mass": lambda logits: logits.log_mass(
        torch.ones(4, dtype=torch.bool), temperature=3.0, spread_tail=True
    ),
    "sorted_probs": lambda logits: logits.sorted_probs(1, temperature=3.0),
    "column_mass": lambda logits: logits.column_mass(temperature=3.0, standardize=True),
    "column_distance": lambda logits: logits.column_distance(torch.zeros(1, 2, 1), temperature=3.0),
    "chunks": lambda logits: list(logits.chunks(FIRST, temperature=3.0, spread_tail=True)),
}


@pytest.mark.parametrize(
    ("query", "k"), [(query, k) for k, query in zip([0, 2, 4] * 2, QUERIES.values(), strict=True)]
)
def test_another_temperature_is_refused(query, k):
    message = (
        "the teacher is queried at temperature 3, but was stored at 1, 2; cache it again with "
        "--temperature 3, or use the live teacher"
    )
    if k == 0 and query is QUERIES["sorted_probs"]:
        message = "--k 1 or more"
    with pytest.raises(BatchError, match=re.escape(message)):
        query(TopKLogits(kept(k)))
    query(TopKLogits(kept(max(k, 1), (1, 3))))


def test_more_of_the_largest_than_are_stored():
    logits = TopKLogits(kept())
    message = (
        "the largest 3 entries of each position are needed, but only 2 are stored; cache the "
        "teacher again with --k 3 or more, or use the live teacher"
    )
    for query in (logits.top_ids, logits.sorted_probs):
        assert query(2).shape == (1, 2, 2)
        with pytest.raises(BatchError, match=message):
            query(3)


def test_what_needs_whole_rows_says_so():
    columns = torch.ones(4, dtype=torch.bool)
    message = (
        "whole rows of the teacher's logits are needed, but only 2 of 4 entries of each are "
        "stored; use the live teacher, or cache it again with --k 4"
    )
    with pytest.raises(BatchError, match=message):
        list(TopKLogits(kept()).chunks(FIRST))
    with pytest.raises(BatchError, match=message):
        TopKLogits(kept()).log_mass(columns)
    whole = TopKLogits(kept(4))
    torch.testing.assert_close(whole.log_mass(columns), torch.zeros(1, 2, dtype=torch.float64))
    ((_, rows),) = whole.chunks(FIRST)
    assert torch.equal(rows.read(), dense().tensor[:, 0])


@pytest.mark.parametrize("columns", [torch.ones(5, dtype=torch.bool), torch.ones(4)])
def test_columns_of_another_shape_are_refused(columns):
    with pytest.raises(BatchError, match=r"columns must be a bool tensor of \(4,\), one for each"):
        TopKLogits(kept()).log_mass(columns, spread_tail=True)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1, 3), (1, 3, 3)])
def test_ids_of_another_shape_are_refused(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    for query in (TopKLogits(kept()).log_probs, TopKLogits(kept()).is_stored):
        with pytest.raises(BatchError, match=r"ids must be \(1, 2, K\) or \(1, 1, K\), got"):
            query(ids)


@pytest.mark.parametrize("wrong", [-1, 4, 5])
def test_ids_without_a_column_are_refused_where_they_are_scored(wrong):
    ids = torch.tensor([[[0], [wrong]]])
    message = re.escape(f"ids go from {min(0, wrong)} to {max(0, wrong)}, but the stored logits")
    with pytest.raises(BatchError, match=message):
        TopKLogits(kept()).log_probs(ids)
    narrow = TopKLogits(kept(), mask=torch.tensor([[True, False]]))
    answer = narrow.log_probs(ids)
    torch.testing.assert_close(answer.exp().flatten().tolist(), [0.5, 1.0])


@pytest.mark.parametrize("k", [0, 1, 4])
def test_rows_are_differentiated_by_the_student_alone(k):
    leaf = torch.tensor([PROBS], dtype=torch.float64).requires_grad_()
    values = map_rows(
        DenseLogits(leaf),
        TopKLogits(kept(k)),
        torch.tensor([[0, 1], [1, 0], [-1, -1]]),
        lambda student, teacher: (student * (teacher / 2.0).softmax(-1)).sum(-1),
        teacher_temperature=2.0,
        spread_tail=True,
    )
    values.values.sum().backward()
    everything = torch.arange(4).view(1, 1, 4)
    probs = TopKLogits(kept(k)).log_probs(everything, temperature=2.0).exp()
    torch.testing.assert_close(leaf.grad, probs.flip(1))
