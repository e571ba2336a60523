import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from ctkd.compare.analysis.analyze import analyze
from ctkd.compare.records import Answer
from ctkd.compare.report import report as report_module
from ctkd.compare.report.published import PublishedCell, PublishedTable
from ctkd.compare.report.report import (
    as_json,
    choose_examples,
    question_tail,
    terminal,
    write_report,
)
from ctkd.distill.evaluation.metrics import METRICS
from ctkd.errors import OutputError
from tests.compare.fake_comparison import METHODS, fake_comparison

HOSTILE = (
    '<img src="https://e.org/x" onerror="alert(1)"><script>1</script> [a](http://e.org) | \x00'
)
SECTIONS = [
    "Results on the held-out test split",
    "What this shows",
    "F1 of each method",
    "Learning curves",
    "Quality at equal steps and at equal time",
    "Cost of a step",
    "Answers side by side",
    "Chosen settings and trials",
    "Exact settings",
    "Costs before any run",
    "Published numbers beside",
    "How to read this",
]
PUBLISHED = PublishedTable(
    name="Table 1", source="A paper", arxiv="2412.14528", venue=None, table="1", measured="F1",
    seeds=None, note="",
    cells=(PublishedCell(method="uld", label="ULD", student="OPT", teacher="LLaMA2-7B",
                         task="qed", metric="f1", value=56.76),),
)  # fmt: skip


