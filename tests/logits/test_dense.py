"""`DenseLogits` answers what a naive computation on the whole tensor answers, however it reads."""

import itertools

import pytest
import torch
from torch import Tensor

from ctkd import ops
from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, HeadLogits, Logits, TopK, TopKLogits
from tests.logits.cases import (
    COLUMNS,
    DIFFERENTIABLE,
    ENGINES,
    MASK,
    QUERIES,
    B,
    Engine,
    Naive,
    S,
    V,
    ids_of,
    in_turn,
    leaf_of,
    randn,
    weighed,
)

LAYOUTS = ("plain", "sliced", "transposed", "expanded", "cut_head", "packed_rows", "garbage")
LAYOUTS += ("columns_apart",)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PACKED = torch.stack([torch.randperm(S + 4, generator=seeded(b))[:S] for b in range(B)])


def build(layout: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], DenseLogits, Naive]:
    """A leaf and its twin in float64, logits on a view of it, and the naive ones on the twin."""
    shapes = {
        "sliced": (B, S + 1, V + 2),
        "transposed": (S, B, V),
        "expanded": (B, 1, V),
        "cut_head": (B, S, V + 3),
        "packed_rows": (B, S + 4, V + 1),
        "columns_apart": (B, V, S),
    }
    values = 2.0 * randn(*shapes.get(layout, (B, S, V)))
    if layout == "garbage":
        values = values.masked_fill(~MASK.unsqueeze(-1), torch.nan)
    leaves = leaf_of(values, dtype)
    leaf, twin = leaves
    settings = {"mask": MASK}
    if layout == "sliced":
        leaf, twin, settings["vocab_size"] = leaf[:, :-1], twin[:, :S, :V], V
    elif layout == "transposed":
        leaf, twin = leaf.transpose(0, 1), twin.permute(1, 0, 2)
    elif layout == "expanded":
        leaf, twin = leaf.expand(B, S, V), twin.repeat(1, S, 1)
    elif layout == "cut_head":
        twin, settings["vocab_size"] = twin[..., :V], V
    elif layout == "packed_rows":
        settings |= {"rows": PACKED, "vocab_size": V}
        twin = torch.stack([twin[b, PACKED[b], :V] for b in range(B)])
    elif layout == "columns_apart":
        leaf, twin = leaf.transpose(1, 2), twin.transpose(1, 2)
    return leaves, DenseLogits(leaf, **settings), Naive(twin, MASK)


@pytest.mark.parametrize(
    ("query", "engine", "layout"),
    in_turn(QUERIES, ENGINES, others=LAYOUTS),
    indirect=["engine"],
)
def test_queries(query, engine, layout):
    (leaf, twin), logits, naive = build(layout, engine.dtype)
    answer, expected = (QUERIES[query](one) for one in (logits, naive))
    engine.agree(answer, expected)
    assert expected.abs().max() > 0
    assert answer.dtype in (torch.int64, torch.promote_types(engine.dtype, torch.float32))
    assert answer.requires_grad == (query in DIFFERENTIABLE)
    if query in DIFFERENTIABLE:
        (wanted,) = torch.autograd.grad(weighed(expected), twin)
        assert wanted.abs().max() > 1e-3
        # The second pass goes through a graph that was kept.
        for kept in (True, False):
            (gradient,) = torch.autograd.grad(weighed(answer), leaf, retain_graph=kept)
            assert gradient.dtype == engine.dtype
            engine.agree(gradient, wanted, narrow=True)


engines = pytest.mark.parametrize("engine", ENGINES, indirect=True)
two_engines = pytest.mark.parametrize("engine", ["float32", "float64"], indirect=True)


@two_engines
def test_one_unused_temperature_does_no_harm(engine):
    (leaf, twin), logits, naive = build("plain", engine.dtype)
    answers = [x.log_probs_at(ids_of(1, x), (1.0, 3.0))[1] for x in (logits, naive)]
    (gradient,) = torch.autograd.grad(weighed(answers[0]), leaf)
    engine.agree(gradient, torch.autograd.grad(weighed(answers[1]), twin)[0])


