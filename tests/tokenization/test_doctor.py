"""The examination of two tokenizers, on figures that can be checked by hand."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.models.loading import check_token_ids
from ctkd.errors import DataError, ModelError, SettingError
from ctkd.tokenization import doctor, kind_audit
from ctkd.tokenization.answer_facts import AnswerIds, measure_answers
from ctkd.tokenization.doctor import NamedToken, examine, judge
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.thresholds import Thresholds
from ctkd.tokenization.token_bytes import TokenBytes
from tests.distill import tiny
from tests.tokenization import real_tokenizers, trained_tokenizers

STUDENT = TokenBytes((b" a", b"b", b"c", b"1", b"2"), ("text",) * 5)
TEACHER = TokenBytes((b" ab", b"c", b"12", b" a", b"b"), ("text",) * 5)
PAIR = TokenizerPair(STUDENT, TEACHER)
ANSWERS = (
    AnswerIds(id="x", text=b" abc", student_ids=[0, 1, 2], teacher_ids=[0, 1]),
    AnswerIds(id="y", text=b" a12", student_ids=[0, 3, 4], teacher_ids=[3, 2]),
    AnswerIds(id="z", text=b" ab", student_ids=[0, 1], teacher_ids=[3, 4]),
)


def bpe(*, single_digits: bool = False, lower: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    if lower:
        backend.normalizer = normalizers.Lowercase()
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if single_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["1648 2024 365250 The The Nile Nile"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def answers_of(student, teacher, examples) -> list[AnswerIds]:
    rows = encode_examples(examples, student, teacher, max_length=512, min_coverage=0.0).rows
    return [
        AnswerIds(
            id=row.id,
            text=example.answer.encode(),
            student_ids=row.student.answer_ids,
            teacher_ids=row.teacher.answer_ids,
        )
        for row, example in zip(rows, examples, strict=True)
    ]


def examined(student, teacher, **settings) -> doctor.Examination:
    return examine(student, teacher, answers_of(student, teacher, tiny.examples()), **settings)


def test_figures_are_those_of_the_hand():
    facts = measure_answers(PAIR, ANSWERS)
    # [ a|b : ab] [c : c]   [ a :  a] [1|2 : 12]   [ a :  a] [b : b]
    assert facts.chunk_shapes == {"1:1": 4, "2:1": 2}
    assert (facts.chunks, facts.one_to_one, facts.coverage) == (6, 4 / 6, 1.0)
    assert (facts.student_tokens, facts.teacher_tokens) == (8, 6)
    # Both have " a", "b" and "c"; the student's 1 and 2 and the teacher's " ab" and 12 are alone.
    assert facts.student_shared == 6 / 8
    assert facts.teacher_shared == 4 / 6
    assert (facts.student_numerals, facts.teacher_numerals) == (2, 1)
    assert (facts.student_numerals_shared, facts.teacher_numerals_shared) == (0.0, 0.0)
    # Position 2 of x: the student has read " a", the teacher " ab".
    assert facts.paired_by_index == 6
    assert facts.in_step == 5 / 6
    assert facts.in_step_behind_first == 2 / 3
    assert facts.differing == 0


def test_the_worst_rows_come_first_and_perfect_ones_not_at_all():
    facts = measure_answers(PAIR, ANSWERS)
    assert [row.id for row in facts.worst] == ["x", "y"]
    assert [(piece.text, piece.chunk) for piece in facts.worst[0].student] == [
        (" a", 0),
        ("b", 0),
        ("c", 1),
    ]
    lossy = AnswerIds(id="w", text=b" abc", student_ids=[0, 1, 2], teacher_ids=[0])
    facts = measure_answers(PAIR, [*ANSWERS, lossy])
    assert [row.id for row in facts.worst] == ["w", "x", "y"]
    assert facts.worst[0].coverage == 0.75
    assert facts.worst[0].student[-1].chunk == -1


def test_figures_do_not_depend_on_how_many_rows_are_aligned_at_once(monkeypatch):
    rows = [replace(one, id=f"{one.id}{n}") for n in range(3) for one in ANSWERS]
    rows.insert(4, AnswerIds(id="w", text=b" abc", student_ids=[0, 1, 2], teacher_ids=[0]))
    together = measure_answers(PAIR, rows)
    monkeypatch.setattr("ctkd.tokenization.answer_facts._ROWS_AT_ONCE", 2)
    assert measure_answers(PAIR, rows) == together


def test_positions_behind_a_difference_are_not_in_step():
    """Equal lengths are not equal text."""
    student = TokenBytes((b"A", b"b", b"c"), ("text",) * 3)
    teacher = TokenBytes((b"a", b"b", b"c"), ("text",) * 3)
    answer = AnswerIds(id="x", text=b"Abc", student_ids=[0, 1, 2], teacher_ids=[0, 1, 2])
    facts = measure_answers(TokenizerPair(student, teacher), [answer])
    assert facts.in_step == 1 / 3
    assert facts.coverage == 2 / 3
    assert [(row.id, row.student, row.teacher) for row in facts.differing_rows] == [("x", "A", "a")]


def test_figures_without_numerals_or_chunks():
    student = TokenBytes((b"x",), ("text",))
    teacher = TokenBytes((b"y",), ("text",))
    answer = AnswerIds(id="1", text=b"x", student_ids=[0], teacher_ids=[0])
    facts = measure_answers(TokenizerPair(student, teacher), [answer])
    assert (facts.coverage, facts.one_to_one, facts.chunks) == (0.0, 0.0, 0)
    assert (facts.student_numerals_shared, facts.teacher_numerals_shared) == (None, None)
    assert facts.in_step_behind_first == 1.0


@pytest.mark.parametrize("answers", [[], [replace(ANSWERS[0], text=b"")]], ids=["none", "empty"])
def test_nothing_to_align_is_refused(answers):
    with pytest.raises(DataError, match="expected at least one answer"):
        measure_answers(PAIR, answers)


def test_coverage_is_the_one_that_training_checks():
    student, teacher = tiny.tokenizer(280), bpe(lower=True)
    rows = [replace(one, answer=" The Nile Río") for one in tiny.examples()]
    expected = encode_examples(rows, student, teacher, max_length=512, min_coverage=0.0).coverage
    facts = measure_answers(TokenizerPair(student, teacher), answers_of(student, teacher, rows))
    assert 0 < facts.coverage < 1
    assert facts.coverage == expected.share
    assert facts.one_to_one == expected.one_to_one_share


def test_numbers_whole_on_one_side_and_digits_on_the_other_are_found():
    """The failure of losses that match tokens by their text: no number has a partner."""
    found = examined(bpe(single_digits=True), bpe())
    numerals = found.kinds[0]
    assert (numerals.name, numerals.student_longest, numerals.teacher_longest) == ("numerals", 1, 4)
    assert numerals.student_tokens == 0 < numerals.teacher_tokens
    assert len(numerals.probes[0].student) == 4
    assert numerals.probes[0].teacher == ("1648",)
    assert found.numerals_split_on_one_side
    assert not examined(bpe(), bpe()).numerals_split_on_one_side
    assert not examined(*[bpe(single_digits=True)] * 2).numerals_split_on_one_side


def test_numbers_of_published_tokenizers():
    pair = TokenizerPair(real_tokenizers.gpt2(), real_tokenizers.mistral("v1"))
    cuts = [
        lambda texts, one=one: one(texts, add_special_tokens=False)["input_ids"]
        for one in (real_tokenizers.gpt2(), real_tokenizers.mistral("v1"))
    ]
    numerals, *_, emoji = kind_audit.audit_kinds(pair, *cuts)
    assert numerals.split_on_one_side
    assert numerals.teacher_longest == 1
    # The space that Mistral's tokenizer puts in front is no token of the probe.
    assert numerals.probes[0].teacher == ("1", "6", "4", "8")
    assert all(probe.student_exact and probe.teacher_exact for probe in (*numerals.probes,))
    assert emoji.probes[0].teacher == ("🙂",)


def test_text_that_a_tokenizer_loses_is_told():
    found = examined(trained_tokenizers.unigram(), bpe())
    cjk = next(kind for kind in found.kinds if kind.name == "CJK")
    assert not cjk.probes[0].student_exact
    assert cjk.probes[0].teacher_exact


def test_special_tokens_of_each_side():
    found = examined(trained_tokenizers.gemma_like(), trained_tokenizers.unigram())
    assert found.student.bos == NamedToken(token="<bos>", id=2)
    assert found.student.leading == ("<bos>",)
    assert found.student.kind == "BPE with byte fallback"
    assert found.teacher.bos is None
    assert found.teacher.trailing == ("<eos>",)
    assert found.teacher.kind == "Unigram"
    assert found.asymmetries == (
        "only the student has a BOS",
        "only the student puts tokens before a text",
        "the teacher ends a text with <eos>; ctkd leaves it out",
    )


def test_pad_that_is_eos_and_a_missing_eos_are_told():
    """Masking padding by its id would mask the true end as well."""
    without = bpe()
    without.eos_token = None
    found = examined(trained_tokenizers.byte_level(), without)
    assert "the student's pad is its EOS; ctkd masks padding by length, not by id" in (
        found.asymmetries
    )
    assert "the teacher has no EOS, so --score-eos is refused" in found.asymmetries
    found = examined(without, trained_tokenizers.byte_level())
    assert "student has no EOS, so answers are taught without an end" in str(found.asymmetries)


def test_a_chat_template_on_one_side_is_told():
    with_template = bpe()
    with_template.chat_template = "{{ messages[0].content }}"
    found = examined(bpe(), with_template)
    assert "only the teacher has a chat template" in found.asymmetries
    assert (found.student.chat_template, found.teacher.chat_template) == (False, True)


def test_overlap_by_bytes_sees_through_the_marks_of_spaces():
    student, teacher = trained_tokenizers.byte_level(), trained_tokenizers.gemma_like()
    found = examined(student, teacher)
    assert found.overlap.shared == len(TokenizerPair(student, teacher).shared_ids()[0])
    plain = {token for token in student.get_vocab() if token in teacher.get_vocab()}
    assert found.overlap.spelled_alike == len(plain)
    assert found.overlap.shared > found.overlap.spelled_alike


@pytest.mark.parametrize("width", [279, 280, 281, 300])
def test_a_head_is_judged_as_training_judges_it(width):
    tokenizer = tiny.tokenizer(280)
    try:
        check_token_ids(tiny.model(width), tokenizer)
        fits = True
    except ModelError:
        fits = False
    found = examined(tokenizer, bpe(), student_head=width)
    assert (found.student.head.outside is None) == fits
    assert found.student.head.spare_columns == max(width - len(tokenizer), 0)
    verdict = judge(found)
    assert verdict.sound == fits
    assert all("the student's head has" in reason for reason in verdict.reasons)


def test_a_special_token_too_many_is_no_fault():
    tokenizer = tiny.tokenizer(280)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    found = examined(bpe(), tokenizer, teacher_head=len(tokenizer) - 1)
    assert found.teacher.head.outside is None
    assert found.teacher.head.spare_special == 1
    assert judge(found).sound
    tokenizer.pad_token = "<image>"
    found = examined(bpe(), tokenizer, teacher_head=len(tokenizer) - 1)
    assert found.teacher.head.outside == NamedToken(token="<image>", id=len(tokenizer) - 1)
    assert "the teacher's head has" in judge(found).reasons[0]


def test_thresholds_decide():
    found = examine_tables()
    assert judge(found, Thresholds(min_one_to_one=0.66)).sound
    (reason,) = judge(found, Thresholds(min_one_to_one=0.67)).reasons
    assert "only 66.6 % of the chunks are one token on both sides, expected at least 67 %" in reason
    lost = replace(found, answers=replace(found.answers, coverage=0.9499))
    (reason,) = judge(lost).reasons
    assert "only 94.9 % of the answers' bytes are spelled alike" in reason
    assert judge(lost, Thresholds(min_coverage=0.94)).sound
    refused = replace(found, refused=("row 1: no", "row 2: no"))
    assert judge(refused).reasons == ("training refuses 2 of the rows: row 1: no; and 1 more",)


@pytest.mark.parametrize("name", ["min_coverage", "min_one_to_one"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_thresholds_are_shares(name, value):
    with pytest.raises(SettingError, match=f"{name} must be from 0 to 1"):
        Thresholds(**{name: value})


def test_every_figure_goes_through_json():
    found = examined(trained_tokenizers.byte_level(), bpe(single_digits=True), student_head=999)
    figures = json.loads(json.dumps(found.as_dict()))
    assert figures["answers"]["coverage"] == found.answers.coverage
    assert figures["student"]["head"]["width"] == 999
    assert figures["kinds"][0]["split_on_one_side"] == found.numerals_split_on_one_side
    assert figures["overlap"] == {"spelled_alike": found.overlap.spelled_alike} | {
        "shared": found.overlap.shared
    }


def examine_tables() -> doctor.Examination:
    """An examination with the answers worked by hand."""
    return replace(examined(bpe(), bpe()), answers=measure_answers(PAIR, ANSWERS))
