"""Which runs a comparison has, and when two of them are one."""

import dataclasses
import enum
from pathlib import Path

import pytest

from ctkd.compare.plan import jobs as plans
from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.plan.jobs import Job, Plan, best_trial
from ctkd.compare.plan.splits import Split, Splits
from ctkd.compare.records import Record
from ctkd.errors import SettingError
from ctkd.registry import describe
from tests.distill import tiny

MODELS = {"student": "s", "teacher": "t"}
COMMON = {"student": "s", "teacher": "t", "data": "rows.jsonl"}
SWEEP = {"learning_rate": (1e-5, 1e-4)}


def splits(*, dev: bool = False, **fingerprints: str) -> Splits:
    def one(name: str, count: int) -> Split:
        return Split(
            name=name,
            path=Path("data", f"{name}.jsonl"),
            examples=tuple(tiny.examples(count)),
            fingerprint=fingerprints.get(name.replace("-", "_"), name),
        )

    return Splits(
        train=one("train", 10),
        dev=one("dev", 4) if dev else None,
        test=one("test", 6),
        curve=one("curve", 4),
        held_out=one("held-out", 6),
    )


def plan(
    losses=("sft", "uld"), *, rows: Splits | None = None, models=MODELS, live=False, **settings
) -> Plan:
    common = {**COMMON, **settings.pop("common", {})}
    config = CompareConfig(losses=losses, common=common, **settings)
    rows = rows or splits(dev=bool(config.sweep))
    cache = Path("cache")
    return Plan(config, rows, models, cache=None if live else cache, texts=cache)


def finals(found: Plan) -> list[Job]:
    return found.finals({one.name: one.points()[0] for one in found.config.methods})


def test_without_a_sweep_there_are_no_trials():
    found = plan(seeds=2)
    assert found.trials() == []
    jobs = finals(found)
    assert [(job.method.name, job.seed) for job in jobs] == [
        ("sft", 0), ("uld", 0), ("sft", 1), ("uld", 1)
    ]  # fmt: skip
    assert {(job.stage, job.split) for job in jobs} == {("final", "test")}
    assert len({job.key for job in jobs}) == len({job.training.folder for job in jobs}) == 4


def test_the_winner_of_the_trials_is_the_run_that_is_reported_for_its_seed():
    found = plan(seeds=3, sweep=SWEEP)
    trials = found.trials()
    assert [(job.method.name, job.varied["learning_rate"], job.seed) for job in trials] == [
        ("sft", 1e-5, 0), ("sft", 1e-4, 0), ("uld", 1e-5, 0), ("uld", 1e-4, 0)
    ]  # fmt: skip
    assert {(job.stage, job.split) for job in trials} == {("trial", "dev")}
    jobs = found.finals({"sft": {"learning_rate": 1e-4}, "uld": {"learning_rate": 1e-5}})
    assert jobs[0].training is trials[1].training
    assert jobs[1].training is trials[2].training
    assert jobs[0].key != trials[1].key
    assert len({job.training.key for job in [*trials, *jobs]}) == 4 + 4


def test_methods_of_equal_settings_share_their_runs_but_not_their_records():
    jobs = finals(plan(("a=uld:kd_weight=2", "uld:kd_weight=2", "uld")))
    assert jobs[0].training is jobs[1].training is not jobs[2].training
    assert len({job.key for job in jobs}) == 3


def keys(found: Plan) -> dict[str, tuple[str, str]]:
    first = found.config.seed_values[0]
    return {
        job.method.name: (job.training.key, job.key) for job in finals(found) if job.seed == first
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"output": "elsewhere"},
        {"common": {"save_steps": 1, "logging_steps": 2, "device": "cpu", "report_to": "all"}},
        {"keep_models": True},
        {"published": ("a.json",)},
        {"published_task": "fairytaleqa"},
        {"metric": "exact_match"},
        {"baseline": "uld"},
        {"seeds": 5},
        {"losses": ("uld", "mined", "sft")},
        {"models": MODELS, "live": True},
        {"rows": dataclasses.replace(splits(), held_out=splits(held_out="more").held_out)},
        {"common": {"max_steps": 3}},
    ],
    ids=str,
)
def test_what_changes_no_result_changes_no_key(settings):
    found = keys(plan(**settings))
    before = keys(plan())
    for name in ("sft", "uld"):
        assert found[name] == before[name]


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"rows": splits(train="others")}, set()),
        ({"rows": splits(curve="others")}, set()),
        ({"models": {"student": "s2", "teacher": "t"}}, set()),
        ({"models": {"student": "s", "teacher": "t2"}}, {"sft"}),
        ({"losses": ("sft", "seqkd"), "models": {"student": "s", "teacher": "t2"}}, {"sft"}),
        ({"common": {"seed": 1}}, set()),
        ({"common": {"learning_rate": 1e-3}}, set()),
        ({"common": {"batch_size": 2}}, set()),
        ({"common": {"dtype": "bfloat16"}}, set()),
        ({"curve_points": 2}, set()),
    ],
    ids=str,
)
def test_what_changes_a_result_changes_its_key(settings, same):
    losses = settings.pop("losses", ("sft", "uld"))
    found, before = keys(plan(losses, **settings)), keys(plan(losses))
    for name in losses:
        assert (found[name][0] == before[name][0]) == (name in same)
        assert (found[name][1] == before[name][1]) == (name in same)