@pytest.mark.parametrize("standardize", [False, True])
def test_gradcheck(standardize):
    tensor = randn(1, 3, 4)
    tensor[0, 1] = 0.7
    tensor.requires_grad_()
    ids, columns = torch.tensor([[[0, 2, 2]]]), torch.tensor([True, False, True, False])

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = DenseLogits(x)
        mass = logits.log_mass(columns, temperature=1.5)
        return logits.log_probs(ids, temperature=1.3, standardize=standardize), mass

    # A constant row has a kink: its deviation grows both ways, which a small step averages out.
    assert torch.autograd.gradcheck(function, tensor, eps=1e-8 if standardize else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_the_lower_id(dtype):
    infinity = float("inf")
    rows = [
        [0.0, -0.0, 0.0, -0.0, 1.0],
        [-1.0, -2.0, -1.0, -infinity, -1.0],
        [infinity, -infinity, infinity, 0.0, -infinity],
        [-3.0, -3.0, 2.5, 2.5, -0.0],
        [-0.0, 0.0, -0.0, 0.0, -1e-3],
    ]
    # Sorts of a few entries are stable by chance.
    wide = (randn(3, 300, seed=4) * 1.5).round().tolist()
    for table, counts in ((rows, (1, 3, 5)), (wide, (1, 50, 300))):
        values, ids = torch.tensor(table, dtype=dtype), range(len(table[0]))
        for k in counts:
            expected = [sorted(ids, key=lambda i, row=row: (-row[i], i))[:k] for row in table]
            assert DenseLogits(values[None]).top_ids(k).tolist() == [expected]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("mass_first", [False, True])
def test_answers_are_new_after_the_logits_changed(inference, mass_first):
    engine, ids = ENGINES["float32"], torch.tensor([[[0, 1]]])
    with torch.inference_mode(inference):
        tensor = randn(1, 2, V).float()
        logits = DenseLogits(tensor)
        for _ in range(3):
            naive = Naive(tensor.double(), logits.mask)
            if mass_first:
                engine.agree(logits.column_mass(), naive.column_mass())
            engine.agree(logits.log_probs(ids), naive.log_probs(ids))
            tensor.mul_(-1.7)
    assert tensor.is_inference() == inference


@engines
def test_answers_do_not_mix_up_temperatures_and_scales(engine):
    tensor = randn(1, 2, V).to(engine.dtype)
    logits, naive = DenseLogits(tensor), Naive(tensor.double(), torch.ones(1, 2).bool())
    ids = torch.arange(V).view(1, 1, V)
    for _ in range(2):
        for temperature, standardize in itertools.product((1.0, 2.0), (False, True)):
            settings = {"temperature": temperature, "standardize": standardize}
            engine.agree(logits.log_probs(ids, **settings), naive.log_probs(ids, **settings))


def test_a_reading_that_serves_two_temperatures_changes_no_known_answer():
    logits = DenseLogits(3.0 * randn(1, 6, 997).float())
    ids = torch.arange(997).view(1, 1, -1)
    first = logits.log_probs(ids)
    for query in (
        lambda: logits.column_mass(temperature=2.0, prefetch=(1.0,)),
        lambda: logits.column_mass(temperature=1.0, prefetch=(2.0,)),
        lambda: logits.log_probs_at(ids, (2.0, 1.0)),
        lambda: logits.log_mass(torch.arange(997) < 5),
        lambda: logits.sorted_probs(3),
        lambda: logits.column_distance(torch.zeros(1, 6, 1)),
    ):
        query()
        assert torch.equal(logits.log_probs(ids), first)


def test_inference_tensors_answer_outside_of_inference_mode():
    with torch.inference_mode():
        tensor = randn(B, S, V).float()
    logits, twin = DenseLogits(tensor), DenseLogits(randn(B, S, V).float())
    with torch.no_grad():
        for query in QUERIES.values():
            assert torch.equal(query(logits), query(twin))


def test_float16_has_float32_statistics():
    engine = Engine(torch.float16, "one_block")
    for query in DIFFERENTIABLE.values():
        (leaf, twin), logits, naive = build("plain", torch.float16)
        answer, expected = query(logits), query(naive)
        assert answer.dtype == torch.float32
        engine.agree(answer, expected)
        (gradient,) = torch.autograd.grad(weighed(answer), leaf)
        engine.agree(gradient, torch.autograd.grad(weighed(expected), twin)[0], narrow=True)


@pytest.mark.parametrize("engine", ["float32", "float64", "device"], indirect=True)
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 3, 3), (2, 0, 0)])
def test_no_positions_at_all(engine, shape):
    sequences, positions, rows = shape
    tensor = torch.zeros(sequences, rows, V, dtype=engine.dtype, requires_grad=True)
    logits = DenseLogits(
        tensor,
        mask=torch.zeros(sequences, positions, dtype=torch.bool),
        rows=torch.zeros(sequences, positions, dtype=torch.int64),
    )
    answer = logits.log_probs(torch.zeros(sequences, 1, 4, dtype=torch.int64))
    assert answer.shape == (sequences, positions, 4)
    (answer.sum() + logits.log_mass(COLUMNS).sum() + logits.sorted_probs(2).sum()).backward()
    assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    assert torch.equal(logits.column_mass(), logits.column_mass().new_zeros(sequences, V))
    distance = logits.column_distance(torch.zeros(sequences, positions, 3))
    assert torch.equal(distance, distance.new_zeros(sequences, 3, V))
    assert logits.top_ids(2).shape == logits.sorted_probs(2).shape == (sequences, positions, 2)


