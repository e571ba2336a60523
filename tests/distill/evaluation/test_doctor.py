"""``ctkd doctor``: what it finds, what it prints, and how it ends."""

import json
from dataclasses import replace

import click
import pytest
from tokenizers import normalizers
from transformers import BertConfig

import ctkd
from ctkd.cli.doctor_page import doctor_page
from ctkd.distill.config import DoctorRequest
from ctkd.distill.evaluation import doctor as doctor
from ctkd.distill.evaluation.doctor import (
    LossAdvice,
    advise,
    advise_on,
    read_head_width,
    run_doctor,
)
from ctkd.distill.models import loading as models
from ctkd.distill.printable import printable, visible
from ctkd.errors import ModelError, PluginError, SettingError
from ctkd.loss import Measured, Paper, Weights
from ctkd.registry import LossFacts, describe
from ctkd.tokenization.answer_facts import AlignedRow, DifferingRow, Piece
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace, error_of, finish, invoke, save
from tests.tokenization import real_tokenizers

LEVELS = {"good", "careful", "unsuited"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("place"))
    save(place.folder / "narrow", vocabulary=280, padded=0, hidden=8, seed=1)
    tiny.tokenizer(330).save_pretrained(place.folder / "narrow")
    save(place.folder / "lower", vocabulary=280, padded=0, hidden=8, seed=1)
    lower = tiny.tokenizer(280)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.save_pretrained(place.folder / "lower")
    tiny.tokenizer(300).save_pretrained(place.folder / "alone")
    BertConfig(vocab_size=280, hidden_size=24).save_pretrained(place.folder / "bert")
    tiny.tokenizer(280).save_pretrained(place.folder / "bert")
    rows = {
        "shouting.jsonl": ["THE MAT", "THE CAT", "the rain"],
        "special.jsonl": [" the mat", " the <eos> mat", " the cat"],
    }
    for name, answers in rows.items():
        lines = [json.dumps({"prompt": "Who?", "answer": answer}) for answer in answers]
        (place.folder / name).write_text("\n".join(lines))
    return place


def words(place: Workplace, *options: str) -> list[str]:
    return [
        *("doctor", "--student", str(place.student), "--teacher", str(place.teacher)),
        *(() if "--data" in options else ("--data", str(place.rows))),
        *("--task", "text", *options),
    ]


@pytest.fixture(scope="module")
def report(place):
    return run_doctor(
        DoctorRequest(
            student=str(place.student),
            teacher=str(place.teacher),
            data=str(place.rows),
            task="text",
        ),
        say=lambda line: None,
    )


def test_a_sound_pair_gets_a_page_and_exit_code_0(place):
    result = finish(*words(place))
    page = result.stdout.splitlines()
    assert len(page) <= 60
    assert page[-1].startswith("SOUND: at least 95 % of the bytes in chunks")
    for part in ("VOCABULARIES", "SPECIAL TOKENS", "KINDS OF TEXT", "ANSWERS (20)", "LOSSES"):
        assert any(line.startswith(part) for line in page), part
    assert "\x1b" not in result.stdout
    head = next(line for line in page if line.startswith("  head"))
    assert head.split() == ["head", "286", "(6", "unused)", "330"]
    assert f"teacher: the tokenizer of {place.teacher}" in result.stderr


def test_the_verdict_follows_from_the_rows_of_losses(place, report, monkeypatch):
    levels = {"alm": "unsuited", "gold": "unsuited", "uld": "unsuited"}
    losses = [replace(one, suits=levels.get(one.name, "good")) for one in report.losses]
    *_, line = doctor_page(replace(report, losses=losses)).splitlines()
    assert click.unstyle(line).startswith("SOUND, but not with alm, gold or uld: at least 95 %")
    one = [replace(one, suits="unsuited" if one.name == "uld" else "good") for one in losses]
    *_, line = doctor_page(replace(report, losses=one)).splitlines()
    assert click.unstyle(line).startswith("SOUND, but not with uld: at least")

    none = [replace(one, suits="unsuited") for one in losses]
    monkeypatch.setattr(doctor, "advise", lambda *_, **__: tuple(none))
    result = invoke(*words(place))
    assert result.exit_code == 1
    assert result.stdout.endswith("UNSOUND\n  - no loss suits the pair; choose another model, or "
                                  "other data\n")  # fmt: skip
    assert json.loads(invoke(*words(place, "--json")).stdout)["verdict"]["sound"] is False


