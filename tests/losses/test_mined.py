"""`mined` against the authors' files, the oracle, and what its docstring claims."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ctkd
from baselines import mined
from ctkd.batch import Batch, Side
from ctkd.errors import BatchError, SettingError
from ctkd.losses.mined import carried_kl, first_sources, fused_target
from ctkd.tokenizers import PlaceholderPair
from tests.golden.golden_values import gradient_norm, load
from tests.ragged_batches import answer_rows, loss_and_gradient, ragged_inputs
from tests.rounding import rounding

V, W = 11, 8
MAPPING = [3, 0, 7, 3, 10, 0, 3, 9]
GOLDEN = load("mined")
VOCABULARY = GOLDEN["vocab"]
SOFT = VOCABULARY["teacher_to_student_ids"]
STUDENT_IDS = {token: index for index, token in enumerate(VOCABULARY["student"])}
TEACHER_IDS = {token: index for index, token in enumerate(VOCABULARY["teacher"])}
HARD = [STUDENT_IDS.get(token.replace("▁", "Ġ")) for token in VOCABULARY["teacher"]]
SETTINGS = [
    {},
    {"k": 3},
    {"k": 100, "temperature": 2.0},
    {"form": "dense"},
    {"form": "dense", "temperature": 2.0},
]
by_case = pytest.mark.parametrize("case", GOLDEN["transform"], ids=lambda case: case["seed"])
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)


class Renaming(PlaceholderPair):
    """Two vocabularies with a map between them, and a list of what edit distance matches."""

    def __init__(self, mapping: list[int], student_size: int, matched: Tensor | None = None):
        self.mapping, self.matched = mapping, matched
        self.student_size, self.teacher_size = student_size, len(mapping)

    def nearest_student_ids(self) -> Tensor:
        return torch.tensor(self.mapping)

    def match_positions(
        self, student_ids: Tensor, teacher_ids: Tensor, student_mask: Tensor, teacher_mask: Tensor
    ) -> Tensor:
        assert student_ids.shape == student_mask.shape == self.matched.shape
        assert teacher_ids.shape == teacher_mask.shape
        return self.matched


def golden_logits(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    rs = np.random.RandomState(case["seed"])
    student = rs.standard_normal((len(case["student_input"]), len(STUDENT_IDS))) * 2
    teacher = rs.standard_normal((len(case["teacher_input"]), len(TEACHER_IDS))) * 2
    return torch.from_numpy(student), torch.from_numpy(teacher)


def golden_partners(case: dict[str, Any]) -> list[int | None]:
    """What the authors' rule keeps: it looks at the tokens that the positions read."""
    return mined.pair_matches(
        case["student_to_teacher"],
        [STUDENT_IDS[token] for token in case["student_input"]],
        [TEACHER_IDS[token] for token in case["teacher_input"]],
        SOFT,
    )


def golden_batch(case: dict[str, Any]) -> Batch:
    """A batch whose chunks pair what the authors' rule pairs."""
    student, teacher = golden_logits(case)
    chunks = [[-1] * len(student), [-1] * len(teacher)]
    kept = [pair for pair in enumerate(golden_partners(case)) if pair[1] is not None]
    for chunk, (ours, theirs) in enumerate(kept):
        chunks[0][ours] = chunks[1][theirs] = chunk
    sides = [
        Side(
            logits=rows[None],
            token_ids=torch.tensor([ids]),
            mask=torch.ones(1, len(rows), dtype=torch.bool),
            chunk_ids=torch.tensor([numbers]),
        )
        for rows, ids, numbers in (
            (student.requires_grad_(), [STUDENT_IDS[t] for t in case["student_target"]], chunks[0]),
            (teacher, [TEACHER_IDS[t] for t in case["teacher_input"]], chunks[1]),
        )
    ]
    return Batch(student=sides[0], teacher=sides[1])


@by_case
def test_the_authors_dense_form(case):
    golden, batch = case["dskd"], golden_batch(case)
    loss = ctkd.get_loss(
        "mined",
        pair=Renaming(SOFT, len(STUDENT_IDS)),
        form="dense",
        temperature=golden["kd_temperature"],
    )
    output = loss(batch)
    total = output.value * output.count
    # The authors' softmax is in float32.
    assert total.item() == pytest.approx(golden["forward_kl_sum"], rel=1e-6)
    norm = gradient_norm(total, [batch.student.logits.tensor])
    assert norm == pytest.approx(golden["grad_norm"], rel=1e-6)