class Page(HTMLParser):
    """What a page holds, by tag: attributes and text inside."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag != "meta":
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def texts(self, tag):
        return ["".join(text).strip() for found, _, text in self.elements if found == tag]


def write(comparison, folder, **settings):
    analysis = analyze(comparison, resamples=200)
    path = write_report(comparison, analysis, folder, **settings)
    return path.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return write(fake_comparison(), tmp_path_factory.mktemp("usual"), published=[PUBLISHED])


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, usual):
    """Pictures are drawn for the usual report alone."""
    for name in ("metric_intervals", "learning_curves", "equal_effort", "costs"):
        monkeypatch.setattr(report_module.pictures, name, lambda *_: "<svg></svg>")


def with_text(comparison, text):
    """The same, but every text that a model or a data file may bring is this one."""

    def changed(record):
        answers = tuple(
            dataclasses.replace(one, prompt=text, prediction=text, references=(text,))
            for one in record.answers
        )
        return dataclasses.replace(record, answers=answers)

    return dataclasses.replace(
        comparison,
        references=tuple(map(changed, comparison.references)),
        finals=tuple(map(changed, comparison.finals)),
        settings={**comparison.settings, "data": text, text: text},
        preparation={text: 1.0},
    )


def test_writes_page_markdown_and_pictures_and_nothing_else(tmp_path):
    folder = tmp_path / "new" / "report"
    write(fake_comparison(), folder)
    found = sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())
    assert found == [
        "pictures/costs.svg",
        "pictures/equal-effort.svg",
        "pictures/learning-curves.svg",
        "pictures/metric.svg",
        "report.html",
        "report.md",
    ]


def test_sections_come_in_order_in_both_forms(usual):
    page, text = usual
    assert Page(page).texts("h2") == SECTIONS
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == SECTIONS


def test_without_published_tables_there_is_no_such_section(tmp_path):
    page, _ = write(fake_comparison(), tmp_path)
    assert [title for title in SECTIONS if title not in Page(page).texts("h2")] == [
        "Published numbers beside"
    ]


def test_the_page_asks_the_network_for_nothing(usual):
    page = Page(usual[0])
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "image", "a", "object", "base", "form"}
    for _, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "action", "srcset") and not name.startswith("on")
            if name.endswith("href"):
                assert value.startswith("#")
            assert "url(" not in (value or "").replace("url(#", "")
    assert "url(" not in page.texts("style")[0] and "@import" not in page.texts("style")[0]
    assert "http" not in usual[0]


def test_markdown_links_only_to_pictures_that_are_there(tmp_path):
    _, text = write(fake_comparison(), tmp_path)
    targets = re.findall(r"(?<!\\)\]\(([^)]*)\)", text)
    assert len(targets) == 4
    for target in targets:
        assert (tmp_path / target).is_file()
    assert "http" not in text


def test_every_picture_is_named_for_those_who_cannot_see_it(usual):
    found = [attributes for tag, attributes, _ in Page(usual[0]).elements if tag == "svg"]
    assert len(found) == 4
    for attributes, title in zip(found, SECTIONS[2:6], strict=True):
        assert attributes["role"] == "img"
        assert attributes["aria-label"].startswith(title)
    assert len(Page(usual[0]).texts("figcaption")) == 4


def test_ids_on_the_page_are_unique(usual):
    ids = [attributes["id"] for _, attributes, _ in Page(usual[0]).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100


def test_a_demonstration_says_so_loudly_and_a_comparison_does_not(tmp_path, usual):
    page, text = write(fake_comparison(seeds=(0,)), tmp_path)
    loud = [
        text for _, attributes, text in Page(page).elements if attributes.get("class") == "loud"
    ]
    assert loud == [["demonstration, no ranking"]]
    assert "**demonstration, no ranking**" in text.split("\n")[:4]
    assert 'class="loud"' not in usual[0]


def test_everything_the_analysis_says_is_there(tmp_path):
    comparison = fake_comparison()
    analysis = analyze(comparison, resamples=200)
    page = Page(write_report(comparison, analysis, tmp_path).read_text(encoding="utf-8"))
    shown = page.texts("li")
    assert shown[: len(analysis.sentences())] == analysis.sentences()
    told = terminal(comparison, analysis).split("\n")
    assert told[0] == analysis.heading
    assert [line[2:] for line in told if line.startswith("- ")] == analysis.sentences()
    for method in METHODS:
        assert any(line.startswith(method) for line in told)
    assert told[-1].startswith("Before any run: teacher cache ")
    bare = dataclasses.replace(comparison, preparation={})
    assert "Before any run" not in terminal(bare, analysis)


def with_settings(**settings):
    comparison = fake_comparison(seeds=(0,))
    return dataclasses.replace(comparison, settings={**comparison.settings, **settings})


@pytest.mark.parametrize(
    ("dev", "rows", "told"),
    [
        (24, 24, "Held-out cross-entropy is over the first 24 development rows."),
        (0, 32, "Held-out cross-entropy is over the first 32 test rows."),
        (0, 1, "Held-out cross-entropy is over the first test row."),
        (24, None, None),
    ],
)
def test_captions_of_curves_say_what_rows_they_rest_on(tmp_path, dev, rows, told):
    comparison = with_settings(**{"development rows": dev, "curve rows": rows})
    page, text = write(comparison, tmp_path)
    _, curves, effort, _ = Page(page).texts("figcaption")
    for caption in (curves, effort):
        assert caption.endswith(f"{told} Lower is better." if told else ". Lower is better.")
        assert ("Held-out cross-entropy is over" in caption) == bool(told)
    assert text.count("Held-out cross-entropy is over") == (2 if told else 0)


def test_the_caption_of_costs_says_whose_memory_it_is(usual):
    assert "peak memory: of the process as a whole" in Page(usual[0]).texts("figcaption")[3]


def test_published_tables_without_a_number_about_this_data_are_named(tmp_path):
    other = dataclasses.replace(
        PUBLISHED, name="Other", cells=(dataclasses.replace(PUBLISHED.cells[0], task="dolly"),)
    )
    page, _ = write(
        with_settings(**{"published task": "qed"}), tmp_path, published=[PUBLISHED, other]
    )
    assert "Table 1" in Page(page).texts("h3") and "Other" not in Page(page).texts("h3")
    assert "Without a number about qed, and left out: Other." in Page(page).texts("p")


def test_the_claim_is_about_these_trained_models_and_says_what_a_seed_varies(usual):
    told = Page(usual[0]).texts("li")
    [claim] = [one for one in told if "the chance of any false claim" in one]
    assert "for these trained models, the chance of any false claim from the choice" in claim
    assert "How far other seeds would move a difference, its interval over seeds tells" in claim
    assert any("It is no other initialization" in one for one in told)


def test_hostile_texts_stay_texts(tmp_path):
    page, text = write(with_text(fake_comparison(), HOSTILE), tmp_path)
    tags = {tag for tag, _, _ in Page(page).elements}
    assert not tags & {"img", "script"}
    assert page.count("onerror=&quot;") > 10
    assert "\x00" not in page + text
    # Inside <pre> Markdown is not read; there it is escaped as HTML is.
    text = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(img|script)", text)
    assert not re.search(r"(?<!\\)\]\(http", text)


@pytest.mark.parametrize("odd", ["\ud800", "", " \n ", "数据\u202e", "a" * 5000])
def test_odd_texts_do_not_stop_the_report(tmp_path, odd):
    page, _ = write(with_text(fake_comparison(), odd), tmp_path)
    assert Page(page).texts("h2")
    assert "\u202e" not in page


def test_each_shown_example_has_everyones_answer_and_its_whole_prompt(usual, tmp_path):
    comparison = fake_comparison()
    page, shown = Page(usual[0]), choose_examples(comparison)
    prompts = page.texts("pre")
    assert len(prompts) == len(shown) == 7
    records = [*comparison.references, *(comparison.of(method)[0] for method in METHODS)]
    for one, prompt in zip(shown, prompts, strict=True):
        for record in records:
            answer = next(answer for answer in record.answers if answer.id == one.id)
            assert answer.prompt == prompt
            row = f'<td class="words">{answer.prediction}</td><td>{answer.scores["f1"]:.1f}</td>'
            assert f'<th scope="row">{record.method}</th>{row}' in usual[0]


def flat(comparison, scores):
    """The same, but each method's answer to an example scores as given, by example and method."""
    finals = tuple(
        dataclasses.replace(
            record,
            answers=tuple(
                dataclasses.replace(one, scores=dict.fromkeys(METRICS, scores(one, record.method)))
                for one in record.answers
            ),
        )
        for record in comparison.finals
    )
    return dataclasses.replace(comparison, finals=finals)


