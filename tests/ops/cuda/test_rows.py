"""Kernels on rows of every kind, by Triton's interpreter, against the reference."""

import dataclasses
import math

import pytest
import torch

import ctkd
from ctkd import ops
from ctkd.chunks import chunk_sums, chunk_table
from ctkd.ops import Rows, SoftmaxTerm, cuda, reference, use_backend

WIDTH = 2501
# Columns that count, columns that there are, and whether rows are strided: rows that begin at
# aligned entries, behind them, and those of which nothing can be told.
LAYOUTS = {"aligned": (2048, 2064, False), "odd": (WIDTH, WIDTH, False), "cut": (700, WIDTH, True)}
KINDS = [(torch.float32, "odd"), (torch.bfloat16, "aligned"), (torch.float16, "cut")]
INDEX = torch.tensor([0, 1, 2, -1, 4, 5, 9, 11])
REAL = INDEX >= 0


@pytest.fixture(params=KINDS, ids=lambda kind: f"{str(kind[0])[6:]}-{kind[1]}")
def rows(request) -> Rows:
    """Rows of a tensor (3, 4, V'): ordinary ones, one of equal entries, one of large logits."""
    dtype, layout = request.param
    width, size, strided = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    tensor = 3 * torch.randn(3, 4 + strided, size + 3 * strided, generator=generator)
    tensor = tensor.to(dtype)[:, strided:, strided : size + strided]
    tensor[1, 0] = 1.0
    tensor[1, 1] *= 1e3
    return Rows(tensor, INDEX, width)


def masked(rows: Rows) -> Rows:
    """The same with columns of minus infinity, at both ends of a row among them."""
    tensor = rows.tensor.clone()
    tensor[..., [0, 7, rows.width - 1]] = -math.inf
    return dataclasses.replace(rows, tensor=tensor)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # A device rounds to the nearest bfloat16; the interpreter cuts off.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    return {"rtol": rounding, "atol": rounding}


def agree(found, expected, **options) -> None:
    options = {**tolerance(torch.float32), **options}
    torch.testing.assert_close(found, expected, equal_nan=True, **options)


@pytest.mark.parametrize("temperatures", [(1.0,), (2.0, 1.0), (0.5, 1.0, 2.0)])
def test_normalizers(rows, temperatures):
    for some in (rows, masked(rows)):
        found = cuda.log_normalizers(some, temperatures)
        agree(found[:, REAL], reference.log_normalizers(some, temperatures)[:, REAL])
    if len(temperatures) == 2:
        columns = torch.arange(rows.width) % 3 > 0
        found = cuda.log_normalizers(rows, temperatures, columns=columns)
        expected = reference.log_normalizers(rows, temperatures, columns=columns)
        agree(found[:, REAL], expected[:, REAL])


def test_statistics_of_standardized_rows(rows):
    temperatures = 2.0, 1.0
    found = cuda.log_normalizers(rows, temperatures, standardize=True)[..., REAL]
    expected = reference.log_normalizers(rows, temperatures, standardize=True)[..., REAL]
    agree(found[:, :2], expected)
    values = rows.read()[REAL]
    agree(found[:, 2], values.mean(-1).expand(2, -1))
    for answers, temperature in zip(found, temperatures, strict=True):
        scaled = values / (values.std(-1, keepdim=True) + 1e-4) / temperature
        agree(answers[3], (scaled.softmax(-1) * values).sum(-1))


@pytest.mark.parametrize("standardize", [False, True])
def test_column_mass(rows, standardize):
    """The second of the sequences has no row, and the last one is behind them all."""
    sequence = torch.tensor([0, 0, 0, 2, 2, 2, 3, 3])
    some = rows if standardize else masked(rows)
    options = {"standardize": standardize}
    mass, normalizers = cuda.column_mass(some, sequence, 5, (2.0, 1.0), **options)
    expected = reference.column_mass(some, sequence, 5, (2.0, 1.0), **options)
    agree(mass, expected[0])
    if standardize:
        # Behind the deviations lies what the kernel of gradients needs.
        normalizers = normalizers[:, :2]
    agree(normalizers[..., REAL], expected[1][..., REAL])
    assert not mass[[1, 4]].any()


def test_distances_of_columns(rows):
    sequence = torch.tensor([0, 0, 0, 2, 2, 2, 3, 3])
    (normalizers,) = reference.log_normalizers(rows, (2.0,))
    for k in (1, 5, 35):
        targets = torch.rand(len(rows), k, generator=torch.Generator().manual_seed(k))
        found = torch.full((5, k, rows.width), 0.25)
        expected = found.clone()
        for backend, distance in ((cuda, found), (reference, expected)):
            backend.add_column_distance_(distance, rows, sequence, targets, normalizers, 2.0)
        agree(found, expected)
        assert found[[1, 4]].eq(0.25).all()


