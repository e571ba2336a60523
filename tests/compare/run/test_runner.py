"""A comparison on tiny models: what is trained, measured, kept and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ctkd
from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.records import TEACHER, UNTRAINED
from ctkd.compare.report.report import terminal
from ctkd.compare.run import evaluating, runner
from ctkd.compare.run.folder import read_records
from ctkd.distill.config import EvaluateRequest
from ctkd.distill.evaluation.evaluate import run_evaluation
from ctkd.distill.evaluation.metrics import BITS_PER_BYTE
from ctkd.distill.models import loading as models
from ctkd.distill.teachers import memory
from ctkd.distill.training import run as training
from ctkd.errors import DataError, OutputError, SettingError, TrainingError
from ctkd.registry import describe
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace, record

pytestmark = pytest.mark.slow

LOSSES = ("sft", "uld", "seqkd")
SWEEP = {"learning_rate": (1e-4, 1e-2)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(
        runner, "write_report", lambda comparison, analysis, folder, published: folder / "page"
    )


def config(place: Workplace, output: str, *, common=None, **settings) -> CompareConfig:
    shared = {
        "student": str(place.student), "teacher": str(place.teacher), "data": str(place.rows),
        "task": "text", "max_steps": 4, "logging_steps": 1, "max_new_tokens": 3,
        "device": "cpu", **(common or {}),
    }  # fmt: skip
    defaults = {"losses": LOSSES, "output": str(place.folder / output)}
    return CompareConfig(**{**defaults, "common": shared, **settings})


@pytest.fixture(scope="module")
def done(place) -> Path:
    """The folder of a finished comparison with a sweep and two seeds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(runner, "write_report", lambda *rest, published: Path("page"))
    runner.compare(config(place, "done", seeds=2, sweep=SWEEP), say=lambda line: None)
    patch.undo()
    return place.folder / "done"


@pytest.fixture
def copied(place, done, tmp_path_factory) -> str:
    """Another name for that comparison: a folder that was moved, and may be changed."""
    name = tmp_path_factory.mktemp("copy").name
    shutil.copytree(done, place.folder / name)
    return name


@pytest.fixture
def worked(monkeypatch) -> list[str]:
    """What is trained and loaded, in order."""
    found = []
    train, load = runner.train, evaluating.load_model

    def trained(settings, **rest):
        found.append(f"train {settings.loss} {settings.answers} seed {settings.seed}")
        return train(settings, **rest)

    def loaded(name, **rest):
        found.append(f"load {Path(name).name}")
        return load(name, **rest)

    monkeypatch.setattr(runner, "train", trained)
    monkeypatch.setattr(evaluating, "load_model", loaded)
    return found


def by_stage(folder: Path) -> dict[str, list]:
    found = {"reference": [], "trial": [], "final": []}
    for one in read_records(folder).values():
        found[one.stage].append(one)
    return found


def test_every_method_is_tried_chosen_and_measured_on_equal_terms(place, done):
    records = by_stage(done)
    assert [one.method for one in records["reference"]] == [UNTRAINED, TEACHER]
    assert [(one.method, one.varied["learning_rate"]) for one in records["trial"]] == [
        (loss, rate) for loss in LOSSES for rate in SWEEP["learning_rate"]
    ]
    assert [(one.seed, one.method) for one in records["final"]] == [
        (seed, loss) for seed in (0, 1) for loss in LOSSES
    ]
    choices = json.loads((done / "comparison.json").read_text())["choices"]
    for method in LOSSES:
        trials = [one for one in records["trial"] if one.method == method]
        best = max(trials, key=lambda one: (one.metrics["rouge_lsum"], -one.losses["ce"]))
        assert choices[method]["varied"] == best.varied
        assert choices[method]["trial"] == best.key
        assert {str(one.varied) for one in records["final"] if one.method == method} == {
            str(best.varied)
        }
    tests = [one for stage in ("reference", "final") for one in records[stage]]
    assert len({tuple((each.id, each.prompt) for each in one.answers) for one in tests}) == 1
    for one in (*records["trial"], *records["final"]):
        assert one.steps == 4
        logged = [entry for entry in one.history if "ce" in entry]
        assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
        assert [entry["step"] for entry in one.history if "eval_ce" in entry] == [1, 2, 3, 4]
        assert one.seconds > 0
        assert one.metrics["f1"] == pytest.approx(
            sum(each.scores["f1"] for each in one.answers) / len(one.answers)
        )
        bits = [each.scores["given_bits_per_byte"] * each.given_bytes for each in one.answers]
        size = sum(len(each.references[0].encode()) for each in one.answers)
        assert one.metrics["given_bits_per_byte"] == pytest.approx(sum(bits) / size)


