"""`DenseLogits` answers what a naive computation on the whole tensor answers, however it reads."""

import itertools

import pytest
import torch
from torch import Tensor

from ctkd import rows as rows_module
from ctkd.dense_logits import DenseLogits
from ctkd.errors import BatchError
from ctkd.head_logits import HeadLogits
from ctkd.logits import Logits
from ctkd.row_logits import RowLogits
from ctkd.row_pairs import map_row_pairs
from ctkd.row_sources import TensorRows
from ctkd.sorting import stable_top_ids
from ctkd.top_k import TopK
from ctkd.top_k_logits import TopKLogits

B, S, V = 3, 5, 11
LENGTHS = (5, 3, 0)
LAYOUTS = ("plain", "sliced", "transposed", "expanded", "cut_head", "packed_rows", "garbage")
READINGS = ("one_block", "small_blocks", "padding_too", "padding_too_in_small_blocks")
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=READINGS, autouse=True)
def reading(request, monkeypatch) -> str:
    """How rows are read: in one block or several, with or without those that are not scored."""
    if "small" in request.param:
        monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", {"cpu": 2 * V + 3})
    if "padding" in request.param:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def build(layout: str, seed: int = 0) -> tuple[Tensor, DenseLogits, Tensor]:
    """A leaf, `DenseLogits` on some view of it, and the same (B, S, V) values by plain indexing."""
    mask = torch.arange(S) < torch.tensor(LENGTHS).unsqueeze(1)
    shapes = {
        "sliced": (B, S + 1, V + 2),
        "transposed": (S, B, V),
        "expanded": (B, 1, V),
        "cut_head": (B, S, V + 3),
        "packed_rows": (B, S + 4, V + 1),
    }
    leaf = 2.0 * randn(*shapes.get(layout, (B, S, V)), seed=seed)
    if layout == "garbage":
        leaf = leaf.masked_fill(~mask.unsqueeze(-1), torch.nan)
    leaf.requires_grad_()
    if layout == "sliced":
        return leaf, DenseLogits(leaf[:, :-1], mask=mask, vocab_size=V), leaf[:, :S, :V]
    if layout == "transposed":
        return leaf, DenseLogits(leaf.transpose(0, 1), mask=mask), leaf.permute(1, 0, 2)
    if layout == "expanded":
        return leaf, DenseLogits(leaf.expand(B, S, V), mask=mask), leaf.repeat(1, S, 1)
    if layout == "cut_head":
        return leaf, DenseLogits(leaf, mask=mask, vocab_size=V), leaf[..., :V]
    if layout == "packed_rows":
        rows = torch.stack([torch.randperm(S + 4, generator=seeded(b))[:S] for b in range(B)])
        dense = torch.stack([leaf[b, rows[b], :V] for b in range(B)])
        return leaf, DenseLogits(leaf, mask=mask, rows=rows, vocab_size=V), dense
    return leaf, DenseLogits(leaf, mask=mask), leaf.masked_fill(~mask.unsqueeze(-1), 0.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_log_probs(dense: Tensor, temperature: float, standardise: bool = False) -> Tensor:
    if standardise:
        dense = dense / (dense.std(-1, keepdim=True) + 1e-4)
    return (dense / temperature).log_softmax(-1)


def agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients_agree(actual: Tensor, expected: Tensor, leaf: Tensor, seed: int = 5) -> None:
    """Equal values, and equal gradients under one random weighting."""
    agree(actual, expected)
    weights = randn(*expected.shape, seed=seed)
    (actual_gradient,) = torch.autograd.grad((actual * weights).sum(), leaf)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), leaf)
    assert expected_gradient.abs().max() > 1e-3
    agree(actual_gradient, expected_gradient)


