"""One backward pass for all queries of one source, and nothing wrong or left behind by it."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import ctkd
from ctkd import ops
from ctkd.batch import Batch, Side
from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, RowLogits, TopK, TopKLogits, map_rows
from ctkd.logits.sources import TensorRows
from ctkd.ops import use_backend
from tests.logits.cases import (
    COLUMNS,
    DIFFERENTIABLE,
    ENGINES,
    KINDS,
    MASK,
    POSITIONS,
    ULD,
    B,
    S,
    T,
    V,
    W,
    ids_of,
    in_turn,
    leaves_of,
    logits_of,
    randn,
    squares,
    weighed,
)
from tests.logits.losses import LOSSES, loss_of
from tests.ragged_batches import ragged_inputs

by_kind = pytest.mark.parametrize("kind", KINDS)
NOT_NARROW = [name for name in ENGINES if name != "bfloat16"]


def cross_entropy(side: Side) -> Tensor:
    log_probs = side.logits.log_probs(side.token_ids.unsqueeze(-1)).squeeze(-1)
    return -log_probs.sum() / side.mask.sum()


def causal_batch(kind: str, dtype: torch.dtype) -> tuple[Batch, list[Tensor]]:
    inputs = ragged_inputs(0, V=V, W=W, dtype=dtype, head=0)
    size = inputs["student_logits"].shape
    leaves = [inputs["student_logits"].requires_grad_()]
    if kind == "head":
        leaves = [randn(*size[:2], 4), randn(V, 4, seed=1)]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return Batch.from_causal_lm(**{**inputs, "student_logits": logits_of(leaves)}), leaves


@pytest.mark.parametrize(
    ("case", "engine", "kind"),
    [
        (case, engine, KINDS[(number + number // 4) % 2])
        for number, (case, engine) in enumerate(in_turn(LOSSES, others=NOT_NARROW))
    ],
    indirect=["engine"],
)
def test_cross_entropy_and_a_loss_share_one_pass(case, engine, kind, passes):
    loss, separate = loss_of(case), []
    for ask in (lambda batch: cross_entropy(batch.student), lambda batch: loss(batch).value):
        batch, leaves = causal_batch(kind, engine.dtype)
        separate.append(torch.autograd.grad(ask(batch), leaves))
    assert len(passes) == 2
    batch, leaves = causal_batch(kind, engine.dtype)
    passes.clear()
    (0.7 * cross_entropy(batch.student) + 1.3 * loss(batch).value).backward()
    assert passes == [batch.student.logits.source]
    for leaf, first, second in zip(leaves, *separate, strict=True):
        assert first.any() and second.any()
        engine.agree(leaf.grad, 0.7 * first + 1.3 * second)


@by_kind
def test_a_second_evaluation_is_the_first_to_the_last_digit(kind):
    for case in LOSSES:
        loss, found = loss_of(case), []
        batch, leaves = causal_batch(kind, torch.float32)
        for _ in range(3):
            values = cross_entropy(batch.student), loss(batch).value
            # Leaves, so that no second pass goes through a graph that is gone.
            found.append([*values, *torch.autograd.grad(sum(values), leaves)])
        for again in found[1:]:
            same = [torch.equal(one, other) for one, other in zip(found[0], again, strict=True)]
            assert all(same), case


def test_a_second_loss_after_a_first_backward_pass_adds(monkeypatch):
    streams = []

    @contextmanager
    def stream():
        streams.append("of the forward pass")
        yield

    for case in LOSSES:
        batch, (leaf,) = causal_batch("tensor", torch.float32)
        loss = loss_of(case)
        streams.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ops, "current_stream", lambda device: stream)
            cross_entropy(batch.student).backward()
            first = leaf.grad.clone()
            loss(batch).value.backward()
        # Each pass over the rows runs where they were read.
        assert len(streams) == 2
        other, (other_leaf,) = causal_batch("tensor", torch.float32)
        (second,) = torch.autograd.grad(loss(other).value, other_leaf)
        ENGINES["float32"].agree(leaf.grad, first + second)


@pytest.mark.parametrize(
    ("case", "dtype"), in_turn(LOSSES, others=[torch.float32, torch.bfloat16, torch.float16])
)
def test_another_default_dtype_and_a_kept_graph_change_nothing(case, dtype):
    """What the first backward pass used up is made again."""
    inputs = ragged_inputs(3, V=70, W=55, head=3, dtype=dtype)
    loss = loss_of(case, (70, 55))

    def run() -> list[Tensor]:
        leaf = inputs["student_logits"].detach().clone().requires_grad_()
        value = loss(Batch.from_causal_lm(**{**inputs, "student_logits": leaf})).value
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(value, leaf)
        assert torch.equal(first, second) and first.any()
        assert not first[..., 70:].any()
        return [value.detach(), first]

    expected, before = run(), torch.get_default_dtype()
    for default in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(default)
            found = run()
        finally:
            torch.set_default_dtype(before)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("case", "dtype"), in_turn(LOSSES, others=[torch.float32, torch.bfloat16]))
def test_kernels_and_the_reference_agree_on_losses(case, dtype):
    inputs = ragged_inputs(3, V=70, W=55, head=3, dtype=dtype)
    loss = loss_of(case, (70, 55))

    def run() -> tuple[ctkd.LossOutput, Tensor]:
        leaf = inputs["student_logits"].detach().clone().requires_grad_()
        output = loss(Batch.from_causal_lm(**{**inputs, "student_logits": leaf}))
        output.value.backward()
        return output, leaf.grad

    output, gradient = run()
    with use_backend("reference"):
        expected, wanted = run()
    engine = ENGINES["float32"]
    engine.agree([output.value, *output.parts.values()], [expected.value, *expected.parts.values()])
    largest = float(wanted.abs().max())
    assert largest > 1e-5
    # Both round the gradient once, which may be a gradient and its weight.
    relative = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient, wanted, rtol=relative, atol=relative * largest)


@pytest.mark.parametrize(
    ("first", "kind", "engine"),
    in_turn(DIFFERENTIABLE, KINDS, others=[*NOT_NARROW, "float32"]),
    indirect=["engine"],
)
def test_two_queries_add_up(first, kind, engine, passes):
    """Gradients of two answers together are those of each, asked alone of logits of their own."""
    names = list(DIFFERENTIABLE)
    for second in names[names.index(first) :]:
        wanted = []
        for query in (first, second):
            leaves = leaves_of(kind, engine.dtype)
            alone = logits_of(leaves, mask=MASK)
            wanted.append(torch.autograd.grad(weighed(DIFFERENTIABLE[query](alone)), leaves))
        leaves = leaves_of(kind, engine.dtype)
        logits = logits_of(leaves, mask=MASK)
        answers = [weighed(DIFFERENTIABLE[query](logits)) for query in (first, second)]
        passes.clear()
        for _ in range(2):
            together = torch.autograd.grad(sum(answers), leaves, retain_graph=True)
            engine.agree(together, [sum(pair) for pair in zip(*wanted, strict=True)])
        # Each function of whole rows beyond the first gets a pass of its own.
        functions = {"two_parts", "per_row", "uld"}
        assert len(passes) == (4 if {first, second} <= functions else 2)
        # One after the other through the graph that was kept, and only one of the two.
        for answer, expected in zip(answers, wanted, strict=True):
            engine.agree(torch.autograd.grad(answer, leaves, retain_graph=True), expected)


VIEWS = {
    "masks": ({"mask": MASK}, {"mask": ~MASK}),
    "overlapping_masks": ({"mask": MASK}, {"mask": MASK.flip(1)}),
    "rows": (
        {"mask": MASK, "rows": torch.tensor([[3, 1, 0, 4, 2], [0, 2, 1, 1, 1], [0, 0, 0, 0, 0]])},
        {
            "mask": MASK.flip(0),
            "rows": torch.tensor([[0, 0, 2, 1, 2], [3, 2, 0, 0, 1], [4, 3, 2, 1, 0]]),
        },
    ),
    "vocab_size": ({"mask": MASK, "vocab_size": V}, {"mask": MASK, "vocab_size": V - 1}),
}


@pytest.mark.parametrize(
    ("query", "views", "kind", "engine"),
    [
        (query, views, KINDS[(number + number // 4) % 2], NOT_NARROW[(number // 2) % 4])
        for number, (query, views) in enumerate(in_turn([*DIFFERENTIABLE] * 2, others=VIEWS))
    ],
    indirect=["engine"],
)
def test_two_views_share_one_pass(query, views, kind, engine, passes):
    first, second = VIEWS[views]

    def other(logits: RowLogits) -> Tensor:
        ids = ids_of(1, logits).clamp_max(logits.shape[2] - 1)
        positions = torch.tensor([[2, 1], [7, 6]]) if logits.mask[1, 2] else POSITIONS[:1]
        teacher = DenseLogits(randn(B, T, W, seed=4).to(logits.source.inputs[0]))
        values = map_rows(logits, teacher, positions, lambda *x: squares(*x).sum(-1)).values
        return weighed(logits.log_probs(ids)) + values.sum()

    wanted = []
    for ask, view in ((lambda x: weighed(DIFFERENTIABLE[query](x)), first), (other, second)):
        leaves = leaves_of(kind, engine.dtype)
        wanted.append(torch.autograd.grad(ask(logits_of(leaves, **view)), leaves))
    leaves = leaves_of(kind, engine.dtype)
    source = logits_of(leaves)
    one, two = (source.at(x.get("rows"), x["mask"], x.get("vocab_size")) for x in (first, second))
    total = weighed(DIFFERENTIABLE[query](one)) + other(two)
    passes.clear()
    found = torch.autograd.grad(total, leaves)
    engine.agree(found, [sum(pair) for pair in zip(*wanted, strict=True)])
    assert len(set(passes)) == 1


@by_kind
@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
def test_two_sides_with_other_labels(kind, engine, passes):
    labels = torch.full((B, S), -100)
    other = labels.clone()
    labels[0, 1:3], labels[1, 2:] = torch.tensor([1, 2]), torch.tensor([4, 5, 0])
    other[0, 2:4], other[2, 1] = torch.tensor([3, 0]), 7
    leaves = leaves_of(kind, engine.dtype)
    logits = logits_of(leaves)
    sides = [
        Side.from_causal_lm(logits, one, vocab_size=size) for one, size in ((labels, 9), (other, V))
    ]
    sum(cross_entropy(side) for side in sides).backward()
    assert len(passes) == 1
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = twins[0] if kind == "tensor" else twins[0] @ twins[1].T
    expected = sum(
        F.cross_entropy(dense[:, :-1, :size].flatten(0, 1), one[:, 1:].flatten())
        for one, size in ((labels, 9), (other, V))
    )
    engine.agree([leaf.grad for leaf in leaves], torch.autograd.grad(expected, twins))


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 120.0), (torch.float64, 800.0)])
def test_large_logits_of_rows_that_another_view_scores(dtype, offset):
    """The exponential of such logits is infinite."""
    tensor = randn(B, S, V)
    tensor[~MASK] += offset
    leaf = tensor.to(dtype).requires_grad_()
    logits = DenseLogits(leaf)
    ids = ids_of(1, logits)
    mass = logits.at(None, MASK).log_mass(COLUMNS).sum()
    (mass + logits.at(None, ~MASK).log_probs(ids).sum()).backward()
    expected = leaf.log_softmax(-1)[..., COLUMNS].logsumexp(-1)[MASK].sum()
    expected = expected + leaf.log_softmax(-1).gather(2, ids.expand(-1, S, -1))[~MASK].sum()
    # Logarithms of sums are as large as the logits, and as exact.
    tolerance = 4 * offset * torch.finfo(dtype).eps
    wanted = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close((leaf.grad,), wanted, rtol=tolerance, atol=tolerance)


def ask_first(logits: RowLogits) -> Tensor:
    return logits.log_probs(torch.zeros(B, 1, 1, dtype=torch.int64)).sum()


def check_first(logits: RowLogits, leaf: Tensor, engine=ENGINES["float32"]) -> None:
    """Another query has its own gradient and nobody else's."""
    twin = leaf.detach().double().requires_grad_()
    wanted = torch.autograd.grad(twin.log_softmax(-1)[..., 0].sum(), twin)
    engine.agree(torch.autograd.grad(ask_first(logits), leaf), wanted)


