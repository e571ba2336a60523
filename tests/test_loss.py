"""The one place that masks and averages, and what every registered loss owes its callers."""

import inspect
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ctkd
from ctkd import ops
from ctkd.batch import Batch
from ctkd.divergences import sorted_l1
from ctkd.errors import BatchError
from ctkd.logits import DenseLogits
from ctkd.loss import average, masked_sum, not_traced
from ctkd.ot.sinkhorn import sinkhorn
from ctkd.testing import make_inputs, make_pair
from tests.ragged_batches import loss_and_gradient, ragged_inputs

FORMS = [
    *[(name, {}) for name in ctkd.list_losses()],
    ("uld", {"top_k": 3}),
    ("uld", {"pairing": "chunk"}),
    ("multilevelot", {"k": 3, "pairing": "chunk"}),
    ("alm", {"debias": True}),
    ("mined", {"alignment": "dtw", "form": "dense"}),
    ("gold", {"merging": "observed"}),
    ("shared_kl", {"rest": "class"}),
    ("multilevelot", {"k": 3, "matching": "greedy"}),
    ("multilevelot", {"k": 3, "matching": "assignment"}),
    ("multilevelot", {"k": 3, "matching": "assignment_topk"}),
]
IDS = {id(form): "-".join([form[0], *map(str, form[1].values())]) for form in FORMS}
RELEASED = ("multilevelot_released", {})


def by_forms(forms):
    return pytest.mark.parametrize(("name", "settings"), forms, ids=[IDS[id(f)] for f in forms])


PAIR = make_pair(11, 8)  # the widths of `ragged_inputs`
by_form = by_forms(FORMS)


def of_forms(forms):
    """A test of each loss, in all of these forms one after the other."""

    def decorate(test):
        def run(name):
            for loss, settings in forms:
                if loss == name:
                    test(name, settings)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("name", sorted({name for name, _ in forms}))(run)

    return decorate


by_name = pytest.mark.parametrize("name", ctkd.list_losses())


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance=1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_masked_sum_replaces_what_is_masked():
    mask = torch.tensor([[True, False], [False, False]])
    values = torch.tensor([[1.0, torch.inf], [torch.nan, -torch.inf]], requires_grad=True)
    total = masked_sum(values, mask)
    assert total.tolist() == [1.0, 0.0]
    total.sum().backward()
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    single = masked_sum(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    assert single.tolist() == [1.0, 0.0]
    assert masked_sum(torch.ones(2, 3, 4), torch.ones(2, 3, 4).bool()).tolist() == [12.0, 12.0]


def test_average_divides_the_sum_by_the_count():
    first = torch.tensor([1.0, 2.0], requires_grad=True)
    output = average({"first": first, "second": torch.tensor([4.0, 5.0])}, torch.tensor(6))
    assert (output.value.item(), output.count.item()) == (2.0, 6)
    assert {n: part.item() for n, part in output.parts.items()} == {"first": 0.5, "second": 1.5}
    assert not any(part.requires_grad for part in output.parts.values())
    output.value.backward()
    torch.testing.assert_close(first.grad, torch.full((2,), 1 / 6))


def test_average_of_nothing_is_a_zero_with_a_gradient():
    sums = torch.zeros(2, requires_grad=True)
    output = average({"a": sums}, torch.tensor(0))
    output.value.backward()
    assert output.value.item() == 0 and sums.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_average_keeps_float64_and_widens_the_rest(dtype):
    value = average({"a": torch.full((3000,), 1.0, dtype=dtype)}, torch.tensor(1)).value
    assert value.item() == 3000
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@by_name
def test_settings_are_stored_under_their_own_names_and_shown(name):
    others = {
        "alignment": "dtw",
        "conditional": False,
        "debias": True,
        "direction": "reverse",
        "form": "dense",
        "matched_weight": 0.5,
        "matching": "greedy",
        "merging": "observed",
        "pairing": "chunk",
        "rest": "class",
        "top_k": 7,
        "unmatched_weight": 0.25,
    }
    settings = {
        setting: others[setting] if setting in others else 2 * default
        for setting, default in ctkd.describe(name).settings.items()
    }
    loss = ctkd.get_loss(name, pair=make_pair(), **settings)
    for setting, value in settings.items():
        assert getattr(loss, setting) == value
        assert f"{setting}={value!r}" in repr(loss)
    parameters = inspect.signature(type(loss)).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)


