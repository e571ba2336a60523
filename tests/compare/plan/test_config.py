"""What may be compared with what, told before anything is read."""

import shlex

import pytest

from ctkd.compare.plan.config import DEMONSTRATION_STEPS, SAVE_STEPS, CompareConfig
from ctkd.compare.plan.methods import Method, parse_method, parse_sweep
from ctkd.distill.config import TrainConfig
from ctkd.errors import SettingError


def refused(**settings) -> str:
    with pytest.raises(SettingError) as caught:
        CompareConfig(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_settings_four_losses_are_compared_once():
    config = CompareConfig()
    assert [one.name for one in config.methods] == ["sft", "uld", "multilevelot", "shared_kl"]
    assert config.seed_values == (0,)
    assert (config.baseline_name, config.metric_name) == ("sft", "bits_per_byte")
    assert (config.base.student, config.base.task) == ("pocket-llama", "lm")
    assert str(config.folder) == "comparison"


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("sft", Method(name="sft", loss="sft")),
        ("seqkd", Method(name="seqkd", loss="seqkd")),
        (
            "uld:kd_weight=1.5:top_k=64",
            Method(
                name="uld kd_weight=1.5 top_k=64",
                loss="uld",
                settings={"kd_weight": 1.5, "top_k": 64},
            ),
        ),
        (
            "best=sft:learning_rate=1e-4",
            Method(name="best", loss="sft", settings={"learning_rate": 1e-4}),
        ),
    ],
)
def test_a_method_is_a_loss_with_settings_and_perhaps_a_name(text, method):
    assert parse_method(text) == method


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("udl", "unknown loss 'udl', did you mean 'uld'?"),
        ("stf", "unknown loss 'stf', did you mean 'sft'?"),
        ("uld:kd_wieght=1", "uld has no setting 'kd_wieght', did you mean 'kd_weight'?"),
        ("sft:kd_weight=1", "sft has no setting 'kd_weight'"),
        ("seqkd:score_eos=true", "seqkd has no setting 'score_eos'"),
        ("uld:max_steps=3", "max_steps cannot differ between methods"),
        ("sft:seed=3", "seed cannot differ between methods"),
        ("uld:kd_weight", "a method's setting is SETTING=VALUE, got 'kd_weight'"),
        ("uld:kd_weight=1:kd_weight=2", "gives kd_weight twice"),
        ("a b=uld", "own name has no spaces"),
        ("", "unknown loss ''"),
    ],
)
def test_a_method_that_is_none_is_refused(text, said):
    with pytest.raises(SettingError) as caught:
        parse_method(text)
    assert said in str(caught.value)


def test_a_sweep_is_a_setting_with_values():
    for text, key, values in (
        ("uld.kd_weight=0.15,1.5", "uld.kd_weight", (0.15, 1.5)),
        ("learning_rate=5e-5,1e-4", "learning_rate", (5e-5, 1e-4)),
        ("mined.alignment=chunk, dtw", "mined.alignment", ("chunk", "dtw")),
        ("uld top_k=64.kd_weight=1,2", "uld top_k=64.kd_weight", (1, 2)),
    ):
        assert parse_sweep(text) == (key, values)


def test_a_sweep_without_name_or_values_is_refused():
    for text in ("uld.kd_weight", "=1,2", "uld.kd_weight="):
        with pytest.raises(SettingError, match=r"a sweep is METHOD\.SETTING=VALUE,VALUE"):
            parse_sweep(text)


def test_a_sweep_without_a_method_is_tried_for_all():
    config = CompareConfig(losses=("sft", "uld"), sweep={"learning_rate": (1e-5, 1e-4)})
    assert [one.points() for one in config.methods] == [
        [{"learning_rate": 1e-5}, {"learning_rate": 1e-4}]
    ] * 2


def test_every_combination_is_tried():
    config = CompareConfig(
        losses=("uld",), sweep={"uld.kd_weight": (1, 2), "uld.learning_rate": (1e-5, 1e-4)}
    )
    points = config.methods[0].points()
    assert len(points) == 4
    assert points[1] == {"kd_weight": 1, "learning_rate": 1e-4}
    trained = config.train_config(config.methods[0], points[1], 7)
    assert (trained.loss, trained.kd_weight, trained.learning_rate) == ("uld", 1, 1e-4)
    assert (trained.seed, trained.loss_options) == (7, {})


