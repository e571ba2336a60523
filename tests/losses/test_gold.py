"""`gold` against the oracle, by hand, and where it must be zero or finite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ctkd
from baselines import gold
from ctkd import ops
from ctkd.batch import Batch
from ctkd.errors import BatchError, SettingError
from ctkd.tokenizers import PlaceholderPair
from tests.ragged_batches import answer_rows, loss_and_gradient, ragged_inputs

V, W = 11, 8
MERGINGS = ("first", "observed", "bayesian")
by_merging = pytest.mark.parametrize("merging", MERGINGS)


class Tokens(PlaceholderPair):
    """Two vocabularies of given sizes and given shared ids."""

    def __init__(self, student_ids: list[int], teacher_ids: list[int], sizes=(V, W)) -> None:
        self.student_size, self.teacher_size = sizes
        self.ids = [torch.tensor(ids, dtype=torch.int64) for ids in (student_ids, teacher_ids)]

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        return self.ids[0], self.ids[1]


SOME = Tokens([7, 0, 10, 3], [2, 1, 7, 5])
NONE = Tokens([], [])
ALL_OF_THE_TEACHER = Tokens([9, 0, 10, 3, 4, 1, 2, 6], [2, 1, 7, 5, 0, 3, 4, 6])
EVERYTHING = Tokens([7, 6, 5, 4, 3, 2, 1, 0], list(range(8)), sizes=(8, 8))
PAIRS = {
    "some": SOME,
    "none": NONE,
    "all of the teacher": ALL_OF_THE_TEACHER,
    "everything": EVERYTHING,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.0},
    {"beta": 1.0},
    {"beta": 0.3, "student_temperature": 2.0, "teacher_temperature": 0.5},
    {"matched_weight": 0.0, "unmatched_weight": 2.0},
    {"matched_weight": 1.5, "unmatched_weight": 0.25},
]


def per_row(inputs: dict[str, Any], side: str, field: str) -> list[list[int]]:
    """A field of the scored tokens of each sequence."""
    return [
        [int(values[i]) for i in range(1, len(labels)) if labels[i] != -100]
        for labels, values in zip(inputs[f"{side}_labels"], inputs[f"{side}_{field}"], strict=True)
    ]


def oracle(inputs: dict[str, Any], pair: Tokens, **settings: Any) -> tuple[Tensor, int, Tensor]:
    leaf = inputs["student_logits"].detach().clone().requires_grad_()
    inputs = {**inputs, "student_logits": leaf}
    sides = ("student", "teacher")
    value, count = gold.loss(
        *(answer_rows(inputs, side) for side in sides),
        *(per_row(inputs, side, "labels") for side in sides),
        *(per_row(inputs, side, "chunk_ids") for side in sides),
        *(ids.tolist() for ids in pair.ids),
        **settings,
    )
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), count, gradient


def one_chunk(
    student: Tensor, student_labels: list[int], teacher: Tensor, teacher_labels: list[int]
) -> dict[str, Any]:
    """One sequence that is one chunk, from the probabilities at its positions."""
    fields = {}
    for side, probs, labels in (
        ("student", student, student_labels),
        ("teacher", teacher, teacher_labels),
    ):
        unused = torch.zeros(1, probs.shape[-1], dtype=probs.dtype)
        fields[f"{side}_logits"] = torch.cat([probs.log(), unused])[None]
        fields[f"{side}_labels"] = torch.tensor([[-100, *labels]])
        fields[f"{side}_chunk_ids"] = torch.tensor([[-1, *[0] * len(labels)]])
    return fields


# Any two of settings, pair, merging and seed meet in all their values.
@pytest.mark.parametrize(
    ("settings", "name", "merging", "seed"),
    [
        (settings, name, MERGINGS[(i + j) % 3], 1 + (i + j) % 2)
        for i, settings in enumerate(SETTINGS)
        for j, name in enumerate(PAIRS)
    ],
    ids=str,
)
def test_the_oracle_agrees(settings, name, merging, seed):
    pair = PAIRS[name]
    inputs = ragged_inputs(seed, V=pair.student_size, W=pair.teacher_size, ties=seed == 2)
    settings = {**settings, "merging": merging}
    expected, expected_count, expected_gradient = oracle(inputs, pair, **settings)
    value, count, gradient = loss_and_gradient(ctkd.get_loss("gold", pair=pair, **settings), inputs)
    assert count == expected_count > 4
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


@by_merging
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_single_precision(merging, beta):
    inputs = ragged_inputs(3, dtype=torch.float32)
    settings = {"merging": merging, "beta": beta}
    expected, _, expected_gradient = oracle(inputs, SOME, **settings)
    value, _, gradient = loss_and_gradient(ctkd.get_loss("gold", pair=SOME, **settings), inputs)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_worked_by_hand():
    # M is the first token of both sides. Student tokens cut "ab" as one, the teacher as two.
    student = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    teacher = torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    pair = Tokens([0], [0], sizes=(3, 2))
    batch = Batch.from_causal_lm(**one_chunk(student, [1], teacher, [1, 0]))
    # v of the teacher: P_1; P_1 times 0.6; P_2 times 0.8.
    for merging, v in (
        ("first", (0.2, 0.8)),
        ("observed", (0.12, 0.48)),
        ("bayesian", (0.48, 0.32)),
    ):
        output = ctkd.get_loss("gold", pair=pair, merging=merging)(batch)
        m = (0.5 + v[0]) / 2
        divergence = 0.5 * v[0] * math.log(v[0] / m) + 0.5 * 0.5 * math.log(0.5 / m)
        assert divergence == pytest.approx(gold.jsd_by_hand([0.5], [v[0]], 0.5), rel=1e-14)
        distance = abs(0.3 - v[1]) + 0.2
        assert output.parts["matched"].item() == pytest.approx(0.5 * divergence, rel=1e-12)
        assert output.parts["unmatched"].item() == pytest.approx(0.5 * distance, rel=1e-12)
        assert output.value.item() == pytest.approx(0.5 * (divergence + distance), rel=1e-12)
        assert output.count == 1


def same_model(ties: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    lengths = {"teacher_lengths": (6, 3, 4)}
    inputs = ragged_inputs(5, V=8, W=8, head=0, ties=ties, dtype=dtype, **lengths)
    for field in ("logits", "labels", "chunk_ids"):
        inputs[f"teacher_{field}"] = inputs[f"student_{field}"].clone()
    return inputs


# In float64, which the reference serves, and in float32, which kernels do.
@pytest.mark.parametrize(
    ("merging", "beta", "shared", "dtype"),
    [
        (MERGINGS[(i + j) % 3], beta, shared, (torch.float32, torch.float64)[(i + j // 2) % 2])
        for i, beta in enumerate((0.0, 0.3, 0.5, 1.0))
        for j, shared in enumerate((range(8), [0, 3, 4], []))
    ],
)
def test_a_student_that_is_the_teacher_gives_exactly_zero(merging, beta, shared, dtype):
    """Both sides go the same way through memory of one layout, so no machine tells them apart."""
    pair = Tokens(list(shared), list(shared), sizes=(8, 8))
    loss = ctkd.get_loss("gold", pair=pair, merging=merging, beta=beta)
    for ties in (False, True):
        value, _, gradient = loss_and_gradient(loss, same_model(ties, dtype))
        assert value == 0
        atol = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=atol)


@by_merging
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_row_too_late_does_not(merging, side):
    inputs = same_model()
    inputs[f"{side}_logits"] = inputs[f"{side}_logits"].roll(1, 1)
    value, _, _ = loss_and_gradient(
        ctkd.get_loss("gold", pair=Tokens([*range(8)], [*range(8)], (8, 8)), merging=merging),
        inputs,
    )
    assert value > 0.1


def test_without_shared_tokens_it_is_uld_on_chunks():
    inputs = ragged_inputs(6)
    actual = loss_and_gradient(ctkd.get_loss("gold", pair=NONE), inputs)
    expected = loss_and_gradient(ctkd.get_loss("uld", pairing="chunk"), inputs)
    # uld counts what it cannot pair as well.
    scale = expected[1].double() / actual[1].double()
    torch.testing.assert_close(actual[0], expected[0] * scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[2], expected[2] * scale, rtol=1e-12, atol=1e-16)


def test_with_everything_shared_it_is_the_divergence():
    inputs = ragged_inputs(6, V=8, W=8)
    output = ctkd.get_loss("gold", pair=EVERYTHING)(Batch.from_causal_lm(**inputs))
    assert output.parts["unmatched"] == 0
    assert output.value == output.parts["matched"] > 0


@pytest.mark.parametrize(
    ("merging", "dtype", "beta"),
    [
        (merging, dtype, (0.0, 0.5, 1.0)[(i + j) % 3])
        for i, merging in enumerate(MERGINGS)
        for j, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_probabilities_that_underflow(merging, dtype, beta):
    inputs = ragged_inputs(7, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for side in ("student", "teacher"):
        logits = inputs[f"{side}_logits"]
        far = torch.randint(0, 2, logits.shape, generator=generator).to(dtype)
        inputs[f"{side}_logits"] = logits - 120.0 * far
    value, _, gradient = loss_and_gradient(
        ctkd.get_loss("gold", pair=SOME, merging=merging, beta=beta), inputs
    )
    expected, _, expected_gradient = oracle_with_zeros(inputs, merging, beta)
    assert value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        gradient.double(), expected_gradient.double(), rtol=tolerance, atol=1e-5
    )


def oracle_with_zeros(inputs: dict[str, Any], merging: str, beta: float):
    """float64 has room for products of probabilities of e^-120."""
    return oracle_on(inputs, SOME, merging, beta)


def oracle_on(inputs: dict[str, Any], pair: Tokens, merging: str, beta: float):
    wide = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return oracle(wide, pair, merging=merging, beta=beta)


@by_merging
def test_columns_that_a_model_rules_out(merging):
    inputs = ragged_inputs(8, head=0)
    inputs["student_logits"][..., [0, 1, 9]] = -torch.inf
    inputs["teacher_logits"][..., [2, 3]] = -torch.inf
    for beta in (0.0, 0.5, 1.0):
        loss = ctkd.get_loss("gold", pair=SOME, merging=merging, beta=beta)
        value, _, gradient = loss_and_gradient(loss, inputs)
        assert value.isfinite() and gradient.isfinite().all()


def test_what_the_docstring_calls_a_known_failure():
    # The teacher is sure of "2", which both have; the student of "2024", which it alone has.
    student = torch.tensor([[0.05, 0.05, 0.9]], dtype=torch.float64)
    teacher = torch.tensor([[0.9, 0.05, 0.05]], dtype=torch.float64)
    pair = Tokens([0, 1], [0, 1], sizes=(3, 3))
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        for beta in (0.0, 0.5):
            loss = ctkd.get_loss(
                "gold", pair=pair, beta=beta, matched_weight=weights[0], unmatched_weight=weights[1]
            )
            _, _, gradient = loss_and_gradient(loss, one_chunk(student, [2], teacher, [0]))
            assert gradient[0, 0, 2] > 0.01


def test_both_scales_carry_gradient_into_the_student():
    inputs = ragged_inputs(9)
    chunk_ids = inputs["student_chunk_ids"]
    later = ((chunk_ids >= 0) & (chunk_ids == chunk_ids.roll(1, 1))).roll(-1, 1)
    assert later.any()
    for merging, reached in (("first", False), ("observed", True)):
        loss = ctkd.get_loss("gold", pair=SOME, merging=merging)
        _, _, gradient = loss_and_gradient(loss, inputs)
        assert ((gradient.abs().sum(-1) > 0)[later] == reached).all()


def test_blocks_and_padding_change_nothing(monkeypatch, uninspected):
    inputs = ragged_inputs(6)
    for merging in MERGINGS:
        loss = ctkd.get_loss("gold", pair=SOME, merging=merging)
        expected = loss_and_gradient(loss, inputs)
        with monkeypatch.context() as patched, uninspected():
            patched.setenv("CTKD_BLOCK_ELEMENTS", str(2 * V + 3))
            torch.testing.assert_close(
                loss_and_gradient(loss, inputs), expected, rtol=1e-13, atol=1e-16
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, "beta must be a finite number of at least 0, got -0.1"),
        ({"beta": 1.1}, "beta must be a number from 0 to 1, got 1.1"),
        ({"student_temperature": 0}, "student_temperature must be a finite number above 0, got 0"),
        ({"teacher_temperature": -1}, "teacher_temperature must be a finite number above 0"),
        ({"merging": "last"}, "merging must be one of first, observed, bayesian, got 'last'"),
        ({"matched_weight": 1.0}, "must be given together or not at all, got 1.0 and None"),
        ({"unmatched_weight": 0.0}, "must be given together or not at all, got None and 0.0"),
        ({"matched_weight": -1, "unmatched_weight": 1}, "matched_weight must be a finite number"),
        ({"matched_weight": 1, "unmatched_weight": -1}, "unmatched_weight must be a finite number"),
        ({"matched_weight": 0, "unmatched_weight": 0}, "must be above 0, got 0 and 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=message):
        ctkd.get_loss("gold", pair=SOME, **settings)


def test_a_weight_on_tokens_that_are_not_there():
    with pytest.raises(SettingError, match="share no token, so unmatched_weight must be above 0"):
        ctkd.get_loss("gold", pair=NONE, matched_weight=1.0, unmatched_weight=0.0)


def test_a_pair_or_a_batch_that_does_not_fit():
    loss = ctkd.get_loss("gold", pair=SOME)
    inputs = ragged_inputs(1)
    with pytest.raises(BatchError, match="student's logits have 13 columns.*vocab_size=11"):
        loss(Batch.from_causal_lm(**{**inputs, "student_vocab_size": None}))
    with pytest.raises(BatchError, match="teacher's logits have 9 columns"):
        loss(Batch.from_causal_lm(**ragged_inputs(1, W=9)))
    for merging in MERGINGS:
        loss = ctkd.get_loss("gold", pair=SOME, merging=merging)
        with pytest.raises(BatchError, match="no chunk_ids"):
            loss(Batch.from_causal_lm(**{**inputs, "student_chunk_ids": None}))
    with pytest.raises(SettingError, match="needs to know both tokenizers"):
        ctkd.get_loss("gold")


@pytest.mark.parametrize(
    ("merging", "beta"), [("first", 0.0), ("first", 0.3), ("observed", 1.0), ("bayesian", 0.3)]
)
def test_wide_rows_both_ways(merging, beta):
    # Few rows, which the oracle walks entry by entry: on both sides a chunk of several tokens.
    lengths = {"student_lengths": (4, 2), "teacher_lengths": (2, 3)}
    inputs = ragged_inputs(10, V=3000, W=2500, dtype=torch.float32, **lengths)
    pair = Tokens([*range(5, 1005, 2)], [*range(1500, 2000)], (3000, 2500))
    loss = ctkd.get_loss("gold", pair=pair, merging=merging, beta=beta)
    fast = loss_and_gradient(loss, inputs)
    expected, _, expected_gradient = oracle_on(inputs, pair, merging, beta)
    torch.testing.assert_close(fast[0].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast[2].double(), expected_gradient, rtol=1e-3, atol=1e-8)
    with ops.use_backend("reference"):
        slow = loss_and_gradient(loss, inputs)
    torch.testing.assert_close(fast[:2], slow[:2], rtol=1e-6, atol=0)
    largest = float(slow[2].abs().max())
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-5, atol=1e-6 * largest)


def test_the_maps_are_not_part_of_the_state():
    loss = ctkd.get_loss("gold", pair=SOME)
    assert not loss.state_dict()
    assert loss.to("meta").student_columns.device.type == "meta"
    assert "merging='first'" in repr(loss) and "shared=4" in repr(loss)
