import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ctkd.batch import Side
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import EncodedExample, EncodedSide, encode_examples
from ctkd.distill.data.tasks import Example
from ctkd.errors import BatchError
from tests.tokenization import trained_tokenizers as trained


def test_any_padding_will_do():
    assert padding_id(trained.byte_level()) == 2
    assert padding_id(trained.wrapped(trained.byte_level().backend_tokenizer)) == 0
    named = trained.wrapped(trained.byte_level().backend_tokenizer, eos_token="<|start|>")
    assert padding_id(named) == 1


def side(
    prompt: list[int], answer: list[int], eos: int | None = 2, chunks: list[int] | None = None
) -> EncodedSide:
    return EncodedSide(prompt_ids=prompt, answer_ids=answer, eos_id=eos, chunk_ids=chunks or [])


def pairs() -> list[EncodedExample]:
    return [
        EncodedExample(
            id="a",
            student=side([5, 6, 7], [8], chunks=[0]),
            teacher=side([1, 9], [4, 5, 6], 3, chunks=[0, 0, 0]),
        ),
        EncodedExample(
            id="b",
            student=side([5], [9, 2], chunks=[0, 1]),
            teacher=side([1, 9, 9, 9], [7], 3, chunks=[-1]),
        ),
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
        "distill_chunk_ids": [[-1, 0, -1, -1], [-1, 0, 1, -1]],
        "teacher_distill_chunk_ids": [[-1, 0, 0, 0], [-1, -1, -1, -1]],
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
    # One chunk number of its own, the same on both sides.
    assert batch["distill_chunk_ids"].tolist() == [[-1, 0, 1, -1], [-1, 0, 1, 2]]
    assert batch["teacher_distill_chunk_ids"].tolist() == [
        [-1, 0, 0, 0, 1],
        [-1, -1, 2, -1, -1],
    ]


def test_cut_rows_have_no_end_among_rows_that_have_one():
    cut = EncodedExample(
        id="c",
        student=side([5], [9, 8, 7], None, [0, 1, 1]),
        teacher=side([1], [4, 6], None, [0, 1]),
        cut=True,
    )
    batch = Collator(student_pad_id=2, teacher_pad_id=3, score_eos=True)([pairs()[0], cut])
    assert batch["labels"].tolist() == [[-100, 8, 2, -100], [-100, 9, 8, 7]]
    assert batch["distill_labels"].tolist() == batch["labels"].tolist()
    assert batch["teacher_distill_labels"].tolist() == [
        [-100, 4, 5, 6, 3],
        [-100, 4, 6, -100, -100],
    ]
    assert batch["distill_chunk_ids"].tolist() == [[-1, 0, 1, -1], [-1, 0, 1, 1]]
    assert batch["teacher_distill_chunk_ids"].tolist() == [[-1, 0, 0, 0, 1], [-1, 0, 1, -1, -1]]
    wrong = EncodedExample(id="c", student=side([5], [9], 2), cut=True)
    with pytest.raises(BatchError, match="example c was cut, so that it does not end"):
        Collator(student_pad_id=2)([wrong])


def test_chunks_are_those_of_the_scored_tokens():
    """A bos on one side only, pad equal to eos on the other, characters cut over tokens."""
    student, teacher = trained.byte_level(), trained.gemma_like()
    assert student.pad_token_id == student.eos_token_id
    answers = [" 日本", " Paris and Münster", " Nile"]
    rows = encode_examples(
        [
            Example(id=a, prompt="Where? " * n, answer=a, references=(a,), group=a)
            for n, a in enumerate(answers, 1)
        ],
        student,
        teacher,
        max_length=99,
        score_eos=True,
    ).rows
    batch = Collator(student_pad_id=student.eos_token_id, teacher_pad_id=0, score_eos=True)(rows)
    assert (batch["teacher_input_ids"] == teacher.bos_token_id).sum() == len(rows)
    assert not (batch["input_ids"] == student.bos_token_id).any()
    for prefix, tokenizer in (("", student), ("teacher_", teacher)):
        labels = batch[f"{prefix}distill_labels"]
        chunks = batch[f"{prefix}distill_chunk_ids"]
        assert ((labels == tokenizer.eos_token_id).sum(1) == 1).all()  # scored, unlike padding
        assert torch.equal(chunks >= 0, labels >= 0)
        assert torch.equal(chunks[labels == tokenizer.eos_token_id], chunks.max(1).values)
    assert torch.equal(
        batch["distill_chunk_ids"].max(1).values, batch["teacher_distill_chunk_ids"].max(1).values
    )


def test_a_side_has_one_chunk_number_per_token_or_none():
    rows = [EncodedExample(id="a", student=side([5], [8, 9]), teacher=side([5], [8]))]
    batch = Collator(student_pad_id=0, teacher_pad_id=0, score_eos=True)(rows)
    assert batch["distill_chunk_ids"].tolist() == [[-1, -1, -1, -1]]
    rows = [EncodedExample(id="a", student=side([5], [8, 9], 2, [0]), teacher=side([5], [8]))]
    with pytest.raises(BatchError, match="one chunk number for each of an answer's 2 tokens"):
        Collator(student_pad_id=0, teacher_pad_id=0)(rows)


def test_without_an_end_of_sequence_nothing_stands_in_for_it():
    rows = [EncodedExample(id="a", student=side([5], [8, 9], None))]
    batch = Collator(student_pad_id=0)(rows)
    assert batch["labels"].tolist() == batch["distill_labels"].tolist() == [[-100, 8, 9]]
    assert batch["input_ids"].tolist() == [[5, 8, 9]]
    with pytest.raises(BatchError, match="score_eos needs an end of sequence"):
        Collator(student_pad_id=0, score_eos=True)(rows)


def test_without_a_teacher_there_are_no_teachers_tensors():
    batch = Collator(student_pad_id=2)(pairs())
    assert not any(name.startswith("teacher") for name in batch)
    alone = [EncodedExample(id="a", student=side([5], [8]))]
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
        rows.append(EncodedExample(id="", student=student, teacher=teacher))
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