def test_examples_shown_are_the_disputed_ones_then_typical_ones():
    def scores(answer: Answer, method: str) -> float:
        if answer.id in ("p3-q1", "p5-q0"):
            return 100.0 if method == "mined" else 0.0
        return 26.0 if answer.id == "p7-q2" else 60.0

    shown = choose_examples(flat(fake_comparison(groups=9, examples=27), scores), typical=1)
    assert [one.id for one in shown[:2]] == ["p5-q0", "p3-q1"]
    assert len(shown) == 3 and "typical" in shown[2].why


def test_equal_scores_are_no_dispute():
    shown = choose_examples(flat(fake_comparison(), lambda answer, method: 50.0))
    assert all("typical" in one.why for one in shown) and len(shown) == 3


def test_examples_are_chosen_from_different_groups_while_there_are_such():
    shown = choose_examples(fake_comparison(groups=12))
    assert len({one.id.split("-")[0] for one in shown}) == 7


@pytest.mark.parametrize("examples", [1, 3])
def test_few_examples_are_shown_once_each(examples):
    shown = [one.id for one in choose_examples(fake_comparison(examples=examples, groups=1))]
    assert len(shown) == len(set(shown)) == examples


def test_one_method_is_held_against_the_references():
    shown = choose_examples(fake_comparison(methods=("sft",), seeds=(0,)))
    assert "disagree" in shown[0].why


@pytest.mark.parametrize(
    ("prompt", "tail"),
    [
        ("Context: c\nQuestion: Who went down the well?\nAnswer:",
         "Question: Who went down the well?"),
        ("Why?", "Why?"),
        ("Answer:", "Answer:"),
        ("", ""),
        ("a long line of the dialogue\nb\nc\n", "a long line of the dialogue b c"),
    ],
)  # fmt: skip
def test_question_tails(prompt, tail):
    assert question_tail(prompt) == tail


def test_a_long_question_is_cut_at_a_word_from_the_front():
    tail = question_tail("word " * 200)
    assert tail.startswith("…word") and tail.endswith("word") and len(tail) < 250


def test_json_is_strict_and_holds_numbers_of_all_tables():
    comparison = fake_comparison()
    comparison = dataclasses.replace(comparison, preparation={"x": math.nan, "y": math.inf})
    analysis = analyze(comparison, resamples=200)
    found = json.loads(json.dumps(as_json(comparison, analysis), allow_nan=False))
    assert found["preparation"] == {"x": None, "y": None}
    methods = found["analysis"]["methods"]
    assert [one["method"] for one in methods] == list(METHODS)
    assert methods[1]["difference"]["mean"] == analysis.methods[1].difference.mean
    assert methods[0]["interval"] == list(analysis.methods[0].interval)
    assert found["sentences"] == analysis.sentences()
    assert len(found["runs"]) == 12 and len(found["trials"]) == 8
    assert "answers" not in found["runs"][0]


def test_a_failure_leaves_the_old_report_whole(tmp_path, monkeypatch):
    comparison = fake_comparison(seeds=(0,))
    write(comparison, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write(fake_comparison(), tmp_path)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in before} == before
    write(fake_comparison(), tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "report.html").read_bytes() != before[tmp_path / "report.html"]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="name a folder"):
        write(fake_comparison(seeds=(0,)), tmp_path / "file")


def test_equal_comparisons_give_equal_reports(tmp_path, usual, monkeypatch):
    monkeypatch.undo()
    assert write(fake_comparison(), tmp_path, published=[PUBLISHED]) == usual
