from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctkd.distill.data import encoding
from ctkd.distill.data.encoding import EncodedSide, encode_examples, encode_side
from ctkd.distill.data.prompts import encode_prompt, leading_ids
from ctkd.distill.data.rows import load_rows
from ctkd.distill.data.tasks import Example, examples
from ctkd.errors import DataError, SettingError
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes
from tests.tokenization import real_tokenizers
from tests.tokenization import trained_tokenizers as trained

EXACT = {
    "byte-level": trained.byte_level,
    "byte-level with a space": lambda: trained.byte_level(prefix_space=True),
    "no added space": trained.gemma_like,
    "metaspace first": lambda: trained.metaspace("first"),
    "metaspace always": lambda: trained.metaspace("always"),
    "prepending": trained.prepending,
}
ANSWERS = [
    *trained.HARD_STRINGS,
    *[" " + text for text in trained.HARD_STRINGS],
    *[f" {text}" for text in ("1648", "Münster", " two", "▸ x", "\n", "a")],
    *["1648", "Münster", "Egypt.", ": colon", ":", "\n", " "],
]


def example(number: int, answer: str = " Paris", prompt: str = "Where?\nAnswer:") -> Example:
    return Example(
        id=f"q{number}",
        prompt=prompt,
        answer=answer,
        references=(answer.strip(),),
        group="g",
        where=f"file.jsonl row {number}",
    )


def encoded(tokenizer, answer: str, prompt: str = "Where?\nAnswer:", **options) -> EncodedSide:
    table = TokenBytes.from_tokenizer(tokenizer)
    return encode_side(tokenizer, table, prompt, answer, **options)


@pytest.mark.parametrize("name", EXACT)
def test_the_answers_ids_spell_the_answer(name):
    tokenizer = EXACT[name]()
    table = TokenBytes.from_tokenizer(tokenizer)
    for answer in ANSWERS:
        found = encode_side(tokenizer, table, "Where?", answer)
        assert table.decode(found.answer_ids).decode() == answer


def test_slow_tokenizers_spell_the_answer(tmp_path):
    for tokenizer in (trained.slow_sentencepiece(tmp_path), trained.byt5()):
        table = TokenBytes.from_tokenizer(tokenizer)
        for answer in ANSWERS:
            found = encode_side(tokenizer, table, "Where?", answer)
            assert table.decode(found.answer_ids).decode() == answer
    assert encode_side(tokenizer, table, "a", "b").prompt_ids == [ord("a") + 3]  # its eos left away


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1))
@pytest.mark.parametrize("name", ["byte-level with a space", "metaspace first", "prepending"])
def test_any_answer_can_be_spelled_in_spite_of_an_added_space(name, answer):
    tokenizer = EXACT[name]()
    found = encoded(tokenizer, answer)
    assert TokenBytes.from_tokenizer(tokenizer).decode(found.answer_ids).decode() == answer


def test_an_added_space_takes_the_place_of_the_answers_own():
    tokenizer = trained.prepending()
    assert encoded(tokenizer, " Paris").answer_ids == tokenizer("Paris")["input_ids"]


def test_a_tokenizer_that_cannot_spell_a_line_break_still_loses_its_added_space():
    tokenizer = trained.unigram()
    for answer in ("Paris", " Paris", "the Nile"):
        found = encoded(tokenizer, answer)
        assert TokenBytes.from_tokenizer(tokenizer).decode(found.answer_ids).decode() == answer


def test_where_no_space_is_added_the_ids_are_the_tokenizers_own():
    for tokenizer in (trained.byte_level(), trained.gemma_like()):
        expected = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
        assert encoded(tokenizer, " Paris").answer_ids == expected


def test_prompts_begin_as_the_tokenizer_begins_texts():
    gemma, bytes_ = trained.gemma_like(), trained.byte_level()
    assert leading_ids(gemma) == [gemma.bos_token_id]
    assert leading_ids(bytes_) == []  # it has a bos, but does not add it
    assert leading_ids(trained.unigram()) == []  # it adds an eos behind
    assert leading_ids(trained.wordpiece()) == [trained.wordpiece().cls_token_id]
    found = encoded(gemma, " Paris", prompt="The Nile")
    assert found.prompt_ids == gemma("The Nile")["input_ids"] == encode_prompt(gemma, "The Nile")
    assert found.eos_id == gemma.eos_token_id
    assert encode_prompt(gemma, "x", leading=[]) == gemma("x", add_special_tokens=False).input_ids
    assert trained.unigram().eos_token_id not in encode_prompt(trained.unigram(), "In Paris")