@by_form
def test_a_device_that_reads_padding_gets_the_same(name, settings, monkeypatch, uninspected):
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    inputs = ragged_inputs(1)
    expected = loss_and_gradient(loss, inputs)
    for garbage in (0.0, torch.nan):
        for side in ("student", "teacher"):
            scored = (inputs[f"{side}_labels"] != -100).roll(-1, 1).unsqueeze(-1)
            inputs[f"{side}_logits"] = inputs[f"{side}_logits"].masked_fill(~scored, garbage)
        same(loss_and_gradient(loss, inputs), expected)
        with monkeypatch.context() as patch, uninspected():
            same(loss_and_gradient(loss, inputs), expected)
            patch.setenv("CTKD_BLOCK_ELEMENTS", "30")
            same(loss_and_gradient(loss, inputs), expected)


@of_forms(FORMS)
def test_autocast_changes_nothing(name, settings):
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = ragged_inputs(2, dtype=dtype)
        expected = loss_and_gradient(loss, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            value, count, gradient = loss_and_gradient(loss, inputs)
        assert value.dtype == torch.float32
        same((value, count, gradient), expected, tolerance=0.0)


class LargeAllocations(TorchDispatchMode):
    """Keeps every tensor made in its context whose storage holds so many elements."""

    def __init__(self, elements: int, known: list[Tensor]) -> None:
        super().__init__()
        self.elements = elements
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                large = storage.nbytes() // tensor.element_size() >= self.elements
                if large and storage.data_ptr() not in self.known:
                    self.found[storage.data_ptr()] = tensor
        return result


def large_allocations(function, dtype: torch.dtype) -> tuple[list[int], int]:
    """Storages of at least half a (B, S, V) that forward and backward make, and the gradient's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 41, width, generator=generator).to(dtype) for width in (5000, 6000)
    )
    student.requires_grad_()
    labels = torch.ones(2, 41, dtype=torch.int64)
    labels[1, 25:] = -100
    batch = Batch.from_causal_lm(
        student_logits=student,
        student_labels=labels,
        student_chunk_ids=torch.arange(41).expand(2, -1),
        teacher_logits=teacher,
        teacher_labels=labels,
        teacher_chunk_ids=torch.arange(41).expand(2, -1),
        num_chunks=41,
    )
    with LargeAllocations(2 * 40 * 5000 // 2, [student, teacher]) as allocations:
        (gradient,) = torch.autograd.grad(function(batch), student)
    return list(allocations.found), gradient.untyped_storage().data_ptr()


# "assignment" looks at whole vocabularies, which max_columns keeps small. A debiased "alm", a dense
# "mined" and a merged "gold" ask the logits two questions, and torch adds the gradients of both.
TWO_QUESTIONS = [
    {"debias": True},
    {"alignment": "dtw", "form": "dense"},
    {"merging": "observed"},
]


@by_forms(
    [
        form
        for form in FORMS
        if "assignment" not in form[1].values() and form[1] not in TWO_QUESTIONS
    ]
)
def test_the_only_large_tensor_is_the_gradient(name, settings, monkeypatch, uninspected):
    monkeypatch.setenv("CTKD_BLOCK_ELEMENTS", str(8 * 6000))
    loss = ctkd.get_loss(name, pair=make_pair(5000, 6000), **settings)
    for way, dtype in (
        (ops.use_backend("auto"), torch.float32),
        (ops.use_backend("auto"), torch.bfloat16),
        (ops.use_backend("reference"), torch.float32),
        (uninspected(), torch.float32),
        (uninspected(), torch.bfloat16),
    ):
        with way:
            found, gradient = large_allocations(lambda batch: loss(batch).value, dtype)
        assert found == [gradient], dtype


def test_the_search_for_large_tensors_finds_them():
    def careless(batch: Batch) -> Tensor:
        student, teacher = batch.student.logits.tensor, batch.teacher.logits.tensor
        student, teacher = (rows.flatten(0, 1).softmax(-1) for rows in (student, teacher))
        return sorted_l1(student, teacher).sum()

    found, gradient = large_allocations(careless, torch.float32)
    assert gradient in found and len(found) > 5


@of_forms(FORMS)
def test_a_side_without_scored_tokens_compares_nothing(name, settings):
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    for (max_scored, dtype), empty in itertools.product(
        [(0, torch.float32), (None, torch.float64)],
        [("teacher",), ("student",), ("student", "teacher")],
    ):
        inputs = ragged_inputs(3, dtype=dtype)
        for side in empty:
            inputs[f"{side}_labels"].fill_(-100)
            inputs[f"{side}_max_scored"] = max_scored
        compares_nothing(loss, name, inputs, empty)


def compares_nothing(loss, name, inputs, empty):
    value, count, gradient = loss_and_gradient(loss, inputs)
    assert count == loss.units(Batch.from_causal_lm(**inputs))
    if name == "multilevelot_released" and len(empty) == 1:
        parts = loss(Batch.from_causal_lm(**inputs)).parts
        assert parts["had"] == 0 and value.isfinite() and gradient.isfinite().all()
    elif name == "mined" and "student" not in empty:
        # What has no partner learns from its label.
        assert loss(Batch.from_causal_lm(**inputs)).parts["fused"] == 0 and value > 0
    else:
        assert value == 0 and (gradient == 0).all()


@of_forms(FORMS)
def test_texts_of_one_token_score_nothing(name, settings):
    # In float32, which kernels serve.
    inputs = {
        f"{side}_{key}": value
        for side in ("student", "teacher")
        for key, value in (
            ("logits", torch.zeros(2, 1, 4)),
            ("labels", torch.ones(2, 1).long()),
            ("chunk_ids", torch.zeros(2, 1).long()),
        )
    }
    loss = ctkd.get_loss(name, pair=make_pair(4, 4), **settings)
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert value == 0 and (gradient == 0).all()


# A row of one logit has no standard deviation, in the released form as in the authors' file.
@of_forms([form for form in FORMS if form != RELEASED])
def test_a_vocabulary_of_one_token(name, settings):
    for widths, dtype in itertools.product(
        [{"V": 1}, {"W": 1}, {"V": 1, "W": 1}], [torch.float32, torch.float64]
    ):
        pair = make_pair(widths.get("V", 11), widths.get("W", 8))
        loss = ctkd.get_loss(name, pair=pair, **settings)
        value, _, gradient = loss_and_gradient(loss, ragged_inputs(4, dtype=dtype, **widths))
        assert value.isfinite() and gradient.isfinite().all(), (widths, dtype)


@of_forms(FORMS)
def test_huge_logits(name, settings):
    inputs = ragged_inputs(5, dtype=torch.float32)
    for side in ("student", "teacher"):
        inputs[f"{side}_logits"] *= 1e4
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            value, _, gradient = loss_and_gradient(loss, inputs)
        assert value.isfinite() and gradient.isfinite().all(), backend


@of_forms(FORMS)
def test_columns_of_minus_infinity(name, settings):
    """As generation processors leave them: such a token has probability 0."""
    inputs = ragged_inputs(6, head=0, V=10, W=8)
    removed = dict(inputs, student_vocab_size=8)
    for side, kept in (("student", [0, 1, 3, 4, 5, 6, 8, 9]), ("teacher", [0, 1, 3, 4, 6, 7])):
        logits = inputs[f"{side}_logits"]
        mask = torch.ones(logits.shape[-1], dtype=torch.bool)
        mask[kept] = False
        removed[f"{side}_logits"] = logits[..., kept]
        inputs[f"{side}_logits"] = logits.masked_fill(mask, -torch.inf)
        labels = inputs[f"{side}_labels"]
        index = (labels % len(kept)).masked_fill(labels == -100, -100)
        removed[f"{side}_labels"] = index
        chosen = torch.tensor(kept)[index.clamp_min(0)]
        inputs[f"{side}_labels"] = chosen.masked_fill(labels == -100, -100)
    if name.startswith("multilevelot") and name != "multilevelot_released":
        settings = {**settings, "k": 3 if settings.get("matching") == "assignment" else 6}
    loss = ctkd.get_loss(name, pair=make_pair(10, 8), **settings)
    if name == "multilevelot_released":
        # Such a row has no standard deviation.
        with pytest.raises(BatchError, match=r"student's .* column 2 .* teacher's .* column 2 "):
            loss_and_gradient(loss, inputs)
    elif "pair" in loss.needs:
        finite_or_refused(loss, inputs)
    else:
        value, count, gradient = loss_and_gradient(loss, inputs)
        expected, expected_count, expected_gradient = loss_and_gradient(loss, removed)
        kept_gradient = gradient[..., [0, 1, 3, 4, 5, 6, 8, 9]]
        same((value, count, kept_gradient), (expected, expected_count, expected_gradient))
        assert (gradient[..., [2, 7]] == 0).all()


@of_forms([form for form in FORMS if form != RELEASED and "matching" not in form[1]])
def test_columns_of_minus_infinity_on_both_sides_beyond_the_finite_ones(name, settings):
    """More columns are kept than are finite: 0 log 0 counts as 0."""
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    for dtype in (torch.float64, torch.float32):
        inputs = ragged_inputs(7, head=0, dtype=dtype)
        inputs["student_logits"][..., 5:] = -torch.inf
        inputs["teacher_logits"][..., 5:] = -torch.inf
        for side in ("student", "teacher"):
            inputs[f"{side}_labels"] = inputs[f"{side}_labels"].clamp_max(4)
        if "pair" in loss.needs:
            # A finite column of the teacher may have a partner that is not.
            finite_or_refused(loss, inputs)
        else:
            value, _, gradient = loss_and_gradient(loss, inputs)
            assert value.isfinite() and gradient.isfinite().all()


def finite_or_refused(loss, inputs):
    """Where only the student's column is gone, a divergence may well be infinite."""
    try:
        value, _, gradient = loss_and_gradient(loss, inputs)
    except BatchError as error:
        assert "the student's logits are minus infinity in column" in str(error)
    else:
        assert value.isfinite() and gradient.isfinite().all()


def test_the_column_of_a_scored_token_is_named_first():
    inputs = ragged_inputs(7)
    labels = inputs["student_labels"]
    labels[labels == 0] = 1
    sequence, place = (labels[:, 1:] >= 0).nonzero()[-1].tolist()
    place += 1
    column = int(labels[sequence, place])
    inputs["student_logits"][..., 0] = -torch.inf  # no token's
    inputs["student_logits"][sequence, place - 1, column] = -torch.inf
    position = int((labels[sequence, 1:place] >= 0).sum())
    message = rf"column {column} \(sequence {sequence}, position {position}\)"
    with pytest.raises(BatchError, match=message):
        ctkd.get_loss("mined", pair=PAIR)(Batch.from_causal_lm(**inputs))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_wrong_themselves_are_let_pass(wrong):
    inputs = ragged_inputs(7)
    inputs["student_logits"][..., 2] = -torch.inf
    inputs["student_logits"][..., 3] = wrong
    assert not ctkd.get_loss("alm")(Batch.from_causal_lm(**inputs)).value.isfinite()


@of_forms(FORMS)
def test_inference_mode(name, settings):
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    inputs = ragged_inputs(8, dtype=torch.float32)
    expected = loss_and_gradient(loss, inputs)
    with torch.inference_mode():
        teacher_logits = inputs["teacher_logits"].clone()
    assert teacher_logits.is_inference()
    same(loss_and_gradient(loss, {**inputs, "teacher_logits": teacher_logits}), expected)
    inputs["student_logits"].requires_grad_()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            value = loss(Batch.from_causal_lm(**inputs)).value
        assert not value.requires_grad
        same((value.clone(),), expected[:1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@of_forms(FORMS)
def test_a_cuda_device_gives_the_same(name, settings):
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    inputs = ragged_inputs(1)
    on_cuda = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    result = tuple(tensor.cpu() for tensor in loss_and_gradient(loss, on_cuda))
    same(result, loss_and_gradient(loss, inputs))


@of_forms(FORMS)
def test_sides_of_different_precision(name, settings):
    loss = ctkd.get_loss(name, pair=PAIR, **settings)
    inputs = ragged_inputs(9, dtype=torch.bfloat16)
    wide = {**inputs, "teacher_logits": inputs["teacher_logits"].float()}
    value, count, gradient = loss_and_gradient(loss, inputs)
    same(loss_and_gradient(loss, wide), (value, count, gradient), tolerance=0.0)
    assert gradient.dtype == torch.bfloat16


@of_forms(FORMS)
def test_a_student_may_teach_itself(name, settings):
    inputs = ragged_inputs(10, teacher_lengths=(6, 3, 4), head=0)
    for key in ("labels", "chunk_ids"):
        inputs[f"teacher_{key}"] = inputs[f"student_{key}"]
    inputs["teacher_logits"] = inputs["student_logits"] + 0.5 * inputs["student_logits"].flip(-1)
    loss = ctkd.get_loss(name, pair=make_pair(11, 11), **settings)
    _, _, expected = loss_and_gradient(loss, inputs)
    logits = inputs["student_logits"].requires_grad_()
    teacher = logits + 0.5 * logits.flip(-1)
    loss(Batch.from_causal_lm(**{**inputs, "teacher_logits": teacher})).value.backward()
    same((logits.grad,), (expected,))


# The compiler looks for gradients of tensors that have none, and calls functions of autograd.
in_a_compiler = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def nothing_compiled_yet(monkeypatch):
    # Only a figure for torch's log, for which each function's caches are emptied.
    guards = "torch._dynamo.guards.profile_guard_manager"
    monkeypatch.setattr(guards, lambda *_: 0.0, raising=False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("nothing_compiled_yet")
class TestCompiled:
    """What reads rows gives the same inside a function that is compiled."""

    pytestmark = in_a_compiler

    @staticmethod
    def both(function, tensor):
        """Value and gradient, as it is and compiled."""
        found = []
        for call in (function, torch.compile(function, backend="aot_eager")):
            leaf = tensor.clone().requires_grad_()
            value = call(leaf)
            (gradient,) = torch.autograd.grad(value.square().sum(), leaf)
            found.append((value.detach(), gradient))
        torch.testing.assert_close(found[1], found[0])

    def test_queries(self):
        columns = torch.tensor([True, False, True, False])

        def step(leaf):
            logits = DenseLogits(2.0 * leaf)
            log_probs = logits.log_probs(torch.tensor([[[1]], [[3]]]))
            return logits.sorted_probs(2) + log_probs + logits.log_mass(columns).unsqueeze(-1)

        self.both(step, torch.linspace(-1.0, 1.0, 24).view(2, 3, 4))

    def test_what_a_query_refuses_it_refuses_there_too(self):
        query = torch.compile(lambda logits: logits.sorted_probs(5), backend="aot_eager")
        with pytest.raises(BatchError, match="the largest 5 entries"):
            query(DenseLogits(torch.zeros(2, 3, 4)))

    def test_transport(self):
        settings = {"regularization": 0.1, "iterations": 5}
        self.both(lambda cost: sinkhorn(2.0 * cost, **settings).plan, torch.rand(2, 3, 4))

    def test_a_whole_step(self):
        inputs, loss = make_inputs(dtype=torch.float32), ctkd.get_loss("uld")
        self.both(
            lambda logits: (
                loss(Batch.from_causal_lm(**{**inputs, "student_logits": 1.0 * logits})).value
            ),
            inputs["student_logits"],
        )

    def test_a_function_that_is_not_traced_is_never_seen_by_a_compiler(self):
        seen = []

        @not_traced
        def inner(tensor):
            seen.append(torch.compiler.is_compiling())
            return 2 * tensor

        compiled = torch.compile(lambda tensor: inner(tensor + 1) - 1, backend="aot_eager")
        assert compiled(torch.ones(())).item() == 3.0
        assert inner(torch.ones(())).item() == 2.0
        assert seen == [False, False]
        whole = torch.compile(lambda tensor: inner(tensor), backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True, or"):
            whole(torch.ones(()))
