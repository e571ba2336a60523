import json
import math
import re
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctkd.distill.evaluation.metrics import (
    Prediction,
    exact_match,
    f1,
    match_predictions,
    normalize_answer,
    read_predictions,
    rouge_lsum,
    score,
    write_predictions,
)
from ctkd.errors import DataError, OutputError

METRICS = [exact_match, f1, rouge_lsum]

texts = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from("the a cats cat Runs running, 7 café ?".split()), max_size=8).map(
        " ".join
    ),
)


@dataclass(frozen=True)
class Example:
    id: str
    references: tuple[str, ...]


# --- normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Nile", "nile"),
        ("A  cat\tand\n an owl", "cat and owl"),
        ("the", ""),
        ("...", ""),
        ("", ""),
        ("theatre analysis", "theatre analysis"),
        ("U.S.", "us"),
        # Punctuation is removed before the articles, so this "a" is glued to its neighbour.
        ("grade-a milk", "gradea milk"),
        ("a.m.", "am"),
        ("l’été", "l’été"),
        ("Größe", "größe"),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


# --- values worked by hand -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The Nile.", ["nile"], 1.0),
        ("the nile river", ["nile"], 0.0),
        ("nile", ["amazon", "The Nile!"], 1.0),
        ("the", [""], 1.0),
        ("", ["nile"], 0.0),
        ("Москва", ["москва"], 1.0),
    ],
)
def test_exact_match_by_hand(prediction, references, expected):
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # 2 shared; 4 predicted, 3 wanted: P = 1/2, R = 2/3, 2PR/(P+R) = (2/3)/(7/6) = 4/7.
        ("big red dog barks", ["red dog sleeps"], 4 / 7),
        # Repeats count as often as both have them: min(3, 2) = 2; P = 2/3, R = 1.
        ("go go go", ["go go"], 4 / 5),
        # Order does not matter, articles do not count.
        ("dog the red", ["a red dog"], 1.0),
        # The best reference wins: 0, then 2/3.
        ("blue whale", ["shark", "whale"], 2 / 3),
        ("the", ["..."], 1.0),
        ("", ["whale"], 0.0),
        ("whale", ["the"], 0.0),
        ("shark", ["whale"], 0.0),
    ],
)
def test_f1_by_hand(prediction, references, expected):
    assert f1(prediction, references) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # Longest common subsequence "the cat": P = 2/3, R = 2/4.
        ("the cat purrs", ["the big cat sleeps"], 4 / 7),
        # Order matters: of "b a" and "a b" only one word is a subsequence.
        ("bb aa", ["aa bb"], 1 / 2),
        # Porter: "walked" and "walking" are one stem.
        ("she walked", ["she walking"], 1.0),
        ("whale", ["shark", "blue whale"], 2 / 3),
        ("", ["whale"], 0.0),
        # Two lines: the reference's only line matches "aa" in one and "cc" in the other: union 2
        # of 3 wanted, 3 predicted.
        ("aa\ncc dd", ["aa bb cc"], 2 / 3),
    ],
)
def test_rouge_by_hand(prediction, references, expected):
    assert rouge_lsum(prediction, references) == pytest.approx(expected, abs=1e-15)


def test_rouge_knows_only_ascii_words():
    assert rouge_lsum("Москва", ["Москва"]) == 0.0
    assert rouge_lsum("東京 7", ["大阪 7"]) == 1.0
    assert f1("Москва", ["Москва"]) == 1.0


# --- properties ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=60)
@given(prediction=texts, references=st.lists(texts, min_size=1, max_size=3), extra=texts)
def test_range_and_best_of(metric, prediction, references, extra):
    value = metric(prediction, references)
    assert 0.0 <= value <= 1.0
    assert value == max(metric(prediction, [reference]) for reference in references)
    assert metric(prediction, [extra, *references]) >= value


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=60)
@given(text=texts, other=texts)
def test_an_answer_equals_itself(metric, text, other):
    if metric is rouge_lsum:
        assume(any(c.isascii() and c.isalnum() for c in text.lower()))
    assert metric(text, [other, text]) == pytest.approx(1.0, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(prediction=texts, reference=texts)
def test_f1_is_symmetric_and_not_below_exact_match(prediction, reference):
    assert f1(prediction, [reference]) == f1(reference, [prediction])
    assert f1(prediction, [reference]) >= exact_match(prediction, [reference])


# --- averaging -------------------------------------------------------------------------------


def test_score_averages_in_percent():
    scores = score(["Paris", "red dog", "whale"], [["paris"], ["red cat", "x"], ["shark", "orca"]])
    assert scores.n == 3
    assert scores.exact_match_each == (100.0, 0.0, 0.0)
    assert scores.f1_each == (100.0, 50.0, 0.0)
    assert scores.rouge_lsum_each == (100.0, 50.0, 0.0)
    assert scores.exact_match == pytest.approx(100 / 3)
    assert scores.f1 == scores.rouge_lsum == pytest.approx(50.0)
    assert scores.summary() == {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "rouge_lsum": scores.rouge_lsum,
        "n": 3,
    }


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=2)), min_size=1))
def test_score_is_the_mean_of_its_examples(rows):
    scores = score([row[0] for row in rows], [row[1] for row in rows])
    assert scores.n == len(rows) == len(scores.f1_each)
    for name, metric in zip(("exact_match", "f1", "rouge_lsum"), METRICS, strict=True):
        each = getattr(scores, f"{name}_each")
        assert each == tuple(100 * metric(p, r) for p, r in rows)
        assert getattr(scores, name) == pytest.approx(math.fsum(each) / len(rows))


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "got 1 and 2"),
        ([], [], "at least one prediction"),
        (["a", "b"], [["a"], []], "example 2: expected at least one reference"),
        (["a"], ["abc"], "example 1: expected a list of references, got one string"),
    ],
)
def test_score_refuses(predictions, references, message):
    with pytest.raises(DataError, match=message):
        score(predictions, references)


