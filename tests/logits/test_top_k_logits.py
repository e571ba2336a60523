"""`TopKLogits` answers what a dense row answers in which the rest is spread evenly."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctkd.logits import DenseLogits, Logits, TopK, TopKLogits
from tests.spread_rows import spread_row, spread_rows

B, S, V = 3, 5, 7
LENGTHS = (5, 3, 0)
TEMPERATURES = (1.0, 2.0, 0.5)
KINDS = ("plain", "ties", "minus_infinity", "sharp")
KS = (0, 1, 2, V - 1, V)
EVERYTHING = torch.arange(V).expand(B, 1, V)
# Tolerances of an answer in each dtype.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}
by_case = pytest.mark.parametrize(
    ("kind", "dtype"),
    list(itertools.product(KINDS, CLOSE)),
    ids=lambda value: str(value).removeprefix("torch."),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scored() -> Tensor:
    return torch.arange(S) < torch.tensor(LENGTHS).unsqueeze(1)


def raw_logits(kind: str, dtype: torch.dtype) -> Tensor:
    logits = 2.0 * torch.randn(B, S, V, generator=seeded(0), dtype=torch.float64)
    if kind == "ties":
        logits = (logits / 2).round()
    if kind == "minus_infinity":
        # Of the first row three entries are possible, of the second one.
        logits[0, 0, [0, 2, 3, 6]] = -torch.inf
        logits[0, 1, 1:] = -torch.inf
        logits[1, 0, :2] = -torch.inf
    if kind == "sharp":
        logits *= 200.0
    return logits.to(dtype).masked_fill(~scored().unsqueeze(-1), torch.nan)


def label_ids(logits: Tensor) -> Tensor:
    """Labels that are the largest, the smallest, the second largest, the third and the last."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.tensor([0, V - 1, 1, 2, V - 1]).expand(B, S).unsqueeze(-1)
    # What stands behind the mask may be anything.
    return order.gather(-1, ranks).squeeze(-1).masked_fill(~scored(), -100)


def stored(kind: str, k: int, dtype: torch.dtype) -> tuple[TopKLogits, Tensor, Tensor]:
    """The logits asked, the tensor that they were made from, and the labels."""
    logits = raw_logits(kind, dtype)
    labels = label_ids(logits)
    kept = TopK.of(DenseLogits(logits, mask=scored()), labels, k, TEMPERATURES)
    return TopKLogits(kept, mask=scored()), logits, labels


def oracle(
    kind: str, k: int, dtype: torch.dtype, temperature: float, standardize: bool = False
) -> tuple[DenseLogits, Tensor]:
    """Dense logits of the spread rows, to be asked at temperature 1, and what is known."""
    log_probs, known = spread(kind, k, dtype, temperature, standardize)
    return DenseLogits(log_probs, mask=scored()), known


@functools.cache
def spread(
    kind: str, k: int, dtype: torch.dtype, temperature: float, standardize: bool
) -> tuple[Tensor, Tensor]:
    """The spread rows, worked out once, and what is known."""
    logits = raw_logits(kind, dtype)
    return spread_rows(logits.double(), scored(), label_ids(logits), k, temperature, standardize)


def agree(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and not actual.requires_grad
    tolerance = CLOSE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=False
    )


def scales(kind: str) -> tuple[bool, ...]:
    # A row with minus infinity has no standard deviation.
    return (False,) if kind == "minus_infinity" else (False, True)


@by_case
def test_log_probs_at_every_temperature_and_scale(kind, dtype):
    for k in KS:
        logits, _, _ = stored(kind, k, dtype)
        per_position = torch.randint(V, (B, S, 4), generator=seeded(1))
        per_position[..., 3] = per_position[..., 1]
        for standardize, ids in itertools.product(scales(kind), (EVERYTHING, per_position)):
            order = (2.0, 0.5, 1.0, 2.0)
            answers = logits.log_probs_at(ids, order, standardize=standardize)
            assert len(answers) == 4
            for temperature, answer in zip(order, answers, strict=True):
                expected = oracle(kind, k, dtype, temperature, standardize)[0].log_probs(ids)
                agree(answer, expected, dtype)
                assert (answer[~scored()] == 0).all()


@by_case
def test_what_is_stored_is_told_from_a_share(kind, dtype):
    for k in KS:
        logits, _, _ = stored(kind, k, dtype)
        _, known = oracle(kind, k, dtype, 1.0)
        assert torch.equal(logits.is_stored(EVERYTHING)[scored()], known[scored()])
        chosen = torch.randint(V, (B, S, 3), generator=seeded(1))
        assert torch.equal(logits.is_stored(chosen)[scored()], known.gather(2, chosen)[scored()])