def test_a_gradient_of_numbers_per_row_alone_leaves_nothing_for_a_later_pass():
    (leaf,) = leaves = leaves_of("tensor", torch.float32)
    logits, numbers = logits_of(leaves), randn(len(POSITIONS), 1).float().requires_grad_()
    teacher = DenseLogits(randn(B, T, W).float())
    values = map_rows(logits, teacher, POSITIONS, lambda *x: squares(*x).sum(-1), per_row=numbers)
    torch.autograd.grad(values.values.sum(), numbers)
    check_first(logits, leaf)


def test_a_pass_that_failed_leaves_nothing_for_a_later_pass():
    (leaf,) = leaves = leaves_of("tensor", torch.float32)
    logits = logits_of(leaves)
    # Of two queries one has run when the other's gradient is refused.
    answers = [logits.log_probs(torch.full((B, 1, 2), i)) for i in range(2)]

    def refuse(_: Tensor) -> None:
        raise ValueError("refused")

    answers[0].register_hook(refuse)
    with pytest.raises(ValueError, match="refused"):
        sum(answer.sum() for answer in answers).backward()
    check_first(logits, leaf)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_query_in_inference_mode_disturbs_no_gradient(temperature):
    (leaf,) = leaves = leaves_of("tensor", torch.float32)
    logits = logits_of(leaves)
    first = logits.at(None, MASK)
    answer = ask_first(first)
    with torch.inference_mode():
        first.log_probs(ids_of(1, first), temperature=temperature)
        first.column_mass(temperature=temperature)
    (answer + ask_first(logits.at(None, ~MASK))).backward()
    logits.column_mass(temperature=temperature)
    gradient, leaf.grad = leaf.grad, None
    check_first(logits, leaf)
    twin = leaf.detach().double().requires_grad_()
    twin.log_softmax(-1)[..., 0].sum().backward()
    ENGINES["float32"].agree(gradient, twin.grad)


