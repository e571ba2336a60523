"""`alm` against the oracle, against decimal arithmetic, and what its docstring claims."""

import itertools
import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import ctkd
from baselines import alm
from ctkd.batch import Batch
from ctkd.errors import BatchError, SettingError
from ctkd.losses.alm import binary_kl, log1mexp
from ctkd.tokenizers import PlaceholderPair
from tests.ragged_batches import answer_rows, loss_and_gradient, ragged_inputs

V, W = 11, 8
STARTS = [0, 3, 4, 9], [1, 2, 6]
SETTINGS = [{}, {"temperature": 1.0}, {"debias": True}, {"temperature": 3.0, "debias": True}]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)


class WordStarts(PlaceholderPair):
    """Two vocabularies of which only the tokens that begin a word are known."""

    def __init__(
        self,
        student: list[int] = STARTS[0],
        teacher: list[int] = STARTS[1],
        sizes: tuple[int, int] = (V, W),
    ) -> None:
        self.starts = student, teacher
        self.student_size, self.teacher_size = sizes

    def word_starts(self) -> tuple[Tensor, Tensor]:
        student = torch.zeros(self.student_size, dtype=torch.bool)
        teacher = torch.zeros(self.teacher_size, dtype=torch.bool)
        student[self.starts[0]] = True
        teacher[self.starts[1]] = True
        return student, teacher


def make_loss(**settings: Any) -> torch.nn.Module:
    return ctkd.get_loss("alm", pair=WordStarts(), **settings)


def inputs_with_gaps(seed: int, **settings: Any) -> dict[str, Any]:
    """Ragged inputs in which the teacher lacks one chunk of the first text."""
    inputs = ragged_inputs(seed, V=V, W=W, **settings)
    chunk_ids = inputs["teacher_chunk_ids"]
    chunk_ids[0, chunk_ids[0] == 1] = -1
    return inputs


def scored(inputs: dict[str, Any], name: str, side: str) -> list[list[int]]:
    """Entries of the labels or chunk ids at the scored tokens of each text."""
    labels = inputs[f"{side}_labels"]
    rows = zip(inputs[f"{side}_{name}"].tolist(), (labels != -100).tolist(), strict=True)
    return [[entry for entry, kept in zip(*row, strict=True) if kept] for row in rows]


def oracle(inputs: dict[str, Any], *, temperature: float = 100.0, debias: bool = False):
    starts = STARTS if debias else (None, None)
    return alm.loss(
        answer_rows(inputs, "student"),
        answer_rows(inputs, "teacher"),
        scored(inputs, "labels", "student"),
        scored(inputs, "labels", "teacher"),
        scored(inputs, "chunk_ids", "student"),
        scored(inputs, "chunk_ids", "teacher"),
        temperature=temperature,
        student_starts=starts[0],
        teacher_starts=starts[1],
    )


