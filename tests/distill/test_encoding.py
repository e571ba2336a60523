import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ctkd.batch import Side
from ctkd.distill.data import load_rows
from ctkd.distill.encoding import (
    Collator,
    EncodedPair,
    EncodedSide,
    encode_pair,
    encode_prompt,
    encode_side,
    leading_ids,
    padding_id,
)
from ctkd.distill.tasks import Example, examples
from ctkd.errors import BatchError, DataError, SettingError
from ctkd.tokenization.token_bytes import TokenBytes
from tests import trained_tokenizers as trained

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


def test_settings_of_the_tokenizer_neither_cut_nor_pad(caplog):
    tokenizer = trained.wrapped(trained.byte_level().backend_tokenizer, eos_token="<|end|>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.model_max_length = 2
    plain = encoded(trained.byte_level(), " Paris and Münster")
    assert encoded(tokenizer, " Paris and Münster") == plain
    assert not caplog.records


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
def test_an_answer_that_cannot_be_spelled_names_its_row(make, answer, expected):
    rows = [example(1), example(17, answer)]
    with pytest.raises(DataError) as caught:
        encode_pair(rows, trained.byte_level(), make(), max_length=999)
    message = str(caught.value)
    side = "student" if make is trained.byte_level else "teacher"
    assert message.startswith(f"file.jsonl row 17: the {side}'s tokenizer (")
    assert expected in message
    assert "\n" not in message


def test_an_empty_prompt_needs_a_bos():
    assert encoded(trained.gemma_like(), "a", prompt="").prompt_ids == [2]
    with pytest.raises(DataError, match="example: the prompt is empty"):
        encoded(trained.byte_level(), "a", prompt="")
    with pytest.raises(DataError, match="example q1: the answer is empty"):
        encode_pair(
            [Example(id="q1", prompt="p", answer="", references=(), group="")],
            trained.byte_level(),
            max_length=9,
        )


def test_both_sides_are_encoded_alike_alone_and_together():
    student, teacher = trained.byte_level(), trained.metaspace()
    answers = [" Paris", "Münster", " 1648", " 日本"]
    found = encode_pair(
        [example(i, a) for i, a in enumerate(answers)], student, teacher, max_length=99
    )
    assert [row.id for row in found.rows] == ["q0", "q1", "q2", "q3"]
    assert found.report() == ""
    for row, answer in zip(found.rows, answers, strict=True):
        assert row.student == encoded(student, answer)
        assert row.teacher == encoded(teacher, answer)
    alone = encode_pair([example(1)], student, max_length=99)
    assert alone.rows[0].teacher is None


def test_an_example_too_long_on_one_side_is_left_out_on_both():
    student, teacher = trained.byte_level(), trained.wordpiece()
    rows = [example(0), example(1, " Paris" * 30), *[example(i, " Nile" * 40) for i in (2, 3, 4)]]
    longest = (
        len(
            encoded(
                student,
                " Paris",
            ).prompt_ids
        )
        + 30
    )
    found = encode_pair(rows, student, teacher, max_length=longest)
    assert [row.id for row in found.rows] == ["q0"]
    assert found.report().startswith(
        f"left out 4 of 5 examples as longer than {longest} tokens: q1"
    )
    assert found.report().endswith(", ...")
    with pytest.raises(
        DataError, match=r"file.jsonl row 1 is longer than .* \(student \d+, teacher"
    ):
        encode_pair(rows, student, teacher, max_length=longest, on_long="refuse")
    with pytest.raises(
        DataError, match=r"all 4 examples are longer than 20 tokens.* raise max_len"
    ):
        encode_pair(rows[1:], student, teacher, max_length=20)


@pytest.mark.parametrize("score_eos", [False, True])
def test_the_length_counts_an_end_of_sequence_where_it_is_read(score_eos):
    tokenizer = trained.byte_level()
    found = encoded(tokenizer, " Paris")
    length = len(found.prompt_ids) + len(found.answer_ids)
    with pytest.raises(DataError):
        encode_pair([example(1)], tokenizer, max_length=length)
    assert len(encode_pair([example(1)], tokenizer, max_length=length + 1)) == 1
    teacher = trained.byt5()
    both = [example(1), example(2, " P")]
    fits = encode_pair(both, tokenizer, teacher, max_length=20, score_eos=score_eos)
    assert len(encoded(teacher, " Paris").prompt_ids) + len(" Paris") == 20
    assert len(fits) == (1 if score_eos else 2)


def test_wrong_settings_are_refused():
    tokenizer = trained.byte_level()
    with pytest.raises(SettingError, match="max_length must be at least 2"):
        encode_pair([example(1)], tokenizer, max_length=1)
    with pytest.raises(SettingError, match="on_long must be 'drop' or 'refuse', got 'cut'"):
        encode_pair([example(1)], tokenizer, max_length=9, on_long="cut")
    with pytest.raises(DataError, match="no examples"):
        encode_pair([], tokenizer, max_length=9)
    with pytest.raises(SettingError, match="the teacher's tokenizer has none"):
        encode_pair([example(1)], tokenizer, trained.end_of_word(), max_length=9, score_eos=True)


def test_any_padding_will_do():
    assert padding_id(trained.byte_level()) == 2
    assert padding_id(trained.wrapped(trained.byte_level().backend_tokenizer)) == 0
    named = trained.wrapped(trained.byte_level().backend_tokenizer, eos_token="<|start|>")
    assert padding_id(named) == 1


def side(prompt: list[int], answer: list[int], eos: int | None = 2) -> EncodedSide:
    return EncodedSide(prompt_ids=prompt, answer_ids=answer, eos_id=eos)


def pairs() -> list[EncodedPair]:
    return [
        EncodedPair(id="a", student=side([5, 6, 7], [8]), teacher=side([1, 9], [4, 5, 6], 3)),
        EncodedPair(id="b", student=side([5], [9, 2]), teacher=side([1, 9, 9, 9], [7], 3)),
    ]


def test_prompts_end_and_answers_begin_at_one_column():
    batch = Collator(student_pad_id=2, teacher_pad_id=0)(pairs())
    expected = {
        "input_ids": [[5, 6, 7, 8, 2, 2], [2, 2, 5, 9, 2, 2]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]],
        # An answer may hold the id of eos; padding, eos and answer all have id 2 here.
        "labels": [[-100, 8, 2, -100], [-100, 9, 2, 2]],
        "distill_labels": [[-100, 8, -100, -100], [-100, 9, 2, -100]],
        "teacher_input_ids": [[0, 0, 1, 9, 4, 5, 6], [1, 9, 9, 9, 7, 0, 0]],
        "teacher_attention_mask": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
        "teacher_position_ids": [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4, 4]],
        "teacher_distill_labels": [[-100, 4, 5, 6], [-100, 7, -100, -100]],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_the_end_of_sequence_is_scored_on_both_sides_or_on_neither():
    batch = Collator(student_pad_id=2, teacher_pad_id=0, score_eos=True)(pairs())
    assert batch["distill_labels"].tolist() == batch["labels"].tolist()
    assert batch["teacher_distill_labels"].tolist() == [
        [-100, 4, 5, 6, 3],
        [-100, 7, 3, -100, -100],
    ]
    assert batch["teacher_input_ids"].tolist() == [
        [0, 0, 1, 9, 4, 5, 6, 3],
        [1, 9, 9, 9, 7, 3, 0, 0],
    ]