@pytest.mark.parametrize("engine", ["float32", "device"], indirect=True)
def test_a_reading_that_failed_is_done_again(engine, monkeypatch):
    (leaf,) = leaves = leaves_of("tensor", engine.dtype)
    logits = logits_of(leaves)
    for ask in (ask_first, DenseLogits.column_mass):
        with monkeypatch.context() as patch:
            patch.setattr(TensorRows, "chunks", lambda *_: [][0])
            with pytest.raises(IndexError):
                ask(logits)
    check_first(logits, leaf)


@pytest.mark.parametrize("query", DIFFERENTIABLE)
def test_logits_overwritten_before_the_backward_pass_are_noticed(query):
    for kind, which in (("tensor", 0), ("head", 0), ("head", 1)):
        leaves = leaves_of(kind, torch.float32)
        inputs = [leaf * 1.0 for leaf in leaves]
        value = DIFFERENTIABLE[query](logits_of(inputs, mask=MASK)).sum()
        with torch.no_grad():
            inputs[which].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_columns_overwritten_before_the_backward_pass_are_noticed(kind):
    def ids() -> Tensor:
        return torch.arange(V).expand(B, 1, V).contiguous()

    for ask, read in (
        (RowLogits.log_probs, ids()),
        (RowLogits.log_mass, torch.arange(V) > 0),
    ):
        value = ask(logits_of(leaves_of(kind, torch.float32), mask=MASK), read).sum()
        read.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("teacher_kind", ["tensor", "top_k"])