@by_layout
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("per_position", [False, True])
def test_log_probs_at(layout, standardise, per_position):
    leaf, logits, dense = build(layout)
    ids = torch.randint(V, (B, S if per_position else 1, 4), generator=seeded(1))
    ids[..., 3] = ids[..., 1]
    # Some are half of another, and one is not.
    temperatures = (1.0, 0.5, 2.0, 0.3)
    answers = logits.log_probs_at(ids, temperatures, standardise=standardise)
    chosen = ids.expand(-1, S, -1)
    expected = [naive_log_probs(dense, t, standardise).gather(2, chosen) for t in temperatures]
    hidden = ~logits.mask.unsqueeze(-1)
    gradients_agree(torch.stack(answers), torch.stack(expected).masked_fill(hidden, 0.0), leaf)


@by_layout
def test_one_unused_temperature_does_no_harm(layout):
    leaf, logits, dense = build(layout)
    ids = torch.tensor([[[0, 3]]]).expand(B, 1, 2)
    _, answer = logits.log_probs_at(ids, (1.0, 3.0))
    expected = naive_log_probs(dense, 3.0)[..., [0, 3]]
    gradients_agree(answer, expected.masked_fill(~logits.mask.unsqueeze(-1), 0.0), leaf)


@pytest.mark.parametrize("standardise", [False, True])
def test_log_probs_pass_gradcheck(standardise):
    tensor = randn(1, 3, 4)
    tensor[0, 1] = 0.7
    tensor.requires_grad_()
    ids = torch.tensor([[[0, 2, 2]]])

    def function(x: Tensor) -> Tensor:
        return DenseLogits(x).log_probs(ids, temperature=1.3, standardise=standardise)

    # A constant row has a kink: its deviation grows both ways, which a small step averages out.
    assert torch.autograd.gradcheck(function, tensor, eps=1e-8 if standardise else 1e-6)


@by_layout
@pytest.mark.parametrize("standardise", [False, True])
def test_column_mass(layout, standardise):
    _, logits, dense = build(layout)
    kept = torch.tensor([[True, False, True, True, False]]).expand(B, S)
    for mask in (None, kept):
        mass = logits.column_mass(mask, temperature=0.7, standardise=standardise)
        probs = naive_log_probs(dense.detach(), 0.7, standardise).exp()
        counted = logits.mask if mask is None else logits.mask & mask
        agree(mass, probs.masked_fill(~counted.unsqueeze(-1), 0.0).sum(1))
        assert not mass.requires_grad


@by_layout
def test_column_distance(layout):
    _, logits, dense = build(layout)
    targets = randn(B, S, 3, seed=2).abs()
    kept = torch.tensor([[True, False, True, True, False]]).expand(B, S)
    for mask in (None, kept):
        distance = logits.column_distance(targets, mask, temperature=1.5)
        probs = naive_log_probs(dense.detach(), 1.5).exp()
        gaps = (targets.unsqueeze(-1) - probs.unsqueeze(2)).abs()
        counted = logits.mask if mask is None else logits.mask & mask
        agree(distance, gaps.masked_fill(~counted[..., None, None], 0.0).sum(1))
        assert not distance.requires_grad


@by_layout
@pytest.mark.parametrize("k", [1, 4, V])
def test_sorted_probs(layout, k):
    leaf, logits, dense = build(layout)
    probs = naive_log_probs(dense, 2.0).exp().sort(-1, descending=True).values[..., :k]
    expected = probs.masked_fill(~logits.mask.unsqueeze(-1), 0.0)
    gradients_agree(logits.sorted_probs(k, temperature=2.0), expected, leaf)


@by_layout
def test_top_ids(layout):
    _, logits, dense = build(layout)
    expected = dense.sort(dim=-1, descending=True, stable=True).indices[..., :4]
    assert torch.equal(logits.top_ids(4), expected.masked_fill(~logits.mask.unsqueeze(-1), 0))


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
            assert stable_top_ids(values, k).tolist() == expected
            assert DenseLogits(values[None]).top_ids(k).tolist() == [expected]


def l1_to_scaled(student: Tensor, teacher: Tensor) -> Tensor:
    width = min(student.shape[-1], teacher.shape[-1])
    gap = student.softmax(-1)[:, :width] - (teacher / 2).softmax(-1)[:, :width]
    return gap.abs().sum(-1) + (student * teacher.sum(-1, keepdim=True)).tanh().sum(-1)