@pytest.mark.parametrize("engine", ["float32", "bfloat16", "float64", "device"], indirect=True)
def test_only_scored_rows_are_read(engine):
    """Rows that nobody asks about are no numbers."""
    for query in QUERIES.values():
        _, logits, _ = build("garbage", engine.dtype)
        assert query(logits).isfinite().all()


@engines
def test_a_mass_too_small_for_a_probability(engine):
    leaf = torch.tensor([[[0.0, -1984.0, -1984.0]]], dtype=engine.dtype, requires_grad=True)
    answer = DenseLogits(leaf).log_mass(torch.tensor([False, True, True]))
    engine.agree(answer, torch.tensor([[-1984 + 0.6931471805599453]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(answer.sum(), leaf)
    # The exponent is rounded relative to the logits.
    assert gradient.flatten().tolist() == pytest.approx([-1.0, 0.5, 0.5], rel=2e-3)


@engines
def test_all_columns_hold_everything_and_none_nothing(engine):
    _, logits, _ = build("cut_head", engine.dtype)
    everything = torch.ones(V, dtype=torch.bool)
    engine.agree(logits.log_mass(everything), torch.zeros(B, S))
    nothing = logits.log_mass(~everything)
    assert (nothing[MASK] == -torch.inf).all() and (nothing[~MASK] == 0).all()


def test_all_columns_hold_everything_whatever_was_asked_before():
    logits = DenseLogits(8.0 * randn(3, 7, 997, seed=9).float())
    first = logits.log_probs(torch.zeros(3, 7, 1, dtype=torch.int64))
    mass = logits.log_mass(torch.ones(997, dtype=torch.bool))
    assert mass.abs().max() < 3e-7
    logits.column_mass(temperature=1.0)
    assert torch.equal(logits.log_probs(torch.zeros(3, 7, 1, dtype=torch.int64)), first)


def test_on_the_meta_device():
    for name, query in QUERIES.items():
        _, twin, _ = build("cut_head", torch.float32)
        leaf = torch.zeros(B, S, V + 3, device="meta", requires_grad=True)
        answer = query(DenseLogits(leaf, mask=MASK.to("meta"), vocab_size=V))
        expected = query(twin)
        assert (answer.shape, answer.dtype) == (expected.shape, expected.dtype)
        assert answer.device.type == "meta"
        for _ in range(2 * (name in DIFFERENTIABLE)):
            (gradient,) = torch.autograd.grad(answer.sum(), leaf, retain_graph=True)
            assert gradient.device.type == "meta" and gradient.shape == leaf.shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equal_columns_have_equal_sums_on_cuda():
    column = randn(1, 4000, 1).float().cuda()
    logits = DenseLogits(column.expand(-1, -1, 64).contiguous())
    assert len(logits.column_mass().unique()) == 1
    assert len(logits.column_distance(column.sigmoid())[0, 0].unique()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": torch.zeros(2, 3)}, r"logits must be \(B, S, V\), got \(2, 3\)"),
        ({"tensor": torch.zeros(1, 2, 3, dtype=torch.int64)}, "floating point, got torch.int64"),
        ({"vocab_size": 6}, "the tokenizer has 6 tokens, but the logits only 5 columns"),
        ({"vocab_size": 0}, "the tokenizer has 0 tokens"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask must be .*\(1, 2\), got \(1, 3\)"),
        ({"mask": torch.ones(1, 2)}, "mask must be a bool tensor, got torch.float32"),
        (
            {"mask": torch.ones(1, 2, dtype=torch.bool, device="meta")},
            "mask is on meta, the logits on cpu",
        ),
        (
            {"mask": torch.ones(1, 1, dtype=torch.bool), "rows": torch.tensor([[1, 0]])},
            r"mask must be .*\(1, 2\), got \(1, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(BatchError, match=message):
        DenseLogits(**{"tensor": torch.zeros(1, 2, 5), **settings})


def kinds_of_logits(dtype: torch.dtype) -> dict[str, Logits]:
    """Logits of 2 positions and 5 columns."""
    dense = DenseLogits(randn(1, 2, 5).to(dtype))
    stored = TopK.of(dense, torch.zeros(1, 2, dtype=torch.int64), 5, [1.0])
    return {
        "dense": dense,
        "head": HeadLogits(randn(1, 2, 3).to(dtype), randn(5, 3).to(dtype)),
        "stored": TopKLogits(stored),
        "cut": DenseLogits(randn(1, 2, 8).to(dtype), vocab_size=5),
        "nothing scored": dense.masked(torch.zeros(1, 2, dtype=torch.bool)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_more_entries_than_there_are_columns_are_refused(dtype):
    for logits in kinds_of_logits(dtype).values():
        for query in (logits.top_ids, logits.sorted_probs):
            assert query(5).shape == (1, 2, 5)
            for k in (6, -1):
                with pytest.raises(
                    BatchError, match=rf"the largest {k} entries .* ask for min\(k, 5\)"
                ):
                    query(k)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1, 3), (1, 3, 3)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(BatchError, match=r"ids must be \(1, 2, K\) or \(1, 1, K\), got"):
        DenseLogits(torch.zeros(1, 2, 5)).log_probs(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("columns", [torch.ones(V + 2, dtype=torch.bool), torch.ones(V)], ids=str)
def test_columns_of_another_vocabulary_are_refused(columns):
    _, logits, _ = build("cut_head", torch.float32)
    with pytest.raises(BatchError, match=r"columns must be a bool tensor of \(11,\)"):
        logits.log_mass(columns)


def test_ids_that_were_changed_to_columns_that_do_not_exist_are_refused():
    # What torch would write past a row it refuses itself.
    pytest.importorskip("numba", exc_type=ImportError)
    tensor = randn(1, 2, 9).float().requires_grad_()
    ids = torch.zeros(1, 2, 1, dtype=torch.int64)
    value = DenseLogits(tensor, vocab_size=5).log_probs(ids).sum()
    # So that torch does not see it.
    ids.data.add_(6)
    with pytest.raises(BatchError, match="from 6 to 6, but the logits have 5"):
        value.backward()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 0]], "one row for two scored positions"),
        ([[3, 0]], "between 0 and 2, the rows of a sequence of logits, got 0 to 3"),
        ([[0, -1]], "got -1 to 0"),
    ],
)
@pytest.mark.parametrize("kind", ["tensor", "head"])
def test_rows_that_are_not_there_or_named_twice_are_refused(kind, rows, said):
    def make(**settings):
        if kind == "tensor":
            return DenseLogits(torch.zeros(1, 3, 5), **settings)
        return HeadLogits(torch.zeros(1, 3, 2), torch.zeros(5, 2), **settings)

    with pytest.raises(BatchError, match=said):
        make(rows=torch.tensor(rows))
    # What is not scored may be anything.
    make(rows=torch.tensor(rows), mask=torch.tensor([[rows[0][0] == 0, rows[0][0] != 0]]))


def test_every_softmax_is_computed_once(monkeypatch):
    column_mass, temperatures = ops.column_mass, []

    def recorded(rows, sequence, sequences, scales, **settings):
        temperatures.append(list(scales))
        return column_mass(rows, sequence, sequences, scales, **settings)

    monkeypatch.setattr(ops, "column_mass", recorded)
    DenseLogits(randn(1, 2, 9)).column_mass(temperature=2.0, prefetch=(1.0, 2.0, 0.5, 1.0))
    assert temperatures == [[2.0, 1.0, 0.5]]
