"""Answers and losses of a model, and the command that measures them alone."""

import json
from dataclasses import replace

import pytest

import ctkd
from ctkd.distill.config import EvaluateRequest
from ctkd.distill.data.prompts import encode_prompt
from ctkd.distill.data.rows import Rows
from ctkd.distill.evaluation import evaluate as evaluate_command
from ctkd.distill.evaluation.evaluate import answer, held_out_losses
from ctkd.distill.models.generation import generate
from tests.distill import tiny
from tests.distill.tiny_runs import ANSWER, Workplace, error_of, finish, invoke, record


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """With a run that has learned its answer."""
    place = Workplace(tmp_path_factory.mktemp("place"))
    finish(
        *place.train("run", "--max-steps", "20", "--learning-rate", "0.03"),
        *("--eval-data", str(place.rows), "--loss", "uld", "--kd-weight", "0.1"),
    )
    return place


def scores(result) -> dict[str, float]:
    return json.loads(result.stdout)


def test_each_example_is_answered_from_its_own_prompt():
    setup = tiny.Setup()
    examples = tiny.examples(5)
    found = answer(setup.student, setup.student_tokenizer, examples, max_new_tokens=4, batch_size=2)
    for one, example in zip(found, examples, strict=True):
        alone = generate(
            setup.student,
            setup.student_tokenizer,
            [encode_prompt(setup.student_tokenizer, example.prompt)],
            max_new_tokens=4,
        )
        assert one.prediction == alone[0].text
        assert (one.id, one.prompt, one.references) == (
            example.id,
            example.prompt,
            example.references,
        )


def test_losses_do_not_depend_on_batches_and_change_nothing():
    setup = tiny.Setup()
    before = {name: value.clone() for name, value in setup.student.state_dict().items()}
    settings = {
        "loss": ctkd.get_loss("multilevelot"),
        "teacher": setup.teacher,
        "teacher_tokenizer": setup.teacher_tokenizer,
        "use_cpu": True,
    }
    small, large = (
        held_out_losses(
            setup.student, setup.student_tokenizer, setup.rows, batch_size=size, **settings
        )
        for size in (1, 6)
    )
    assert list(small) == ["ce", "kd", "kd/had", "kd/sl", "kd/sd"]
    for name in small:
        assert small[name] == pytest.approx(large[name], rel=1e-9), name
    alone = held_out_losses(setup.student, setup.student_tokenizer, setup.rows, use_cpu=True)
    assert list(alone) == ["ce"]
    assert alone["ce"] == pytest.approx(small["ce"], rel=1e-9)
    assert all((value == before[name]).all() for name, value in setup.student.state_dict().items())


def test_a_model_scores_as_its_training_run_said(place):
    found = scores(
        finish(
            *place.evaluate(str(place.folder / "run"), "--format", "json"),
            *("--loss", "uld", "--teacher", str(place.teacher)),
        )
    )
    results = record(place.folder / "run")["results"]
    same = {name: found[name] for name in results["student after"]}
    assert same == pytest.approx(results["student after"], rel=1e-6)
    assert found["f1"] > 0
    losses = {name: value for name, value in found.items() if name.startswith(("ce", "kd"))}
    assert losses == pytest.approx(results["losses after"], rel=1e-6)
    assert losses.keys() == results["losses after"].keys()


def test_options_reach_the_loss(place):
    words = place.evaluate(str(place.student), "--loss", "uld", "--teacher", str(place.teacher))
    plain = scores(finish(*words, "--format", "json"))
    hot = scores(finish(*words, "--format", "json", "--loss-option", "student_temperature=1e2"))
    assert plain["ce"] == hot["ce"]
    assert plain["kd"] != pytest.approx(hot["kd"], rel=1e-3)


def test_given_answers_are_the_data_s_or_what_a_teacher_writes(place, tmp_path, monkeypatch):
    student, teacher = str(place.folder / "run"), str(place.teacher)
    answers = tmp_path / "answers.jsonl"
    finish(*place.evaluate(teacher, "--output", str(answers)))
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    rows = [{"asked": one["prompt"], "answer": f" {one['prediction']}"} for one in written]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row["answer"].strip()))
    words = place.evaluate(student, "--answers", "teacher", "--teacher", teacher, "--loss", "uld")
    found = scores(finish(*words, "--format", "json"))
    words = place.evaluate(student, "--loss", "uld", "--teacher", teacher, "--data", str(data))
    same = scores(finish(*words, "--column", "prompt=asked", "--format", "json"))
    for name in ("given_bits_per_byte", "ce", "kd"):
        assert found[name] == pytest.approx(same[name], rel=1e-6), name
    assert found["f1"] == scores(finish(*place.evaluate(student, "--format", "json")))["f1"] > 0

    def silent_at_first(*arguments, **options):
        first, *rest = answer(*arguments, **options)
        is_teacher = options["progress"] == "teacher, answering"
        return [replace(first, prediction="") if is_teacher else first, *rest]

    # The model's own answers are scored to all prompts.
    monkeypatch.setattr(evaluate_command, "answer", silent_at_first)
    words = place.evaluate(student, "--answers", "teacher", "--teacher", teacher)
    result = finish(*words, "--format", "json")
    assert scores(result)["n"] == 20 and " wrote, to 19 of 20" in result.stderr
    # Names of columns are those of the run, where the data lack the field and have the column.
    path = tmp_path / "told" / "ctkd.json"
    path.parent.mkdir()
    told = record(place.folder / "run")
    told["settings"]["columns"] = {"prompt": "asked", "answer": "gone"}
    path.write_text(json.dumps(told))
    said = []
    request = EvaluateRequest(model=str(path.parent), data=str(data))
    found = evaluate_command._examples(request, said.append)
    assert [one.prompt for one in found] == [row["asked"] for row in rows if row["answer"].strip()]
    assert said == ["columns as in training: prompt=asked"]


