"""The reference against formulas on whole tensors in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctkd import ops
from ctkd.ops import RowLoss, Rows, SoftmaxTerm, use_backend
from tests.ops.sorted_rows import KINDS, rows_of, stable
from tests.rounding import rounding

N, V, W = 7, 11, 8
INDEX = torch.tensor([9, -1, 0, 3, 5, -1, 8])
REAL = INDEX >= 0
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 3, 3])
pytestmark = pytest.mark.usefixtures("reading")


@pytest.fixture(autouse=True)
def reference():
    with use_backend("reference"):
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits(width: int = V, seed: int = 0) -> tuple[Rows, Tensor]:
    """Rows of a tensor in which what nobody names is no number, and the same rows, or zeros."""
    tensor = 2.0 * randn(2, 5, width + 1, seed=seed)
    named = torch.zeros(10, dtype=torch.bool).index_fill(0, INDEX[REAL], True)
    values = tensor.view(10, -1)[INDEX.clamp_min(0), :width].masked_fill(~REAL[:, None], 0.0)
    return Rows(tensor.masked_fill(~named.view(2, 5, 1), torch.nan), INDEX, width), values


def scaled(values: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    if standardize:
        values = values / (values.std(-1, keepdim=True) + ops.STANDARD_DEVIATION_EPSILON)
    return values / temperature


def agree(actual: Tensor, expected: Tensor) -> None:
    tolerance = rounding(torch.float64, V * N)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def sums_of(values: Tensor) -> Tensor:
    """Of the rows of each of 4 sequences."""
    values = values[REAL]
    return values.new_zeros(4, *values.shape[1:]).index_add(0, SEQUENCE[REAL], values)


@pytest.mark.parametrize("standardize", [False, True])
def test_statistics(standardize):
    rows, values = logits()
    columns = torch.arange(V) % 3 == 1
    for chosen in (None, columns, columns & False):
        answers = ops.log_normalizers(rows, [1.0, 0.5], standardize=standardize, columns=chosen)
        kept = slice(None) if chosen is None else chosen
        for answer, temperature in zip(answers, (1.0, 0.5), strict=True):
            expected = scaled(values, temperature, standardize)[:, kept].logsumexp(-1)
            if standardize:
                answer, deviation = answer
                agree(deviation[REAL], values.std(-1)[REAL])
            agree(answer[REAL], expected[REAL])


@pytest.mark.parametrize("standardize", [False, True])
def test_column_mass(standardize):
    rows, values = logits()
    mass, normalizers = ops.column_mass(rows, SEQUENCE, 4, [2.0, 0.5], standardize=standardize)
    agree(mass, sums_of(scaled(values, 2.0, standardize).softmax(-1)))
    assert torch.equal(normalizers, ops.log_normalizers(rows, [2.0, 0.5], standardize=standardize))


def test_distances_of_columns():
    rows, values = logits()
    targets, distance = randn(N, 3, seed=9), torch.full((4, 3, V), 0.5, dtype=torch.float64)
    (normalizers,) = ops.log_normalizers(rows, [2.0])
    ops.add_column_distance_(distance, rows, SEQUENCE, targets, normalizers, 2.0)
    gaps = (values / 2.0).softmax(-1).unsqueeze(1) - targets.unsqueeze(-1)
    agree(distance, 0.5 + sums_of(gaps.abs()))


def test_greedy_partners():
    inf = torch.inf
    distance = torch.tensor([[[2.0, 1.0, 1.0], [3.0, 0.0, inf], [0.0, 0.0, 0.0]]])
    columns, has_partner = ops.greedy_partners(distance)
    assert columns.tolist() == [[1, 0, 2]] and has_partner.all()
    distance = torch.tensor([[[inf, 1.0, inf], [inf, 0.0, inf]]])
    columns, has_partner = ops.greedy_partners(distance)
    assert columns[0, 0] == 1 and has_partner.tolist() == [[True, False]]


def test_largest_entries():
    rows, values = logits()
    for k in (0, 1, 4, V):
        ids, entries = ops.top_k(rows, k)
        expected, columns = stable(values)
        assert torch.equal(ids[REAL], columns[REAL, :k])
        assert torch.equal(entries[REAL], expected[REAL, :k])


@pytest.mark.parametrize("standardize", [False, True])
def test_softmax_backward(standardize):
    rows, values = logits()
    leaf, columns = values.clone().requires_grad_(), torch.arange(V) % 3 == 1
    terms, total = [], leaf.new_zeros(())
    for width, temperature, chosen in ((V, 2.0, None), (V - 2, 0.7, None), (V, 1.0, columns)):
        narrow = Rows(rows.tensor, INDEX, width)
        (normalizers,) = ops.log_normalizers(
            narrow, [temperature], standardize=standardize, columns=chosen
        )
        weights, totals = randn(N, 2, seed=width), randn(N, seed=4)
        weights[~REAL], totals[~REAL] = 0.0, 0.0
        ids = torch.tensor([[1, 4], [2, 2], [0, 0], [3, 8], [5, 5], [0, 0], [7, 1]])
        terms.append(
            SoftmaxTerm(
                temperature=temperature,
                width=width,
                columns=chosen,
                log_normalizers=normalizers,
                totals=totals,
                ids=ids,
                weights=weights,
            )
        )
        scores = scaled(leaf[REAL, :width], temperature, standardize)
        total = total + (scores.gather(1, ids[REAL]) * weights[REAL]).sum()
        log_sums = scores[:, slice(None) if chosen is None else chosen].logsumexp(-1)
        total = total - (log_sums * totals[REAL]).sum()
    (expected,) = torch.autograd.grad(total, leaf)
    known, factors = randn(11, V + 1, seed=5), randn(N, seed=6).masked_fill(~REAL, 0.0)
    known[INDEX[0]], factors[0] = torch.nan, 0.0
    wanted = expected + (known[INDEX, :V] * factors[:, None]).nan_to_num(0.0)
    out = torch.full((11, V + 1), 7.0, dtype=torch.float64)
    ops.softmax_backward(
        rows,
        terms,
        Rows(out, INDEX, V + 1),
        known=Rows(known, INDEX, V + 1),
        weights=factors,
    )
    agree(out[INDEX[REAL], :V], wanted[REAL])
    agree(out[INDEX[REAL], V], known[INDEX[REAL], V].nan_to_num(0.0) * factors[REAL])
    assert (out[[1, 2, 4, 6, 7]] == 7.0).all()


def test_a_constant_row_has_a_finite_standardized_gradient():
    tensor, none = torch.full((2, V), 0.7, dtype=torch.float64), torch.zeros(2, 0)
    rows, out = Rows(tensor, None, V), torch.empty_like(tensor)
    (normalizers,) = ops.log_normalizers(rows, [1.0], standardize=True)
    term = SoftmaxTerm(
        temperature=1.0,
        width=V,
        columns=None,
        log_normalizers=normalizers,
        totals=torch.ones(2, dtype=torch.float64),
        ids=none.to(torch.int64),
        weights=none.double(),
    )
    ops.softmax_backward(rows, [term], Rows(out, None, V))
    expected = -1.0 / V / ops.STANDARD_DEVIATION_EPSILON
    # The exponent, logits divided by the epsilon, is as large as it is rounded.
    torch.testing.assert_close(out, torch.full_like(out, expected), rtol=7000 * 2**-50, atol=0)


def two_parts(student: Tensor, teacher: Tensor, numbers: Tensor | None = None) -> Tensor:
    gap = student.softmax(-1)[:, :W] - teacher.softmax(-1)
    scale = 1.0 if numbers is None else numbers.prod(-1).exp()
    return torch.stack([gap.abs().sum(-1), gap.square().sum(-1) * scale], dim=-1)


@pytest.mark.parametrize("has_numbers", [False, True])
def test_row_losses(has_numbers):
    (student, values), (teacher, others) = logits(), logits(W, seed=1)
    leaf = values.clone().requires_grad_()
    numbers = randn(N, 2, seed=2).requires_grad_() if has_numbers else None
    expected = two_parts(leaf, others, numbers).masked_fill(~REAL[:, None], 0.0)
    inputs = [leaf] if numbers is None else [leaf, numbers]
    wanted = torch.autograd.grad(expected.sum(), inputs)
    loss = RowLoss("", two_parts, parts=2)
    out = Rows(torch.full((11, V + 2), 7.0, dtype=torch.float64), INDEX, V + 2)
    answer = ops.row_loss(loss, student, teacher, numbers, out, differentiate=has_numbers)
    agree(answer.values, expected.detach())
    agree(out.tensor[INDEX[REAL]], torch.nn.functional.pad(wanted[0], (0, 2))[REAL])
    assert (out.tensor[[1, 2, 4, 6, 7]] == 7.0).all()
    if has_numbers:
        agree(answer.per_row_gradient, wanted[1])
    without = ops.row_loss(loss, student, teacher, numbers)
    assert torch.equal(without.values, answer.values) and without.per_row_gradient is None


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 900),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def check_ties(kind, width, share, seed, dtype):
    rows = rows_of(kind, width, seed).to(dtype)
    k = 1 + int(share**4 * (width - 1))
    values, ids = stable(rows)
    found, entries = ops.top_k(Rows(rows, None, width), k)
    assert torch.equal(found, ids[:, :k])
    assert torch.equal(entries, values[:, :k].to(entries.dtype))


@pytest.mark.parametrize("reading", ["one_block"], indirect=True)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ties_go_to_the_lower_column(backend):
    with use_backend(backend):
        check_ties()


def test_rows_with_nan_have_columns_all_the_same():
    rows = rows_of("smooth", 300, 4)
    rows[0, 7] = torch.nan
    ids, _ = ops.top_k(Rows(rows, None, 300), 5)
    assert len(set(ids[0].tolist())) == 5 and 0 <= ids.min() and ids.max() < 300
    assert torch.equal(ids[1], stable(rows)[1][1, :5])
