"""Conversations: layouts, what each side's template makes of them, and which of it is scored."""

import json
import random

import pytest

from ctkd.distill.config import TrainConfig
from ctkd.distill.data.chat_templates import ChatTemplate
from ctkd.distill.data.collator import Collator
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.prompts import PLAIN, PromptForm
from ctkd.distill.data.rows import Rows
from ctkd.distill.data.tasks import Example, examples
from ctkd.errors import BatchError, DataError, ModelError, SettingError
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes
from tests.distill.tiny import CHATML, GEMMA
from tests.tokenization import real_tokenizers
from tests.tokenization import trained_tokenizers as trained

CHAT = PromptForm(template="chat")
# Mistral's: a space before an answer, no mark of where one begins.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
    "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Qwen's: the prompt of an answer opens a thought, of which nothing is left once it is answered.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NAMES = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")


def chatting(tokenizer, template: str, end: str):
    """The tokenizer with a template of its own, which ends turns with a token."""
    tokenizer = trained.wrapped(
        tokenizer.backend_tokenizer, bos_token="<bos>", eos_token=end, pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(NAMES)})
    tokenizer.chat_template = template
    return tokenizer


def chatml(kind=trained.byte_level):
    return chatting(kind(), CHATML, "<|im_end|>")


def gemma(kind=trained.gemma_like):
    return chatting(kind(), GEMMA, "<eos>")


def message(role: str, content: object, **others: object) -> dict[str, object]:
    return {"role": role, "content": content, **others}


def exchange(*texts: str) -> list[dict[str, object]]:
    """What a user and an assistant say in turns."""
    return [message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]


def chats(*conversations: object) -> list[Example]:
    rows = Rows("file.jsonl", [{"messages": one} for one in conversations])
    return examples(rows, "chat")


def encoded(found, student, teacher=None, **options):
    settings = {"max_length": 10**6, "student_form": CHAT, "teacher_form": CHAT, **options}
    return encode_examples(found, student, teacher, **settings)


def written(tokenizer, table, ids) -> str:
    """With special tokens, as they are written."""
    return b"".join(
        table.bytes_of[index] or tokenizer.convert_ids_to_tokens(index).encode() for index in ids
    ).decode()


def check_spans(found, sides, tables) -> None:
    """What is scored are the answers, byte for byte on all sides, and nothing else."""
    rows = encoded(found, *sides, min_coverage=1.0, pair=TokenizerPair(*tables))
    assert len(rows) == len(found) and not rows.refused
    for example, row in zip(found, rows.rows, strict=True):
        ends = []
        for tokenizer, table, side in zip(sides, tables, (row.student, row.teacher), strict=True):
            spelled = [table.decode(ids).decode() for ids in side.answers]
            assert spelled == list(example.answers)
            assert len(side.kinds) == len(side.chunk_ids) == len(side.answer_ids)
            # A model reads what the template writes, up to the last answer.
            read = written(tokenizer, table, [*side.prompt_ids, *side.answer_ids])
            assert read == ChatTemplate(tokenizer).prompt(example.messages[:-1]) + example.answer
            # All chunks of an answer end before the next one begins, at the same bytes.
            chunks: dict[int, bytes] = {}
            numbers = []
            for index, kind, chunk in zip(side.answer_ids, side.kinds, side.chunk_ids, strict=True):
                assert (chunk >= 0) == (kind == "a")
                assert kind != "e" or index == side.eos_id
                if kind == "a":
                    chunks[chunk] = chunks.get(chunk, b"") + table.bytes_of[index]
                    numbers.append(chunk)
            assert numbers == sorted(numbers) and set(numbers) == set(range(len(chunks)))
            ends.append(list(chunks.values()))
        assert ends[0] == ends[1]