@pytest.mark.parametrize(
    ("settings", "ties", "seed"),
    [
        (settings, ties, 1 + (i + ties) % 3)
        for i, settings in enumerate(SETTINGS)
        for ties in (False, True)
    ],
    ids=str,
)
def test_the_oracle_agrees(settings, ties, seed):
    inputs = inputs_with_gaps(seed, ties=ties)
    leaf = inputs["student_logits"].requires_grad_()
    expected, expected_count = oracle(inputs, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    value, count, gradient = loss_and_gradient(make_loss(**settings), inputs)
    assert count == expected_count >= 4
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


@by_settings
def test_the_oracle_agrees_in_single_precision(settings):
    inputs = inputs_with_gaps(4, dtype=torch.float32)
    leaf = inputs["student_logits"].requires_grad_()
    expected, _ = oracle(inputs, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    value, _, gradient = loss_and_gradient(make_loss(**settings), inputs)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)


def test_nearly_equal_models_in_single_precision():
    """Their coins differ by 1e-3, so that the terms of each divergence nearly cancel."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 9, 20, generator=generator)
    labels = torch.randint(20, (2, 9), generator=generator)
    chunk_ids = torch.arange(-1, 8).expand(2, -1)

    def value(dtype: torch.dtype) -> Tensor:
        batch = Batch.from_causal_lm(
            student_logits=(logits + 1e-3 * noise).to(dtype),
            student_labels=labels,
            student_chunk_ids=chunk_ids,
            teacher_logits=logits.to(dtype),
            teacher_labels=labels,
            teacher_chunk_ids=chunk_ids,
        )
        return make_loss(temperature=1.0)(batch).value.double()

    noise = torch.randn(logits.shape, generator=generator)
    expected = value(torch.float64)
    assert 1e-9 < expected < 1e-5
    # Log-likelihoods of about 3 are rounded by 3e-7 on either side, and the value is about the
    # square of their distance: 2 * 2 * 3e-7 / 1e-3, with room for smaller distances.
    torch.testing.assert_close(value(torch.float32), expected, rtol=6e-3, atol=0)


def one_token(student: Tensor, teacher: Tensor) -> Batch:
    """N texts of one token whose log-likelihoods on the two sides are (N,) and (N,)."""

    def logits(log_likelihoods: Tensor) -> Tensor:
        complements = log1mexp(log_likelihoods.double()).to(log_likelihoods.dtype)
        return torch.stack([log_likelihoods, complements], -1)[:, None]

    return Batch(
        student=side_of_chunks(logits(student)),
        teacher=side_of_chunks(logits(teacher)),
    )


def side_of_chunks(logits: Tensor, chunk_ids: Tensor | None = None) -> ctkd.Side:
    """A side that scores token 0 everywhere; by default each token is its own chunk."""
    size = logits.shape[:2]
    if chunk_ids is None:
        chunk_ids = torch.arange(size[1]).expand(size)
    return ctkd.Side(
        logits=logits,
        token_ids=torch.zeros(size, dtype=torch.int64),
        mask=torch.ones(size, dtype=torch.bool),
        chunk_ids=chunk_ids,
    )


LIKELIHOODS = [-0.01, -0.013, -0.1, -1.0, -1.02, -5.0, -20.0, -60.0, -200.0]


@pytest.mark.parametrize("teacher", LIKELIHOODS)
def test_single_precision_is_enough_from_certain_to_unlikely(teacher):
    # float32 log-likelihoods, tau = 100: the coins are between 0.9999 and 0.14.
    student = torch.tensor([x for x in LIKELIHOODS if x != teacher]).requires_grad_()
    batch = one_token(student, torch.full_like(student, teacher))
    output = ctkd.get_loss("alm")(batch)
    (gradient,) = torch.autograd.grad(output.value, student)
    assert output.value.dtype == gradient.dtype == torch.float32
    expected = [coin_kl(teacher, x, 100) for x in student.tolist()]
    assert output.value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    leaf = student.detach().double().requires_grad_()
    exact = ctkd.get_loss("alm")(one_token(leaf, torch.full_like(leaf, teacher)))
    (expected_gradient,) = torch.autograd.grad(exact.value, leaf)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=0)


def coin_kl(teacher: float, student: float, temperature: float) -> float:
    """The divergence of the two coins in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        p, q = (
            (Decimal(x) / Decimal(temperature) - Decimal(1e-6)).exp() for x in (teacher, student)
        )
        return float(p * (p / q).ln() + (1 - p) * ((1 - p) / (1 - q)).ln())


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_coins_against_decimal_arithmetic(temperature):
    for teacher, student in itertools.product(
        (-1e-9, -0.01, -0.7, -3.0, -200.0), (-1e-7, -0.011, -0.6, -8.0, -150.0)
    ):
        log_probs = torch.tensor([student, teacher], dtype=torch.float64) / temperature - 1e-6
        log_probs.requires_grad_()
        value = binary_kl(*log_probs)
        assert value.item() == pytest.approx(
            coin_kl(teacher, student, temperature), rel=1e-9, abs=1e-18
        )
        (gradient,) = torch.autograd.grad(value, log_probs)
        with localcontext() as context:
            context.prec = 400
            q, p = (Decimal(one).exp() for one in log_probs.tolist())
            assert gradient.tolist() == pytest.approx([float((q - p) / (1 - q)), 0.0], rel=1e-9)


@pytest.mark.parametrize("x", [-1e-12, -1e-3, -0.69, -0.7, -30.0, -700.0, -1e5])
def test_the_log_of_the_complement(x):
    value = log1mexp(torch.tensor(x, dtype=torch.float64))
    with localcontext() as context:
        context.prec = 400
        assert value.item() == pytest.approx(float((1 - Decimal(x).exp()).ln()), rel=1e-12)


def test_worked_by_hand():
    # Every token has probability 1/2. Chunk 0: the teacher's coin is 1/2 * 1/2, the student's 1/2,
    # up to epsilon. Chunk 1: 1/2 and 1/2.
    batch = Batch(
        student=side_of_chunks(torch.zeros(1, 2, 2, dtype=torch.float64)),
        teacher=side_of_chunks(
            torch.zeros(1, 3, 2, dtype=torch.float64), torch.tensor([[0, 0, 1]])
        ),
    )
    output = ctkd.get_loss("alm", temperature=1.0)(batch)
    expected = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)) / 2
    assert output.value.item() == pytest.approx(expected, rel=1e-5)
    assert output.count.item() == 2
    assert set(output.parts) == {"alm"}


@by_settings
def test_equal_models_are_no_distance_apart(settings):
    inputs = ragged_inputs(5, V=W, W=W, head=0, teacher_lengths=(6, 3, 4))
    for name in ("logits", "labels", "chunk_ids"):
        inputs[f"teacher_{name}"] = inputs[f"student_{name}"]
    pair = WordStarts(STARTS[1], STARTS[1], (W, W))
    loss = ctkd.get_loss("alm", pair=pair, **settings)
    value, count, gradient = loss_and_gradient(loss, inputs)
    assert value == 0 and count > 6
    assert gradient.abs().max() < 1e-15
    # One row off, as without the shift of labels, and nothing is equal any more.
    shifted = {**inputs, "teacher_logits": inputs["teacher_logits"].roll(1, 1)}
    value, _, gradient = loss_and_gradient(loss, shifted)
    assert value > 1e-4 and gradient.abs().max() > 1e-4