@by_case
def test_the_authors_carried_rows(case):
    partners, (_, teacher) = golden_partners(case), golden_logits(case)
    sources = first_sources(torch.tensor(SOFT), len(STUDENT_IDS))
    assert sum(partner is not None for partner in partners) == 3
    for partner, target, expected in zip(
        partners, case["student_target"], case["dskd"]["aligned_teacher_logits"], strict=True
    ):
        if partner is None:
            row = mined.one_hot_row(STUDENT_IDS[target], len(STUDENT_IDS))
        else:
            row = mined.carry_row(teacher[partner], SOFT, len(STUDENT_IDS))
            carried = teacher[partner][sources.clamp_min(0)].masked_fill(sources < 0, -1e5)
            assert carried.tolist() == pytest.approx(expected, rel=1e-12)
        assert row.tolist() == pytest.approx(expected, rel=1e-12)


@by_case
@pytest.mark.parametrize(("rule", "mapping"), [("hard", HARD), ("soft", SOFT)])
def test_the_authors_top_rows(case, rule, mapping):
    _, teacher = golden_logits(case)
    ids, logits = (case[f"fusellm_aligned_{name}"][rule] for name in ("indices", "logits"))
    fused = 0
    for partner, row_ids, row_logits in zip(golden_partners(case), ids, logits, strict=True):
        if len(row_ids) > 1:
            found = mined.carry_top(teacher[partner], mapping, case["fusellm_top_k"])
            assert found == (row_ids, pytest.approx(row_logits, rel=1e-12))
            fused += 1
    assert fused >= 2


@by_case
def test_the_authors_targets_in_the_loss(case):
    batch = golden_batch(case)
    student = batch.student.logits.tensor[0].detach()
    expected, fused = 0.0, 0
    ids, logits = (case[f"fusellm_aligned_{name}"]["soft"] for name in ("indices", "logits"))
    for row, row_ids, row_logits in zip(student, ids, logits, strict=True):
        if len(row_ids) > 1:
            probs = torch.tensor(row_logits, dtype=torch.float64).softmax(0)
            expected -= (probs * row.log_softmax(0)[row_ids]).sum().item()
            fused += 1
    loss = ctkd.get_loss("mined", pair=Renaming(SOFT, len(STUDENT_IDS)), k=case["fusellm_top_k"])
    output = loss(batch)
    assert fused == 3 and output.count == 5
    assert output.parts["fused"].item() * 5 == pytest.approx(expected, rel=1e-12)


@by_case
def test_edit_distance_keeps_what_the_authors_rule_keeps(case):
    batch = golden_batch(case)
    # The authors compare the tokens that are read, so these stand where the labels belong.
    read = torch.tensor([[STUDENT_IDS[token] for token in case["student_input"]]])
    side = Side(logits=batch.student.logits, token_ids=read, mask=batch.student.mask)
    matched = [j[0] if len(j) == 1 else -1 for j in case["student_to_teacher"]]
    pair = Renaming(SOFT, len(STUDENT_IDS), torch.tensor([matched]))
    loss = ctkd.get_loss("mined", pair=pair, alignment="dtw", k=4)
    output = loss(Batch(student=side, teacher=batch.teacher))
    expected = mined.terms(
        [batch.student.logits.tensor[0].detach()],
        [batch.teacher.logits.tensor[0]],
        read.tolist(),
        [golden_partners(case)],
        SOFT,
        k=4,
    )
    for name, total in expected.items():
        assert output.parts[name].item() * 5 == pytest.approx(total.item(), rel=1e-12)


def scored(inputs: dict[str, Any], name: str, side: str) -> list[list[int]]:
    """Entries of the labels or chunk ids at the scored tokens of each text."""
    labels = inputs[f"{side}_labels"]
    rows = zip(inputs[f"{side}_{name}"].tolist(), (labels != -100).tolist(), strict=True)
    return [[entry for entry, kept in zip(*row, strict=True) if kept] for row in rows]


def by_chunk(inputs: dict[str, Any]) -> list[list[int | None]]:
    sides = (scored(inputs, "chunk_ids", side) for side in ("student", "teacher"))
    return [mined.pair_chunks(*chunks) for chunks in zip(*sides, strict=True)]