def test_a_teacher_overwritten_before_it_is_read_again_is_noticed(teacher_kind, monkeypatch):
    rows = randn(B, T, W).float()
    labels = torch.zeros(B, T, dtype=torch.int64)
    kept = TopK.of(DenseLogits(rows), labels, 3, [ULD.settings["teacher_temperature"]])
    for kind, elements in (("tensor", "100"), ("head", "100000"), ("head", "1")):
        monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", elements)
        teacher = DenseLogits(rows) if teacher_kind == "tensor" else TopKLogits(kept)
        logits = logits_of(leaves_of(kind, torch.float32))
        temperature = ULD.settings["teacher_temperature"]
        options = {"teacher_temperature": temperature, "spread_tail": teacher_kind == "top_k"}
        values = map_rows(logits, teacher, POSITIONS, ULD, **options).values.sum()
        if (kind, elements) != ("head", "1"):
            # The gradient was computed with the values; the next pass needs another one.
            values.backward(retain_graph=True)
        (rows if teacher_kind == "tensor" else kept.values).add_(1.0)
        with pytest.raises(BatchError, match="teacher's logits were overwritten"):
            values.backward()


def both_of(leaf: Tensor) -> tuple[Tensor, Tensor]:
    logits = DenseLogits(leaf)
    return ask_first(logits), logits.log_mass(COLUMNS).sum()