# Flattened positions; sequences have 5 rows here, the teacher's 6. The student's first row is used.
PAIRS = torch.tensor([[0, 7], [-1, -1], [1, 0], [3, -1], [-1, 2], [5, 1], [6, 7], [-1, -1], [2, 7]])


@by_layout
def test_map_row_pairs(layout):
    leaf, student, dense = build(layout)
    teacher_leaf = randn(B, 6, 8, seed=9).requires_grad_()
    values = map_row_pairs(student, DenseLogits(teacher_leaf), PAIRS, l1_to_scaled)
    kept = (PAIRS >= 0).all(-1)
    expected = l1_to_scaled(
        dense.flatten(0, 1)[PAIRS[kept, 0]], teacher_leaf.detach().flatten(0, 1)[PAIRS[kept, 1]]
    )
    expected = torch.zeros(len(PAIRS), dtype=torch.float64).masked_scatter(kept, expected)
    agree(values, expected)
    weights = torch.linspace(0.5, 2.0, len(PAIRS), dtype=torch.float64)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), leaf)
    for kept_graph in (True, True, False):
        (gradient,) = torch.autograd.grad(
            (values * weights).sum(), leaf, retain_graph=kept_graph, materialize_grads=True
        )
        agree(gradient, wanted)


def test_map_row_pairs_gives_the_teacher_no_gradient():
    student, teacher = randn(1, 2, V).requires_grad_(), randn(1, 2, V, seed=1).requires_grad_()
    rows = torch.tensor([[0, 1], [1, 0]])
    values = map_row_pairs(DenseLogits(student), DenseLogits(teacher), rows, l1_to_scaled)
    values.sum().backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(mode, monkeypatch):
    def refuse(*_):
        raise RuntimeError("a buffer for gradients was made")

    monkeypatch.setattr(TensorRows, "row_buffer", refuse)
    tensor = randn(1, 2, V).requires_grad_()
    rows = torch.tensor([[0, 1], [1, 0]])
    with mode():
        values = map_row_pairs(DenseLogits(tensor), DenseLogits(tensor), rows, l1_to_scaled)
        assert not values.requires_grad
    with pytest.raises(RuntimeError, match="a buffer"):
        map_row_pairs(DenseLogits(tensor), DenseLogits(tensor), rows, l1_to_scaled)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("mass_first", [False, True])
def test_answers_are_new_after_the_logits_changed(inference, mass_first):
    ids = torch.tensor([[[0, 1]]])
    with torch.inference_mode(inference):
        tensor = randn(1, 2, V)
        logits = DenseLogits(tensor)
        for _ in range(3):
            if mass_first:
                agree(logits.column_mass(), naive_log_probs(tensor, 1.0).exp().sum(1))
            agree(logits.log_probs(ids), naive_log_probs(tensor, 1.0)[..., :2])
            tensor.mul_(-1.7)
    assert tensor.is_inference() == inference


def test_answers_do_not_mix_up_temperatures_and_scales():
    logits = DenseLogits(tensor := randn(1, 2, V))
    ids = torch.arange(V).view(1, 1, V)
    for _ in range(2):
        for temperature, standardise in itertools.product((1.0, 2.0), (False, True)):
            answer = logits.log_probs(ids, temperature=temperature, standardise=standardise)
            agree(answer, naive_log_probs(tensor, temperature, standardise))