def random_conversations(count: int) -> list[list[dict[str, object]]]:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        texts = [
            "".join(draw.choices(trained.HARD_STRINGS, k=draw.randint(1, 2)))
            for _ in range(2 * draw.randint(1, 4))
        ]
        system = [message("system", "Be brief.")] if draw.random() < 0.5 else []
        made.append([*system, *exchange(*texts)])
    return made


def test_what_is_scored_is_the_same_text_on_both_sides():
    inst = chatting(trained.metaspace(), INST, "<eos>")
    thinking = chatting(trained.byte_level(), THINKING, "<|im_end|>")
    found = chats(*random_conversations(12))
    for sides in ((chatml(), gemma()), (gemma(), inst), (inst, thinking)):
        check_spans(found, sides, list(map(TokenBytes.from_tokenizer, sides)))


@pytest.mark.models
def test_so_it_is_with_the_tokenizers_of_published_models(monkeypatch):
    names = ("smollm2-135m-instruct", "gemma-3-270m")
    student, teacher = map(real_tokenizers.packaged, names)
    # Of the models that were made for chatting with this tokenizer.
    monkeypatch.setattr(teacher, "chat_template", GEMMA)
    found = chats(*random_conversations(20))
    check_spans(found, (student, teacher), list(map(real_tokenizers.table, names)))


def test_an_end_of_every_turn_is_learned():
    (row,) = encoded(chats(exchange("a", "the", "b", "Nile")), chatml(), gemma()).rows
    for score_eos in (False, True):
        batch = Collator(student_pad_id=0, teacher_pad_id=0, score_eos=score_eos)([row])
        for prefix, side in (("", row.student), ("teacher_", row.teacher)):
            ids = [*side.answer_ids, side.eos_id]
            kinds = side.kinds + "e"
            assert kinds.count("e") == 2
            scored = [one in ("ae" if score_eos else "a") for one in kinds]
            wanted = [-100, *(i if s else -100 for i, s in zip(ids, scored, strict=True))]
            labels = batch[f"{prefix}distill_labels"][0].tolist()
            assert labels + [-100] * (len(wanted) - len(labels)) == wanted
            if not prefix:
                every = [i if one in "ae" else -100 for i, one in zip(ids, kinds, strict=True)]
                assert batch["labels"][0].tolist() == [-100, *every]
            # The ends are chunks of their own, as many on both sides.
            chunks = batch[f"{prefix}distill_chunk_ids"][0].tolist()
            ends = [chunks[1 + n] for n, kind in enumerate(kinds[: len(chunks) - 1]) if kind == "e"]
            most = max(side.chunk_ids)
            assert [one for one in ends if one >= 0] == ([most + 1, most + 2] if score_eos else [])
    endless = chatml()
    endless.chat_template = CHATML.replace("<|im_end|>", "")
    with pytest.raises(SettingError, match="the teacher's chat template writes none behind an ea"):
        encoded(chats(exchange("a", "b", "c", "d")), chatml(), endless, score_eos=True)
    found = encoded(chats(exchange("a", "b", "c", "d")), chatml(), endless).rows
    with pytest.raises(BatchError, match="example 1 has more of them on one; leave it off"):
        Collator(student_pad_id=0, teacher_pad_id=0, score_eos=True)(found)