def test_settings_of_the_loss_are_told_from_those_of_training():
    config = CompareConfig(losses=("uld:top_k=64:kd_weight=0.5",))
    trained = config.train_config(config.methods[0], {"warmup": 0.2}, 0)
    assert trained.loss_options == {"top_k": 64}
    assert (trained.kd_weight, trained.warmup) == (0.5, 0.2)


def test_seqkd_is_cross_entropy_on_the_teachers_text():
    config = CompareConfig(losses=("seqkd",), common={"task": "qa"})
    trained = config.train_config(config.methods[0], {}, 0)
    assert (trained.loss, trained.answers) == ("sft", "teacher")
    assert config.baseline_name == "seqkd"


def test_unequal_numbers_of_trials_are_refused_with_what_to_add():
    said = refused(losses=("sft", "uld", "mined"), sweep={"uld.kd_weight": (0.15, 1.5, 3)})
    assert "1 of sft, 3 of uld, 1 of mined" in said
    assert "--sweep sft.learning_rate=0.002,0.004,0.008" in said
    assert "--sweep mined.learning_rate=0.002,0.004,0.008" in said
    # What it says to add is enough.
    added = dict(parse_sweep(one) for one in said.split("add ")[1].split("--sweep ")[1:])
    CompareConfig(losses=("sft", "uld", "mined"), sweep={"uld.kd_weight": (0.15, 1.5, 3), **added})


def test_what_it_says_to_add_can_be_pasted_into_a_shell():
    losses = ("uld:kd_weight=1.5", "mined")
    sweep = {"mined.k": (5, 10)}
    said = refused(losses=losses, sweep=sweep)
    words = shlex.split(said.split("add ")[1])
    assert words == ["--sweep", "uld kd_weight=1.5.learning_rate=0.002,0.004"]
    CompareConfig(losses=losses, sweep={**sweep, **dict([parse_sweep(words[1])])})


def test_runs_are_saved_more_often_than_a_single_run_is_unless_told_otherwise():
    config = CompareConfig(losses=("uld",))
    assert SAVE_STEPS < TrainConfig().save_steps
    for common, steps in (({}, SAVE_STEPS), ({"save_steps": 7}, 7)):
        config = CompareConfig(losses=("uld",), common=common)
        run = config.train_config(config.methods[0], {}, 0)
        assert run.save_steps == config.base.save_steps == config.teacher_base.save_steps == steps


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"losses": ()}, "there is nothing to compare"),
        ({"losses": ("sft", "sft")}, "two methods are called 'sft'"),
        ({"baseline": "ult"}, "the baseline 'ult' is not compared, did you mean 'uld'?"),
        ({"metric": "rouge", "common": {"task": "qa"}}, "no metric 'rouge', did you mean"),
        ({"metric": "f1"}, "task lm has no metric 'f1'; metrics: bits_per_byte"),
        ({"sweep": {"ult.kd_weight": (1,)}}, "names no method of this comparison, did you mean"),
        ({"sweep": {"uld.kdweight": (1,)}}, "uld has no setting 'kdweight', did you mean"),
        ({"sweep": {"kd_weight": (1,)}}, "sft has no setting 'kd_weight'"),
        ({"sweep": {"uld.kd_weight": ()}}, "needs a list of values"),
        ({"sweep": {"uld.kd_weight": (1, 1.0)}}, "tries a value twice"),
        (
            {"losses": ("uld:kd_weight=1",), "sweep": {"kd_weight": (1, 2)}},
            "uld kd_weight=1 has kd_weight=1 already",
        ),
        (
            {"losses": ("uld",), "sweep": {"kd_weight": (1, 2), "uld.kd_weight": (3,)}},
            "kd_weight of uld is swept twice",
        ),
        ({"losses": ("uld:kd_weight=-1",)}, "method uld kd_weight=-1: kd_weight must be"),
        (
            {"losses": ("uld",), "sweep": {"uld.top_k": (0, 5)}},
            "method uld: top_k must be",
        ),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"seeds": 2, "common": {"seed": 2**32 - 1}}, "seed must lie between"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"dev_fraction": 1.0}, "dev_fraction is a share between 0 and 1"),
        ({"curve_points": -1}, "curve_points must be a whole number of at least 0"),
        ({"common": {"kd_weight": 1.0}}, "give it to a method, as in uld:kd_weight=1.5"),
        ({"common": {"max_step": 1}}, "unknown setting 'max_step', did you mean 'max_steps'?"),
        ({"common": {"batch_size": 0}}, "batch_size must be a finite number above 0"),
        ({"common": {"on_long": "cut"}}, "use drop or refuse"),
        ({"seeds": 2, "common": {"teacher_shots": 1}}, "teacher_shots draws other examples"),
        ({"dev_data": "pocketqa"}, "dev_data serves to choose settings, but there is no sweep"),
        ({"dev_data": ["a.jsonl", 3]}, "dev_data must be text"),
        ({"live_teacher": "yes"}, "live_teacher must be true or false"),
        (
            {"common": {"task": "qa", "student": "some", "student_template": "chat"}},
            "ask the teacher in a chat as well, or the student in plain text",
        ),
        ({"losses": ("bpm:conditional=maybe",)}, "conditional must be true or false, got 'maybe'"),
        ({"live_teacher": True, "top_k": 5}, "live_teacher keeps nothing of it; leave one"),
        ({"cache": 3}, "cache must be text"),
        ({"published_task": 3}, "published_task must be text"),
        (
            {
                "losses": ("seqkd",),
                "seeds": 2,
                "live_teacher": True,
                "common": {"teacher_shots": 1},
            },
            "use one seed, no shots, or live_teacher without seqkd",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, said):
    assert said in refused(**settings)