@by_case
def test_log_mass(kind, dtype):
    for k in KS:
        logits, _, _ = stored(kind, k, dtype)
        sets = [torch.zeros(V, dtype=torch.bool), torch.ones(V, dtype=torch.bool)]
        sets += [torch.arange(V) == column for column in range(V)]
        sets += [torch.randint(2, (V,), generator=seeded(seed)).bool() for seed in range(5)]
        for temperature in TEMPERATURES:
            dense, _ = oracle(kind, k, dtype, temperature)
            for columns in sets:
                answer = logits.log_mass(columns, temperature=temperature, spread_tail=True)
                agree(answer, dense.log_mass(columns), dtype)


@by_case
def test_the_largest_entries(kind, dtype):
    for k in KS:
        logits, tensor, _ = stored(kind, k, dtype)
        rows = tensor.nan_to_num(nan=0.0, neginf=-torch.inf)
        order = rows.sort(dim=-1, descending=True, stable=True).indices
        order = order.masked_fill(~scored().unsqueeze(-1), 0)
        for temperature in TEMPERATURES:
            dense, _ = oracle(kind, k, dtype, temperature)
            for count in range(k + 1):
                assert torch.equal(logits.top_ids(count), order[..., :count])
                probs = logits.sorted_probs(count, temperature=temperature)
                agree(probs, dense.sorted_probs(count), dtype)


MASKS = (scored(), scored() & torch.tensor([True, False, True, True, False]))


@by_case
def test_column_mass_and_distance(kind, dtype):
    for k in KS:
        logits, _, _ = stored(kind, k, dtype)
        targets = torch.rand(B, S, 3, generator=seeded(2), dtype=torch.float64)
        targets[~scored()] = torch.nan
        for temperature, mask in itertools.product(TEMPERATURES, MASKS):
            asked = logits.masked(mask)
            for standardize in scales(kind):
                dense, _ = oracle(kind, k, dtype, temperature, standardize)
                mass = asked.column_mass(temperature=temperature, standardize=standardize)
                agree(mass, dense.masked(mask).column_mass(), dtype)
                assert (mass[2] == 0).all()
            dense, _ = oracle(kind, k, dtype, temperature)
            distance = asked.column_distance(targets, temperature=temperature)
            agree(distance, dense.masked(mask).column_distance(targets), dtype)


def rows_at(logits: Logits, index: Tensor, temperature: float) -> Tensor:
    """Whole rows (N, V)."""
    numbers = torch.arange(len(index), device=logits.device)
    rows = torch.zeros(len(index), V, dtype=logits.dtype, device=logits.device)
    for which, chunk in logits.chunks(index, temperature=temperature, spread_tail=True):
        rows[numbers[which]] = chunk.read()
    return rows


@by_case
def test_whole_rows(kind, dtype, monkeypatch):
    for k in KS:
        logits, _, _ = stored(kind, k, dtype)
        index = torch.tensor([4, 7, -1, 0, 1, 5])
        for temperature, size in itertools.product(TEMPERATURES, (2 * V, 1 << 10)):
            monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", str(size))
            dense, _ = oracle(kind, k, dtype, temperature)
            probs = (rows_at(logits, index, temperature) / temperature).softmax(-1)
            agree(probs[index >= 0], rows_at(dense, index, 1.0).exp()[index >= 0], dtype)


@by_case
def test_another_mask(kind, dtype):
    for k in KS:
        logits, tensor, labels = stored(kind, k, dtype)
        fewer = torch.arange(S) < torch.tensor([2, 3, 0]).unsqueeze(1)
        narrowed = logits.masked(fewer)
        assert logits.masked(logits.mask) is logits
        assert narrowed.mask is fewer and narrowed.shape == logits.shape
        kept = TopK.of(DenseLogits(tensor, mask=fewer), labels, k, TEMPERATURES)
        expected = TopKLogits(kept, mask=fewer)
        *answers, top_ids = all_answers(narrowed, k)
        *wanted, expected_ids = all_answers(expected, k)
        for answer, one in zip(answers, wanted, strict=True):
            agree(answer, one, dtype)
        assert torch.equal(top_ids, expected_ids)
        for query in (0, 4):
            answer = all_answers(narrowed, k)[query]
            assert not torch.equal(answer, all_answers(logits, k)[query])