def test_without_an_end_of_sequence_nothing_stands_in_for_it():
    rows = [EncodedPair(id="a", student=side([5], [8, 9], None))]
    batch = Collator(student_pad_id=0)(rows)
    assert batch["labels"].tolist() == batch["distill_labels"].tolist() == [[-100, 8, 9]]
    assert batch["input_ids"].tolist() == [[5, 8, 9]]
    with pytest.raises(BatchError, match="score_eos needs an end of sequence"):
        Collator(student_pad_id=0, score_eos=True)(rows)


def test_without_a_teacher_there_are_no_teachers_tensors():
    batch = Collator(student_pad_id=2)(pairs())
    assert not any(name.startswith("teacher") for name in batch)
    alone = [EncodedPair(id="a", student=side([5], [8]))]
    with pytest.raises(BatchError, match="no teacher's side"):
        Collator(student_pad_id=2, teacher_pad_id=0)(alone)
    with pytest.raises(BatchError, match="at least one example"):
        Collator(student_pad_id=2)([])


def tiny(kind: str, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation=attention,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config).to(dtype).eval()
    config = GPT2Config(
        vocab_size=40,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        attn_implementation=attention,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


@pytest.mark.parametrize(
    ("kind", "attention", "dtype", "tolerance"),
    [
        ("llama", "sdpa", torch.float64, 1e-10),
        ("gpt2", "sdpa", torch.float64, 1e-10),
        ("gpt2", "eager", torch.float64, 1e-10),
        # Llama's eager attention takes its softmax in float32, whose range a float64 mask exceeds.
        ("llama", "eager", torch.float32, 1e-4),
    ],
)
@pytest.mark.parametrize("score_eos", [False, True])
def test_a_batch_says_of_each_token_what_the_single_sequence_says(
    kind, attention, dtype, tolerance, score_eos
):
    model = tiny(kind, attention, dtype)
    draw = torch.Generator().manual_seed(1)
    lengths = [(3, 5), (11, 1), (1, 4), (7, 7), (20, 2)]
    rows = []
    for prompt, answer in lengths:
        student, teacher = (
            side(
                torch.randint(40, (p,), generator=draw).tolist(),
                torch.randint(40, (a,), generator=draw).tolist(),
            )
            for p, a in ((prompt, answer), (answer, prompt))
        )
        rows.append(EncodedPair(id="", student=student, teacher=teacher))
    batch = Collator(student_pad_id=2, teacher_pad_id=0, score_eos=score_eos)(rows)

    def from_batch(prefix: str, labels: torch.Tensor) -> list[torch.Tensor]:
        names = ("input_ids", "attention_mask", "position_ids")
        with torch.no_grad():
            logits = model(
                **{name: batch[prefix + name] for name in names}, logits_to_keep=labels.shape[1]
            ).logits
        seen = Side.from_causal_lm(logits, labels)
        log_probs = seen.logits.log_probs(seen.token_ids.unsqueeze(-1)).squeeze(-1)
        return [found[mask] for found, mask in zip(log_probs, seen.mask, strict=True)]

    def alone(one: EncodedSide, with_eos: bool) -> torch.Tensor:
        answer = one.answer_ids + [one.eos_id] * with_eos
        with torch.no_grad():
            logits = model(torch.tensor([one.prompt_ids + answer])).logits[0]
        start = len(one.prompt_ids) - 1
        log_probs = logits[start:-1].log_softmax(-1)
        return log_probs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)

    for prefix, name, with_eos in (
        ("", "labels", True),
        ("", "distill_labels", score_eos),
        ("teacher_", "teacher_distill_labels", score_eos),
    ):
        found = from_batch(prefix, batch[name])
        for row, log_probs in zip(rows, found, strict=True):
            one = row.teacher if prefix else row.student
            torch.testing.assert_close(
                log_probs, alone(one, with_eos), rtol=tolerance, atol=tolerance
            )


@pytest.mark.models
def test_the_packaged_models_encode_the_embedded_set():
    from ctkd.distill.models import load_tokenizer

    student, teacher = load_tokenizer("smollm2-135m-instruct"), load_tokenizer("gemma-3-270m")
    found = encode_pair(examples(load_rows("pocketqa"), "qa"), student, teacher, max_length=512)
    assert found.report() == ""
    assert leading_ids(student) == []
    assert leading_ids(teacher) == [teacher.bos_token_id]
    for tokenizer in (student, teacher):
        table = TokenBytes.from_tokenizer(tokenizer)
        for answer in ANSWERS:
            one = encode_side(tokenizer, table, "Where?", answer)
            assert table.decode(one.answer_ids).decode() == answer