def test_other_test_rows_make_other_records_of_the_same_run():
    found, before = keys(plan(rows=splits(test="others"))), keys(plan())
    assert found["sft"][0] == before["sft"][0]
    assert found["sft"][1] != before["sft"][1]


def test_a_run_reads_the_written_rows_and_asks_the_cache():
    sft, uld, seqkd = finals(plan(("sft", "uld", "seqkd"), output="out", common={"task": "text"}))
    config = uld.training.config
    assert (config.data, config.eval_data) == ("data/train.jsonl", "data/curve.jsonl")
    assert config.columns == {"id": "id", "group": "group", "ends": "ends"}
    assert (config.measure, config.teacher_cache) == ("nothing", "cache")
    assert sft.training.config.teacher_cache is None
    assert seqkd.training.config.teacher_cache == "cache"
    assert config.folder.parent == Path("out", "runs")
    assert config.folder.name.startswith("uld-seed0-")
    # What a record shows names the user's own data.
    assert uld.training.settings["data"] == "rows.jsonl"
    assert "output" not in uld.training.settings


def test_a_record_shows_what_takes_effect_and_the_run_what_was_given():
    sft, mined, uld = finals(plan(("sft", "mined:k=3", "uld:kd_weight=0.5:ce_weight=0")))
    assert (mined.training.config.kd_weight, mined.training.config.loss_options) == (None, {"k": 3})
    shown = [
        [job.training.settings[name] for name in ("ce_weight", "kd_weight")]
        for job in (sft, mined, uld)
    ]
    assert shown == [[1.0, 0.0], [0.9, 0.1], [0, 0.5]]
    assert sft.training.settings["loss_options"] == {}
    options = mined.training.settings["loss_options"]
    assert options == {**describe("mined").settings, "k": 3}
    assert len(options) > 1
    # What it says does not tell runs apart.
    given = finals(plan(("mined:k=3",)))[0]
    assert given.training.key == mined.training.key


def test_a_record_holds_what_json_can_whatever_a_losss_defaults_are(monkeypatch):
    way = enum.Enum("way", "there back")
    facts = dataclasses.replace(describe("uld"), settings={"way": way.there, "ends": (1, 2)})
    monkeypatch.setattr(plans, "describe", lambda name: facts)
    (job,) = finals(plan(("uld",)))
    assert job.training.settings["loss_options"] == {"way": repr(way.there), "ends": [1, 2]}


def test_with_a_live_teacher_only_its_texts_come_from_the_cache():
    _, uld, seqkd = finals(plan(("sft", "uld", "seqkd"), live=True))
    assert uld.training.config.teacher_cache is None
    assert seqkd.training.config.teacher_cache == "cache"


@pytest.mark.parametrize(
    ("common", "steps", "every"),
    [
        ({}, 3, 1),
        ({"epochs": 3.0}, 9, 3),
        ({"batch_size": 2, "grad_accumulation": 2}, 3, 1),
        ({"max_steps": 20, "epochs": 3.0}, 20, 5),
        ({"max_steps": 21}, 21, 6),
    ],
)
def test_all_runs_have_the_same_steps_and_points_of_their_curves(common, steps, every):
    for job in finals(plan(("sft", "seqkd"), common=common)):
        assert job.training.config.max_steps == steps
        assert job.training.config.eval_steps == every


def test_curves_can_be_left_out():
    assert finals(plan(curve_points=0))[0].training.config.eval_steps is None


def test_a_folders_name_is_one_that_files_can_have():
    (job,) = finals(plan(("mined:alignment=chunk:kd_weight=0.15",)))
    assert job.training.folder.name.startswith("mined-alignment=chunk-kd_weight=0.15-seed0-")


def trial(key: str, f1: float, ce: float) -> Record:
    return Record(
        key=key, method="uld", stage="trial", split="dev", seed=0, settings={}, varied={},
        metrics={"f1": f1}, answers=(), losses={"ce": ce},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([trial("a", 1, 3.0), trial("b", 2, 9.0)], "b"),
        ([trial("a", 2, 3.0), trial("b", 2, 2.0), trial("c", 1, 1.0)], "b"),
        ([trial("a", 2, 3.0), trial("b", 2, 3.0)], "a"),
        ([trial("a", 2, float("nan")), trial("b", 2, 3.0)], "b"),
    ],
)
def test_the_metric_decides_then_cross_entropy_then_the_order(trials, best):
    assert best_trial(trials, "f1").key == best


def test_of_bits_less_is_better():
    wordy, terse = (
        dataclasses.replace(trial(name, bits, 1.0), metrics={"bits_per_byte": bits})
        for name, bits in (("wordy", 2.5), ("terse", 2.25))
    )
    assert best_trial([wordy, terse], "bits_per_byte").key == "terse"


def test_there_is_nothing_to_choose_from_without_trials():
    with pytest.raises(SettingError):
        best_trial([], "f1")


def test_the_demonstration_is_shorter_than_its_passes(monkeypatch):
    config = CompareConfig(losses=("sft",))
    found = Plan(config, splits(), MODELS, cache=None, texts=None)
    rows = len(splits().train.examples)
    assert found.steps == plans._steps(config, rows) == 4 * -(-rows // 4)
    monkeypatch.setattr("ctkd.compare.plan.config.DEMONSTRATION_STEPS", 2)
    assert Plan(config, splits(), MODELS, cache=None, texts=None).steps == 2