def test_scores_are_frozen():
    scores = score(["a"], [["a"]])
    with pytest.raises(AttributeError):
        scores.f1 = 0.0


# --- files of predictions --------------------------------------------------------------------


def test_predictions_round_trip(tmp_path):
    rows = [
        Prediction(prediction="größe\u2028\n2", id="7", references=("x", "y"), prompt="Q: é"),
        Prediction(prediction=""),
        Prediction(prediction="\ud83d half", id="\\ud83d"),
    ]
    path = tmp_path / "new" / "predictions.jsonl"
    write_predictions(path, rows)
    assert read_predictions(path) == rows
    first = path.read_text(encoding="utf-8").split("\n")[0]
    assert json.loads(first) == {
        "id": "7",
        "prompt": "Q: é",
        "prediction": "größe\u2028\n2",
        "references": ["x", "y"],
    }
    assert "größe" in first


def test_reading_is_lenient_about_what_does_not_matter(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prediction": "a", "id": 3, "references": "b", "model": "m"}\r\n\n'
        b'{"prediction": "c", "prompt": 5}'
    )
    assert read_predictions(path) == [
        Prediction(prediction="a", id="3", references=("b",)),
        Prediction(prediction="c"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not JSON"),
        ('{"prediction": "\xff"}', "not JSON in UTF-8"),
        ("[1]", "expected a JSON object, got list"),
        ('{"answer": "a"}', '"prediction" to be a string, got NoneType; the line has answer'),
        ("{}", "the line has no fields"),
        ('{"prediction": 3}', "got int"),
        ('{"prediction": "a", "references": []}', "one or more strings"),
        ('{"prediction": "a", "references": [1]}', "one or more strings"),
        ('{"prediction": "a", "references": null}', "one or more strings"),
        ('{"prediction": "a", "id": true}', '"id" to be a string or a whole number, got True'),
        ('{"prediction": "a", "id": 1.5}', "got 1.5"),
        ('{"prediction": "a", "id": 1%s}' % ("0" * 5000), "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prediction": "fine"}\n\n' + line.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot read predictions from .*none.jsonl: No such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no predictions"):
        read_predictions(tmp_path / "empty.jsonl")


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write predictions to"):
        write_predictions(tmp_path / "file" / "p.jsonl", [Prediction(prediction="a")])
    with pytest.raises(OutputError, match="Is a directory"):
        write_predictions(tmp_path, [Prediction(prediction="a")])


EXAMPLES = [Example("1", ("one",)), Example("2", ("two", "zwei")), Example("3", ("three",))]


def test_matching_takes_order_and_references_from_the_data():
    predictions = [
        Prediction(prediction="c", id="3", references=("mine",)),
        Prediction(prediction="a", id="1", prompt="q"),
        Prediction(prediction="b", id="2"),
    ]
    assert match_predictions(predictions, EXAMPLES) == [
        Prediction(prediction="a", id="1", prompt="q", references=("one",)),
        Prediction(prediction="b", id="2", references=("two", "zwei")),
        Prediction(prediction="c", id="3", references=("three",)),
    ]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["1", None, "3"], "prediction 2 has no id"),
        (["1", "2", "2", "3"], "'2' predicted more than once"),
        (["1", "2", "3", "{4}"], "not in the data: '{4}'"),
        (["2"], "no prediction for '1', '3'"),
    ],
)
def test_matching_refuses_and_names_the_ids(ids, message):
    with pytest.raises(DataError, match=re.escape(message)):
        match_predictions([Prediction(prediction="a", id=i) for i in ids], EXAMPLES)


def test_matching_refuses_repeated_examples_and_shortens_long_lists():
    predictions = [Prediction(prediction="a", id="1")]
    with pytest.raises(DataError, match="the data holds '1' more than once"):
        match_predictions(predictions, [Example("1", ("x",)), Example("1", ("y",))])
    many = [Example(str(number), ("x",)) for number in range(1, 9)]
    with pytest.raises(DataError, match="'6' and 2 more; predict"):
        match_predictions(predictions, many)
