import dataclasses
import math
from html.parser import HTMLParser

import pytest

from ctkd.compare.analysis.analyze import analyze
from ctkd.compare.records import TEACHER, UNTRAINED
from ctkd.compare.report import tables
from ctkd.compare.report.published import PublishedCell, PublishedTable
from ctkd.compare.report.tables import NOTHING, Column, Table, decimal, markdown_text
from tests.compare.fake_comparison import METHODS, fake_comparison

HOSTILE = 'a|b <script>alert("1")</script> `c` *d* \x1b[31m\nnext & https://e.org www.e.org [f](g)'


@pytest.fixture(scope="module")
def three_seeds():
    comparison = fake_comparison(gain=8.0)
    return comparison, analyze(comparison, resamples=2000)


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
    share = f"{100 * best.gap_share:+.1f} %"
    assert rows["multilevelot"]["of the gap\nto the teacher"] == share
    assert rows["sft"]["verdict"] == "baseline"
    assert rows["sft"]["of the gap\nto the teacher"] == NOTHING
    # Other seeds would not bear it out.
    apart = dataclasses.replace(best, seed_interval=best.seed_interval._replace(low=-99.0))
    methods = (*analysis.methods[:-1], dataclasses.replace(analysis.methods[-1], difference=apart))
    rows = cells_of(tables.results(comparison, dataclasses.replace(analysis, methods=methods)))
    assert rows["multilevelot"]["verdict"] == "better (these runs)"


def test_a_demonstration_has_differences_without_intervals_and_verdicts():
    comparison = fake_comparison(seeds=(0,))
    rows = cells_of(tables.results(comparison, analyze(comparison, resamples=200)))
    for method in METHODS[1:]:
        assert "[" not in rows[method]["difference to sft\n[Holm-adjusted]"]
        assert rows[method]["verdict"] == "not tested"


def test_the_teachers_cross_entropy_is_left_out_as_its_tokens_are_others():
    comparison = fake_comparison()
    references = tuple(
        dataclasses.replace(record, losses={"ce": 1.25}) for record in comparison.references
    )
    comparison = dataclasses.replace(comparison, references=references)
    rows = cells_of(tables.results(comparison, analyze(comparison, resamples=200)))
    assert rows[TEACHER]["held-out\nCE"] == NOTHING
    assert rows[UNTRAINED]["held-out\nCE"] == "1.250"


def test_what_was_not_measured_is_a_dash():
    comparison = fake_comparison(methods=("sft",), seeds=(0,))
    finals = tuple(
        dataclasses.replace(one, seconds_per_step=None, peak_memory=None, losses={})
        for one in comparison.finals
    )
    comparison = dataclasses.replace(comparison, finals=finals)
    row = cells_of(tables.results(comparison, analyze(comparison, resamples=200)))["sft"]
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


PRINTED = {
    "teacher": (61.7, 50.9),
    "untrained student": (12.5, 11.2),
    "sft": (55.7, 46.0),
    "seqkd": (49.6, 39.2),
    "uld": (56.8, 45.8),
    "dskd": (57.0, 46.5),
}


def printed(*tasks, name="Table 1"):
    """A paper's table: F1 on "qed", Rouge-LSum on "fairytaleqa", and Rouge-L on "dolly"."""
    metrics = {"qed": "f1", "fairytaleqa": "rouge_lsum", "dolly": "rouge_l"}
    return PublishedTable(
        name=name, source="A paper", arxiv="2412.14528", venue=None, table="1",
        measured="Three things", seeds=None, note="A note.",
        cells=tuple(
            PublishedCell(method=method, label=method.upper(), student="OPT", teacher="LLaMA2-7B",
                          task=task, metric=metrics[task], value=values[task != "qed"])
            for method, values in PRINTED.items() for task in tasks
        ),
    )  # fmt: skip


