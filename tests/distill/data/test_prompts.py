"""Prompts as plain text and in a chat template, with and without shots."""

import pytest

from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.prompts import PLAIN, PromptForm, choose_shots, encode_prompt
from ctkd.distill.data.tasks import Example
from ctkd.distill.evaluation.evaluate import answer
from ctkd.distill.models.generation import generate
from ctkd.errors import DataError, ModelError, SettingError
from ctkd.tokenization.token_bytes import TokenBytes
from tests.distill import tiny
from tests.tokenization import trained_tokenizers as trained

CHAT = PromptForm(template="chat")
STUDENT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEACHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "[{{ 'model' if m.role == 'assistant' else 'user' }}] {{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)


def example(name: str, group: str = "", **changes: str) -> Example:
    settings = {
        "prompt": f"Where is {name}?",
        "answer": f" in {name}",
        "where": f"file.jsonl row {name}",
        **changes,
    }
    return Example(id=name, references=(f"in {name}",), group=group or name, **settings)


@pytest.fixture
def student():
    tokenizer = trained.wrapped(
        trained.byte_level().backend_tokenizer, bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = STUDENT_TEMPLATE
    return tokenizer


@pytest.fixture
def teacher():
    """It puts a bos in front of plain text, and its template writes one, too."""
    tokenizer = trained.wrapped(
        trained.gemma_like().backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEACHER_TEMPLATE
    return tokenizer


def text(tokenizer, ids: list[int]) -> str:
    """With special tokens, as they are written."""
    table = TokenBytes.from_tokenizer(tokenizer)
    return b"".join(
        table.bytes_of[index] or tokenizer.convert_ids_to_tokens(index).encode() for index in ids
    ).decode()


@pytest.fixture
def gemma_like():
    """Its template ends a turn with a token that is not the end of sequence."""
    tokenizer = trained.wrapped(trained.gemma_like().backend_tokenizer, eos_token="<eos>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>", "<end_of_turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    )
    return tokenizer


def test_an_answer_in_a_chat_ends_as_the_template_ends_a_turn(student, teacher, gemma_like):
    turn = gemma_like.convert_tokens_to_ids("<end_of_turn>")
    assert turn != gemma_like.eos_token_id
    assert CHAT.end_id(gemma_like) == turn
    assert CHAT.ends(gemma_like) == {turn, gemma_like.eos_token_id}
    assert PLAIN.end_id(gemma_like) == gemma_like.eos_token_id
    assert CHAT.end_id(student) == student.eos_token_id
    # This template writes nothing behind a turn.
    assert CHAT.end_id(teacher) == teacher.eos_token_id
    for form, end in ((CHAT, turn), (PLAIN, gemma_like.eos_token_id)):
        (row,) = encode_examples(
            [example("Oslo")], student, gemma_like, max_length=99, teacher_form=form
        ).rows
        assert row.teacher.eos_id == end
    gemma_like.eos_token = None
    assert CHAT.end_id(gemma_like) == turn
    assert PLAIN.end_id(gemma_like) is None
    chats = {"student_form": CHAT, "teacher_form": CHAT}
    encode_examples([example("Oslo")], student, gemma_like, max_length=99, score_eos=True, **chats)
    with pytest.raises(SettingError, match="score_eos needs an end of sequence on both sides"):
        encode_examples([example("Oslo")], student, gemma_like, max_length=99, score_eos=True)


def test_a_plain_prompt_is_what_it_always_was(student, teacher):
    for tokenizer in (student, teacher):
        asked = example("Oslo")
        assert PLAIN.ids(tokenizer, [asked]) == [encode_prompt(tokenizer, asked.prompt)]
        assert PLAIN.ids(tokenizer, []) == CHAT.ids(tokenizer, []) == []


def test_a_chat_prompt_is_what_the_template_makes_of_it(student, teacher):
    asked = [example("Oslo"), example("Rome")]
    for tokenizer in (student, teacher):
        for one, found in zip(asked, CHAT.ids(tokenizer, asked), strict=True):
            expected = tokenizer.apply_chat_template(
                [{"role": "user", "content": one.prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
            assert found == expected
    (found,) = CHAT.ids(student, asked[:1])
    assert text(student, found) == "<|start|>user\nWhere is Oslo?<|end|>\n<|start|>assistant\n"
    (found,) = CHAT.ids(teacher, asked[:1])
    assert found.count(teacher.bos_token_id) == 1  # the template's, and no second
    assert text(teacher, found) == "<bos>[user] Where is Oslo?[model]"


def test_shots_stand_in_front_but_never_those_of_the_same_group(student, teacher):
    shots = (example("Oslo", "north"), example("Rome", "south"))
    asked = [example("Paris", "west"), example("Bergen", "north")]
    plain, chat = PromptForm(shots=shots), PromptForm(template="chat", shots=shots)
    found = [text(teacher, ids) for ids in plain.ids(teacher, asked)]
    assert found == [
        "<bos>Where is Oslo? in Oslo\n\nWhere is Rome? in Rome\n\nWhere is Paris?",
        "<bos>Where is Rome? in Rome\n\nWhere is Bergen?",
    ]
    found = [text(student, ids) for ids in chat.ids(student, asked)]
    rome = (
        "<|start|>user\nWhere is Rome?<|end|>\n<|start|>assistant\nin Rome<|end|>\n"
        "<|start|>user\nWhere is {}?<|end|>\n<|start|>assistant\n"
    )
    oslo = "<|start|>user\nWhere is Oslo?<|end|>\n<|start|>assistant\nin Oslo<|end|>\n"
    assert found == [oslo + rome.format("Paris"), rome.format("Bergen")]


@pytest.mark.parametrize("student_chats", [False, True])
@pytest.mark.parametrize("teacher_chats", [False, True])
def test_each_side_is_asked_in_its_own_form_and_scores_the_same_text(
    student, teacher, student_chats, teacher_chats
):
    forms = {
        "student_form": CHAT if student_chats else PLAIN,
        "teacher_form": PromptForm(
            template="chat" if teacher_chats else "plain", shots=(example("Rome"),)
        ),
    }
    asked = [example("Oslo"), example("Rome"), example("日本", prompt="Wo?")]
    found = encode_examples(asked, student, teacher, max_length=400, score_eos=True, **forms)
    tables = [TokenBytes.from_tokenizer(one) for one in (student, teacher)]
    both = student_chats and teacher_chats
    for one, row in zip(asked, found.rows, strict=True):
        expected = one.answer.strip() if both else one.answer
        assert tables[0].decode(row.student.answer_ids).decode() == expected
        assert tables[1].decode(row.teacher.answer_ids).decode() == expected
        assert max(row.student.chunk_ids) == max(row.teacher.chunk_ids)
        assert row.student.eos_id == student.eos_token_id
        assert row.teacher.eos_id == teacher.eos_token_id
        asked_teacher = text(teacher, row.teacher.prompt_ids)
        asked_student = text(student, row.student.prompt_ids)
        # Neither reads what belongs to the other's template, nor the other's shots.
        assert not any(mark in asked_teacher for mark in ("<|start|>", "<|end|>", "assistant"))
        assert not any(mark in asked_student for mark in ("<bos>", "[user]", "[model]"))
        assert ("<|start|>" in asked_student) == student_chats
        assert ("[model]" in asked_teacher) == teacher_chats
        assert "Rome" not in asked_student or one.id == "Rome"
        assert asked_teacher.count("Where is Rome?") == 1
    assert found.coverage.share == 1.0


def test_a_student_alone_in_a_chat_answers_without_the_space(student):
    (row,) = encode_examples([example("Oslo")], student, max_length=99, student_form=CHAT).rows
    assert text(student, row.student.answer_ids) == "in Oslo"
    with pytest.raises(DataError, match="row Oslo: the answer is empty"):
        encode_examples([example("Oslo", answer=" ")], student, max_length=99, student_form=CHAT)


def test_a_side_without_a_template_is_told_so(student, teacher):
    student.chat_template = None
    with pytest.raises(ModelError, match=r"^the student's tokenizer \(.* has no chat template; as"):
        encode_examples([example("Oslo")], student, teacher, max_length=99, student_form=CHAT)
    encode_examples([example("Oslo")], student, teacher, max_length=99, teacher_form=CHAT)
    teacher.chat_template = "{{ raise_exception('no turns\nof users') }}"
    with pytest.raises(ModelError, match=r"^the teacher's chat template .*\(no turns\); ask"):
        encode_examples([example("Oslo")], student, teacher, max_length=99, teacher_form=CHAT)


def test_half_a_surrogate_pair_in_a_shot_is_refused(teacher):
    for field in ("prompt", "answer"):
        form = PromptForm(shots=(example("Oslo", **{field: "\ud83d"}),))
        with pytest.raises(DataError, match=f"row Oslo: the {field} is not valid Unicode"):
            form.ids(teacher, [example("Rome")])


def test_a_wrong_template_is_refused():
    with pytest.raises(SettingError, match="template must be 'plain' or 'chat', got 'Chat'"):
        PromptForm(template="Chat")


def test_shots_are_drawn_from_as_many_groups():
    found = [example(str(i), group=str(i % 5)) for i in range(40)]
    for seed in range(20):
        shots = choose_shots(found, 4, seed)
        assert len({shot.group for shot in shots}) == 4
        assert shots == choose_shots(found, 4, seed)
    assert len({choose_shots(found, 4, seed) for seed in range(20)}) > 1
    assert choose_shots(found, 0) == ()
    with pytest.raises(DataError, match="6 shots need training examples of 6 groups, there are 5"):
        choose_shots(found, 6)
    with pytest.raises(SettingError, match="at least 0, got -1"):
        choose_shots(found, -1)


def test_answers_are_made_from_the_form_that_is_given():
    setup = tiny.Setup()
    tokenizer = setup.student_tokenizer
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    asked = tiny.examples(3)
    form = PromptForm(template="chat", shots=(asked[1],))
    found = answer(setup.student, tokenizer, asked, max_new_tokens=4, form=form)
    plain = answer(setup.student, tokenizer, asked, max_new_tokens=4)
    alone = generate(setup.student, tokenizer, form.ids(tokenizer, asked), max_new_tokens=4)
    expected = [one.text for one in alone]
    assert [one.prediction for one in found] == expected
    assert expected != [one.prediction for one in plain]
    assert [one.prompt for one in found] == [one.prompt for one in asked]
