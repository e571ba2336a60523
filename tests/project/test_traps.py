"""Faults that live in other projects' losses, each with a test of what holds here.

The faults of texts, ids and labels are in `test_traps_of_data`.
"""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ctkd
from ctkd.batch import Batch, Side
from ctkd.losses.alm import binary_kl
from ctkd.testing import make_pair
from ctkd.tokenization import TokenBytes, TokenizerPair
from tests.distill import tiny
from tests.ragged_batches import loss_and_gradient, ragged_inputs

# Every registered loss, and the forms of it that take another way through the code.
FORMS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ctkd.list_losses()],
    ("uld", {"pairing": "chunk"}),
    ("uld", {"top_k": 5}),
    ("gold", {"merging": "observed"}),
    ("gold", {"merging": "bayesian"}),
    ("shared_kl", {"rest": "class"}),
    ("mined", {"form": "dense"}),
    ("mined", {"alignment": "dtw"}),
    ("multilevelot", {"pairing": "chunk", "matching": "greedy"}),
]


def every_form(test):
    """A test of each loss, in all its forms one after the other."""

    def run(name):
        for loss, settings in FORMS:
            if loss == name:
                test(name, settings)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return pytest.mark.parametrize("name", ctkd.list_losses())(run)


# That one copies a double softmax and divides its logits by their standard deviation.
not_released = pytest.mark.parametrize(
    "name", sorted({*ctkd.list_losses()} - {"multilevelot_released"})
)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))