def all_answers(
    logits: DenseLogits | TopKLogits, k: int, standardize: bool = False
) -> list[Tensor]:
    """One answer to each query, at the temperature 2."""
    columns = torch.arange(V, device=logits.device) % 2 == 0
    targets = torch.rand(B, S, 2, generator=seeded(2), dtype=torch.float64)
    index = torch.tensor([0, 5, 6], device=logits.device)
    spread = {"spread_tail": True} if isinstance(logits, TopKLogits) else {}
    return [
        *logits.log_probs_at(EVERYTHING.to(logits.device), (1.0, 2.0), standardize=standardize),
        logits.log_mass(columns, temperature=2.0, **spread),
        logits.sorted_probs(k, temperature=2.0),
        logits.column_mass(temperature=2.0, standardize=standardize),
        logits.column_distance(targets.to(logits.device), temperature=2.0),
        rows_at(logits, index, 2.0),
        logits.top_ids(k),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", CLOSE)
def test_everything_kept_is_the_live_teacher(kind, dtype):
    logits, tensor, _ = stored(kind, V, dtype)
    live = DenseLogits(tensor, mask=scored())
    for standardize in scales(kind):
        answers = all_answers(logits, V, standardize)
        expected = all_answers(live, V, standardize)
        for answer, wanted in zip(answers[:-1], expected[:-1], strict=True):
            agree(answer, wanted, dtype)
        for same in (-2, -1):
            assert torch.equal(answers[same], expected[same])


@pytest.mark.parametrize("k", KS)
def test_nothing_is_differentiable(k):
    tensor = raw_logits("plain", torch.float64).requires_grad_()
    kept = TopK.of(DenseLogits(tensor, mask=scored()), label_ids(tensor.detach()), k, TEMPERATURES)
    assert not any(one.requires_grad for one in kept.tensors().values())
    # A caller's tensors may ask for it all the same.
    wanted = kept.with_tensors(
        {
            name: one.clone().requires_grad_() if one.is_floating_point() else one
            for name, one in kept.tensors().items()
        }
    )
    logits = TopKLogits(wanted, mask=scored())
    assert not any(answer.requires_grad for answer in all_answers(logits, k))


@pytest.mark.parametrize("k", KS)
def test_on_the_meta_device_shapes_are_the_same(k):
    kind = "plain"
    tensor = raw_logits(kind, torch.float32)
    labels = label_ids(tensor)
    dense = DenseLogits(tensor.to("meta"), mask=scored().to("meta"))
    kept = TopK.of(dense, labels.to("meta"), k, TEMPERATURES)
    answers = all_answers(TopKLogits(kept, mask=dense.mask), k)
    expected = all_answers(stored(kind, k, torch.float32)[0], k)
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer.shape, answer.dtype) == (wanted.shape, wanted.dtype)
        assert answer.is_meta


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_equal_columns_have_equal_sums(device):
    column = torch.randn(1, 4000, 1, generator=seeded(0)).to(device)
    dense = DenseLogits(column.expand(-1, -1, 64).contiguous())
    labels = torch.zeros(1, 4000, dtype=torch.int64, device=device)
    # Only kept columns are added up one by one.
    logits = TopKLogits(TopK.of(dense, labels, 32))
    assert len(logits.column_mass()[0, :32].unique()) == 1
    assert len(logits.column_distance(column.sigmoid())[0, 0, :32].unique()) == 1


@st.composite
def rows_to_store(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float]:
    """Logits (1, S, V), labels, k and a temperature."""
    positions, columns = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    number = st.floats(-30, 30) | st.integers(-2, 2).map(float) | st.just(-float("inf"))
    rows = [
        draw(
            st.lists(number, min_size=columns, max_size=columns).filter(
                lambda row: max(row) > -float("inf")
            )
        )
        for _ in range(positions)
    ]
    labels = [draw(st.integers(0, columns - 1)) for _ in range(positions)]
    return (
        torch.tensor([rows], dtype=torch.float64),
        torch.tensor([labels]),
        draw(st.integers(0, columns)),
        draw(st.floats(0.25, 8.0)),
    )


@settings(max_examples=200, deadline=None)
@given(rows_to_store())
def test_any_rows(case):
    tensor, labels, k, temperature = case
    width = tensor.shape[2]
    live = DenseLogits(tensor)
    logits = TopKLogits(TopK.of(live, labels, k, [temperature]))
    ids = torch.arange(width).view(1, 1, width)
    answer = logits.log_probs(ids, temperature=temperature)
    expected = torch.tensor(
        [
            spread_row(row, label, k, temperature)[0]
            for row, label in zip(tensor[0].tolist(), labels[0].tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    agree(answer[0], expected, torch.float64)
    probs = answer.exp()
    ones = torch.ones(1, tensor.shape[1], dtype=torch.float64)
    agree(probs.sum(-1), ones, torch.float64)
    everything = torch.ones(width, dtype=torch.bool)
    mass = logits.log_mass(everything, temperature=temperature, spread_tail=True)
    agree(mass, torch.zeros_like(ones), torch.float64)
    # Spreading moves at most twice what is spread.
    shared = probs.masked_fill(logits.is_stored(ids), 0.0).sum(-1)
    moved = (probs - live.log_probs(ids, temperature=temperature).exp()).abs().sum(-1)
    assert (moved <= 2 * shared + 1e-12).all()
    if k:
        off = (probs - live.log_probs(ids, temperature=temperature).exp()).abs()
        smallest = logits.sorted_probs(k, temperature=temperature)[..., -1:]
        assert (off <= smallest + 1e-12).all()
