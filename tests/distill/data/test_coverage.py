"""Tokenizers that change the text, and answers that are too long: what is kept and what is told."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from ctkd.distill.data.coverage import Coverage, RowCoverage, kept_bytes, shared_ends
from ctkd.distill.data.encoding import EncodedExample, encode_examples
from ctkd.distill.data.tasks import Example
from ctkd.errors import DataError
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes
from tests.tokenization import trained_tokenizers as trained


@functools.cache
def lower_casing():
    backend = Tokenizer.from_str(trained.byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    return trained.wrapped(backend, eos_token="<|end|>", pad_token="<|end|>")


def example(number: int, answer: str, prompt: str = "Where?") -> Example:
    return Example(
        id=f"q{number}",
        prompt=prompt,
        answer=answer,
        references=(answer,),
        group="g",
        where=f"file.jsonl row {number}",
    )


@functools.cache
def table(make) -> TokenBytes:
    return TokenBytes.from_tokenizer(make())


@functools.cache
def pair() -> TokenizerPair:
    return TokenizerPair(table(trained.byte_level), table(trained.gemma_like))


def spelled(make, ids: list[int]) -> bytes:
    return table(make).decode(ids)


def in_chunks(make, side) -> bytes:
    kept = [i for i, chunk in zip(side.answer_ids, side.chunk_ids, strict=True) if chunk >= 0]
    return spelled(make, kept)


def test_a_lossy_row_keeps_its_tokenizers_ids_and_is_aligned_where_the_texts_agree():
    student, teacher = trained.byte_level(), lower_casing()
    rows = [example(1, " zq Xq zq"), example(2, " the river")]
    found = encode_examples(rows, student, teacher, max_length=99, min_coverage=0.5)
    one = found.rows[0]
    assert spelled(trained.byte_level, one.student.answer_ids) == b" zq Xq zq"
    assert spelled(lower_casing, one.teacher.answer_ids) == b" zq xq zq"
    ours = in_chunks(trained.byte_level, one.student)
    theirs = in_chunks(lower_casing, one.teacher)
    assert ours == theirs
    assert ours.startswith(b" zq") and ours.endswith(b"q zq")
    assert found.coverage.covered_bytes == len(ours) + len(" the river")
    assert found.coverage.text_bytes == 19
    (worst,) = found.coverage.worst
    assert (worst.id, worst.covered_bytes) == ("q1", len(ours))


def test_too_little_coverage_names_the_worst_rows():
    rows = [example(i, " the river Nile" if i % 2 else " NILE") for i in range(10)]
    with pytest.raises(DataError) as caught:
        encode_examples(rows, trained.byte_level(), lower_casing(), max_length=99)
    message = str(caught.value)
    assert "of the answers' bytes are spelled alike on both sides, expected at least 95.0 %" in (
        message
    )
    assert "file.jsonl row 0 (0.0 %): expected ' NILE', the teacher's ids spell ' nile'" in message
    assert message.count("file.jsonl row") == 3
    assert message.endswith("choose another model, or lower min_coverage")
    assert "\n" not in message
    found = encode_examples(
        rows, trained.byte_level(), lower_casing(), max_length=99, min_coverage=0.0
    ).coverage
    assert [row.id for row in found.worst] == [f"q{i}" for i in range(0, 10, 2)]
    # Exactly as much as is asked for will do.
    encode_examples(
        rows, trained.byte_level(), lower_casing(), max_length=99, min_coverage=found.share
    )


def test_without_a_teacher_the_students_bytes_are_compared_with_the_text():
    rows = [example(1, " aXa"), example(2, " the river")]
    found = encode_examples(rows, lower_casing(), max_length=99, min_coverage=13 / 14)
    assert (found.coverage.covered_bytes, found.coverage.text_bytes) == (13, 14)
    assert found.coverage.report().startswith("encoded 2 answers: 92.8 % of bytes kept by the ")
    with pytest.raises(DataError, match="only 92.8 % of the answers' bytes are kept by the stu"):
        encode_examples(rows, lower_casing(), max_length=99)


def test_two_tokenizers_that_change_the_text_alike_agree():
    found = encode_examples([example(1, " NILE")], lower_casing(), lower_casing(), max_length=99)
    assert found.coverage.share == 1.0
    assert found.rows[0].student == found.rows[0].teacher


def test_what_a_tokenizer_adds_makes_up_for_nothing():
    backend = Tokenizer.from_str(trained.byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("x", "and so on")
    adding = trained.wrapped(backend, eos_token="<|end|>")
    rows = [example(1, " x"), example(2, " NILE")]
    found = encode_examples(rows, adding, adding, max_length=99).coverage
    assert (found.covered_bytes, found.text_bytes) == (7, 7)


def test_unknown_characters_are_lost_and_an_answer_of_nothing_is_refused():
    backend = Tokenizer.from_str(trained.byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("x", "")
    dropping = trained.wrapped(backend, eos_token="<|end|>")
    with pytest.raises(DataError, match="row 1: the teacher's .* expected 'xx', its ids spell ''"):
        encode_examples(
            [example(1, "xx")], trained.byte_level(), dropping, max_length=99, min_coverage=0.0
        )
    found = encode_examples(
        [example(1, " 日本")],
        trained.byte_level(),
        trained.unigram(),
        max_length=99,
        min_coverage=0.0,
    )
    assert trained.unigram().unk_token_id in found.rows[0].teacher.answer_ids
    assert found.coverage.covered_bytes <= 1


TEXTS = [" Paris and the river Nile", " 日本語のテキスト", " Münster, 👩\u200d👩\u200d👧!", " a"]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(TEXTS), st.integers(0, 30), st.integers(0, 8), st.booleans())
def test_a_cut_keeps_the_same_bytes_on_both_sides(answer, room, words, score_eos):
    student, teacher = trained.byte_level(), trained.gemma_like()
    asked = example(1, answer, "Where? " * words + "Question. Answer:")
    options = {"score_eos": score_eos, "pair": pair()}
    whole = encode_examples([asked], student, teacher, max_length=999, **options).rows[0]
    ours, theirs = (len(one.prompt_ids) for one in (whole.student, whole.teacher))
    longest = max(ours, theirs) + room
    rows = [asked, example(2, "a", "b")]
    found = encode_examples(rows, student, teacher, max_length=longest, on_long="cut", **options)
    ours_whole = ours + len(whole.student.answer_ids) + 1
    theirs_whole = theirs + len(whole.teacher.answer_ids) + score_eos
    kept = found.rows[0]
    if max(ours_whole, theirs_whole) <= longest:
        assert kept == whole
        assert found.report() == ""
        return
    why = "" if kept.id == "q1" else "; no part of its answer fits"
    shown = f"q1 (student {ours_whole}, teacher {theirs_whole}{why})"
    told = f"1 of 2 examples as longer than {longest} tokens: {shown}"
    if kept.id != "q1":
        assert (found.too_long, found.cut) == ((shown,), ())
        assert found.report() == f"left out {told}"
    else:
        assert (found.too_long, found.cut) == ((), (shown,))
        assert found.report() == f"cut {told}"
        assert kept.cut and kept.student.eos_id is None and kept.teacher.eos_id is None
        text = spelled(trained.byte_level, kept.student.answer_ids)
        assert text == spelled(trained.gemma_like, kept.teacher.answer_ids)
        assert text and answer.startswith(text.decode())  # no half of a character
        for one, full in ((kept.student, whole.student), (kept.teacher, whole.teacher)):
            assert one.prompt_ids == full.prompt_ids
            assert one.chunk_ids == full.chunk_ids[: len(one.answer_ids)]
            assert len(one.prompt_ids) + len(one.answer_ids) <= longest
    # No longer cut would have fitted.
    done = 0 if kept.id != "q1" else len(kept.student.answer_ids)
    for end in range(done + 1, len(whole.student.answer_ids) + 1):
        text = spelled(trained.byte_level, whole.student.answer_ids[:end])
        for other in range(1, len(whole.teacher.answer_ids) + 1):
            same = text == spelled(trained.gemma_like, whole.teacher.answer_ids[:other])
            if same and answer.startswith(text.decode(errors="replace")):
                assert ours + end > longest or theirs + other > longest


def test_without_a_teacher_an_answer_is_cut_at_the_end_of_a_character():
    tokenizer = trained.byt5()
    asked = example(1, "aé日", "A:")
    lengths = {}
    for longest in range(2, 10):
        try:
            found = encode_examples([asked], tokenizer, max_length=longest, on_long="cut")
        except DataError:
            continue
        lengths[longest] = spelled(trained.byt5, found.rows[0].student.answer_ids).decode()
        assert found.rows[0].cut == (longest < 9)
    assert lengths == {
        3: "a",
        4: "a",
        5: "aé",
        6: "aé",
        7: "aé",
        8: "aé日",  # without room for the end of sequence
        9: "aé日",
    }


def test_a_prompt_that_leaves_no_room_leaves_out_the_row():
    rows = [example(1, " Paris", "Where? " * 20), example(2, " a", "b")]
    found = encode_examples(
        rows, trained.byte_level(), trained.gemma_like(), max_length=10, on_long="cut"
    )
    assert [row.id for row in found.rows] == ["q2"]
    assert found.too_long[0].startswith("q1 (student ")
    with pytest.raises(DataError, match="all 1 examples are longer than 10 tokens"):
        encode_examples(
            rows[:1], trained.byte_level(), trained.gemma_like(), max_length=10, on_long="cut"
        )


def test_a_lossy_row_is_cut_where_the_texts_agree_again():
    student, teacher = trained.byte_level(), lower_casing()
    asked = example(1, " zq Xq zq zq zq")
    whole = encode_examples([asked], student, teacher, max_length=99, min_coverage=0).rows[0]
    longest = len(whole.student.prompt_ids) + len(whole.student.answer_ids) - 1
    found = encode_examples(
        [asked], student, teacher, max_length=longest, min_coverage=0, on_long="cut"
    )
    (row,) = found.rows
    assert isinstance(row, EncodedExample) and row.cut
    ours = spelled(trained.byte_level, row.student.answer_ids)
    assert ours.startswith(b" zq Xq zq")
    assert ours.lower() == spelled(lower_casing, row.teacher.answer_ids)


def test_places_to_cut():
    assert shared_ends([]) == []
    # An empty piece stands inside a character if the next byte goes on with it.
    assert shared_ends([b"a", b"\xc3", b"", b"\xa9", b""]) == [(1,), (4,), (5,)]
    assert shared_ends([b"a", b"b", b"c"], [[0, -1, 1], [0, 1]]) == [(1, 1), (3, 2)]
    assert shared_ends([b"\xc3", b"\xa9"], [[0, 1], [0, 1]]) == [(2, 2)]
    assert shared_ends([b"a"], [[-1], [-1]]) == []


def test_kept_bytes_are_counted_once():
    assert kept_bytes(b"aaa", b"aa") == kept_bytes(b"aa", b"aaa") == 2
    assert kept_bytes(b"abc", b"abc") == 3
    assert kept_bytes(b"abc", b"") == 0
    assert kept_bytes(b"abcd", b"abXd") == 3


def test_reports_round_down_and_speak_of_one_answer():
    nearly = Coverage(answers=1, text_bytes=10_000, covered_bytes=9_999, teacher_tokens=0)
    assert nearly.report() == (
        "aligned 1 answer: 99.9 % of bytes in chunks, no chunks, 0.0 student and 0.0 teacher "
        "tokens per answer"
    )
    assert nearly.one_to_one_share is None
    assert Coverage.summed([]).share == 1.0
    row = RowCoverage(
        id="1", where="row 1", text=b"ab", covered_bytes=1, student=b"aB", teacher=b"Ab"
    )
    assert str(row) == (
        "row 1 (50.0 %): expected 'ab', the student's ids spell 'aB' and the teacher's ids spell "
        "'Ab'"
    )