def test_a_pass_inside_a_pass_takes_nothing_from_it():
    (leaf,) = leaves_of("tensor", torch.float32)
    wanted, inner_wanted = (torch.autograd.grad(both_of(leaf)[i], leaf)[0] for i in range(2))
    logits, seen = DenseLogits(leaf), []
    inner = logits.log_mass(COLUMNS).sum()
    # Later nodes run sooner: when the hook runs, the outer pass has filed its query.
    between = torch.ones((), requires_grad=True) * 1.0
    between.register_hook(
        lambda _: seen.extend(torch.autograd.grad(inner, leaf, retain_graph=True))
    )
    (ask_first(logits) + between).backward()
    torch.testing.assert_close(leaf.grad, wanted)
    torch.testing.assert_close(seen, [inner_wanted])


def test_a_pass_inside_a_pass_may_fail():
    """What it has filed by then is not taken for the outer pass's."""
    (leaf,) = leaves_of("tensor", torch.float32)
    wanted = torch.autograd.grad(both_of(leaf)[0], leaf)[0]
    logits, one = DenseLogits(leaf), torch.ones((), requires_grad=True)
    ask_first(logits)
    # Nodes run in the opposite order: the query files, this fails, and the rows' turn never comes.
    failing = one * 1.0
    failing.register_hook(lambda _: 1 / 0)
    inner = logits.log_mass(COLUMNS).sum() + failing
    between, failures = one * 1.0, []

    def fail(_: Tensor) -> None:
        with pytest.raises(ZeroDivisionError) as raised:
            torch.autograd.grad(inner, [leaf, one], retain_graph=True)
        failures.append(raised)

    between.register_hook(fail)
    (ask_first(logits) + between).backward()
    assert failures
    torch.testing.assert_close(leaf.grad, wanted)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_query_in_a_checkpoint_beside_others_of_the_same_logits(use_reentrant):
    (leaf,) = leaves_of("tensor", torch.float32)
    first, second = (torch.autograd.grad(both_of(leaf)[i], leaf)[0] for i in range(2))
    logits, factor = DenseLogits(leaf), torch.ones((), requires_grad=True)
    before = ask_first(logits)
    kept = checkpoint(
        lambda x: x * logits.log_mass(COLUMNS).sum(), factor, use_reentrant=use_reentrant
    )
    (before + kept + ask_first(logits)).backward()
    torch.testing.assert_close(leaf.grad, 2.0 * first + second)


def test_passes_in_two_threads_keep_apart():
    (leaf,) = leaves_of("tensor", torch.float32)
    wanted = [torch.autograd.grad(both_of(leaf)[i], leaf)[0] for i in range(2)]
    answers = both_of(leaf)
    meet = threading.Barrier(2, timeout=60)

    def run(number: int) -> Tensor:
        for _ in range(20):
            meet.wait()
            (gradient,) = torch.autograd.grad(answers[number], leaf, retain_graph=True)
            torch.testing.assert_close(gradient, wanted[number])
        return gradient

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))