def test_every_registered_loss_has_a_line(place, report):
    assert [loss.name for loss in report.losses] == ctkd.list_losses()
    assert {loss.suits for loss in report.losses} <= LEVELS
    assert all(loss.reason for loss in report.losses)
    page = doctor_page(report)
    assert all(f"  {loss.name} " in page for loss in report.losses)
    measured = Measured(kd=1.0, difference=-0.1, low=-0.2, high=-0.01, share=0.1, at_default=0.0)
    less, unclear = replace(measured, share=0.05), replace(measured, high=0.01, share=0.5)
    losses = [
        LossAdvice(name=name, suits=suits, reason="", measured=one)
        for name, suits, one in (
            ("less", "good", less),
            ("more", "good", measured),
            ("unclear", "good", unclear),
            ("unmeasured", "good", None),
            ("unsuited", "unsuited", measured),
            ("careful", "careful", measured),
        )
    ]
    found = replace(report, losses=tuple(losses))
    assert "  try more first: " in doctor_page(found)
    assert replace(found, losses=tuple(losses[2:])).first is None
    assert replace(found, losses=tuple(losses[4:])).first == losses[5]
    assert "try" not in doctor_page(replace(found, losses=tuple(losses[4:5])))


def test_json_is_one_object_and_nothing_else(place, report):
    result = finish(*words(place, "--json"))
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(report.as_dict()))
    assert found["verdict"] == {
        "sound": True,
        "reasons": [],
        "thresholds": {"min_coverage": 0.95, "min_one_to_one": 0.05},
    }
    assert found["examination"]["answers"]["answers"] == 20
    assert found["examination"]["student"]["head"]["width"] == 286


def test_a_head_narrower_than_its_tokenizer_is_unsound(place):
    """Pain 2: equal or unequal widths say nothing, ids without a column do."""
    result = invoke(*words(place, "--student", str(place.folder / "narrow")))
    assert result.exit_code == 1
    assert "UNSOUND" in result.stdout
    assert "280: TOO NARROW" in result.stdout
    assert "the student's head has 280 columns, but its tokenizer writes ids up to 329" in (
        result.stdout
    )
    assert "Error" not in result.stderr


def test_a_tokenizer_that_loses_text_is_unsound(place):
    data = str(place.folder / "shouting.jsonl")
    lossy = words(place, "--student", str(place.folder / "lower"), "--data", data)
    result = invoke(*lossy)
    assert result.exit_code == 1, result.output
    assert "of the answers' bytes are spelled alike on both sides" in result.stdout
    assert "the two sides spell 2 of the answers differently" in result.stdout
    assert 'student "the␣mat", teacher "THE␣MAT"' in result.stdout
    assert "\n  alm                    unsuited" in result.stdout
    # The thresholds are the user's.
    assert invoke(*lossy, "--min-coverage", "0", "--min-one-to-one", "0").exit_code == 0
    found = json.loads(invoke(*lossy, "--json").stdout)
    assert found["verdict"]["sound"] is False


def test_too_few_one_to_one_chunks_are_unsound(place, report):
    assert 0 < report.examination.answers.one_to_one < 1
    result = invoke(*words(place, "--min-one-to-one", "1"))
    assert result.exit_code == 1
    assert "of the chunks are one token on both sides, expected at least 100 %" in result.stdout


def test_a_row_that_training_refuses_is_unsound(place):
    special = ["--data", str(place.folder / "special.jsonl")]
    result = invoke(*words(place, *special))
    assert result.exit_code == 1
    assert "ANSWERS (2)" in result.stdout
    assert "training refuses 1 of the rows: special.jsonl row 2" in result.stdout