class HalfShared(TokenizerPair):
    """One tokenizer twice, of which a loss is told that only every other token is shared."""

    def shared_ids(self) -> tuple[Tensor, Tensor]:
        ids = torch.arange(0, self.student_size, 2)
        return ids, ids

    def nearest_student_ids(self) -> Tensor:
        return torch.arange(self.teacher_size)


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """The model with logits that differ by several units, as a trained one's do."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20.0)
    return model


@functools.cache
def setup() -> tiny.Setup:
    found = tiny.Setup(score_eos=True)
    sharpened(found.student)
    sharpened(found.teacher)
    return found


@functools.cache
def pair() -> TokenizerPair:
    return TokenizerPair(setup().student_tokenizer, setup().teacher_tokenizer, progress=False)


def seen(rows: list, collator, student: tuple, teacher: tuple) -> dict[str, Any]:
    """What two models, each with its tokenizer, say about collated rows."""
    batch = collator(rows)
    inputs: dict[str, Any] = {}
    for side, prefix, (model, tokenizer) in (
        ("student", "", student),
        ("teacher", "teacher_", teacher),
    ):
        names = ("input_ids", "attention_mask", "position_ids")
        labels = batch[f"{prefix}distill_labels"]
        with torch.no_grad():
            logits = model(**{name: batch[prefix + name] for name in names}).logits
        before = (logits.shape[1] - labels.shape[1], 0)  # the prompts, which are not scored
        inputs[f"{side}_logits"] = logits.clone()
        inputs[f"{side}_labels"] = F.pad(labels, before, value=-100)
        chunk_ids = batch[f"{prefix}distill_chunk_ids"]
        inputs[f"{side}_chunk_ids"] = F.pad(chunk_ids, before, value=-1)
        inputs[f"{side}_vocab_size"] = len(tokenizer)
    return inputs


def two_models(rows: list | None = None) -> dict[str, Any]:
    """The tiny student and teacher on some of their rows, by default all."""
    found = setup()
    return seen(
        found.rows if rows is None else rows,
        found.collator,
        (found.student, found.student_tokenizer),
        (found.teacher, found.teacher_tokenizer),
    )


def value_of(loss: ctkd.Loss, inputs: dict[str, Any]) -> float:
    return float(loss(Batch.from_causal_lm(**inputs)).value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alm", {"temperature": 1.0}),
        ("alm", {}),
        ("alm", {"debias": True, "temperature": 1.0}),
        ("gold", {}),
        ("gold", {"merging": "observed"}),
        ("gold", {"merging": "bayesian"}),
        ("bpm", {}),
        ("shared_kl", {}),
        ("shared_kl", {"rest": "class"}),
        ("uld", {}),
        ("uld", {"pairing": "chunk"}),
        ("multilevelot_token", {"sl_weight": 0.0}),
        ("mined", {"form": "dense"}),
    ],
)
def test_one_row_shift(name, settings):
    """Elsewhere logits are compared one row off; a student that is the teacher must cost 0."""
    tokenizer = setup().student_tokenizer
    rows = tiny.encode_examples(tiny.examples(), tokenizer, tokenizer, max_length=64).rows
    collator = tiny.Collator(student_pad_id=1, teacher_pad_id=1)
    inputs = seen(rows, collator, *[(setup().student, tokenizer)] * 2)
    loss = ctkd.get_loss(name, pair=HalfShared(tokenizer, tokenizer), **settings)
    assert abs(value_of(loss, inputs)) < 1e-12
    for side in ("student", "teacher"):
        for what in (["logits"], ["labels", "chunk_ids"]):
            names = [f"{side}_{one}" for one in what]
            shifted = {one: inputs[one].roll(1 if what == ["logits"] else -1, 1) for one in names}
            assert value_of(loss, {**inputs, **shifted}) > 1e-3, names
    # Both sides shifted alike would agree too: the rows must be those that predict the labels.
    ids = collator(rows)["input_ids"]
    oracle = F.one_hot(ids.roll(-1, 1), len(tokenizer)).double()
    side = Side.from_causal_lm(oracle, inputs["student_labels"])
    assert torch.equal(side.logits.top_ids(1).squeeze(-1)[side.mask], side.token_ids[side.mask])


@every_form
def test_vocabulary_width_vs_tokenizer_length(name, settings):
    """Elsewhere a head padded past the tokenizer crashes or leaks; here its columns are cut."""
    inputs = two_models()
    for one in ("student", "teacher"):
        inputs[f"{one}_logits"] = inputs[f"{one}_logits"][..., : inputs[f"{one}_vocab_size"]]
    loss = ctkd.get_loss(name, pair=pair(), **settings)
    expected = value_of(loss, inputs)
    for side in ("student", "teacher"):
        inputs[f"{side}_logits"] = F.pad(inputs[f"{side}_logits"], (0, 7), value=40.0)
        assert value_of(loss, inputs) == pytest.approx(expected, rel=1e-12), side


@every_form
def test_no_student_tokens(name, settings):
    """Elsewhere a sample without student tokens is 0/0; here it adds 0, alone or among others."""
    loss = ctkd.get_loss(name, pair=make_pair(11, 8), **settings)
    value, count, gradient = loss_and_gradient(
        loss, ragged_inputs(1, student_lengths=(0, 0), teacher_lengths=(3, 2))
    )
    if name == "multilevelot_released":  # its log cost takes the missing rows for rows of zeros
        assert count == 2 and value.isfinite()
    else:
        assert count == 0 and value == 0
    assert (gradient == 0).all()
    value, _, gradient = loss_and_gradient(
        loss, ragged_inputs(1, student_lengths=(4, 0, 3), teacher_lengths=(3, 5, 0))
    )
    assert value.isfinite() and value != 0 and gradient.isfinite().all()
    assert (gradient[1] == 0).all() and gradient[0].abs().sum() > 0


@every_form
def test_no_teacher_tokens(name, settings):
    """Elsewhere a sample without teacher tokens is 0/0; here it is finite, and most often 0."""
    loss = ctkd.get_loss(name, pair=make_pair(11, 8), **settings)
    inputs = ragged_inputs(1, student_lengths=(3, 2), teacher_lengths=(0, 0))
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert value.isfinite() and gradient.isfinite().all()
    if name == "mined":  # it then teaches the student's own labels
        assert value > 0 and gradient.abs().sum() > 0
    elif name != "multilevelot_released":  # the released log cost compares with rows of zeros
        assert value == 0 and (gradient == 0).all()


@every_form
def test_padding_rows_inside_means(name, settings):
    """Elsewhere means run over padding too; here neither its number nor its contents matter."""
    short = sorted(setup().rows, key=lambda row: len(row.student.answer_ids))[:3]
    inputs, padded = two_models(short), two_models(short)
    for key, fill in (("labels", -100), ("chunk_ids", -1), ("logits", torch.nan)):
        for side in ("student", "teacher"):
            tensor = padded[f"{side}_{key}"]
            extra = tensor.new_full((3, 4, *tensor.shape[2:]), fill)
            padded[f"{side}_{key}"] = torch.cat([tensor, extra], 1)
    for side in ("student", "teacher"):
        scored = (inputs[f"{side}_labels"] != -100).roll(-1, 1)
        inputs[f"{side}_logits"][~scored] = 30.0
        assert not scored.all()
    loss = ctkd.get_loss(name, pair=pair(), **settings)
    value, count, gradient = loss_and_gradient(loss, inputs)
    padded_value, padded_count, padded_gradient = loss_and_gradient(loss, padded)
    assert padded_count == count
    torch.testing.assert_close(padded_value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded_gradient[:, :-4], gradient, rtol=1e-12, atol=1e-12)


SINGLE_SOFTMAX = {
    # Teacher (1, 0, 0, 0), student (0.7, 0.1, 0.1, 0.1).
    "uld": ({}, 0.6),
    "multilevelot": (
        {"sl_weight": 1.0, "sd_weight": 1.0, "sd_temperature": 1.0, "iterations": 3},
        0.6 + 0.356675 + 0.6,
    ),
    "multilevelot_token": ({"sl_weight": 1.0}, 0.6 + 0.356675),
    "multilevelot_sequence": ({"sd_weight": 1.0, "sd_temperature": 1.0}, 0.6),
    "bpm": ({}, 0.356675),
    "shared_kl": ({}, 0.356675),
    "gold": ({"beta": 0.0}, 0.356675),
    "mined": ({}, 0.356675),
    "alm": ({"temperature": 1.0}, 0.356675),
}


@not_released
def test_double_softmax(name):
    """Elsewhere probabilities go through a second softmax; here a certain teacher is certain."""
    settings, expected = SINGLE_SOFTMAX[name]
    inputs: dict[str, Any] = {}
    for side, row in (("student", [0.7, 0.1, 0.1, 0.1]), ("teacher", [1.0, 0.0, 0.0, 0.0])):
        probs = torch.tensor([[row, row]], dtype=torch.float64)
        inputs[f"{side}_logits"] = probs.log().clamp_min(-300.0)
        inputs[f"{side}_labels"] = torch.tensor([[-100, 0]])
        inputs[f"{side}_chunk_ids"] = torch.tensor([[-1, 0]])
    tables = [TokenBytes((b"a", b"b", b"c", b"d"), ("text",) * 4) for _ in range(2)]
    loss = ctkd.get_loss(name, pair=TokenizerPair(*tables, progress=False), **settings)
    assert value_of(loss, inputs) == pytest.approx(expected, rel=1e-4)


@every_form
def test_batch_dependent_sort_and_std(name, settings):
    """Elsewhere a sample is ranked and scaled with its batch; here its mates do not matter."""
    inputs = two_models()
    loss = ctkd.get_loss(name, pair=pair(), **settings)
    _, count, gradient = loss_and_gradient(loss, inputs)
    for side in ("student", "teacher"):  # other mates: flipped columns, far larger
        mates = inputs[f"{side}_logits"][1:, :, : inputs[f"{side}_vocab_size"]]
        mates.copy_(5.0 * mates.flip(-1))
    _, other_count, other_gradient = loss_and_gradient(loss, inputs)
    assert other_count == count
    same = torch.allclose(gradient[0], other_gradient[0], rtol=1e-10, atol=1e-14)
    assert same == (name != "multilevelot_released")  # the one that copies the fault
    assert gradient[0].abs().sum() > 0
    assert not torch.allclose(gradient[1:], other_gradient[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bf16_sinkhorn(dtype):
    """Elsewhere exp(-cost / lambda) underflows to rows of zeros and 0/0; here logs are scaled."""
    loss = ctkd.get_loss("multilevelot_sequence", sd_weight=1.0, regularization=1e-3)
    # The teacher's last token is at distance 2 of every student token, its first two at 0.
    certain = 200.0 * F.one_hot(torch.tensor([[0, 0, 1, 0]]), 3)
    inputs = {
        "student_logits": 200.0 * F.one_hot(torch.zeros(1, 4, dtype=torch.int64), 3).to(dtype),
        "student_labels": torch.tensor([[-100, 0, 0, 0]]),
        "teacher_logits": certain.to(dtype),
        "teacher_labels": torch.tensor([[-100, 0, 0, 0]]),
    }
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert value == pytest.approx(2 / 3, rel=1e-6) and gradient.isfinite().all()
    inputs = ragged_inputs(5, dtype=dtype)
    inputs["student_logits"] *= 4
    inputs["teacher_logits"] *= 4
    wide = {k: v.double() if "logits" in k else v for k, v in inputs.items()}
    loss = ctkd.get_loss("multilevelot_sequence", sd_weight=1.0, regularization=0.02)
    (value, _, gradient), (expected, _, slope) = (
        loss_and_gradient(loss, i) for i in (inputs, wide)
    )
    assert value == pytest.approx(float(expected), rel=1e-4)
    torch.testing.assert_close(gradient.double(), slope, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alm", {}),
        ("alm", {"temperature": 1.0}),
        *[("gold", {"merging": "observed", "beta": beta}) for beta in (0.0, 0.5)],
        *[("gold", {"merging": "bayesian", "beta": beta}) for beta in (0.0, 0.5)],
    ],
)
def test_log_of_products(name, settings, dtype):
    """Elsewhere probabilities of a chunk are multiplied to 0 and logged; here logs are added."""
    length, improbable = 300, -12.0
    inputs: dict[str, Any] = {}
    for side, count in (("student", length), ("teacher", 2)):
        logits = torch.zeros(1, count + 1, 4, dtype=dtype)
        logits[..., 2] = improbable
        inputs[f"{side}_logits"] = logits
        inputs[f"{side}_labels"] = torch.tensor([[-100] + [2] * count])
        inputs[f"{side}_chunk_ids"] = torch.tensor([[-1] + [0] * count])
    tables = [TokenBytes((b"a", b"b", b"c", b"d"), ("text",) * 4)] * 2
    loss = ctkd.get_loss(name, pair=TokenizerPair(*tables), **settings)
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert gradient.isfinite().all()
    each = improbable - math.log(3.0 + math.exp(improbable))
    if name == "alm":
        coins = [n * each / loss.temperature - 1e-6 for n in (length, 2)]
        expected = float(binary_kl(*torch.tensor(coins, dtype=torch.float64)))
    else:  # whole rows, scaled by the probabilities of all tokens but one
        of_beta = {0.0: each - each * (length - 1) - 1.0, 0.5: 0.5 * math.log(2.0)}
        expected = math.exp(each) * of_beta[settings["beta"]]
    assert value == pytest.approx(expected, rel=1e-4)


BOTH = ("student", "teacher")
TEMPERATURES = {
    # Settings that are temperatures of logits, and the sides whose logits they divide.
    "uld": [({"student_temperature": 3.0}, BOTH[:1]), ({"teacher_temperature": 3.0}, BOTH[1:])],
    "gold": [({"student_temperature": 3.0}, BOTH[:1]), ({"teacher_temperature": 3.0}, BOTH[1:])],
    "bpm": [({"temperature": 3.0}, BOTH)],
    "shared_kl": [({"temperature": 3.0}, BOTH)],
    "mined": [({"temperature": 3.0}, BOTH[1:]), ({"temperature": 3.0, "form": "dense"}, BOTH)],
    "multilevelot": [({"temperature": 3.0, "sl_temperature": 3.0, "sd_temperature": 3.0}, BOTH)],
    "multilevelot_token": [({"temperature": 3.0, "sl_temperature": 3.0}, BOTH)],
    "multilevelot_sequence": [({"temperature": 3.0, "sd_temperature": 3.0}, BOTH)],
}


@not_released
def test_t_squared_convention(name):
    """Elsewhere some losses grow with T squared; here T only divides what the loss says it does."""
    inputs = two_models()
    if name == "alm":  # its temperature divides log-likelihoods of chunks, and nothing else
        hot, cold = (ctkd.get_loss(name, temperature=t) for t in (3.0, 1.0))
        batch = Batch.from_causal_lm(**inputs)
        sums = []
        for side in (batch.student, batch.teacher):
            log_probs = side.logits.log_probs(side.token_ids.unsqueeze(-1)).squeeze(-1)
            chunks = [side.chunk_ids == c for c in range(int(side.chunk_ids.max()) + 1)]
            sums.append(torch.stack([(log_probs * chunk).sum(1) for chunk in chunks]))
        there = sums[0] < 0
        coins = [total[there] / 3.0 - 1e-6 for total in sums]
        assert hot(batch).value == pytest.approx(float(binary_kl(*coins).mean()), rel=1e-9)
        assert hot(batch).value != pytest.approx(float(cold(batch).value), rel=0.01)
        return
    for settings, divided in TEMPERATURES[name]:
        neutral = {k: 1.0 if k.endswith("temperature") else v for k, v in settings.items()}
        hot, cold = (ctkd.get_loss(name, pair=pair(), **s) for s in (settings, neutral))
        by_hand = {f"{side}_logits": inputs[f"{side}_logits"] / 3.0 for side in divided}
        value = value_of(hot, inputs)
        assert value == pytest.approx(value_of(cold, {**inputs, **by_hand}), rel=1e-9), settings
        assert value != pytest.approx(value_of(cold, inputs), rel=0.01), settings


@every_form
def test_student_logits_mutated_in_place(name, settings):
    """Elsewhere the loss divides the caller's logits in place; here tensors stay as they are."""
    inputs = two_models()
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaf = inputs["student_logits"].clone().requires_grad_()
    # An output of a model, unlike a leaf, can be written to without an error.
    inputs["student_logits"] = leaf * 1.0
    versions = {k: v._version for k, v in inputs.items() if isinstance(v, Tensor)}
    loss = ctkd.get_loss(name, pair=pair(), **settings)
    loss(Batch.from_causal_lm(**inputs)).value.backward()
    for key, version in versions.items():
        assert inputs[key]._version == version and torch.equal(inputs[key], before[key]), key


def test_top_k_before_a_sequence_level_operation():
    """Elsewhere top-k is cut per token, then ranked; here columns are ranked over the sequence."""
    inputs = {}
    for side, rows in (
        # No column is the largest of any row that is the largest of the sequence.
        ("student", [[0.45, 0.15, 0.4], [0.15, 0.45, 0.4]]),
        ("teacher", [[0.4, 0.5, 0.1], [0.4, 0.1, 0.5]]),
    ):
        probs = torch.tensor([[*rows, [1 / 3] * 3]], dtype=torch.float64)
        inputs[f"{side}_logits"] = probs.log()
        inputs[f"{side}_labels"] = torch.tensor([[-100, 0, 1]])
    batch = Batch.from_causal_lm(**inputs)
    loss = ctkd.get_loss("multilevelot", k=1, sl_weight=1.0, sd_weight=1.0, sd_temperature=1.0)
    match = loss.match(batch)
    assert match.teacher_ids.tolist() == [[0]] and match.student_ids.tolist() == [[2]]
    parts = {name: float(part) for name, part in loss(batch).parts.items()}
    assert parts == pytest.approx({"had": 0.0, "sl": 0.366516, "sd": 0.0}, abs=1e-6)