def test_settings_of_the_tokenizer_neither_cut_nor_pad(transformers_log):
    tokenizer = trained.wrapped(trained.byte_level().backend_tokenizer, eos_token="<|end|>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.model_max_length = 2
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    plain = encoded(trained.byte_level(), " Paris and Münster")
    assert encoded(tokenizer, " Paris and Münster") == plain
    assert transformers_log == []


@pytest.mark.parametrize(
    ("make", "answer", "expected"),
    [
        (trained.gemma_like, " a▁b", "expected ' a▁b', its ids spell ' a b'"),
        (
            lambda: trained.byte_level(nfc=True),
            " e\u0301",
            "expected ' e\u0301', its ids spell ' é'",
        ),
        (trained.byte_level, " a<|end|>", "expected ' a<|end|>', its ids spell ' a'"),
        (trained.unigram, " 日本", "its ids spell ' '"),
        (trained.wordpiece, " It's", 'expected " It\'s", its ids spell " It \' s"'),
        (trained.byte_level, " " + "<|end|>" * 99, "<|end|..., its ids spell ' '"),
    ],
)
def test_alone_an_answer_that_cannot_be_spelled_is_refused(make, answer, expected):
    with pytest.raises(DataError) as caught:
        encoded(make(), answer, where="file.jsonl row 17", side="teacher")
    message = str(caught.value)
    assert message.startswith("file.jsonl row 17: the teacher's tokenizer (")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("answer", [" a<|end|>", " " + "<|end|>" * 99, "<|start|>"])
def test_an_answer_that_spells_a_special_token_is_refused(answer):
    rows = [example(1), example(17, answer)]
    for teacher in (None, trained.gemma_like()):
        with pytest.raises(DataError, match=r"^file.jsonl row 17: the student's tokenizer \("):
            encode_examples(rows, trained.byte_level(), teacher, max_length=999, min_coverage=0.0)


HALF = "half \ud83d"


@pytest.mark.parametrize(
    ("row", "what"),
    [(example(7, HALF), "answer"), (example(7, prompt=HALF), "prompt")],
)
def test_half_a_surrogate_pair_names_its_row(row, what):
    expected = rf"row 7: the {what} is not valid Unicode \(half a surrogate pair at character 6\)"
    for teacher in (None, trained.gemma_like()):
        with pytest.raises(DataError, match=f"file.jsonl {expected}"):
            encode_examples([example(1), row], trained.byte_level(), teacher, max_length=99)
    with pytest.raises(DataError, match=expected):
        encoded(trained.byte_level(), row.answer, row.prompt, where="row 7")
    if what == "prompt":
        with pytest.raises(DataError, match=expected):
            encode_prompt(trained.byte_level(), HALF, where="row 7")


def test_an_empty_prompt_needs_a_bos():
    assert encoded(trained.gemma_like(), "a", prompt="").prompt_ids == [2]
    with pytest.raises(DataError, match="example: the prompt is empty"):
        encoded(trained.byte_level(), "a", prompt="")
    with pytest.raises(DataError, match="example q1: the answer is empty"):
        encode_examples(
            [Example(id="q1", prompt="p", answer="", references=(), group="")],
            trained.byte_level(),
            max_length=9,
        )


def test_both_sides_are_encoded_alike_alone_and_together():
    student, teacher = trained.byte_level(), trained.metaspace()
    answers = [" Paris", "Münster", " 1648", " 日本"]
    found = encode_examples(
        [example(i, a) for i, a in enumerate(answers)], student, teacher, max_length=99
    )
    assert [row.id for row in found.rows] == ["q0", "q1", "q2", "q3"]
    assert found.report() == ""
    for row, answer in zip(found.rows, answers, strict=True):
        assert replace(row.student, chunk_ids=[]) == encoded(student, answer)
        assert replace(row.teacher, chunk_ids=[]) == encoded(teacher, answer)
    alone = encode_examples([example(1)], student, max_length=99)
    assert alone.rows[0].teacher is None
    assert alone.rows[0].student == encoded(student, " Paris")  # no chunks


def test_an_answer_that_was_cut_has_no_end_on_either_side():
    whole = example(1)
    pair = trained.gemma_like(), trained.unigram()
    for tokenizers in (pair, pair[:1]):
        found, cut = encode_examples(
            [whole, replace(whole, id="2", ends=False)], *tokenizers, max_length=64
        ).rows
        assert (found.cut, cut.cut) == (False, True)
        assert found.student.eos_id is not None
        assert cut.student == replace(found.student, eos_id=None)
        if cut.teacher is not None:
            assert cut.teacher == replace(found.teacher, eos_id=None)


def spans(table: TokenBytes, one: EncodedSide) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for token, chunk in zip(one.answer_ids, one.chunk_ids, strict=True):
        found[chunk] = found.get(chunk, b"") + table.bytes_of[token]
    return found


def test_chunks_are_the_same_bytes_on_both_sides_and_cannot_be_cut_further():
    student, teacher = trained.byte_level(), trained.gemma_like()
    pair = TokenizerPair(student, teacher)
    rows = [example(i, answer) for i, answer in enumerate(ANSWERS) if "<" not in answer]
    found = encode_examples(rows, student, teacher, max_length=999, pair=pair)
    split = 0
    for row, one in zip(rows, found.rows, strict=True):
        ours = spans(pair.student_bytes, one.student)
        assert ours == spans(pair.teacher_bytes, one.teacher)
        assert list(ours) == list(range(len(ours)))
        assert b"".join(ours.values()).decode() == row.answer
        # Where either side's token ends inside a chunk, the other side has no end.
        ends = [
            {len(table.decode(side.answer_ids[:n])) for n in range(1, len(side.answer_ids) + 1)}
            for table, side in (
                (pair.student_bytes, one.student),
                (pair.teacher_bytes, one.teacher),
            )
        ]
        assert len(ends[0] & ends[1]) == len(ours)
        split += sum(len(b.decode(errors="ignore").encode()) < len(b) for b in ours.values())
    assert split  # chunks may end inside a character, where both tokenizers do
    coverage = found.coverage
    assert coverage.share == 1.0
    assert coverage.worst == ()
    assert coverage.student_tokens == sum(len(one.student.answer_ids) for one in found.rows)
    assert coverage.teacher_tokens == sum(len(one.teacher.answer_ids) for one in found.rows)
    assert coverage.text_bytes == sum(len(row.answer.encode()) for row in rows)
    single = [
        one.student.chunk_ids.count(chunk) == one.teacher.chunk_ids.count(chunk) == 1
        for one in found.rows
        for chunk in set(one.student.chunk_ids)
    ]
    assert (coverage.one_to_one, coverage.chunks) == (sum(single), len(single))


def test_rows_are_aligned_in_blocks(monkeypatch):
    student, teacher = trained.byte_level(), trained.metaspace()
    rows = [example(i, " Paris and Münster"[: 6 + 2 * i]) for i in range(5)]
    whole = encode_examples(rows, student, teacher, max_length=99)
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", 2)
    assert encode_examples(rows, student, teacher, max_length=99) == whole


def test_an_example_too_long_on_one_side_is_left_out_on_both():
    student, teacher = trained.byte_level(), trained.wordpiece()
    rows = [example(0), example(1, " Paris" * 30), *[example(i, " Nile" * 40) for i in (2, 3, 4)]]
    longest = len(encoded(student, " Paris").prompt_ids) + 30
    found = encode_examples(rows, student, teacher, max_length=longest)
    assert [row.id for row in found.rows] == ["q0"]
    assert found.report().startswith(
        f"left out 4 of 5 examples as longer than {longest} tokens: q1"
    )
    assert found.report().endswith(", ...")
    with pytest.raises(
        DataError, match=r"file.jsonl row 1 is longer than .* \(student \d+, teacher"
    ):
        encode_examples(rows, student, teacher, max_length=longest, on_long="refuse")
    with pytest.raises(
        DataError, match=r"all 4 examples are longer than 20 tokens.* or raise --max-len"
    ):
        encode_examples(rows[1:], student, teacher, max_length=20)


@pytest.mark.parametrize("score_eos", [False, True])
def test_the_length_counts_an_end_of_sequence_where_it_is_read(score_eos):
    tokenizer = trained.byte_level()
    found = encoded(tokenizer, " Paris")
    length = len(found.prompt_ids) + len(found.answer_ids)
    with pytest.raises(DataError):
        encode_examples([example(1)], tokenizer, max_length=length)
    assert len(encode_examples([example(1)], tokenizer, max_length=length + 1)) == 1
    teacher = trained.byt5()
    both = [example(1), example(2, " P")]
    fits = encode_examples(both, tokenizer, teacher, max_length=20, score_eos=score_eos)
    assert len(encoded(teacher, " Paris").prompt_ids) + len(" Paris") == 20
    assert len(fits) == (1 if score_eos else 2)


def test_wrong_settings_are_refused():
    tokenizer = trained.byte_level()
    with pytest.raises(SettingError, match="max_length must be at least 2"):
        encode_examples([example(1)], tokenizer, max_length=1)
    with pytest.raises(SettingError, match="on_long must be 'drop', 'refuse' or 'cut', got 'end'"):
        encode_examples([example(1)], tokenizer, max_length=9, on_long="end")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(SettingError, match=f"min_coverage must be from 0 to 1, got {wrong}"):
            encode_examples([example(1)], tokenizer, max_length=9, min_coverage=wrong)
    with pytest.raises(DataError, match="no examples"):
        encode_examples([], tokenizer, max_length=9)
    with pytest.raises(SettingError, match="the teacher's tokenizer has none"):
        encode_examples(
            [example(1)], tokenizer, trained.end_of_word(), max_length=9, score_eos=True
        )


@pytest.mark.models
def test_the_packaged_models_encode_the_embedded_set():
    names = ("smollm2-135m-instruct", "gemma-3-270m")
    student, teacher = map(real_tokenizers.packaged, names)
    found = encode_examples(examples(load_rows("pocketqa"), "qa"), student, teacher, max_length=512)
    assert found.report() == ""
    assert leading_ids(student) == []
    assert leading_ids(teacher) == [teacher.bos_token_id]
    for name in names:
        tokenizer, table = real_tokenizers.packaged(name), real_tokenizers.table(name)
        for answer in ANSWERS:
            one = encode_side(tokenizer, table, "Where?", answer)
            assert table.decode(one.answer_ids).decode() == answer