def test_methods_may_be_compared_by_the_bits_of_given_answers(place):
    settings = {"losses": ("sft", "uld")}
    by_f1 = runner.compare(config(place, "by-bits", **settings), say=lambda line: None)
    settings["metric"] = "given_bits_per_byte"
    outcome = runner.compare(config(place, "by-bits", **settings), say=lambda line: None)
    assert [one.key for one in outcome.comparison.finals] == [
        one.key for one in by_f1.comparison.finals
    ]
    assert {one.method for one in outcome.comparison.references} == {UNTRAINED, TEACHER}
    for one in (*outcome.comparison.references, *outcome.comparison.finals):
        assert one.metrics["given_bits_per_byte"] > 0
    results = {one.method: one for one in outcome.analysis.methods}
    (final,) = [one for one in outcome.comparison.finals if one.method == "uld"]
    assert results["uld"].mean == pytest.approx(final.metrics["given_bits_per_byte"])


def test_all_methods_begin_with_one_student_and_read_the_same_rows_in_one_order(done):
    for seed in (0, 1):
        first = {
            one.method: next(entry["ce"] for entry in one.history if "ce" in entry)
            for one in by_stage(done)["final"]
            if one.seed == seed
        }
        assert first["sft"] == first["uld"]
        # It trains on other answers.
        assert first["seqkd"] != first["sft"]


def test_a_trial_that_diverges_is_passed_over(place):
    settings = {"losses": ("sft",), "sweep": {"learning_rate": (1e30, 1e-3)}}
    said = []
    outcome = runner.compare(config(place, "diverging", **settings), say=said.append)
    title = "sft learning_rate=1e+30, seed 0"
    (line,) = [line for line in said if line.endswith("this trial is passed over")]
    assert line.startswith(f"{title}: ") and "training has diverged" in line
    assert [trial.varied for trial in outcome.comparison.trials] == [{"learning_rate": 1e-3}]
    assert outcome.comparison.settings["diverged trials"] == title
    assert not list((place.folder / "diverging").glob("runs/*/checkpoint-*"))
    # It is not tried again.
    said.clear()
    again = runner.compare(config(place, "diverging", **settings), say=said.append)
    assert again.comparison.trials == outcome.comparison.trials
    assert not [line for line in said if "passed over" in line or line.startswith("run ")]


def test_a_method_all_of_whose_trials_diverge_ends_a_comparison(place):
    settings = {"losses": ("sft",), "sweep": {"learning_rate": (1e30, 1e31)}}
    with pytest.raises(TrainingError, match="all trials of sft have diverged; give it others"):
        runner.compare(config(place, "hopeless", **settings), say=lambda line: None)
    single = {"losses": ("sft",), "common": {"learning_rate": 1e30}}
    with pytest.raises(TrainingError, match=r"^sft, seed 0: .* training has diverged"):
        runner.compare(config(place, "lone", **single), say=lambda line: None)


def test_one_run_serves_the_trial_and_the_report(done):
    folders = list((done / "runs").iterdir())
    assert len(folders) == 2 * len(LOSSES) + len(LOSSES)
    files = sorted(len(list(one.glob("predictions-*.jsonl"))) for one in folders)
    # One split for trials that lost and for the second seed, both for the winners.
    assert files == [1] * 6 + [2] * 3


def test_weights_go_when_nothing_will_be_asked_of_them(place, done):
    assert not list(done.glob("runs/*/*.safetensors"))
    assert not list(done.glob("runs/*/checkpoint-*"))
    assert len(list(done.glob("runs/*/ctkd.json"))) == 9