def oracle(inputs: dict[str, Any], partners: list[list[int | None]], **settings: Any):
    return mined.loss(
        answer_rows(inputs, "student"),
        answer_rows(inputs, "teacher"),
        scored(inputs, "labels", "student"),
        partners,
        MAPPING,
        **settings,
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
    inputs = ragged_inputs(seed, V=V, W=W, ties=ties)
    leaf = inputs["student_logits"].requires_grad_()
    partners = by_chunk(inputs)
    assert sum(partner is not None for row in partners for partner in row) >= 2
    expected, expected_count = oracle(inputs, partners, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    loss = ctkd.get_loss("mined", pair=Renaming(MAPPING, V), **settings)
    value, count, gradient = loss_and_gradient(loss, inputs)
    assert count == expected_count == 13
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


@by_settings
def test_the_oracle_agrees_in_single_precision(settings):
    inputs = ragged_inputs(4, V=V, W=W, dtype=torch.float32)
    leaf = inputs["student_logits"].requires_grad_()
    expected, _ = oracle(inputs, by_chunk(inputs), **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    loss = ctkd.get_loss("mined", pair=Renaming(MAPPING, V), **settings)
    value, _, gradient = loss_and_gradient(loss, inputs)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@by_settings
def test_the_oracle_agrees_on_what_edit_distance_matches(settings):
    inputs = ragged_inputs(5, V=V, W=W)
    del inputs["student_chunk_ids"], inputs["teacher_chunk_ids"]
    # Two positions with one partner, one without any, and others whose tokens do not correspond.
    matched = torch.tensor([[0, 0, -1, 1, 2, 3, -1], [4, 1, 0, *[-1] * 4], [-1] * 7])
    inputs["teacher_labels"][0, inputs["teacher_labels"][0] != -100] = torch.tensor([6, 4, 2, 5])
    inputs["student_labels"][0, inputs["student_labels"][0] != -100] = torch.tensor(
        [MAPPING[6], MAPPING[6], 0, MAPPING[4], MAPPING[2], MAPPING[5] + 1]
    )
    student, teacher = (scored(inputs, "labels", side) for side in ("student", "teacher"))
    partners = [
        mined.pair_matches([[j] if j >= 0 else [] for j in row[: len(ours)]], ours, theirs, MAPPING)
        for row, ours, theirs in zip(matched.tolist(), student, teacher, strict=True)
    ]
    assert partners[0] == [0, 0, None, 1, 2, None]
    leaf = inputs["student_logits"].requires_grad_()
    expected, _ = oracle(inputs, partners, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    loss = ctkd.get_loss("mined", pair=Renaming(MAPPING, V, matched), alignment="dtw", **settings)
    value, _, gradient = loss_and_gradient(loss, inputs)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-14)
    assert loss.needs == {"pair"}


def hand_batch(student: Tensor, teacher: Tensor, second_chunk: int = -1) -> Batch:
    """Two student positions, labels 1 and 2; the first is the teacher's only one."""
    return Batch(
        student=Side(
            logits=student.log()[None],
            token_ids=torch.tensor([[1, 2]]),
            mask=torch.ones(1, 2, dtype=torch.bool),
            chunk_ids=torch.tensor([[0, second_chunk]]),
        ),
        teacher=Side(
            logits=teacher.log()[None],
            token_ids=torch.tensor([[0]]),
            mask=torch.ones(1, 1, dtype=torch.bool),
            chunk_ids=torch.tensor([[0]]),
        ),
    )


STUDENT = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]], dtype=torch.float64)
TEACHER = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)


def test_worked_by_hand():
    # The teacher's top 3 become 1, 1 and 0: the second 1 is dropped, 0.4 and 0.2 become 2/3, 1/3.
    output = ctkd.get_loss("mined", pair=Renaming([1, 1, 0, 2], 3), k=3)(
        hand_batch(STUDENT, TEACHER)
    )
    fused = -(2 / 3 * math.log(0.25) + 1 / 3 * math.log(0.5))
    label = -math.log(0.1)
    assert output.count == 2
    assert output.parts["fused"].item() == pytest.approx(fused / 2, rel=1e-12)
    assert output.parts["label"].item() == pytest.approx(label / 2, rel=1e-12)
    assert output.value.item() == pytest.approx((fused + label) / 2, rel=1e-12)


def test_the_dense_form_worked_by_hand():
    # Student token 1 takes 0.4 and not 0.3, token 0 takes 0.2, token 2 has no source.
    output = ctkd.get_loss("mined", pair=Renaming([1, 1, 0, 0], 3), form="dense")(
        hand_batch(STUDENT, TEACHER)
    )
    fused = 2 / 3 * math.log(2 / 3 / 0.25) + 1 / 3 * math.log(1 / 3 / 0.5)
    assert output.parts["fused"].item() == pytest.approx(fused / 2, rel=1e-12)
    assert output.parts["label"].item() == pytest.approx(-math.log(0.1) / 2, rel=1e-12)