def test_the_baseline_may_be_named_as_it_was_given_or_as_it_is_shown():
    losses = ("uld:kd_weight=1.5", "mined")
    for name in ("uld:kd_weight=1.5", "uld kd_weight=1.5"):
        assert CompareConfig(losses=losses, baseline=name).baseline_name == "uld kd_weight=1.5"


def test_the_metric_follows_the_task():
    assert CompareConfig().metric_name == "bits_per_byte"
    assert CompareConfig(common={"task": "summarization"}).metric_name == "rouge_lsum"
    assert CompareConfig(common={"task": "text"}, metric="f1").metric_name == "f1"


def test_a_file_and_options_give_names_side_by_side():
    config = CompareConfig.from_mapping(
        {
            "losses": "sft, uld:kd_weight=1.5",
            "seeds": 3,
            "max_steps": 7,
            "seed": 4,
            "sweep": {"learning_rate": [1e-5, 1e-4]},
            "published": ["a.json"],
        }
    )
    assert config.losses == ("sft", "uld:kd_weight=1.5")
    assert config.common == {"max_steps": 7, "seed": 4}
    assert config.seed_values == (4, 5, 6)
    assert config.methods[0].grid == {"learning_rate": (1e-5, 1e-4)}
    assert config.published == ("a.json",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lossses": "sft"}, "file.yaml: unknown setting 'lossses', did you mean 'losses'?"),
        ({"loss": "sft"}, "file.yaml: loss is no setting of a comparison; name the losses"),
        ({"common": {}}, "file.yaml: unknown setting 'common'"),
        ({"losses": 3}, "losses must be a list of texts, got [3]"),
        ({"sweep": ["uld"]}, "sweep must be a mapping"),
    ],
)
def test_a_file_that_says_something_else_is_refused(settings, said):
    with pytest.raises(SettingError) as caught:
        CompareConfig.from_mapping(settings, source="file.yaml")
    assert said in str(caught.value)


def test_a_loss_of_whole_rows_makes_the_teacher_live_unless_there_is_a_cache_of_some_kind():
    assert CompareConfig(losses=("sft", "shared_kl")).is_live
    assert not CompareConfig(losses=("sft", "uld")).is_live
    assert CompareConfig(losses=("sft", "uld"), live_teacher=True).is_live
    for given in ({"cache": "folder"}, {"top_k": 49152}):
        assert not CompareConfig(losses=("sft", "shared_kl"), **given).is_live


def test_a_run_that_nobody_gave_a_length_is_bounded():
    assert CompareConfig().most_steps == DEMONSTRATION_STEPS
    assert CompareConfig(common={"learning_rate": 1e-4}).most_steps == DEMONSTRATION_STEPS
    for given in ({"data": "rows.jsonl"}, {"epochs": 1.0}, {"max_steps": 90}):
        assert CompareConfig(common=given).most_steps is None