def test_a_long_conversation_loses_its_last_turns_on_both_sides():
    texts = [f"{n} In Paris the café opens" for n in range(8)]
    found, sides = chats(exchange(*texts)), (chatml(), gemma())
    tables = [TokenBytes.from_tokenizer(one) for one in sides]
    (whole,) = encoded(found, *sides).rows
    longest = len(whole.student.prompt_ids) + len(whole.student.answer_ids)
    kept = set()
    for length in range(longest, 60, -7):
        (row,) = encoded(found, *sides, max_length=length, on_long="cut").rows
        assert row.cut and row.student.eos_id is row.teacher.eos_id is None
        answers = []
        for side, table in zip((row.student, row.teacher), tables, strict=True):
            assert len(side.prompt_ids) + len(side.answer_ids) <= length
            assert len(side.kinds) == len(side.answer_ids) and side.kinds[-1] in "ae"
            answers.append([table.decode(ids).decode() for ids in side.answers])
        assert answers[0] == answers[1]
        *full, last = answers[0]
        assert full == texts[1::2][: len(full)] and texts[2 * len(full) + 1].startswith(last)
        kept.add(len(full))
        (alone,) = encoded(found, sides[0], max_length=length, on_long="cut").rows
        assert alone.student.kinds[-1] in "ae"
    assert kept >= {1, 2, 3}
    # An answer that fits whole has its end, if that fits on both sides.
    both = (whole.student, whole.teacher)
    second = [[place for place, kind in enumerate(side.kinds) if kind == "e"][1] for side in both]
    room = max(len(side.prompt_ids) + end + 1 for side, end in zip(both, second, strict=True))
    for length, last in ((room, "e"), (room - 1, "a")):
        (row,) = encoded(found, *sides, max_length=length, on_long="cut").rows
        assert row.student.kinds[-1] == row.teacher.kinds[-1] == last
        assert tables[0].decode(row.student.answers[1]).decode() == texts[3]
    with pytest.raises(DataError, match="no part of an answer fits behind its prompt: shorten"):
        encoded(found, *sides, max_length=12, on_long="cut")