def beside(published_task, *papers, methods=("sft", "seqkd", "uld a=1", "uld a=2")):
    """Published tables beside a comparison on that data, and the comparison's results by name."""
    comparison = fake_comparison(methods=methods)
    settings = {**comparison.settings, "published task": published_task}
    comparison = dataclasses.replace(comparison, settings=settings)
    analysis = analyze(comparison, resamples=200)
    found = {one.method: one for one in (*analysis.references, *analysis.methods)}
    return tables.published_numbers(papers, comparison, analysis), found


def test_published_numbers_are_those_on_our_data_beside_our_means_of_their_metric():
    [table], found = beside("fairytaleqa", printed("qed", "fairytaleqa", "dolly"))
    assert [column.title for column in table.columns] == [
        "published as",
        "LLaMA2-7B → OPT, fairytaleqa, Rouge-LSum",
        "this comparison, Rouge-LSum",
    ]
    here = {name: f"{one.means['rouge_lsum']:.1f}" for name, one in found.items()}
    assert table.rows == (
        ("TEACHER", "50.9", here["teacher"]),
        ("UNTRAINED STUDENT", "11.2", here["untrained student"]),
        ("SFT", "46", here["sft"]),
        ("SEQKD", "39.2", here["seqkd"]),
        ("ULD", "45.8", f"{here['uld a=1']} / {here['uld a=2']}"),
        ("DSKD", "46.5", NOTHING),
    )
    # Else the columns could be of the metric that methods are compared by.
    assert here["sft"] != f"{found['sft'].mean:.1f}"
    assert "arXiv 2412.14528" in table.note and "A note." in table.note
    assert table.note.endswith("not comparable number by number.")


def test_seqkd_is_not_filed_under_the_loss_it_trains_with():
    [table], found = beside("qed", printed("qed"), methods=("seqkd", "uld"))
    rows = cells_of(table)
    assert rows["SFT"]["this comparison, F1"] == NOTHING
    assert rows["SEQKD"]["this comparison, F1"] == f"{found['seqkd'].mean:.1f}"


def test_a_method_with_a_name_of_its_own_is_filed_under_its_loss():
    comparison = fake_comparison(methods=("sft", "uld"))
    finals = tuple(
        dataclasses.replace(one, method="strong" if one.method == "uld" else "mined")
        for one in comparison.finals
    )
    settings = {**comparison.settings, "published task": "qed"}
    comparison = dataclasses.replace(comparison, finals=finals, baseline="mined", settings=settings)
    analysis = analyze(comparison, resamples=200)
    [table] = tables.published_numbers([printed("qed")], comparison, analysis)
    rows = cells_of(table)
    sft, uld = (f"{one.mean:.1f}" for one in analysis.methods)
    assert (rows["SFT"]["this comparison, F1"], rows["ULD"]["this comparison, F1"]) == (sft, uld)


def test_a_published_metric_that_is_not_measured_here_stands_alone():
    [table], _ = beside("dolly", printed("qed", "dolly"))
    assert [column.title for column in table.columns] == [
        "published as",
        "LLaMA2-7B → OPT, dolly, rouge_l",
    ]


def test_tables_about_other_data_are_left_out():
    found, _ = beside("qed", printed("fairytaleqa", name="other"), printed("qed", name="same"))
    assert [table.title for table in found] == ["same"]
    assert beside("pocketqa", printed("qed", "fairytaleqa"))[0] == []


@pytest.mark.parametrize("unset", [None, ""])
def test_without_a_published_task_tables_are_whole_and_none_of_our_numbers_stand_there(unset):
    [table], _ = beside(unset, printed("qed", "fairytaleqa"))
    assert [column.title for column in table.columns[1:]] == [
        "LLaMA2-7B → OPT, qed, F1",
        "LLaMA2-7B → OPT, fairytaleqa, Rouge-LSum",
    ]
    assert table.rows[2] == ("SFT", "55.7", "46")
    assert "Other data than here" in table.note
    comparison = fake_comparison()
    assert "published task" not in comparison.settings
    analysis = analyze(comparison, resamples=200)
    assert tables.published_numbers([printed("qed", "fairytaleqa")], comparison, analysis) == [
        table
    ]


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