@pytest.mark.parametrize("width", [1, 7, 5000])
def test_greedy_partners(width):
    """Ties, columns that are no partner, and more targets than columns."""
    generator = torch.Generator().manual_seed(width)
    distance = torch.randint(40, (3, 9, width), generator=generator).float()
    distance[1].masked_fill_(torch.rand(width, generator=generator) < 0.5, math.inf)
    expected = reference.greedy_partners(distance.clone())
    found = cuda.greedy_partners(distance)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0][found[1]], expected[0][expected[1]])


@pytest.mark.parametrize("k", [1, 5, 24])
def test_largest_entries(rows, k):
    """Of few rows: to sort is slow where it is interpreted."""
    few = dataclasses.replace(masked(rows), width=min(rows.width, 300 if k > 5 else 1100))
    rounded = dataclasses.replace(few, tensor=few.tensor.round(), index=INDEX[3:6])
    for found, expected in zip(cuda.top_k(rounded, k), reference.top_k(rounded, k), strict=True):
        assert torch.equal(found, expected)


def term(rows: Rows, seed: int, ids: int, temperature: float, **options) -> SoftmaxTerm:
    generator = torch.Generator().manual_seed(seed)
    width = options.get("width", rows.width)
    standardize, columns = options.get("standardize", False), options.get("columns")
    size = len(rows), ids
    # Of standardized rows the kernel needs more than the reference gives.
    backend = cuda if standardize else reference
    return SoftmaxTerm(
        temperature=temperature,
        width=width,
        columns=columns,
        log_normalizers=backend.log_normalizers(
            dataclasses.replace(rows, width=width),
            [temperature],
            standardize=standardize,
            columns=columns,
        )[0],
        totals=torch.randn(len(rows), generator=generator),
        # Some ids occur twice.
        ids=torch.randint(min(width, 2 * ids + 1), size, generator=generator),
        weights=torch.randn(size, generator=generator),
    )


def terms_of(rows: Rows, kind: str) -> list[SoftmaxTerm]:
    if kind == "one":
        return [term(rows, 1, 1, 1.0)]
    if kind == "two":
        columns = torch.arange(rows.width) % 3 > 0
        return [term(rows, 1, 20, 2.0), term(rows, 2, 3, 1.0, columns=columns)]
    if kind == "standardized":
        narrow = rows.width - 1
        return [
            term(rows, 1, 5, 2.0, standardize=True, width=narrow),
            term(rows, 2, 2, 1.0, standardize=True, width=narrow),
            term(rows, 3, 1, 1.0),
        ]
    return []


@pytest.mark.parametrize("kind", ["none", "one", "two", "standardized"])
def test_gradients(rows, kind):
    terms = terms_of(rows, kind)
    if len(terms) > 1:
        # Of one row the first knows nothing.
        terms[0].log_normalizers[..., 0] = math.inf
        terms[0].totals[0], terms[0].weights[0] = 0.0, 0.0
    size, dtype = rows.tensor.shape[-1], rows.tensor.dtype
    weights = torch.randn(len(rows), generator=torch.Generator().manual_seed(4))
    # What is known of a row of weight 0 may be anything.
    weights[2] = 0.0
    answers = []
    for backend in (cuda, reference):
        out = torch.full((13, size), 7.0, dtype=dtype)
        out[[1, 4]] = torch.linspace(-1, 1, size).to(dtype)
        out[INDEX[2]] = math.nan
        target = Rows(out, INDEX, size)
        backend.softmax_backward(rows, terms, target, target, weights)
        answers.append(out[:-1].clone())
        backend.softmax_backward(rows, terms, target)
        answers.append(out[:-1].clone())
    scale = answers[-1][INDEX[REAL]].float().abs().max().clamp_min(1.0).item()
    options = {"rtol": tolerance(dtype)["rtol"], "atol": tolerance(dtype)["rtol"] * scale}
    agree(answers[0], answers[2], **options)
    agree(answers[1], answers[3], **options)
    assert (answers[0][3] == 7.0).all()


def test_gradients_may_take_the_place_of_logits(rows):
    logits = rows.tensor.flatten(0, 1)[INDEX[REAL]].contiguous()
    some = Rows(logits, None, rows.width)
    terms = [term(some, 1, 3, 1.0)]
    expected = logits.clone()
    reference.softmax_backward(some, terms, Rows(expected, None, logits.shape[1]))
    cuda.softmax_backward(some, terms, Rows(logits, None, logits.shape[1]))
    agree(logits, expected, **tolerance(logits.dtype))


def test_rows_without_a_gradient_are_cleared(rows):
    with use_backend("cuda"):
        gradient = ops.gradient_rows(rows.tensor, INDEX)
    assert gradient.shape == (13, rows.tensor.shape[-1])
    assert not gradient[[3, 6, 7, 8, 10]].any()


@pytest.mark.parametrize("shared", [False, True])
def test_chosen_entries(rows, shared):
    batch = 2
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(rows.width, (batch, 1 if shared else 4, 3), generator=generator)
    for standardize in (False, True):
        normalizers = reference.log_normalizers(rows, (1.0, 2.0), standardize=standardize)
        arguments = rows, ids, 4, normalizers, (1.0, 2.0)
        found = cuda.chosen_log_probs(*arguments)
        with use_backend("reference"):
            expected = ops.chosen_log_probs(*arguments)
        for one, other in zip(found, expected, strict=True):
            agree(one, other)


