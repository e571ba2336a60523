"""The embedded questions keep the form that their README promises."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import pytest

Row = dict[str, Any]

COLUMNS = ["id", "passage", "title", "context", "question", "answers"]
TEXTS = ["id", "passage", "title", "context", "question"]
QUESTION_WORDS = ["who", "what", "when", "where", "how", "why", "which"]
MIN_WORDS, MAX_WORDS = 40, 90
MAX_ANSWER_WORDS = 8
# Two passages that share this part of the shorter one's four-word runs are near-copies.
NEAR_COPY = 0.2


def parse(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def load(split: str) -> list[Row]:
    folder = files("ctkd.distill.data") / "pocketqa"
    return parse((folder / f"{split}.jsonl").read_text(encoding="utf-8"))


def contains(text: str, part: str) -> bool:
    """Whether part occurs in text verbatim and not inside longer words."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def normalized(answer: str) -> str:
    """The answer as exact match sees it: lower case, no punctuation, no articles."""
    return " ".join(w for w in re.findall(r"\w+", answer.lower()) if w not in {"a", "an", "the"})


def row_problems(row: Row) -> list[str]:
    """What is wrong inside one row."""
    name = row.get("id", "?")
    if list(row) != COLUMNS:
        return [f"{name}: columns {list(row)}"]
    if not all(isinstance(row[column], str) for column in TEXTS):
        return [f"{name}: not a string"]
    answers = row["answers"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return [f"{name}: answers are not a list of strings"]

    found = []
    texts = [row[column] for column in TEXTS] + answers
    if any(text != text.strip() or "  " in text for text in texts):
        found.append(f"{name}: stray whitespace")
    if any(not text or not text.isprintable() for text in texts):
        found.append(f"{name}: empty or unprintable text")
    if not re.fullmatch(re.escape(row["passage"]) + r"-q[1-9]", row["id"]):
        found.append(f"{name}: id does not belong to passage {row['passage']}")
    if not MIN_WORDS <= len(row["context"].split()) <= MAX_WORDS:
        found.append(f"{name}: context of {len(row['context'].split())} words")
    if not row["question"].endswith("?"):
        found.append(f"{name}: question without a question mark")
    if not answers:
        found.append(f"{name}: no answer")
    if len(set(answers)) != len(answers):
        found.append(f"{name}: an answer is given twice")
    for answer in answers:
        if not contains(row["context"], answer):
            found.append(f"{name}: answer {answer!r} is not in the context")
        if not normalized(answer):
            found.append(f"{name}: answer {answer!r} is empty for exact match")
        if len(answer.split()) > MAX_ANSWER_WORDS:
            found.append(f"{name}: answer {answer!r} is long")
        if contains(row["question"].lower(), answer.lower()):
            found.append(f"{name}: question gives away {answer!r}")
    return found


def problems(rows: list[Row]) -> list[str]:
    """What is wrong with the rows of one split; empty when all is well."""
    found = [problem for row in rows for problem in row_problems(row)]
    if found:
        return found

    found = [f"id {name} twice" for name, n in Counter(row["id"] for row in rows).items() if n > 1]
    passages: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        passages[row["passage"]].append(row)
    for name, members in passages.items():
        if len(members) != 4:
            found.append(f"{name}: {len(members)} questions")
        if len({(row["title"], row["context"]) for row in members}) != 1:
            found.append(f"{name}: several titles or contexts")
        if len({normalized(row["question"]) for row in members}) != len(members):
            found.append(f"{name}: a question is asked twice")
    for column in ("title", "context"):
        if len({members[0][column] for members in passages.values()}) != len(passages):
            found.append(f"two passages share a {column}")
    return found


@lru_cache
def runs(context: str) -> frozenset[tuple[str, ...]]:
    """The four-word runs of a text, without case and punctuation."""
    words = re.findall(r"\w+", context.lower())
    return frozenset(tuple(words[i : i + 4]) for i in range(len(words) - 3))


def overlap(context: str, other: str) -> float:
    """Shared four-word runs, as a part of the shorter text's."""
    own, others = runs(context), runs(other)
    return len(own & others) / max(1, min(len(own), len(others)))


def contexts(rows: Iterable[Row]) -> dict[str, str]:
    return {row["passage"]: row["context"] for row in rows}


def leaks(train: list[Row], test: list[Row]) -> list[str]:
    """What the two splits share; empty when they are apart."""
    found = []
    for column in ("id", "passage", "title", "context", "question"):
        shared = {row[column] for row in train} & {row[column] for row in test}
        found += [f"{column} {value!r} in both splits" for value in sorted(shared)]
    for name, context in contexts(test).items():
        for other, train_context in contexts(train).items():
            if overlap(context, train_context) >= NEAR_COPY:
                found.append(f"{name} is a near-copy of {other}")
    return found


def one_sided(rows: list[Row], least: int) -> list[str]:
    """Question words among the first three words that are too rare or too frequent."""
    starts = [re.findall(r"\w+", row["question"].lower())[:3] for row in rows]
    counts = {word: sum(word in start for start in starts) for word in QUESTION_WORDS}
    return [f"{w}: {n}" for w, n in counts.items() if not least <= n <= len(rows) / 2]


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return load("train")


@pytest.fixture(scope="module")
def test() -> list[Row]:
    return load("test")


@pytest.mark.parametrize(("split", "passages"), [("train", 52), ("test", 16)])
def test_counts(split: str, passages: int) -> None:
    rows = load(split)
    assert len(contexts(rows)) == passages
    assert len(rows) == 4 * passages


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_well_formed(split: str) -> None:
    assert problems(load(split)) == []


def test_splits_are_apart(train: list[Row], test: list[Row]) -> None:
    assert leaks(train, test) == []


@pytest.mark.parametrize(("split", "least"), [("train", 5), ("test", 2)])
def test_questions_are_mixed(split: str, least: int) -> None:
    assert one_sided(load(split), least) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_mostly_short(split: str) -> None:
    lengths = [len(row["answers"][0].split()) for row in load(split)]
    assert sum(length <= 6 for length in lengths) >= 0.95 * len(lengths)


def test_text_reaches_beyond_ascii(train: list[Row], test: list[Row]) -> None:
    assert sum(not context.isascii() for context in contexts(train).values()) >= 26
    assert sum(not context.isascii() for context in contexts(test).values()) >= 8
    everything = "".join(contexts(train + test).values())
    for sample in ("é", "ü", "°", "−", "–", "“", "林", "Ю", "🐸", "☔"):
        assert sample in everything


def test_lines_are_plain_utf8() -> None:
    for split in ("train", "test"):
        text = (files("ctkd.distill.data") / "pocketqa" / f"{split}.jsonl").read_text(
            encoding="utf-8"
        )
        assert text.endswith("}\n")
        assert "\\u" not in text
        rows = parse(text)
        assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_readme_states_the_counts(train: list[Row], test: list[Row]) -> None:
    readme = (files("ctkd.distill.data") / "pocketqa" / "README.md").read_text(encoding="utf-8")
    for split, rows in (("train", train), ("test", test)):
        assert f"| `{split}.jsonl` | {len(contexts(rows))} | {len(rows)} |" in readme
    lengths = [len(context.split()) for context in contexts(train + test).values()]
    assert f"{len(lengths)} English passages of {min(lengths)} to {max(lengths)} words" in (
        " ".join(readme.split())
    )
    for column in COLUMNS:
        assert f"| `{column}` |" in readme
    assert "CC0 1.0" in readme


# From here on: the checks above can fail.

CONTEXT = (
    "The baker of Ulm sells ten rolls a day. His cat, Mirza, sleeps in the window until noon, and "
    "often the children knock at the glass to see her yawn. In winter she moves to the flour store "
    "behind the oven, where it is warm and where the mice are slow."
)


def sound() -> list[Row]:
    asked = {
        "Who sleeps in the window?": ["Mirza", "His cat, Mirza"],
        "How many rolls are sold a day?": ["ten"],
        "Where does the cat move in winter?": ["the flour store"],
        "Why do the children knock?": ["to see her yawn"],
    }
    return [
        {
            "id": f"p900-q{number}",
            "passage": "p900",
            "title": "The Cat",
            "context": CONTEXT,
            "question": question,
            "answers": answers,
        }
        for number, (question, answers) in enumerate(asked.items(), 1)
    ]


def changed(column: str, value: Any) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        rows[1][column] = value

    return change


BREAKS: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "missing column": (lambda rows: rows[0].pop("title"), "columns"),
    "number for text": (changed("title", 7), "not a string"),
    "bare answer": (changed("answers", "ten"), "not a list of strings"),
    "no answer": (changed("answers", []), "no answer"),
    "absent answer": (changed("answers", ["ten", "eleven"]), "'eleven' is not in the context"),
    "part of a word": (changed("answers", ["mic"]), "'mic' is not in the context"),
    "other case": (changed("answers", ["Ten"]), "'Ten' is not in the context"),
    "article only": (changed("answers", ["the"]), "empty for exact match"),
    "doubled answer": (changed("answers", ["ten", "ten"]), "given twice"),
    "long answer": (changed("answers", [CONTEXT[:60].rsplit(" ", 1)[0]]), "is long"),
    "given away": (changed("question", "How many rolls, ten?"), "gives away"),
    "no question mark": (changed("question", "How many rolls"), "question mark"),
    "leading blank": (changed("question", " How many rolls?"), "stray whitespace"),
    "trailing blank": (changed("context", CONTEXT + " "), "stray whitespace"),
    "doubled blank": (changed("title", "The  Cat"), "stray whitespace"),
    "line break": (changed("title", "The\nCat"), "unprintable"),
    "empty title": (changed("title", ""), "empty or unprintable"),
    "id of another passage": (changed("id", "p901-q2"), "does not belong"),
    "same id": (changed("id", "p900-q1"), "id p900-q1 twice"),
    "same question": (changed("question", "Who sleeps in the window ?"), "asked twice"),
    "other context": (changed("context", CONTEXT + " Always."), "several titles or contexts"),
    "short context": (changed("context", "He sells ten rolls."), "context of 4 words"),
    "long context": (changed("context", CONTEXT + " " + CONTEXT), "context of 102 words"),
    "three questions": (lambda rows: rows.pop(), "3 questions"),
    "same context under two names": (
        lambda rows: rows.extend(
            {**row, "id": row["id"].replace("p900", "p901"), "passage": "p901"} for row in sound()
        ),
        "two passages share a context",
    ),
}


def test_sound_rows_pass() -> None:
    assert problems(sound()) == []


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_row_is_found(name: str) -> None:
    rows = sound()
    change, expected = BREAKS[name]
    change(rows)
    assert any(expected in problem for problem in problems(rows)), problems(rows)


@pytest.mark.parametrize("column", ["id", "passage", "title", "context", "question"])
def test_a_shared_value_is_found(column: str, train: list[Row], test: list[Row]) -> None:
    mixed = [dict(row) for row in test]
    mixed[5][column] = train[100][column]
    assert any(problem.startswith(column) for problem in leaks(train, mixed))


def test_a_near_copy_is_found(train: list[Row], test: list[Row]) -> None:
    words = train[0]["context"].split()
    words[5::10] = ["quite"] * len(words[5::10])
    copy = {**test[0], "context": " ".join(words)}
    assert leaks(train, [copy]) == [f"{test[0]['passage']} is a near-copy of p001"]


def test_one_sided_questions_are_found(train: list[Row]) -> None:
    without_why = [row for row in train if not row["question"].startswith("Why")]
    assert one_sided(without_why, 1) == ["why: 0"]
    what = [row for row in train if row["question"].startswith("What")]
    assert f"what: {len(what)}" in one_sided(what, 0)