def test_a_file_of_answers_scores_as_the_model_did(place, tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    words = place.evaluate(str(place.folder / "run"), "--limit", "7", "--format", "json")
    shown = finish(*words, "--output", str(file))
    assert f"answers: {file}" in shown.stderr
    found = scores(shown)
    assert found["n"] == 7
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(7)]
    # A file does not say what probability the model gave the answers of the data.
    assert found.pop("given_bits_per_byte") > 0
    assert scores(finish("evaluate", "--predictions", str(file), "--format", "json")) == found
    before = file.read_bytes()
    assert "exists already" in error_of(invoke(*words, "--output", str(file)))
    assert file.read_bytes() == before
    file.write_text("something else")
    finish(*words, "--output", str(file), "--overwrite")
    assert file.read_bytes() == before
    with_data = place.evaluate("--predictions", str(file), "--format", "json", "--limit", "7")
    assert scores(finish(*with_data)) == found
    assert "no prediction for 'r7'" in error_of(invoke(*place.evaluate("--predictions", str(file))))


def test_answers_without_references_are_matched_with_the_data(place, tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [{"id": f"r{n}", "prediction": ANSWER if n < 5 else "a dog"} for n in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    words = place.evaluate("--predictions", str(file), "--format", "json")
    found = scores(finish(*words))
    assert (found["exact_match"], found["n"]) == (25.0, 20)
    # The first ten of the data, wherever their answers stand in the file.
    limited = scores(finish(*words, "--limit", "10"))
    assert (limited["exact_match"], limited["n"]) == (50.0, 10)


def test_the_table_shows_counts_in_full(place, monkeypatch):
    found = {"f1": 12.3456789, "n": 1234567}
    monkeypatch.setattr(evaluate_command, "run_evaluation", lambda request, overwrite, say: found)
    assert [line.split() for line in finish("evaluate", "model").stdout.splitlines()] == [
        ["measure", "value"],
        ["---------", "-------"],
        ["f1", "12.35"],
        ["n", "1234567"],
    ]


def test_the_embedded_sets_test_part_is_the_default(monkeypatch):
    asked = []

    def parts(source, *, held_out):
        asked.append((source, held_out))
        return [Rows("some", [{}])]

    monkeypatch.setattr(evaluate_command, "load_parts", parts)
    monkeypatch.setattr(evaluate_command, "examples", lambda *arguments: [1, 2, 3])
    request = EvaluateRequest(limit=2)
    assert evaluate_command._examples(request, print) == [1, 2]
    evaluate_command._examples(EvaluateRequest(data="rows.jsonl"), print)
    assert asked == [("pydocs", True), ("rows.jsonl", True)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a MODEL to evaluate, or a file of answers with --predictions"),
        (["--predictions", "no-such.jsonl"], "cannot read predictions from no-such.jsonl"),
        (["--predictions", "x", "--loss", "uld"], "--loss belongs to a model; name a MODEL"),
        (["--predictions", "x", "--output", "y"], "--output belongs to a model; name a MODEL"),
        (["MODEL", "--predictions", "x"], "written to the file of --output"),
        (["MODEL", "--data", "ROWS", "--output", "ROWS"], "holds the data; name another file"),
        (
            ["MODEL", "--data", "ROWS", "--output", "ROWS", "--overwrite"],
            "holds the data; name another file",
        ),
        (["MODEL", "--limit", "0"], "limit must be at least 1, got 0"),
        (["MODEL", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["MODEL", "--max-new-tokens", "-1"], "max_new_tokens must be at least 1, got -1"),
        (["MODEL", "--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
        (["MODEL", "--loss", "ulld"], "unknown loss 'ulld'. Did you mean 'uld'?"),
        (["MODEL", "--loss", "uld", "--loss-option", "topk=3"], "Did you mean 'top_k'?"),
        (["MODEL", "--loss-option", "k=3"], "belongs to a loss; name it with --loss"),
        (["MODEL", "--teacher", "gemma-3-270m"], "add --loss, --next-bytes or --answers teacher"),
        (["MODEL", "--data", "no-such.jsonl"], "no-such.jsonl does not exist"),
        (["MODEL", "--column", "prompt"], "a column is FIELD=COLUMN"),
        (["./no-such-model"], "there is no folder ./no-such-model"),
        (["MODEL", "--loss", "uld", "--teacher", "./none"], "there is no folder ./none"),
        (["MODEL", "--output", "ROWS/below"], "Not a directory; name a file in a folder"),
        (["MODEL", "--output", "FOLDER"], "is a folder; name a file for the answers"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_answers(place, monkeypatch, words, message):
    def never(*arguments, **settings):
        raise AssertionError("answered in vain")

    monkeypatch.setattr(evaluate_command, "answer", never)
    places = {"MODEL": place.student, "FOLDER": place.folder}
    words = [str(places.get(word, word)).replace("ROWS", str(place.rows)) for word in words]
    assert message in error_of(invoke(*place.evaluate(*words)))


def test_a_stop_has_nothing_to_resume(place, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_command, "answer", interrupted)
    said = error_of(invoke(*place.evaluate(str(place.student))))
    assert said == "stopped; repeat the command"