def test_a_finished_comparison_is_only_looked_up(place, copied, worked):
    folder = place.folder / copied
    before = (folder / "results.jsonl").read_bytes()
    said = []
    outcome = runner.compare(config(place, copied, seeds=2, sweep=SWEEP), say=said.append)
    assert worked == []
    assert (folder / "results.jsonl").read_bytes() == before
    assert outcome.comparison.methods == list(LOSSES)
    assert outcome.analysis.baseline == "sft"
    assert not any("run 1 of" in line for line in said)


def test_the_settings_say_what_was_trained_how_and_with_what(place, copied, worked):
    again = config(place, copied, seeds=2, sweep=SWEEP, published_task="fairytaleqa")
    comparison = runner.compare(again, say=lambda line: None).comparison
    found = comparison.settings
    assert worked == []
    assert found["published task"] == "fairytaleqa"
    splits = (found["training rows"], found["development rows"], found["test rows"])
    assert all(isinstance(one, int) for one in (*splits, found["curve rows"]))
    assert found["curve rows"] == found["development rows"]
    assert not {"development split", "test split"} & found.keys()
    size = json.loads((place.folder / copied / "teacher" / "cache.json").read_text())["vocab_size"]
    assert found["teacher logits"] == f"top 256 of {size}, cached, asked in float32"
    assert (found["device"], found["threads"]) == ("cpu", "1")
    assert (found["torch"], found["ctkd"]) == (torch.__version__, ctkd.__version__)
    assert "transformers" in found
    # A loss's own weights are where they take effect.
    assert "ce_weight" not in found
    (uld, *_) = comparison.of("uld")
    assert (uld.settings["ce_weight"], uld.settings["kd_weight"]) == describe("uld").default_weights
    assert uld.settings["loss_options"] == describe("uld").settings


def test_losses_and_seeds_may_be_added_in_another_environment(place, copied, worked, monkeypatch):
    monkeypatch.setattr(training, "__version__", "99")
    more = config(place, copied, losses=(*LOSSES, "mined"), seeds=3, sweep=SWEEP)
    outcome = runner.compare(more, say=lambda line: None)
    trained = [one for one in worked if one.startswith("train")]
    assert trained == [
        *["train mined data seed 0"] * 2,
        "train mined data seed 1",
        *("train sft data seed 2", "train uld data seed 2", "train sft teacher seed 2"),
        "train mined data seed 2",
    ]
    assert outcome.comparison.seeds == [0, 1, 2]
    assert outcome.comparison.settings["ctkd"] == f"{ctkd.__version__}, 99"
    assert outcome.comparison.settings["device"] == "cpu"
    # Each was measured once; a winner twice.
    assert len([one for one in worked if one.startswith("load")]) == 8


