"""Settings from files, options and Python: what is taken, and what is refused with a way out."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from ctkd.distill.config import DoctorRequest, EvaluateRequest, TrainConfig
from ctkd.distill.options import parse_loss_option, read_config_file
from ctkd.errors import CtkdError, SettingError
from ctkd.loss import Weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losss": "uld"}, "settings: unknown setting 'losss'. Did you mean 'loss'?"),
        ({"wibble": 1}, "unknown setting 'wibble'. Known: loss, loss_options, student"),
        ({5: 1}, "unknown setting 5."),
        ({"loss": "multilevelott"}, "Did you mean 'multilevelot'?"),
        ({"loss": "seqkd"}, "generate the answers first"),
        ({"loss": "multilevelot", "loss_options": {"kk": 3}}, "no setting 'kk'. Did you mean 'k'?"),
        (
            {"loss": "multilevelot", "loss_options": {"k": -1}},
            "k must be a whole number of at least 1, got -1",
        ),
        (
            {"loss": "multilevelot", "loss_options": {"k": "many"}},
            "k must be a whole number of at least 1, got 'many'",
        ),
        ({"loss_options": {5: 5}}, "loss_options must be a mapping of names to values"),
        ({"loss_options": [1]}, "loss_options must be a mapping of names to values"),
        ({"loss": "sft", "loss_options": {"k": 3}}, "'sft' is cross-entropy alone"),
        ({"columns": {"context": 5}}, "columns must be a mapping of names to names"),
        ({"max_steps": 0}, "max_steps must be a finite number above 0, got 0"),
        ({"max_steps": 1.5}, "max_steps must be a whole number or nothing, got 1.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"max_length": 0}, "max_length must be a finite number above 0"),
        ({"epochs": float("nan")}, "epochs must be a finite number above 0, got nan"),
        ({"epochs": float("inf")}, "epochs must be a finite number above 0, got inf"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number of at least 0"),
        ({"kd_weight": -1.0}, "kd_weight must be a finite number of at least 0, got -1.0"),
        ({"ce_weight": float("inf")}, "ce_weight must be a finite number of at least 0"),
        ({"loss": "uld", "kd_weight": 0, "ce_weight": 0}, "nothing would be trained: ce_weight is"),
        ({"loss": "sft", "control": True}, "what a loss contributed to what was measured; name a"),
        ({"control": True, "measure": "nothing"}, "leave measure nothing out, or leave control"),
        ({"task": "lm", "student_template": "chat"}, "reads documents as they are; leave the"),
        ({"task": "lm", "answers": "teacher"}, "task lm has no prompts that a teacher could"),
        ({"loss": "sft", "ce_weight": 0.0}, "nothing would be trained: ce_weight is 0 and loss"),
        ({"warmup": 1.0}, "warmup is a share of the steps, from 0 to below 1, got 1.0"),
        ({"seed": -1}, "seed must lie between 0 and 4294967295, got -1"),
        ({"seed": 2**32}, "seed must lie between 0 and 4294967295"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, bfloat16-pure"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"score_eos": "perhaps"}, "score_eos must be true or false, got 'perhaps'"),
        ({"data": []}, "data must be text or a list of texts, got []"),
        ({"data": ["a.jsonl", 5]}, "data must be text or a list of texts, got ['a.jsonl', 5]"),
        ({"eval_data": 5}, "eval_data must be text or a list of texts or nothing, got 5"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(CtkdError) as caught:
        TrainConfig.from_mapping(settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "sft", "max_steps": 1},
        {"kd_weight": 0, "warmup": 0, "epochs": 0.25},
        {"ce_weight": 0.0, "kd_weight": 1.0},
        {"seed": 2**32 - 1, "score_eos": True, "dtype": "bfloat16-pure", "device": "cpu"},
        {"loss": "uld", "loss_options": {"top_k": None, "student_temperature": 2}},
        {"columns": {"context": "passage"}, "eval_data": None, "output": "~/runs"},
        {"data": ["b.jsonl", "a.jsonl"], "eval_data": "part-*.jsonl"},
    ],
)
def test_settings_survive_being_written(settings):
    config = TrainConfig.from_mapping(settings)
    assert TrainConfig.from_mapping(json.loads(json.dumps(config.as_dict()))) == config
    assert TrainConfig.from_mapping(yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config
    for name, value in settings.items():
        assert config.as_dict()[name] == value


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateRequest, DoctorRequest])
def test_equal_sources_are_equal_settings_however_they_are_given(kind):
    for one in ("a.jsonl", ["a.jsonl"], ("a.jsonl",)):
        assert kind(data=one) == kind(data="a.jsonl")
        assert kind(data=one).data == "a.jsonl"
    assert kind(data=("a.jsonl", "b.jsonl")).data == ["a.jsonl", "b.jsonl"]
    assert kind(data=["b.jsonl", "a.jsonl"]) != kind(data=["a.jsonl", "b.jsonl"])


def test_all_settings_are_described():
    for entry in dataclasses.fields(TrainConfig):
        assert entry.metadata["help"].endswith("."), entry.name


def test_weights_are_the_losss_own_unless_given():
    assert TrainConfig(loss="multilevelot").weights() == Weights(1.0, 0.15)
    assert TrainConfig(loss="uld").weights() == Weights(1.0, 1.5)
    assert TrainConfig(loss="sft").weights() == Weights(1.0, 0.0)
    assert TrainConfig(loss="uld", ce_weight=0.0).weights() == Weights(0.0, 1.5)
    assert TrainConfig(loss="uld", kd_weight=0).weights() == Weights(1.0, 0)


def test_the_loss_gets_its_options():
    loss = TrainConfig(loss="multilevelot", loss_options={"k": 7, "matching": "greedy"}).make_loss()
    assert (loss.k, loss.matching) == (7, "greedy")
    assert TrainConfig(loss="sft").make_loss() is None
    assert not TrainConfig(loss="sft").distils


def test_the_folder_is_made_of_loss_and_seed():
    assert TrainConfig(loss="uld", seed=3).folder == Path("runs/uld-seed3")
    assert TrainConfig(output="~/here").folder == Path.home() / "here"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=20", 20),
        ("k=1e-6", 1e-6),
        ("k=-2.5E3", -2500.0),
        ("k=.5e1", 5.0),
        ("k=0.1", 0.1),
        ("k=greedy", "greedy"),
        ("k='1e-6'", "1e-6"),
        ("k=1e", "1e"),
        ("k=true", True),
        ("k=null", None),
        (" k =a=b", "a=b"),
    ],
)
def test_a_loss_option_is_read_as_yaml(text, value):
    found = parse_loss_option(text)
    assert found == ("k", value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k", "a loss option is KEY=VALUE, such as k=20, got 'k'"),
        ("=3", "a loss option is KEY=VALUE"),
        ("k=[1", "cannot read the value of loss option 'k=[1'; write a number"),
    ],
)
def test_what_is_no_loss_option_is_refused(text, message):
    with pytest.raises(SettingError) as caught:
        parse_loss_option(text)
    assert message in str(caught.value)


def test_numbers_of_a_file_are_numbers_and_texts_are_texts(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "loss: uld\n"
        "learning_rate: 1e-6\n"
        "date: 2026-03-01\n"
        "loss_options:\n"
        "  student_temperature: 2e0\n"
        "output: '1e5'\n"
        "report_to: none\n"
        "eval_data: null\n"
    )
    settings = read_config_file(file)
    assert settings["loss_options"] == {"student_temperature": 2.0}
    config = TrainConfig.from_mapping(settings)
    assert (config.learning_rate, config.output, config.report_to) == (1e-6, "1e5", "none")
    assert config.date == "2026-03-01"
    assert config.make_loss().student_temperature == 2.0


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_config_file(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.yaml: No such file or directory; name a YAML file of settings"),
        (b"\xff\xfe\x00", "cannot read the configuration"),
        (b"loss: [uld\nseed: 1\n", "is not YAML: expected ',' or ']'"),
        (b"task: lm\nseed: 1\ntask: qa\n", "task is given twice (line 3, column 1)"),
        (b"- loss\n", "must hold settings as 'name: value' lines"),
        (b"just words\n", "must hold settings as 'name: value' lines"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingError) as caught:
        read_config_file(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file_of_settings(tmp_path):
    with pytest.raises(SettingError, match="Is a directory; name a YAML file"):
        read_config_file(tmp_path)