def test_the_dense_form_is_zero_where_the_student_agrees():
    student = torch.stack([TEACHER[0][[2, 0, 3]] / 0.7, STUDENT[1]])
    output = ctkd.get_loss("mined", pair=Renaming([1, 1, 0, 2], 3), form="dense")(
        hand_batch(student, TEACHER)
    )
    assert output.parts["fused"].item() == pytest.approx(0, abs=rounding(torch.float64, 4))


def test_columns_that_a_model_rules_out_do_no_harm():
    teacher = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    for settings in ({"k": 2}, {"k": 4}, {"form": "dense"}):
        batch = hand_batch(student, teacher)
        leaf = batch.student.logits.tensor.requires_grad_()
        loss = ctkd.get_loss("mined", pair=Renaming([0, 1, 2, 0], 3), **settings)
        value = loss(batch).value
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite() and gradient.isfinite().all()


def test_a_chunk_of_several_tokens_is_no_pair():
    batch = hand_batch(STUDENT, TEACHER, second_chunk=0)
    output = ctkd.get_loss("mined", pair=Renaming([1, 1, 0, 2], 3))(batch)
    assert output.parts["fused"] == 0
    assert output.value.item() == pytest.approx(-(math.log(0.25) + math.log(0.1)) / 2, rel=1e-12)


def test_targets_and_sources_against_loops():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 7, 30):
        ids, renaming = torch.randint(6, (4, 3, width), generator=generator), torch.arange(6) % 4
        log_probs = torch.randn(4, 3, width, generator=generator).double()
        teacher_of = torch.randint(-1, 3, (4, 5), generator=generator)
        labels = torch.randint(6, (4, 5), generator=generator)
        found = fused_target(ids, log_probs, renaming, teacher_of, labels)
        for b, s in itertools.product(range(4), range(5)):
            t = int(teacher_of[b, s])
            names, weights = [int(labels[b, s])] * width, [1.0] + [0.0] * (width - 1)
            if t >= 0:
                names = renaming[ids[b, t]].tolist()
                weights = [
                    math.exp(log_probs[b, t, n]) * (i not in names[:n]) for n, i in enumerate(names)
                ]
            assert found[0][b, s].tolist() == names
            expected = [one / math.fsum(weights) for one in weights]
            assert found[1][b, s].tolist() == pytest.approx(expected, rel=1e-12, abs=0)
        mapping = ids[0, 0]
        sources = [mapping.tolist().index(v) if v in mapping.tolist() else -1 for v in range(8)]
        assert first_sources(mapping, 8).tolist() == sources


def test_carried_rows_have_no_part_outside_their_sources():
    student = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    value = carried_kl(student, torch.zeros(2, 2).double(), torch.tensor([0, -1, 1]), 2.0)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    target = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    expected = ((student / 2.0).softmax(-1) - target) / 2.0
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be a whole number of at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"alignment": "soft"}, "alignment must be one of chunk, dtw, got 'soft'"),
        ({"form": "sparse"}, "form must be one of top_k, dense, got 'sparse'"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        ctkd.get_loss("mined", pair=Renaming(MAPPING, V), **settings)


def test_the_tokenizers_are_needed_and_nothing_is_saved():
    with pytest.raises(SettingError, match="needs to know both tokenizers"):
        ctkd.get_loss("mined")
    loss = ctkd.get_loss("mined", pair=Renaming(MAPPING, V))
    assert loss.state_dict() == {} and loss.needs == {"chunks", "pair"}
    assert repr(loss) == "MinED(k=10, temperature=1.0, alignment='chunk', form='top_k')"


def test_logits_of_other_tokenizers_are_refused():
    batch = Batch.from_causal_lm(**ragged_inputs(6, V=V, W=W))
    for mapping, size, message in (
        (MAPPING, V + 1, "the student's logits have 11 columns, but its tokenizer has 12 tokens"),
        ([*MAPPING, 0], V, "8 columns, but its tokenizer has 9 tokens; give the pair as Tok"),
    ):
        with pytest.raises(BatchError, match=message):
            ctkd.get_loss("mined", pair=Renaming(mapping, size))(batch)


def test_a_batch_without_chunks_is_refused():
    inputs = {**ragged_inputs(7, V=V, W=W), "student_chunk_ids": None}
    with pytest.raises(BatchError, match="the batch has no chunk_ids"):
        ctkd.get_loss("mined", pair=Renaming(MAPPING, V))(Batch.from_causal_lm(**inputs))