def test_what_a_template_lacks_is_written_otherwise_or_the_row_is_left_out_and_counted():
    said = [message("system", "Be brief."), *exchange("rain?", "", "b", "c")]
    said[2]["tool_calls"] = [{"function": {"name": "look", "arguments": '{"at": "é"}'}}]
    said[3]["role"] = "tool"
    (found,) = chats(said)
    assert chats([one.as_dict() for one in found.messages])[0].messages == found.messages
    call = '{"name": "look", "arguments": {"at": "é"}}'
    assert found.answers == (call, "c")
    assert ChatTemplate(chatml()).prompt(found.messages[:-1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nrain?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ChatTemplate(gemma()).prompt(found.messages[:-1]) == (
        "<bos><start_of_turn>user\nBe brief.\n\nrain?<end_of_turn>\n"
        f"<start_of_turn>model\n{call}<end_of_turn>\n<start_of_turn>user\nb<end_of_turn>\n"
        "<start_of_turn>model\n"
    )

    good = exchange("a", "b", "c", "d")
    thoughts = exchange("a", "<think>hm</think>b", "c", "d")
    student, thinking = chatml(), chatting(trained.byte_level(), THINKING, "<|im_end|>")
    merging = gemma()
    merging.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    twice = [*exchange("a", "b"), message("assistant", "c")]
    two = [message("user", "a"), *exchange("b", "c")]
    for other, bad, reason in (
        (thinking, thoughts, "the teacher's chat template changes, drops or merges what the"),
        (merging, twice, "the teacher's chat template changes, drops or merges what the"),
        (gemma(), two, r"the teacher's chat template cannot write .*\(roles must alternate\)"),
        (gemma(), exchange("a", "b<|im_end|>", "c", "d"), "student's tokenizer .* cannot spell"),
    ):
        found = encoded(chats(bad, good), student, other)
        assert [row.id for row in found.rows] == ["2"]
        assert found.report().startswith("left out 1 of 2 conversations: file.jsonl row 1: the ")
        with pytest.raises(DataError, match=f"all 1 conversations are refused: .* 1: .*{reason}"):
            encoded(chats(bad), student, other)
    # An answer may have thoughts where nothing follows it.
    assert not encoded(chats(exchange("a", "<think>hm</think>b")), thinking).refused
    # What a model would answer has the same prompts.
    written, refused = CHAT.writable(gemma(), chats(two, good), side="teacher")
    assert [one.id for one in written] == ["2"] and "row 1: the teacher's" in refused[0]
    with pytest.raises(SettingError, match="conversations are written in chat templates"):
        encoded(chats(good), student, gemma(), teacher_form=PLAIN)
    with pytest.raises(ModelError, match="the teacher's .* or set the tokenizer's chat_template"):
        encoded(chats(good), student, trained.byte_level())
    for settings in ({"student_template": "plain"}, {"teacher_shots": 2}):
        with pytest.raises(SettingError, match="task chat"):
            TrainConfig(loss="sft", student="x", data="x", task="chat", **settings)
    assert TrainConfig(loss="sft", student="x", task="chat").teacher_template == "chat"


def test_layouts_of_conversations(tmp_path):
    def read(rows, task="chat", columns=None, name="a.jsonl"):
        path, said = tmp_path / name, []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = examples(read_rows(str(path), task, columns, say=said.append), task, columns)
        return found, said

    shared = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": " b\n"},
        {"from": "observation", "value": "t"},
        {"from": "chatgpt", "value": ""},
        {"from": "bard", "value": "c"},
        {"from": "user", "value": "behind the last answer"},
    ]
    (one,), said = read([{"conversations": shared}])
    assert said == ["a.jsonl: messages are its column 'conversations'"]
    roles = ("system", "user", "assistant", "tool", "assistant", "assistant")
    assert tuple(found.role for found in one.messages) == roles
    assert one.answers == ("b", "c") and one.references == ("c",) == (one.answer,)
    assert one.prompt == "system: s\nuser: a\nassistant: b\ntool: t\nassistant: \n"
    # Only the completion is scored, or what has a weight.
    pair = {"prompt": exchange("a", "b", "c"), "completion": [message("assistant", "d")]}
    (one,), _ = read([pair])
    assert one.answers == ("d",) and len(one.messages) == 4
    weighed = exchange("a", "b", "c", "d")
    weighed[1]["weight"] = 0
    (one,), _ = read([{"talk": weighed, "id": "x"}], columns={"messages": "talk"})
    assert one.answers == ("d",) and one.id == "x"
    parts = [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]
    image = [message("user", [{"type": "image", "url": "x"}])]
    answer = message("assistant", "c")
    found, said = read([{"messages": rows} for rows in (image, parts + [answer], parts)
                        for rows in ([*rows, answer] if rows is image else rows,)])  # fmt: skip
    assert [one.prompt for one in found] == ["user: ab\n"] and found[0].where.endswith("row 2")
    assert said == [
        "a.jsonl: left out 2 of 3 conversations: a.jsonl row 1, message 1 holds a part that is no "
        "text (image); a.jsonl row 3 has no answer of an assistant to train on"
    ]
    # Rows that begin alike are not parted.
    both, _ = read([{"messages": exchange("a", "b")}, {"messages": exchange("a", "c", "d", "e")}])
    assert both[0].group == both[1].group
    (tmp_path / "a.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""a""}, '
                                    '{""role"": ""model"", ""content"": ""b""}]"\n')  # fmt: skip
    rows = read_rows(str(tmp_path / "a.csv"), "chat", say=print)
    assert examples(rows, "chat")[0].answers == ("b",)

    for rows, task, match in (
        ([{"messages": exchange("a", "b")}], "qa", "column 'messages', are read with --task chat"),
        ([pair], "text", "column 'prompt' holds list .*; conversations are read with --task chat"),
        ([{"messages": [message("asistant", "a")]}], "chat",
         "row 1, message 1 has the role 'asistant', did you mean 'assistant'.*; known roles: sys"),
        ([{"messages": [message("user", "a")]}], "chat", "no conversation of a.jsonl can be train"),
        ([{"messages": "user: a"}], "chat", "row 1: expected a list of messages, got text"),
        ([{"messages": ["a"]}], "chat", "row 1, message 1 is text; expected an object with role"),
        ([{"prompt": "a", "completion": "b"}], "chat", "'prompt' is text; expected a list of mess"),
        ([{"text": "a"}], "chat", "has no column 'messages', which task chat needs"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=match):
            read(rows, task)