@pytest.mark.parametrize("query", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(query):
    (leaf,) = leaves_of("tensor", torch.float64)
    value = DIFFERENTIABLE[query](DenseLogits(leaf, mask=MASK)).sum()
    (gradient,) = torch.autograd.grad(value + leaf.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again|differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("case", "kind"), in_turn([*LOSSES], others=KINDS))
def test_nothing_is_left_behind_by_a_step(case, kind, no_collector):
    loss = loss_of(case)
    inputs = ragged_inputs(0, V=V, W=W, dtype=torch.float32, head=0)
    size = inputs["student_logits"].shape
    leaves = [randn(*size[:2], 4).float(), randn(V, 4, seed=1).float()]
    leaves = leaves if kind == "head" else [inputs["student_logits"]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for ending in ("backward", "backward", "forward_only", "no_grad", "kept_and_run_twice"):
        tensors = [leaf * 1.0 for leaf in leaves]
        logits = logits_of(tensors)
        batch = Batch.from_causal_lm(**{**inputs, "student_logits": logits})
        with torch.set_grad_enabled(ending != "no_grad"):
            value = cross_entropy(batch.student) + loss(batch).value
        if ending == "kept_and_run_twice":
            value.backward(retain_graph=True)
        if ending in ("backward", "kept_and_run_twice"):
            value.backward()
        watched = [weakref.ref(one) for one in (logits.source, batch.student.logits, *tensors)]
        del tensors, logits, batch, value
        assert [one() for one in watched] == [None] * len(watched), ending


def test_a_frozen_student_is_not_left_behind(no_collector):
    tensor, numbers = randn(B, S, V).float(), randn(len(POSITIONS), 1).float().requires_grad_()
    teacher = DenseLogits(randn(B, T, W).float())
    map_rows(
        DenseLogits(tensor),
        teacher,
        POSITIONS,
        lambda *x: squares(*x).sum(-1),
        per_row=numbers,
    ).values.sum().backward()
    assert numbers.grad.any()
    watched = weakref.ref(tensor)
    del tensor
    assert watched() is None


class Largest(TorchDispatchMode):
    """Elements of the largest tensors made in its context, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr()
            for one in tree_leaves((args, kwargs))
            if isinstance(one, Tensor)
        }
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                storage = one.untyped_storage()
                self.kept.append(one)
                self.sizes[storage.data_ptr()] = storage.nbytes() // one.element_size()
        return result


@pytest.mark.parametrize("query", DIFFERENTIABLE)
def test_nothing_as_large_as_the_logits_is_made_but_the_gradient(query, monkeypatch):
    columns = 1 << 14
    for dtype, backend in (
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.float32, "reference"),
    ):
        leaf = torch.zeros(B, S * 8, columns, dtype=dtype)
        leaf[..., :V] = randn(B, S * 8, V).to(dtype)
        leaf.requires_grad_()
        rows = torch.arange(S).expand(B, S) * 8
        monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", str(2 * columns))
        with Largest() as largest, use_backend(backend):
            logits = DenseLogits(leaf, mask=MASK, rows=rows)
            if query in ("log_mass", "all_sorted_probs"):
                chosen = torch.arange(columns) % 3 == 0
                answer = logits.log_mass(chosen) if query == "log_mass" else logits.sorted_probs(V)
            elif query == "uld":
                teacher = DenseLogits(randn(B, T, W).to(dtype))
                answer = map_rows(logits, teacher, POSITIONS, ULD).values
            else:
                answer = DIFFERENTIABLE[query](logits)
            (gradient,) = torch.autograd.grad(answer.sum(), leaf)
        large = [place for place, size in largest.sizes.items() if size >= leaf.numel() // 4]
        assert large == [gradient.untyped_storage().data_ptr()]


def test_few_rows_of_a_head_are_worked_through_once(monkeypatch):
    row_loss, worked = ops.row_loss, []

    def counted(loss, student, *others):
        worked.append(len(student))
        return row_loss(loss, student, *others)

    monkeypatch.setattr(ops, "row_loss", counted)
    gradients = []
    for elements, passes in (("100000", 1), ("1", 2)):
        monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", elements)
        worked.clear()
        leaves = leaves_of("head", torch.float32)
        teacher = DenseLogits(randn(B, T, W).float())
        map_rows(logits_of(leaves), teacher, POSITIONS, ULD).values.sum().backward()
        assert sum(worked) == passes * int((POSITIONS >= 0).all(-1).sum())
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
