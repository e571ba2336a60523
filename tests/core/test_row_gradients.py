"""One backward pass for everything asked of one source, and nothing wrong or left behind by it."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ctkd import HeadLogits
from ctkd import rows as rows_module
from ctkd.batch import Batch, Side
from ctkd.dense_logits import DenseLogits
from ctkd.head_rows import HeadRows
from ctkd.row_logits import RowLogits
from ctkd.row_pairs import map_row_pairs, map_row_pairs_to_parts
from ctkd.row_sources import TensorRows
from tests.losses.test_stored_teacher import build, forms
from tests.ragged_batches import ragged_inputs

V, W, H = 11, 8, 4
IDS = torch.tensor([[[0, 2, 2]]])
SCORED = torch.tensor([[True, True, False, False], [False, True, True, False]])
PAIRS = torch.tensor([[0, 2], [5, 7], [-1, 1], [6, 0]])
KINDS = pytest.mark.parametrize("kind", ["tensor", "head"])
Numbers = Callable[[RowLogits], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaves_of(kind: str, *shape: int, seed: int = 0, dtype=torch.float64) -> list[Tensor]:
    """A tensor of logits, or hidden states and a weight."""
    if kind == "tensor":
        tensors = [2.0 * randn(*shape, seed=seed)]
    else:
        tensors = [randn(*shape[:2], H, seed=seed), randn(shape[2], H, seed=seed + 1)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def logits_of(leaves: list[Tensor], **settings) -> RowLogits:
    return DenseLogits(*leaves, **settings) if len(leaves) == 1 else HeadLogits(*leaves, **settings)


def agree(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.fixture
def passes(monkeypatch) -> list[object]:
    """Sources that carried a gradient back, one entry for each time."""
    done: list[object] = []
    for kind in (TensorRows, HeadRows):

        def carry_back(self, rows, fill, buffer=None, original=kind.carry_back):
            done.append(self)
            return original(self, rows, fill, buffer)

        monkeypatch.setattr(kind, "carry_back", carry_back)
    return done


def cross_entropy(side: Side) -> Tensor:
    log_probs = side.logits.log_probs(side.token_ids.unsqueeze(-1)).squeeze(-1)
    return -log_probs.sum() / side.mask.sum()


def causal_batch(kind: str, dtype=torch.float64, seed: int = 0) -> tuple[Batch, list[Tensor]]:
    inputs = ragged_inputs(seed, V=V, W=W, dtype=dtype)
    leaves = leaves_of(kind, *inputs["student_logits"].shape, dtype=dtype)
    return Batch.from_causal_lm(**{**inputs, "student_logits": logits_of(leaves)}), leaves


@KINDS
@forms("rows", "top_k", "observed")
def test_cross_entropy_and_a_loss_share_one_pass(name, settings, kind, passes):
    loss = build(name, settings)
    separate = []
    for ask in (lambda batch: cross_entropy(batch.student), lambda batch: loss(batch).value):
        batch, leaves = causal_batch(kind)
        separate.append(torch.autograd.grad(ask(batch), leaves))
    assert len(passes) == 2
    batch, leaves = causal_batch(kind)
    passes.clear()
    (0.7 * cross_entropy(batch.student) + 1.3 * loss(batch).value).backward()
    assert passes == [batch.student.logits.source]
    for leaf, first, second in zip(leaves, *separate, strict=True):
        assert first.any() and second.any()
        agree(leaf.grad, 0.7 * first + 1.3 * second)


@KINDS
@forms("rows", "top_k", "observed")
def test_a_second_evaluation_is_the_first_to_the_last_digit(name, settings, kind):
    loss = build(name, settings)
    batch, leaves = causal_batch(kind, torch.float32)
    found = []
    for _ in range(3):
        values = cross_entropy(batch.student), loss(batch).value
        # Leaves, so that no second pass goes through a graph that is gone.
        found.append([*values, *torch.autograd.grad(sum(values), leaves)])
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))


def test_a_reading_that_serves_two_temperatures_changes_no_known_answer():
    logits = DenseLogits(3.0 * randn(1, 6, 997).float())
    ids = torch.arange(997).view(1, 1, -1)
    first = logits.log_probs(ids)
    for ask in (
        lambda: logits.column_mass(temperature=2.0, asked_next=(1.0,)),
        lambda: logits.column_mass(temperature=1.0, asked_next=(2.0,)),
        lambda: logits.log_probs_at(ids, (2.0, 1.0)),
        lambda: logits.log_mass(torch.arange(997) < 5),
    ):
        ask()
        assert torch.equal(logits.log_probs(ids), first)


@forms("rows", "top_k", "observed")
def test_a_second_loss_after_a_first_backward_pass_adds(name, settings):
    batch, leaves = causal_batch("tensor")
    loss = build(name, settings)
    cross_entropy(batch.student).backward()
    (first,) = (leaf.grad.clone() for leaf in leaves)
    loss(batch).value.backward()
    other, other_leaves = causal_batch("tensor")
    (second,) = torch.autograd.grad(loss(other).value, other_leaves)
    agree(leaves[0].grad, first + second)


def teacher() -> DenseLogits:
    return DenseLogits(randn(2, 4, W, seed=9))


def overlap(student: Tensor, other: Tensor, *numbers: Tensor) -> Tensor:
    found = (student.softmax(-1)[:, :W] - other.softmax(-1)).square().sum(-1)
    return found * (numbers[0][:, 0].exp() if numbers else 1.0)


def product(student: Tensor, other: Tensor) -> Tensor:
    return (student * other.sum(-1, keepdim=True)).tanh().sum(-1)


QUESTIONS: dict[str, Numbers] = {
    "log_probs": lambda x: x.log_probs(IDS.expand(2, 1, 3)),
    "log_probs_at": lambda x: sum(x.log_probs_at(IDS.expand(2, 4, 3), (2.0, 1.0))),
    "same_temperature_twice": lambda x: sum(
        (i + 1) * y for i, y in enumerate(x.log_probs_at(IDS.expand(2, 1, 3), (1.0, 1.0)))
    ),
    "standardised": lambda x: x.log_probs(IDS.expand(2, 1, 3), temperature=0.7, standardise=True),
    "half_temperature": lambda x: x.log_probs(1 + IDS.expand(2, 4, 3), temperature=0.5),
    "log_mass": lambda x: x.log_mass(torch.arange(x.shape[2]) % 3 == 1, temperature=2.0),
    "sorted_probs": lambda x: x.sorted_probs(5),
    "overlap": lambda x: map_row_pairs(x, teacher(), PAIRS, overlap),
    "product": lambda x: map_row_pairs(x, teacher(), PAIRS.flip(0), product),
    "per_pair": lambda x: map_row_pairs(
        x, teacher(), PAIRS, overlap, per_pair=x.log_probs(IDS.expand(2, 1, 3))[0]
    ),
}


def total(ask: Numbers, logits: RowLogits) -> Tensor:
    answer = ask(logits)
    return (answer * randn(*answer.shape, seed=7)).sum()


@KINDS
@pytest.mark.parametrize("second", QUESTIONS)
@pytest.mark.parametrize("first", QUESTIONS)
def test_two_questions_add_up(first, second, kind, passes):
    """Gradients of two answers together are those of each, asked alone of logits of their own."""
    wanted = []
    for question in (first, second):
        leaves = leaves_of(kind, 2, 4, V)
        alone = logits_of(leaves, mask=SCORED)
        wanted.append(torch.autograd.grad(total(QUESTIONS[question], alone), leaves))
    leaves = leaves_of(kind, 2, 4, V)
    logits = logits_of(leaves, mask=SCORED)
    answers = [total(QUESTIONS[question], logits) for question in (first, second)]
    passes.clear()
    for _ in range(2):
        together = torch.autograd.grad(sum(answers), leaves, retain_graph=True)
        agree(together, tuple(sum(pair) for pair in zip(*wanted, strict=True)))
    assert len(passes) == 2
    # One after the other through the graph that was kept, and only one of the two.
    for answer, expected in zip(answers, wanted, strict=True):
        agree(torch.autograd.grad(answer, leaves, retain_graph=True), expected)


@KINDS
@pytest.mark.parametrize("question", QUESTIONS)
def test_alone_against_autograd(question, kind):
    """A question whose answer is asked of other logits for every number in it."""
    leaves = leaves_of(kind, 2, 4, V)
    logits = logits_of(leaves, mask=SCORED)
    dense = leaves[0] if kind == "tensor" else leaves[0] @ leaves[1].T
    rows, count = dense.detach().clone().requires_grad_(), 0
    value = total(QUESTIONS[question], DenseLogits(rows, mask=SCORED))
    (direct,) = torch.autograd.grad(value, rows)
    step = randn(2, 4, V, seed=3)
    for sign in (1, -1):
        moved = DenseLogits(rows.detach() + sign * 1e-6 * step, mask=SCORED)
        count = count + sign * total(QUESTIONS[question], moved)
    slope = (direct * step).sum()
    torch.testing.assert_close(count / 2e-6, slope, rtol=1e-6, atol=1e-8)
    expected = torch.autograd.grad((dense * direct).sum(), leaves)
    agree(torch.autograd.grad(total(QUESTIONS[question], logits), leaves), expected)


VIEWS = {
    "masks": ({"mask": SCORED}, {"mask": ~SCORED}),
    "overlapping_masks": ({"mask": SCORED}, {"mask": SCORED.flip(1)}),
    "rows": (
        {"mask": SCORED, "rows": torch.tensor([[3, 1, 0, 0], [0, 2, 1, 1]])},
        {"mask": SCORED.flip(0), "rows": torch.tensor([[0, 0, 2, 1], [3, 2, 0, 1]])},
    ),
    "vocab_size": ({"mask": SCORED, "vocab_size": 9}, {"mask": SCORED, "vocab_size": 10}),
}


@KINDS
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("padding_too", [False, True])
def test_two_views_of_one_source(question, views, kind, padding_too, passes, monkeypatch):
    if padding_too:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    for other in ("log_probs", "overlap"):
        wanted = []
        for one, view in zip((question, other), VIEWS[views], strict=True):
            leaves = leaves_of(kind, 2, 4, V)
            alone = logits_of(leaves, **view)
            wanted.append(torch.autograd.grad(total(QUESTIONS[one], alone), leaves))
        leaves = leaves_of(kind, 2, 4, V)
        source = logits_of(leaves)
        answers = [
            total(QUESTIONS[one], source.at(view.get("rows"), view["mask"], view.get("vocab_size")))
            for one, view in zip((question, other), VIEWS[views], strict=True)
        ]
        passes.clear()
        agree(
            torch.autograd.grad(sum(answers), leaves),
            tuple(sum(pair) for pair in zip(*wanted, strict=True)),
        )
        assert len(passes) == 1


@KINDS
def test_two_sides_with_other_labels(kind, passes):
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, 4, 5]])
    other = torch.tensor([[-100, -100, 3, 0], [-100, 7, -100, -100]])
    leaves = leaves_of(kind, 2, 4, V)
    logits = logits_of(leaves)
    sides = [
        Side.from_causal_lm(logits, one, vocab_size=size) for one, size in ((labels, 9), (other, V))
    ]
    sum(cross_entropy(side) for side in sides).backward()
    assert len(passes) == 1
    dense = leaves[0] if kind == "tensor" else leaves[0] @ leaves[1].T
    expected = sum(
        torch.nn.functional.cross_entropy(dense[:, :-1, :size].flatten(0, 1), one[:, 1:].flatten())
        for one, size in ((labels, 9), (other, V))
    )
    agree([leaf.grad for leaf in leaves], list(torch.autograd.grad(expected, leaves)))


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 120.0), (torch.float64, 800.0)])
def test_large_logits_of_rows_that_another_view_scores(dtype, offset):
    """The exponential of such logits is infinite."""
    tensor = randn(2, 4, V)
    tensor[~SCORED] += offset
    leaf = tensor.to(dtype).requires_grad_()
    logits, columns = logits_of([leaf]), torch.arange(V) % 3 == 1
    mass = logits.at(None, SCORED).log_mass(columns).sum()
    (mass + logits.at(None, ~SCORED).log_probs(IDS.expand(2, 1, 3)).sum()).backward()
    expected = leaf.log_softmax(-1)[..., columns].logsumexp(-1)[SCORED].sum()
    expected = expected + leaf.log_softmax(-1)[..., [0, 2, 2]][~SCORED].sum()
    # Logarithms of sums are as large as the logits, and as exact.
    tolerance = 4 * offset * torch.finfo(dtype).eps
    wanted = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close((leaf.grad,), wanted, rtol=tolerance, atol=tolerance)


def plain_gradient(leaf: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(leaf.log_softmax(-1)[..., 0].sum(), leaf)


def ask_first(logits: RowLogits) -> Tensor:
    return logits.log_probs(IDS[..., :1].expand(2, 1, 1)).sum()


def test_numbers_per_pair_alone_leave_nothing_for_a_later_pass():
    (leaf,) = leaves = leaves_of("tensor", 2, 4, V)
    logits, numbers = logits_of(leaves), randn(4, 1, seed=2).requires_grad_()
    values = map_row_pairs(logits, teacher(), PAIRS, overlap, per_pair=numbers)
    torch.autograd.grad(values.sum(), numbers)
    agree(torch.autograd.grad(ask_first(logits), leaf), plain_gradient(leaf))


def test_a_pass_that_failed_leaves_nothing_for_a_later_pass():
    (leaf,) = leaves = leaves_of("tensor", 2, 4, V)
    logits = logits_of(leaves)
    # Of two questions one has run when the other's gradient is refused.
    answers = [logits.log_probs(IDS.expand(2, 1, 3) + i) for i in range(2)]

    def refuse(_: Tensor) -> None:
        raise ValueError("refused")

    answers[0].register_hook(refuse)
    with pytest.raises(ValueError, match="refused"):
        sum(answer.sum() for answer in answers).backward()
    agree(torch.autograd.grad(ask_first(logits), leaf), plain_gradient(leaf))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_question_in_inference_mode_disturbs_no_gradient(temperature):
    (leaf,) = leaves = leaves_of("tensor", 2, 4, V)
    logits = logits_of(leaves)
    views = [logits.at(None, mask) for mask in (SCORED, ~SCORED)]
    first = ask_first(views[0])
    with torch.inference_mode():
        views[0].log_probs(IDS.expand(2, 1, 3), temperature=temperature)
        views[0].column_mass(temperature=temperature)
    agree(torch.autograd.grad(first + ask_first(views[1]), leaf), plain_gradient(leaf))
    logits.column_mass(temperature=temperature)


@pytest.mark.parametrize("padding_too", [False, True])
def test_a_reading_that_failed_is_done_again(padding_too, monkeypatch):
    if padding_too:
        monkeypatch.setattr(rows_module, "DEVICES_THAT_SKIP_PADDING", set())
    (leaf,) = leaves = leaves_of("tensor", 2, 4, V)
    logits = logits_of(leaves)
    for ask in (ask_first, DenseLogits.column_mass):
        with monkeypatch.context() as patch:
            patch.setattr(TensorRows, "blocks", lambda *_: [][0])
            with pytest.raises(IndexError):
                ask(logits)
    agree(torch.autograd.grad(ask_first(logits), leaf), plain_gradient(leaf))


@KINDS
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("which", [0, -1])
def test_logits_overwritten_before_the_backward_pass_are_noticed(question, kind, which):
    leaves = leaves_of(kind, 2, 4, V)
    inputs = [leaf * 1.0 for leaf in leaves]
    value = QUESTIONS[question](logits_of(inputs, mask=SCORED)).sum()
    with torch.no_grad():
        inputs[which].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@KINDS
@forms("rows", "top_k", "observed")
def test_nothing_is_left_behind_by_a_step(name, settings, kind, no_collector):
    loss = build(name, settings)
    inputs = ragged_inputs(0, V=V, W=W)
    leaves = leaves_of(kind, *inputs["student_logits"].shape)
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
    tensor, numbers = randn(2, 4, V), randn(4, 1, seed=2).requires_grad_()
    map_row_pairs_to_parts(
        DenseLogits(tensor),
        teacher(),
        PAIRS,
        lambda *x: overlap(*x)[:, None],
        parts=1,
        per_pair=numbers,
    )[0].sum().backward()
    assert numbers.grad.any()
    watched = weakref.ref(tensor)
    del tensor
    assert watched() is None
