import pytest

from ctkd.distill.data.rows import Rows, load_rows
from ctkd.distill.data.tasks import TASKS, examples, get_task
from ctkd.errors import DataError, SettingError

QA = {"context": "Oslo is in Norway.", "question": "Where is Oslo?", "answers": ["Norway"]}


def one(task: str, row: dict, columns=None, **options):
    (example,) = examples(Rows("file.jsonl", [row]), task, columns, **options)
    return example


def refused(task: str, rows: list[dict], columns=None, **options) -> str:
    with pytest.raises(DataError) as caught:
        examples(Rows("file.jsonl", rows), task, columns, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "row", "prompt", "answer"),
    [
        ("qa", QA, "Context: Oslo is in Norway.\nQuestion: Where is Oslo?\nAnswer:", " Norway"),
        (
            "summarization",
            {"dialogue": "A: Hi!\nB: Hi!", "summaries": "They greet."},
            "Dialogue: A: Hi!\nB: Hi!\nSummary:",
            " They greet.",
        ),
        (
            "summarization",
            {"document": "A {story}.", "summaries": ["Short.", "Brief."]},
            "Document: A {story}.\nSummary:",
            " Short.",
        ),
        ("text", {"prompt": " 1 + 1 = ", "answer": "2 \n"}, " 1 + 1 = ", "2 \n"),
    ],
)
def test_prompts_are_the_papers(task, row, prompt, answer):
    example = one(task, row)
    assert (example.prompt, example.answer) == (prompt, answer)


def test_the_title_is_used_only_when_asked_for():
    row = QA | {"name": "Oslo"}
    assert one("qa", row, {"title": "name"}).prompt.startswith("Context: ")
    titled = one("qa", row, {"title": "name"}, use_title=True)
    assert titled.prompt == "Title: Oslo\n" + one("qa", row).prompt
    assert "no column 'title', which task qa needs" in refused("qa", [QA], use_title=True)


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ("Norway", ("Norway",)),
        (["Norway", "in Norway", "Norway "], ("Norway", "in Norway")),
        (("", " ", "in Norway"), ("in Norway",)),
        ([None, "Norway"], ("Norway",)),
        ({"text": ["Norway", "Norway"], "answer_start": [11, 11]}, ("Norway",)),
        ([{"string": "Norway"}, {"text": "in Norway"}], ("Norway", "in Norway")),
    ],
)
def test_answers_come_in_many_shapes(answers, references):
    example = one("qa", QA | {"answers": answers})
    assert example.references == references
    assert example.answer == " " + references[0]


def test_answers_of_task_text_are_taken_as_they_are():
    example = one("text", {"prompt": "p", "answer": [" a", " a", "a "]})
    assert (example.answer, example.references) == (" a", (" a", "a "))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "file.jsonl row 2 has no answer in column 'answers'"),
        ("", "file.jsonl row 2 has no answer"),
        ([" ", None], "file.jsonl row 2 has no answer"),
        (None, "file.jsonl row 2 has no answer"),
        ({"text": []}, "file.jsonl row 2 has no answer"),
        ({"answer": "Norway"}, "file.jsonl row 2 has no answer"),
        (1945, "row 2: column 'answers' holds int 1945 as an answer; expected text"),
        (["1945", 1945], "row 2: column 'answers' holds int 1945 as an answer"),
        ([["nested"]], "row 2: column 'answers' holds list ['nested'] as an answer"),
        ("\ud800", "row 2: column 'answers' holds text that is not valid Unicode"),
    ],
)
def test_a_row_without_a_usable_answer_is_named(answers, message):
    assert message in refused("qa", [QA, QA | {"answers": answers}])
    without = {key: value for key, value in QA.items() if key != "answers"}
    assert "row 2 has no answer" in refused("qa", [QA, without])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "file.jsonl row 2: column 'context' holds nothing; expected text"),
        (3.5, "row 2: column 'context' holds float 3.5; expected text"),
        (["x" * 99], "row 2: column 'context' holds list ['xxxx"),
        ("\udfff", "row 2: column 'context' holds text that is not valid Unicode"),
    ],
)
def test_a_row_with_something_else_than_text_is_named(value, message):
    assert message in refused("qa", [QA, QA | {"context": value}])


def test_columns_can_have_other_names():
    row = {"passage": "c", "Q": "q", "gold": "a"}
    example = one("qa", row, {"context": "passage", "question": "Q", "answers": "gold"})
    assert example.prompt == "Context: c\nQuestion: q\nAnswer:"
    assert example.references == ("a",)
    both = {"dialogue": "talk", "document": "text", "summaries": "s"}
    assert one("summarization", both).prompt.startswith("Dialogue: talk")
    assert one("summarization", both, {"document": "document"}).prompt.startswith("Document: text")


def test_a_wrong_mapping_is_refused_with_a_suggestion():
    message = refused("qa", [QA], {"contxt": "context"})
    assert "task qa has no field 'contxt', did you mean 'context'?" in message
    assert "its fields: context, question, answers, id, group, title" in message
    message = refused("qa", [QA], {"context": "contexts"})
    assert "no column 'contexts' for 'context', did you mean 'context'?" in message
    assert "its columns: context, question, answers" in message