def test_at_large_temperatures_the_gradient_is_that_of_the_docstring():
    student = torch.tensor([-4.0], dtype=torch.float64, requires_grad=True)
    for temperature, error in ((1e2, 0.1), (1e4, 0.01)):  # epsilon counts beyond
        batch = one_token(student, torch.tensor([-10.0], dtype=torch.float64))
        value = ctkd.get_loss("alm", temperature=temperature)(batch).value
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.item() * temperature == pytest.approx(10 / 4 - 1, rel=error)
    assert ctkd.describe("alm").default_weights == (1.0, ctkd.get_loss("alm").temperature)


def test_debiasing_tells_apart_what_ends_where():
    # Both sides are equally sure of the one token of chunk 0, but only the teacher expects a word
    # to begin after it.
    student = torch.zeros(1, 2, V, dtype=torch.float64)
    teacher = torch.zeros(1, 2, W, dtype=torch.float64)
    teacher[0, 0, 0] = math.log(7 / 10)  # a probability of 1 / 11 among 8 tokens
    teacher[0, 1, STARTS[1]] = 9.0
    batch = Batch(student=side_of_chunks(student), teacher=side_of_chunks(teacher))
    plain = make_loss()(batch)
    debiased = make_loss(debias=True)(batch)
    # Chunk 1 is followed by nothing and goes without; only chunk 0 changes.
    boundary = [
        rows[1].softmax(-1)[starts].sum().log().item()
        for rows, starts in zip((student[0], teacher[0]), STARTS, strict=True)
    ]
    likelihood = [rows[0].log_softmax(-1)[0].item() for rows in (student[0], teacher[0])]
    last = [rows[1].log_softmax(-1)[0].item() for rows in (student[0], teacher[0])]
    kept = coin_kl(last[1], last[0], 100)
    assert likelihood[0] == pytest.approx(likelihood[1])
    assert plain.value.item() == pytest.approx(kept / 2, rel=1e-9)
    changed = coin_kl(likelihood[1] + boundary[1], likelihood[0] + boundary[0], 100)
    assert debiased.value.item() == pytest.approx((kept + changed) / 2, rel=1e-9)


def test_debias_needs_to_know_the_tokenizers():
    with pytest.raises(SettingError, match="debias=True needs to know which tokens begin a word"):
        ctkd.get_loss("alm", debias=True)
    with pytest.raises(SettingError, match="but the teacher's tokenizer has none"):
        ctkd.get_loss("alm", debias=True, pair=WordStarts(teacher=[]))
    with pytest.raises(SettingError, match="debias must be true or false, got 'maybe'"):
        ctkd.get_loss("alm", debias="maybe", pair=WordStarts())
    assert ctkd.get_loss("alm").needs == {"chunks"}
    loss = make_loss(debias=True)
    assert loss.needs == {"chunks", "pair"}
    assert loss.state_dict() == {}
    assert "debias=True" in repr(loss)


def test_a_temperature_that_is_no_positive_number_is_refused():
    for temperature in (0, -1.0, float("inf"), "1"):
        with pytest.raises(SettingError, match="temperature must be a finite number above 0"):
            ctkd.get_loss("alm", temperature=temperature)


@pytest.mark.parametrize(("side", "width"), [("student", V + 2), ("teacher", W + 2)])
def test_a_padded_head_is_refused_where_columns_have_a_meaning(side, width):
    inputs = ragged_inputs(6, V=V, W=W)
    del inputs["student_vocab_size"]
    if side == "teacher":
        inputs["student_logits"] = inputs["student_logits"][..., :V]
        inputs["teacher_logits"] = torch.nn.functional.pad(inputs["teacher_logits"], (0, 2))
    batch = Batch.from_causal_lm(**inputs)
    with pytest.raises(BatchError, match=f"{width} columns.*pass {side}_vocab_size={width - 2}"):
        make_loss(debias=True)(batch)
    assert make_loss()(batch).value.isfinite()


def test_a_batch_without_chunks_is_refused():
    inputs = ragged_inputs(7)
    inputs["student_chunk_ids"] = None
    with pytest.raises(BatchError, match="the batch has no chunk_ids"):
        ctkd.get_loss("alm")(Batch.from_causal_lm(**inputs))


def test_heads_that_the_teacher_rules_out_leave_tails():
    ruled_out = torch.tensor([-torch.inf], dtype=torch.float64)
    student = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    value = binary_kl(student, ruled_out)
    assert value.item() == pytest.approx(-log1mexp(torch.tensor(-0.5).double()).item())
    value.backward()
    assert student.grad.item() == pytest.approx(math.exp(-0.5) / (1 - math.exp(-0.5)))