def test_limit_takes_the_first_rows(place):
    result = finish(*words(place, "--limit", "3"))
    assert "ANSWERS (3)" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--min-coverage", "2"], "min_coverage must be from 0 to 1, got 2.0"),
        (["--min-one-to-one", "-1"], "min_one_to_one must be from 0 to 1, got -1.0"),
        (["--student", "./nothing"], "there is no folder ./nothing"),
        (["--teacher", "gemma-3-271m"], "did you mean gemma-3-270m?"),
        (["--teacher", "HERE/bert"], "has no causal language-model head (it is of the kind bert)"),
        (["--data", "HERE/nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--task", "qaa"], "unknown task 'qaa', did you mean 'qa'?"),
        (["--column", "prompt"], "a column is FIELD=COLUMN"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_a_way_out(place, options, message):
    given = [option.replace("HERE", str(place.folder)) for option in options]
    assert message in error_of(invoke(*words(place, *given)))


def test_no_weights_are_loaded(place, monkeypatch):
    monkeypatch.setattr(models, "auto_class", None)
    (place.folder / "student" / "model.safetensors").rename(place.folder / "aside")
    try:
        finish(*words(place))
    finally:
        (place.folder / "aside").rename(place.folder / "student" / "model.safetensors")


def test_a_student_of_random_weights_is_examined_by_what_it_would_learn(place, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(place.folder / "made"))
    file = place.folder / "config.json"
    file.write_text('{"model_type": "llama", "vocab_size": 290}')
    options = {"teacher": str(place.teacher), "data": str(place.rows), "task": "text"}
    request = DoctorRequest(student_config=str(file), limit=3, **options)
    report = run_doctor(request, say=lambda _: None)
    assert report.sound and report.as_dict()["student"] == str(file)
    assert report.examination.student.head.width == 290
    (made,) = [one for one in (place.folder / "made" / "models").iterdir() if one.is_dir()]
    assert made.name.startswith("vocabulary-")
    with pytest.raises(SettingError, match="are two students; leave one of them out"):
        DoctorRequest(student_config=str(file), student="other", **options)


def test_head_widths_come_from_configurations(place, tmp_path):
    assert read_head_width(str(place.student)) == 286
    assert read_head_width(str(place.folder / "alone")) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the configuration of"):
        read_head_width(str(tmp_path))


def test_a_folder_with_a_tokenizer_alone_can_be_examined(place):
    result = finish(*words(place, "--teacher", str(place.folder / "alone")))
    page = result.stdout.splitlines()
    assert next(line for line in page if line.startswith("  head")).split()[-1] == "unknown"
    assert page[-1].endswith("; heads not looked at, for want of a config.json")


def with_answers(report, **figures):
    return replace(report.examination, answers=replace(report.examination.answers, **figures))


def suits(report, name: str, **figures) -> tuple[str, str]:
    found = advise_on(describe(name), with_answers(report, **figures), min_coverage=0.95)
    return found.suits, found.reason


@pytest.mark.parametrize(
    ("name", "figures", "expected", "told"),
    [
        ("alm", {"coverage": 1.0}, "good", "100 % of bytes in chunks"),
        ("alm", {"coverage": 0.94}, "unsuited", "94 % of bytes in chunks"),
        ("bpm", {"coverage": 1.0}, "good", "100 % of bytes in chunks"),
        ("uld", {"in_step": 0.9}, "good", "90 % of positions"),
        ("uld", {"in_step": 0.89}, "careful", "--loss-option pairing=chunk pairs what"),
        ("multilevelot", {"in_step": 0.1}, "careful", "--loss-option pairing=chunk pairs what"),
        ("multilevelot_released", {"in_step": 1.0}, "careful", "published runs"),
        ("multilevelot_released", {"in_step": 0.1}, "careful", "10 % of positions"),
        ("mined", {"coverage": 1.0, "one_to_one": 0.7}, "good", "70 % of chunks one to one"),
        ("mined", {"coverage": 1.0, "one_to_one": 0.3}, "careful", "on the labels alone"),
        ("mined", {"coverage": 1.0, "one_to_one": 0.29}, "unsuited", "29 % of chunks"),
        ("mined", {"coverage": 0.5, "one_to_one": 0.9}, "unsuited", "50 % of bytes in chunks"),
    ],
)
def test_each_loss_is_judged_by_what_it_looks_at(report, name, figures, expected, told):
    level, reason = suits(report, name, **figures)
    assert level == expected
    assert told in reason


@pytest.mark.parametrize("name", ["gold", "shared_kl"])
def test_losses_on_shared_tokens_look_at_the_overlap_and_at_numerals(report, name):
    fine = {
        "coverage": 1.0,
        "student_shared": 0.95,
        "teacher_shared": 0.9,
        "student_numerals_shared": None,
        "teacher_numerals_shared": 1.0,
    }
    assert suits(report, name, **fine)[0] == "good"
    level, reason = suits(report, name, **fine | {"student_shared": 0.5})
    assert (level, reason) == ("careful", "50 % of answer tokens in both vocabularies")
    assert suits(report, name, **fine | {"teacher_shared": 0.4})[0] == "unsuited"
    level, reason = suits(report, name, **fine | {"student_numerals_shared": 0.2})
    assert (level, reason) == ("careful", "only 20 % of numerals in both vocabularies")

    found = with_answers(report, **fine)
    split = replace(found.kinds[0], student_longest=1, teacher_longest=3)
    found = replace(found, kinds=(split, *found.kinds[1:]))
    advice = advise_on(describe(name), found, min_coverage=0.95)
    assert advice.suits == "careful"
    assert advice.reason == "numerals cut into digits on one side only"
    found = replace(found, overlap=replace(found.overlap, shared=0))
    advice = advise_on(describe(name), found, min_coverage=0.95)
    assert (advice.suits, advice.reason) == ("unsuited", "the vocabularies share no token")


def test_plugins_are_judged_by_their_needs(report, monkeypatch):
    found = with_answers(report, in_step=0.2, coverage=1.0)
    facts = LossFacts(
        name="plugin",
        matches="",
        paper=Paper("A paper", "0000.00000", ""),
        unit="position",
        needs=frozenset(),
        teacher_needs="rows",
        default_weights=Weights(1.0, 1.0),
        measured=None,
        settings={},
        doc="",
    )
    assert advise_on(facts, found, min_coverage=0.95).suits == "careful"
    chunks = replace(facts, needs=frozenset({"chunks"}))
    assert advise_on(chunks, found, min_coverage=0.95).suits == "good"
    hidden = replace(facts, needs=frozenset({"chunks", "hidden"}))
    advice = advise_on(hidden, found, min_coverage=0.95)
    assert (advice.suits, advice.reason) == (
        "unsuited",
        "needs hidden: not with ctkd train, in a loop of your own",
    )

    def broken(name):
        raise PluginError("it\nfails")

    monkeypatch.setattr(doctor, "describe", broken)
    assert {(one.suits, one.reason) for one in advise(found, min_coverage=0.95)} == {
        ("unsuited", "it fails")
    }


def test_chunks_are_marked_on_both_lines_and_long_rows_start_where_they_differ(report):
    row = AlignedRow(
        id="r1",
        coverage=0.8,
        student=(*(Piece(text="x", chunk=n) for n in range(9)), Piece(text=" y", chunk=9))
        + (Piece(text="z", chunk=9), Piece(text="Q" * 200, chunk=-1)),
        teacher=(*(Piece(text="x", chunk=n) for n in range(9)), Piece(text=" yz", chunk=9)),
    )
    found = with_answers(report, worst=(row,))
    coloured = doctor_page(replace(report, request=DoctorRequest(), examination=found))
    page = click.unstyle(coloured)
    assert "student   … [x][x][␣y|z]{QQQ" in page
    assert "teacher   … [x][x][␣yz]" in page
    assert max(map(len, page.splitlines())) <= 110
    for text in ("[␣y|z]", "[␣yz]"):
        assert click.style(text, fg="blue") in coloured


def test_data_cannot_steer_the_terminal(report):
    evil = "\x1b[2J\u202e"
    row = AlignedRow(
        id=evil,
        coverage=0.5,
        student=(Piece(text=evil, chunk=0),),
        teacher=(Piece(text=evil, chunk=-1),),
    )
    differing = DifferingRow(id=evil, student=evil, teacher=evil)
    found = with_answers(report, worst=(row,), differing=1, differing_rows=(differing,))
    verdict = replace(report.verdict, reasons=(evil,))
    losses = [replace(report.losses[0], reason=evil)]
    evil_report = replace(
        report,
        request=replace(report.request, student=evil),
        examination=replace(found, asymmetries=(evil,)),
        losses=losses,
        verdict=verdict,
    )
    page = click.unstyle(doctor_page(evil_report))
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert visible(" \t\n\x1b") == "␣⇥⏎\\x1b"
    assert printable(" a\n") == " a\\n"


def test_requests_are_checked():
    with pytest.raises(SettingError, match="limit must be at least 1"):
        DoctorRequest(limit=0)


@pytest.mark.models
def test_the_packaged_pair_is_sound(monkeypatch):
    monkeypatch.setattr(doctor, "load_tokenizer", real_tokenizers.packaged)
    reports = []

    def kept(*arguments, **options):
        reports.append(run_doctor(*arguments, **options))
        return reports[0]

    monkeypatch.setattr(doctor, "run_doctor", kept)
    words = ["--student", "smollm2-135m-instruct", "--teacher", "gemma-3-270m"]
    assert len(finish("doctor", *words, "--data", "pocketqa").stdout.splitlines()) <= 60
    found = json.loads(json.dumps(reports[0].as_dict()))
    answers = found["examination"]["answers"]
    assert answers["answers"] == 200
    assert answers["coverage"] == 1.0
    assert answers["one_to_one"] > 0.9
    assert found["examination"]["student"]["head"] == {
        "width": 49152,
        "outside": None,
        "spare_special": 0,
        "spare_columns": 0,
    }
    assert {loss["name"]: loss["suits"] for loss in found["losses"]}["alm"] == "good"