def test_a_missing_column_is_refused_with_a_way_out():
    row = {"context": "c", "question": "q", "answer": "a"}
    message = refused("qa", [row])
    assert "has no column 'answers', which task qa needs" in message
    assert message.endswith("columns: context, question, answer; map one: --column answers=answer")
    assert "no column 'context' and 'question'" in refused("qa", [{"answers": "a"}])
    assert "no column 'question', which" in refused("qa", [{"text": "c"}], {"context": "text"})
    message = refused("summarization", [{"article": "x", "summary": "y"}])
    assert "no column 'dialogue' or 'document', which" in message
    many = {f"c{i}": "x" for i in range(99)}
    assert "c11, ...;" in refused("qa", [many])


def test_ids_are_those_of_the_data_where_they_tell_rows_apart():
    def ids(rows, columns=None):
        return [example.id for example in examples(Rows("f", rows), "qa", columns)]

    assert ids([QA, QA]) == ["1", "2"]
    assert ids([QA | {"id": "a"}, QA | {"id": 7}]) == ["a", "7"]
    assert ids([QA | {"id": "a"}, QA | {"id": "a"}]) == ["1", "2"]
    assert ids([QA | {"id": "a"}, QA]) == ["1", "2"]
    assert ids([QA | {"key": "a"}, QA | {"key": "b"}], {"id": "key"}) == ["a", "b"]
    assert "row 2 has the id 'a', as file.jsonl row 1 has" in refused(
        "qa", [QA | {"key": "a"}, QA | {"key": "a"}], {"id": "key"}
    )


def test_groups_are_passages_or_what_the_mapping_says():
    rows = [QA | {"story": 1}, QA | {"question": "?", "story": 2}, QA | {"context": "x"}]
    a, b, c = examples(Rows("f", rows), "qa")
    assert a.group == b.group != c.group
    a, b = examples(Rows("f", rows[:2]), "qa", {"group": "story"})
    assert (a.group, b.group) == ("1", "2")
    assert "row 3: column 'story' holds nothing" in refused("qa", rows, {"group": "story"})


def test_an_unknown_task_is_refused_with_a_suggestion():
    with pytest.raises(SettingError, match="'summarisation', did you mean 'summarization'"):
        get_task("summarisation")
    with pytest.raises(SettingError, match="tasks: qa, summarization, text, chat, lm"):
        examples(Rows("f", [QA]), "translation")
    assert set(TASKS) == {"qa", "summarization", "text", "chat", "lm"}


def test_the_embedded_set_is_a_qa_task():
    found = examples(load_rows("pocketqa"), "qa")
    assert found[0].where == "pocketqa:train row 1"
    assert len({example.id for example in found}) == len(found)
    passages = {row["passage"] for row in load_rows("pocketqa")}
    assert len({example.group for example in found}) == len(passages)


def test_documents_are_cut_into_windows_that_add_up_to_them():
    documents = [
        "A line of text.\n" * 60,
        "no-break" * 120,
        "Größe ändert sich\u2009täglich, 時間とともに。" * 25,
        "short",
    ]
    rows = Rows("texts.jsonl", [{"text": text, "id": f"d{n}"} for n, text in enumerate(documents)])
    windows = examples(rows, "lm")
    size = get_task("lm").window
    by_document = {}
    for window in windows:
        by_document.setdefault(window.group, []).append(window)
    assert len(by_document) == len(documents)
    for number, (text, found) in enumerate(zip(documents, by_document.values(), strict=True)):
        assert "".join(window.answer for window in found) == text
        assert [window.id for window in found] == [f"d{number}.{k + 1}" for k in range(len(found))]
        # Only the last one shows where a text stops.
        assert [window.ends for window in found] == [False] * (len(found) - 1) + [True]
        sizes = [len(window.answer.encode()) for window in found]
        assert max(sizes) <= size and all(one > size // 2 - 4 for one in sizes[:-1])
        assert {window.prompt for window in found} == {""}
    assert by_document[windows[0].group][0].answer.endswith(".\n")
    assert windows[0].where == "texts.jsonl row 1, part 1"
    assert "no column 'text'" in refused("lm", [{"content": "x"}])
    renamed = Rows("texts.csv", [{"body": text} for text in ("a b", "c")])
    named = examples(renamed, "lm", {"text": "body"})
    assert [one.answer for one in named] == ["a b", "c"]
    assert "holds list ['a', 'b']; expected text" in refused("lm", [{"text": ["a", "b"]}])


def test_chapters_of_pythons_reference_are_documents_of_two_splits():
    train, test = load_rows("pydocs"), load_rows("pydocs", held_out=True)
    assert (train.name, test.name) == ("pydocs:train", "pydocs:test")
    lines = {line for row in train for line in row["text"].splitlines() if len(line) > 30}
    held = [line for row in test for line in row["text"].splitlines() if len(line) > 30]
    assert sum(line in lines for line in held) <= 0.02 * len(held)
    assert 200 < len(examples(train, "lm")) < 320 and 35 < len(examples(test, "lm")) < 65
