import dataclasses
import math
from html.parser import HTMLParser

import pytest

from ctkd.distill.compare import tables
from ctkd.distill.compare.analysis import analyse
from ctkd.distill.compare.published import PublishedCell, PublishedTable
from ctkd.distill.compare.records import TEACHER, UNTRAINED
from ctkd.distill.compare.tables import NOTHING, Column, Table, decimal, markdown_text
from tests.distill.compare.fake_comparison import METHODS, fake_comparison

HOSTILE = 'a|b <script>alert("1")</script> `c` *d* \x1b[31m\nnext & https://e.org www.e.org [f](g)'


@pytest.fixture(scope="module")
def three_seeds():
    comparison = fake_comparison(gain=8.0)
    return comparison, analyse(comparison, resamples=2000)


def cells_of(table):
    """Each row by its name, as title to cell."""
    titles = [column.title for column in table.columns]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in table.rows}


class Cells(HTMLParser):
    """The texts of a table's cells, and every tag that there is."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def test_results_have_the_references_first_then_the_methods_in_order(three_seeds):
    table = tables.results(*three_seeds)
    assert [row[0] for row in table.rows] == [UNTRAINED, TEACHER, *METHODS]


def test_results_say_what_the_analysis_says(three_seeds):
    comparison, analysis = three_seeds
    rows = cells_of(tables.results(comparison, analysis))
    for result in analysis.methods:
        row = rows[result.method]
        low, high = result.interval
        assert row["F1\n[95 % interval]"] == f"{result.mean:.1f} [{low:.1f}, {high:.1f}]"
        assert row["exact\nmatch"] == f"{result.means['exact_match']:.1f}"
        assert row["held-out\nCE"] == f"{result.losses['ce']:.3f}"
        assert row["s/step"] == f"{result.seconds_per_step:.2f}"
        assert row["peak\nGiB"] == f"{result.peak_memory / 2**30:.2f}"
    best = analysis.methods[-1].difference
    assert best.verdict == "better"
    low, high = best.adjusted_interval
    told = f"{best.mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    assert rows["multilevelot"]["difference to sft\n[Holm-adjusted]"] == told
    assert rows["multilevelot"]["verdict"] == "better"
    assert rows["sft"]["verdict"] == "baseline"


def test_a_demonstration_has_differences_without_intervals_and_verdicts():
    comparison = fake_comparison(seeds=(0,))
    rows = cells_of(tables.results(comparison, analyse(comparison, resamples=200)))
    for method in METHODS[1:]:
        assert "[" not in rows[method]["difference to sft\n[Holm-adjusted]"]
        assert rows[method]["verdict"] == "not tested"


def test_the_teachers_cross_entropy_is_left_out_as_its_tokens_are_others():
    comparison = fake_comparison()
    references = tuple(
        dataclasses.replace(record, losses={"ce": 1.25}) for record in comparison.references
    )
    comparison = dataclasses.replace(comparison, references=references)
    rows = cells_of(tables.results(comparison, analyse(comparison, resamples=200)))
    assert rows[TEACHER]["held-out\nCE"] == NOTHING
    assert rows[UNTRAINED]["held-out\nCE"] == "1.250"


def test_what_was_not_measured_is_a_dash():
    comparison = fake_comparison(methods=("sft",), seeds=(0,))
    finals = tuple(
        dataclasses.replace(one, seconds_per_step=None, peak_memory=None, losses={})
        for one in comparison.finals
    )
    comparison = dataclasses.replace(comparison, finals=finals)
    row = cells_of(tables.results(comparison, analyse(comparison, resamples=200)))["sft"]
    assert [row[name] for name in ("s/step", "peak\nGiB", "held-out\nCE")] == [NOTHING] * 3


def test_trials_mark_the_chosen_one_of_each_method():
    table = tables.trials(fake_comparison())
    chosen = [(row[0], row[1]) for row in table.rows if row[-1] == "chosen"]
    assert chosen == [
        ("sft", "defaults"),
        ("uld kd_weight=1.5", "kd_weight=1.5"),
        ("mined", "defaults"),
        ("multilevelot", "kd_weight=1.5"),
    ]
    assert len(table.rows) == 8
    assert tables.trials(fake_comparison(trials=False)) is None


def test_settings_are_parted_into_shared_ones_and_those_of_a_method():
    comparison = fake_comparison()
    shared = dict(tables.common_settings(comparison).rows)
    assert shared["learning_rate"] == "5e-05"
    assert shared["warmup"] == "0.1"
    own = tables.own_settings(comparison)
    assert [column.title for column in own.columns] == ["method", "loss", "kd_weight"]
    assert ("multilevelot", "multilevelot", "1.5") in own.rows
    assert ("sft", "sft", "not set") in own.rows
    assert not {"seed", "loss", "kd_weight"} & set(shared)
    assert tables.own_settings(fake_comparison(methods=("sft",))) is None


def test_preparation_is_listed_if_there_was_any():
    comparison = fake_comparison()
    assert tables.preparation_costs(comparison).rows[0] == ("teacher cache", "81.4")
    assert tables.preparation_costs(dataclasses.replace(comparison, preparation={})) is None


def published(metric="f1"):
    def cell(method, label, student, value):
        return PublishedCell(
            method=method, label=label, student=student, teacher="LLaMA2-7B", task="qed",
            metric=metric, value=value,
        )  # fmt: skip

    return PublishedTable(
        name="Table 1", source="A paper", arxiv="2412.14528", venue=None, table="1",
        measured="F1", seeds=None, note="A note.",
        cells=(cell("uld", "ULD", "OPT", 56.76), cell("dskd", "DSKD", "OPT", 1.5),
               cell("uld", "ULD", "Pythia", 59.71)),
    )  # fmt: skip


def test_published_numbers_stand_beside_those_of_the_same_loss():
    comparison = fake_comparison(methods=("sft", "uld kd_weight=0.15", "uld kd_weight=1.5"))
    analysis = analyse(comparison, resamples=200)
    [table] = tables.published_numbers([published()], comparison, analysis)
    here = " / ".join(f"{result.mean:.1f}" for result in analysis.methods[1:])
    assert table.rows == (("ULD", "56.76", "59.71", here), ("DSKD", "1.5", NOTHING, NOTHING))
    assert "arXiv 2412.14528" in table.note and "A note." in table.note


def test_published_numbers_of_another_metric_stand_alone():
    comparison = fake_comparison()
    analysis = analyse(comparison, resamples=200)
    [table] = tables.published_numbers([published("rouge_lsum")], comparison, analysis)
    assert len(table.columns) == 3


def test_nothing_in_a_cell_is_html_or_steers_a_terminal():
    table = Table(
        title="t",
        columns=(Column(HOSTILE, words=True), Column(HOSTILE)),
        rows=((HOSTILE, HOSTILE),),
    )
    found = Cells(table.html())
    assert set(found.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\n", " ")
    assert found.rows == [[shown, shown], [shown, shown]]
    assert "\x1b" not in table.plain()
    assert "\x1b" not in table.markdown()


def test_nothing_in_a_cell_is_markdown():
    table = Table(title="t", columns=(Column("a"), Column("b")), rows=((HOSTILE, "1"),))
    lines = table.markdown().split("\n")
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == 3
    for sign in (" <script", "[f]", " `c", " *d", "https://", "www.e"):
        assert sign in HOSTILE and sign not in lines[2]


@pytest.mark.parametrize("text", ["- a", "+ a", "# a", "1. a", "=== a", "--- a", "2) a"])
def test_a_text_starts_no_list_or_heading(text):
    escaped = markdown_text(text)
    assert escaped != text and escaped.replace("\\", "") == text


@pytest.mark.parametrize("text", ["kd_weight=0.15", "-4.7", "+3.2", "a (b) c-d", "0.5", "12"])
def test_plain_text_and_numbers_stay_readable(text):
    assert markdown_text(text) == text


def test_numbers_are_written_as_given_and_not_parsed_again():
    table = Table(title="t", columns=(Column("a"),), rows=(("1e-05",), ("007",), ("nan",)))
    assert table.plain().split("\n")[2:] == ["1e-05", "  007", "  nan"]


def test_decimals():
    assert decimal(-0.04, 1, signed=True) == "0.0"
    assert decimal(0.04, 1, signed=True) == "0.0"
    assert decimal(-0.06, 1, signed=True) == "-0.1"
    assert decimal(10.0, 0) == "10"
    assert decimal(math.nan, 1) == NOTHING