def test_inference_tensors_answer_outside_of_inference_mode():
    with torch.inference_mode():
        tensor = randn(B, S, V)
    logits, twin = DenseLogits(tensor), DenseLogits(randn(B, S, V))
    with torch.no_grad():
        ids = logits.top_ids(2)
        agree(logits.log_probs(ids), twin.log_probs(ids))
        agree(logits.column_mass(), twin.column_mass())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype):
    narrow = (3.0 * randn(B, S, V)).to(dtype)
    logits, wide = DenseLogits(narrow), DenseLogits(narrow.double())
    ids = torch.arange(V).expand(B, 1, V)
    targets = randn(B, S, 2).abs()
    rows = torch.tensor([[0, 1]])
    for answer, expected in (
        (logits.log_probs(ids, temperature=0.7), wide.log_probs(ids, temperature=0.7)),
        (logits.log_probs(ids, standardise=True), wide.log_probs(ids, standardise=True)),
        (logits.column_mass(), wide.column_mass()),
        (logits.column_distance(targets), wide.column_distance(targets)),
        (logits.sorted_probs(3), wide.sorted_probs(3)),
        (
            map_row_pairs(logits, logits, rows, l1_to_scaled),
            map_row_pairs(wide, wide, rows, l1_to_scaled),
        ),
    ):
        assert answer.dtype == torch.float32
        torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_read_where_there_are_no_positions():
    tensor = torch.zeros(2, 3, V, requires_grad=True)
    logits = DenseLogits(
        tensor,
        mask=torch.zeros(2, 0, dtype=torch.bool),
        rows=torch.zeros(2, 0, dtype=torch.int64),
    )
    answer = logits.log_probs(torch.zeros(2, 1, 4, dtype=torch.int64))
    assert answer.shape == (2, 0, 4)
    answer.sum().backward()
    assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    assert torch.equal(logits.column_mass(), torch.zeros(2, V))
    assert torch.equal(logits.column_distance(torch.zeros(2, 0, 3)), torch.zeros(2, 3, V))
    assert logits.top_ids(2).shape == logits.sorted_probs(2).shape == (2, 0, 2)


def test_only_scored_rows_are_read_on_the_cpu(reading):
    read = []

    class Spy(TensorRows):
        def blocks(self, rows):
            read.extend((row // S, row % S) for row in rows.tolist())
            return super().blocks(rows)

    _, plain, _ = build("plain")
    RowLogits(Spy(plain.tensor), mask=plain.mask).column_mass()
    everything = list(itertools.product(range(B), range(S)))
    expected = everything if "padding" in reading else plain.mask.nonzero().tolist()
    assert sorted(read) == [tuple(pair) for pair in expected]


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
    head = HeadLogits(randn(1, 2, 3).to(dtype), randn(5, 3).to(dtype))
    stored = TopKLogits(TopK.of(dense, torch.zeros(1, 2, dtype=torch.int64), 5, [1.0]))
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    return {
        "dense": dense,
        "head": head,
        "stored": stored,
        "cut": DenseLogits(randn(1, 2, 8).to(dtype), vocab_size=5),
        "nothing scored": dense.masked(nothing),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", kinds_of_logits(torch.float64))
def test_more_entries_than_there_are_columns_are_refused(kind, dtype):
    logits = kinds_of_logits(dtype)[kind]
    for ask in (logits.top_ids, logits.sorted_probs):
        assert ask(5).shape == (1, 2, 5)
        for k in (6, -1):
            with pytest.raises(
                BatchError, match=rf"the largest {k} entries .* ask for min\(k, 5\)"
            ):
                ask(k)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1, 3), (1, 3, 3)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(BatchError, match=r"ids must be \(1, 2, K\) or \(1, 1, K\), got"):
        DenseLogits(torch.zeros(1, 2, 5)).log_probs(torch.zeros(shape, dtype=torch.int64))


def test_row_pairs_need_a_student_s_tensor_and_a_teacher_s_logits():
    dense, table, rows = DenseLogits(torch.zeros(1, 2, 5)), object(), torch.tensor([[0, 0]])
    with pytest.raises(BatchError, match="as a tensor or from its head, got object"):
        map_row_pairs(table, dense, rows, l1_to_scaled)
    for teacher in (table, dense.tensor):
        with pytest.raises(BatchError, match="needs the teacher's Logits, got (object|Tensor)"):
            map_row_pairs(dense, teacher, rows, l1_to_scaled)