def test_the_teacher_is_loaded_once_to_make_the_cache_and_models_are_kept_if_asked(
    place, monkeypatch
):
    loaded = []
    original = AutoModelForCausalLM.from_pretrained

    def load(source, *rest, **settings):
        loaded.append(Path(source).name.split("-")[0])
        return original(source, *rest, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    runner.compare(config(place, "once", keep_models=True), say=lambda line: None)
    # The student to know what it can read, then untrained, then trained and measured by each loss.
    assert loaded == [
        *("student", "teacher", "student"),
        *(name for loss in LOSSES for name in ("student", loss)),
    ]
    kept = list((place.folder / "once").glob("runs/*/model.safetensors"))
    assert len(kept) == len(LOSSES)


def test_a_cache_that_is_there_is_used(place, done, worked):
    runner.compare(
        config(place, "with-cache", losses=("uld",), sweep=SWEEP, cache=str(done / "teacher")),
        say=lambda line: None,
    )
    assert not (place.folder / "with-cache" / "teacher").exists()
    ours, theirs = (
        [one for one in by_stage(folder)["trial"] if one.method == "uld"]
        for folder in (place.folder / "with-cache", done)
    )
    assert len(ours) == 2
    assert [one.answers for one in ours] == [one.answers for one in theirs]
    assert [one.losses for one in ours] == [one.losses for one in theirs]


def test_a_cache_of_other_rows_is_refused_before_anything_is_trained(place, done, worked):
    rows = place.folder / "others.jsonl"
    rows.write_text(place.rows.read_text().replace("train", "cat"))
    other = config(place, "other-rows", cache=str(done / "teacher"), common={"data": str(rows)})
    with pytest.raises(DataError) as caught:
        runner.compare(other, say=lambda line: None)
    assert "not in the teacher cache" in str(caught.value)
    assert worked == []


def test_a_cache_without_training_texts_is_refused_before_anything_is_trained(place, worked):
    made = config(place, "no-texts", losses=("uld",))
    runner.compare(made, say=lambda line: None)
    worked.clear()
    cache = str(place.folder / "no-texts" / "teacher")
    for live in (False, True):
        settings = {"cache": cache, "live_teacher": live}
        with pytest.raises(DataError) as caught:
            runner.compare(config(place, f"written-{live}", **settings), say=lambda line: None)
        assert "holds no answer of the teacher to example" in str(caught.value)
        assert "--texts all" in str(caught.value)
    assert worked == []
    others = config(place, "written-not", losses=("sft",), cache=cache)
    runner.compare(others, say=lambda line: None)


def test_whole_rows_are_asked_of_a_live_teacher(place, worked):
    losses = ("mined:form=dense",)
    with pytest.raises(SettingError) as caught:
        runner.compare(config(place, "rows", losses=losses, top_k=16), say=lambda line: None)
    assert "mined form=dense needs whole rows of the teacher's logits" in str(caught.value)
    assert "--live-teacher, or keep all of them with --top-k" in str(caught.value)
    assert worked == []
    live = config(place, "live", losses=losses, live_teacher=True)
    outcome = runner.compare(live, say=lambda line: None)
    (run,) = outcome.comparison.finals
    folder = next((place.folder / "live" / "runs").glob("mined*"))
    assert record(folder)["settings"]["teacher_cache"] is None
    assert outcome.comparison.settings["teacher logits"] == "live, asked in float32"
    assert "kd" in run.history[0]


def test_documents_are_compared_in_bits_per_byte(place, worked, monkeypatch):
    rows = place.folder / "documents.jsonl"
    texts = [f"{tiny.TEXTS[n % 4]} {n}{' the' * 120 * (n % 2)}" for n in range(12)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lm = {"task": "lm", "data": str(rows), "learning_rate": 0.03, "batch_size": 8}
    outcomes, read, pad = {}, [], memory.padded_sides
    monkeypatch.setattr(
        memory, "padded_sides", lambda s, *a, **k: read.append(str(s)) or pad(s, *a, **k)
    )
    live_losses = "sft", "shared_kl", "shared_kl:temperature=2.0"
    for output, losses in (("lm-live", live_losses), ("lm-cached", ("sft", "uld"))):
        settings = config(place, output, losses=losses, common=lm)
        outcomes[output] = runner.compare(settings, say=lambda line: None)
    assert not (place.folder / "lm-live" / "teacher").exists()
    # Both losses saw the teacher's states of one reading.
    assert read and len(set(read)) == len(read)
    kept = (place.folder / "lm-live" / "data" / "train.jsonl").read_text().splitlines()
    parts = [json.loads(line) for line in kept]
    assert {one["ends"] for one in parts} == {True, False}
    live, cached = (outcomes[name].comparison for name in ("lm-live", "lm-cached"))
    assert (live.settings["teacher logits"], live.metric) == (
        "live, asked in float32",
        BITS_PER_BYTE,
    )
    assert "cached" in cached.settings["teacher logits"]
    # What is asked of the teacher's logits moves nothing of plain training, nor of references.
    for ours, theirs in zip(
        (*live.references, live.finals[0]), (*cached.references, cached.finals[0]), strict=True
    ):
        assert ours.method == theirs.method and ours.answers == theirs.answers
    untrained, teacher = live.references
    sft, shared_kl, warm = live.finals
    assert sft.metrics[BITS_PER_BYTE] < untrained.metrics[BITS_PER_BYTE] - 0.1
    assert len({one.metrics[BITS_PER_BYTE] for one in (sft, shared_kl, warm)}) == 3
    # Each text has its own bits per byte, of which long ones count as much as they are long.
    assert {one.weight for one in sft.answers} == {
        float(len(text.encode())) for one in sft.answers for text in one.references
    }
    assert len({one.weight for one in sft.answers}) > 1
    total = sum(one.weight for one in sft.answers)
    bits = sum(one.weight * one.scores[BITS_PER_BYTE] for one in sft.answers)
    assert sft.metrics[BITS_PER_BYTE] == pytest.approx(bits / total, rel=1e-12)
    assert max(one.scores[BITS_PER_BYTE] for one in untrained.answers) < 16
    # The teacher's figure, and the untrained student's, are those of `ctkd evaluate`.
    test = place.folder / "lm-live" / "data" / "test.jsonl"
    for reference, model in ((untrained, place.student), (teacher, place.teacher)):
        found = run_evaluation(
            EvaluateRequest(model=str(model), data=str(test), task="lm", device="cpu"),
            say=lambda line: None,
        )
        assert reference.metrics[BITS_PER_BYTE] == pytest.approx(found[BITS_PER_BYTE], rel=1e-5)
    shown = terminal(live, outcomes["lm-live"].analysis)
    assert f"{sft.metrics[BITS_PER_BYTE]:.4f}" in shown and "F1" not in shown
    refused = config(place, "lm-random", common={"student": "pocket-llama"})
    with pytest.raises(SettingError, match="cannot learn to answer in a short run"):
        runner.compare(refused, say=lambda line: None)


def test_each_seed_has_weights_of_its_own_that_all_methods_begin_from(place, monkeypatch):
    source = place.folder / "small.json"
    settings = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    source.write_text(json.dumps(settings))
    trained, train = [], runner.train

    def recorded(config, **rest):
        trained.append(config)
        return train(config, **rest)

    monkeypatch.setattr(runner, "train", recorded)
    common = {"student": None, "student_config": str(source), "max_steps": 2}
    found = runner.compare(
        config(place, "drawn", losses=("sft", "uld"), common=common), say=lambda line: None
    )
    # Seeds may be added, and the cache of the first serves them.
    more = config(place, "drawn", losses=("sft", "uld"), common=common, seeds=2)
    found = runner.compare(more, say=lambda line: None).comparison
    assert [(one.loss, one.seed) for one in trained] == [
        ("sft", 0), ("uld", 0), ("sft", 1), ("uld", 1),
    ]  # fmt: skip
    students = [one.student for one in trained]
    assert students[0] == students[1] != students[2] == students[3]
    first, second = (models.load_model(name).state_dict() for name in students[::2])
    assert any(not torch.equal(first[name], second[name]) for name in first)
    vocabularies = [models.load_tokenizer(name).get_vocab() for name in students]
    assert all(one == vocabularies[0] for one in vocabularies)
    assert {one.learning_rate for one in trained} == {2e-3}
    # Before a step, both methods of a seed are at one loss.
    losses = {(one.method, one.seed): one.history[0]["ce"] for one in found.finals}
    assert losses["sft", 0] == pytest.approx(losses["uld", 0], rel=1e-5)
    assert losses["sft", 1] == pytest.approx(losses["uld", 1], rel=1e-5)
    assert abs(losses["sft", 0] - losses["sft", 1]) > 1e-3
    assert "tokens; random, others for each seed, the same" in found.settings["initial weights"]
    assert found.finals[0].settings["student_config"] == str(source)
    source.write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    with pytest.raises(OutputError, match="was begun with other models"):
        runner.compare(more, say=lambda line: None)
    source.write_text(json.dumps({**settings, "vocab_size": settings["vocab_size"] + 10}))
    with pytest.raises(OutputError, match=r"was begun with other tokenizers \(student\)"):
        runner.compare(more, say=lambda line: None)


def test_a_temperature_that_the_cache_was_not_made_for_is_refused(place, copied, worked):
    warm = config(place, copied, losses=(*LOSSES, "uld:teacher_temperature=3.0"), sweep=SWEEP)
    with pytest.raises(OutputError, match="was not made for temperature 3, which"):
        runner.compare(warm, say=lambda line: None)
    assert worked == []
    hot = config(place, "hot", losses=("sft", "uld:teacher_temperature=3.0"))
    runner.compare(hot, say=lambda line: None)
    # A cache that knows more is not made anew for a method less.
    runner.compare(config(place, "hot", losses=("sft",)), say=lambda line: None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"common": {"max_steps": 5}}, "max_steps 4 -> 5"),
        ({"common": {"seed": 1}}, "seed 0 -> 1"),
        ({"top_k": 64}, "top_k 256 -> 64"),
        ({"sweep": {"learning_rate": (1e-4, 1e-3)}}, "sweep of sft"),
        ({"sweep": {}}, "sweep True -> False"),
        ({"metric": "f1"}, "metric 'rouge_lsum' -> 'f1'"),
    ],
)
def test_other_settings_than_at_the_beginning_are_refused(
    place, done, worked, monkeypatch, settings, said
):
    before = (done / "comparison.json").read_bytes()
    with pytest.raises(OutputError) as caught:
        runner.compare(config(place, "done", **{"sweep": SWEEP, **settings}))
    assert said in str(caught.value)
    assert ("metric" in str(caught.value)) == ("metric" in settings)
    assert "choose another --output" in str(caught.value)
    monkeypatch.setattr("ctkd.compare.run.folder.source_fingerprint", lambda _: "edited")
    with pytest.raises(OutputError, match="source of uld None -> 'edited'"):
        runner.compare(config(place, "done", sweep=SWEEP))
    assert worked == []
    assert (done / "comparison.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(place):
    (place.folder / "thesis").mkdir()
    (place.folder / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="it is no comparison"):
        runner.compare(config(place, "thesis"))
    with pytest.raises(OutputError, match="is a file"):
        runner.compare(config(place, "thesis/thesis.tex"))
    assert [one.name for one in (place.folder / "thesis").iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_work_in_one_folder(place, copied, monkeypatch):
    same = config(place, copied, seeds=2, sweep=SWEEP)
    refused = []

    def nested(settings, folder, say):
        monkeypatch.undo()
        with pytest.raises(OutputError) as caught:
            runner.compare(same, say=say)
        refused.append(str(caught.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare", nested)
    with pytest.raises(KeyboardInterrupt):
        runner.compare(same, say=lambda line: None)
    assert "another process works in" in refused[0]


def test_a_record_that_was_lost_is_made_again(place, copied, worked, monkeypatch):
    monkeypatch.setattr(runner, "give_back_freed_memory", lambda: worked.append("give back"))
    folder = place.folder / copied
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    lost = [line for line in lines if '"stage": "final"' in line][-2:]
    (folder / "results.jsonl").write_text("".join(line for line in lines if line not in lost))
    before = read_records(place.folder / "done")
    runner.compare(config(place, copied, seeds=2, sweep=SWEEP), say=lambda line: None)
    assert [one for one in worked if not one.startswith("load")] == [
        "give back",
        "train uld data seed 1",
        "give back",
        "train sft teacher seed 1",
    ]
    found = read_records(folder)
    assert found.keys() == before.keys()
    for key, one in found.items():
        assert (one.answers, one.losses) == (before[key].answers, before[key].losses)


def test_progress_says_which_run_it_is_and_how_long_the_rest_takes(place):
    said = []
    rows = {"eval_data": str(place.rows), "eval_limit": 3}
    quick = config(place, "told", losses=("sft", "uld:kd_weight=0.15"), seeds=2, common=rows)
    outcome = runner.compare(quick, say=said.append)
    assert outcome.comparison.settings["test rows"] == 3
    assert outcome.comparison.settings["test split"] == "first 3 of 20"
    runs = [line for line in said if line.startswith("run ")]
    assert [line.split(";")[0] for line in runs] == [
        "run 1 of 4: sft, seed 0",
        "run 2 of 4: uld kd_weight=0.15, seed 0",
        "run 3 of 4: sft, seed 1",
        "run 4 of 4: uld kd_weight=0.15, seed 1",
    ]
    assert "to go" not in runs[0]
    assert all(" so far, about " in line and line.endswith(" to go") for line in runs[1:])
    (prepared,) = [line for line in said if line.startswith("done once, before any run: ")]
    assert "teacher cache" in prepared and "vocabulary maps" in prepared