def test_scored_positions_are_packed():
    generator = torch.Generator().manual_seed(6)
    targets = torch.randint(50, (5, 1500), generator=generator)
    targets[torch.rand(5, 1500, generator=generator) < 0.6] = -100
    targets[1], targets[2] = -100, 3
    chunks = torch.arange(1500).expand(5, -1)
    for size in (1500, 700, 1):
        for given in (None, chunks):
            arguments = targets[:, 1:], -100, min(size, 1499), 1500, given
            arguments = (*arguments[:4], None if given is None else given[:, 1:])
            found, expected = cuda.pack_scored(*arguments), reference.pack_scored(*arguments)
            for one, other in zip(found, expected, strict=True):
                assert (one is None and other is None) or torch.equal(one, other)


def test_no_rows_and_rows_of_one_column():
    for index in (torch.zeros(0, dtype=torch.int64), torch.tensor([-1, -1])):
        none = Rows(torch.zeros(2, 3, 5), index, 5)
        assert cuda.log_normalizers(none, (1.0,)).shape == (1, len(index))
        assert cuda.top_k(none, 2)[0].eq(0).all()
        gradient = torch.ones(7, 5)
        cuda.softmax_backward(none, [term(none, 1, 2, 1.0)], Rows(gradient, index, 5))
        assert gradient[:-1].eq(1).all()
    one = Rows(torch.tensor([[2.0], [-1.0]]), None, 1)
    assert torch.equal(cuda.log_normalizers(one, (1.0, 2.0)), torch.tensor([[2.0, -1], [1, -0.5]]))
    assert torch.equal(cuda.top_k(one, 1)[1], one.tensor)


def test_what_is_declared_is_what_is_started(monkeypatch):
    """Launches; the bytes are those of one reading where a row is read once."""
    from ctkd.ops.cuda import operators

    rows = Rows(torch.randn(3, 4, 300), INDEX, 300)
    started = []

    class Counting:
        def __getattr__(self, name):
            kernel = getattr(kernels, name)

            class Start:
                def __getitem__(self, grid):
                    return lambda *args, **kwargs: (
                        started.append(name),
                        kernel[grid](*args, **kwargs),
                    )

            return Start()

    kernels = operators.kernels("row_kernels")
    monkeypatch.setattr(operators, "kernels", lambda name: Counting())
    calls = {
        "row_statistics": (rows.tensor, INDEX, rows.width, [1.0, 2.0], True, None),
        "row_top": (rows.tensor, INDEX, rows.width, 3),
        "column_distances": (
            rows.tensor, INDEX, rows.width, torch.zeros(8, dtype=torch.int64),
            torch.zeros(8, 3), torch.zeros(8), 1.0, torch.zeros(1, 3, 300),
        ),
        "greedy_partners": (torch.zeros(2, 3, 400),),
        "mass_of_columns": (
            rows.tensor, INDEX, rows.width, torch.zeros(8, dtype=torch.int64), 1,
            torch.zeros(8), None, 1.0,
        ),
    }  # fmt: skip
    for name, arguments in calls.items():
        started.clear()
        operator = getattr(torch.ops.ctkd, name)
        operator(*arguments)
        cost = ops.cost_of(operator.default, arguments, {})
        # Zeros for rows that are not there are launches of torch's.
        cleared = 2 if name == "row_top" else 0
        assert cost.launches == len(started) + cleared
        assert cost.bytes_moved >= len(INDEX) * rows.width * rows.tensor.element_size()


def test_sizes_ends_and_sums_of_chunks():
    generator = torch.Generator().manual_seed(7)
    steps = torch.rand(4, 300, generator=generator) < 0.6
    chunk_ids = steps.long().cumsum(1) - 1
    chunk_ids[torch.rand(4, 300, generator=generator) < 0.1] = -1
    # The number of a chunk says nothing of where it lies.
    chunk_ids[1] = chunk_ids[1].flip(0)
    mask = torch.arange(300) < torch.tensor([300, 170, 0, 1])[:, None]
    logits = torch.zeros(4, 300, 2)
    side = ctkd.Side(logits=logits, token_ids=steps.long(), mask=mask, chunk_ids=chunk_ids)
    values = torch.randn(4, 300, generator=generator).masked_fill(~mask, torch.nan)
    weights = torch.randn(4, 301, generator=generator, dtype=torch.float64)
    answers = []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            given = values.clone().requires_grad_()
            sums, counts = chunk_sums(side, given, 301, dtype=torch.float64)
            (gradient,) = torch.autograd.grad((sums * weights).sum(), given)
            answers.append([counts, gradient, *chunk_table(side, 301), sums])
    for found, expected in zip(*(one[:-1] for one in answers), strict=True):
        assert torch.equal(found, expected)
    # Of each chunk some four values.
    torch.testing.assert_close(*(one[-1].detach() for one in answers), rtol=1e-14, atol=1e-14)
