"""Settings whose fields are options: their defaults, their help, and what commands make of them."""

from dataclasses import dataclass, fields

import click
import pytest
from click.testing import CliRunner

from ctkd.cli.options import given, options_of, read_settings
from ctkd.distill.config import TrainConfig
from ctkd.distill.options import (
    check_names,
    check_types,
    closest,
    default_of,
    default_text,
    option,
    parse_column,
    read_config_file,
    same_as,
)
from ctkd.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Settings:
    rate: float = option(5e-5, "Peak.")
    count: int | None = option(None, "Steps.", unset="as many as there are")
    eager: bool = option(False, "Start at once.")
    lone: bool = option(False, "Alone.", flag="--lone")
    columns: dict[str, str] = option(
        {}, "A column.", flag="--column", repeated=True, parse=parse_column
    )
    warmths: tuple[float, ...] = option(
        (1.0, 2.0), "Warmth.", flag="--warmth", repeated=True, parse=float
    )
    sources: str | list[str] = option("here", "A place.", flag="--source", repeated=True)
    files: tuple[str, ...] = option((), "A file.", flag="--file", repeated=True)
    hidden: int = 3


@dataclass(frozen=True, kw_only=True)
class Other:
    rate: float | None = same_as(Settings, "rate", default=None)
    eager: bool = same_as(Settings, "eager", help="Soon.")
    columns: dict[str, str] = same_as(Settings, "columns")


def run(*words: str) -> dict:
    caught = {}

    @click.command()
    @options_of(Settings)
    def command(**options):
        caught.update(given(options, Settings))

    result = CliRunner().invoke(command, list(words))
    assert result.exit_code == 0, result.output
    return caught


def test_what_is_left_out_is_not_given():
    assert run() == {}
    assert Settings(**run()) == Settings()


def test_what_is_given_is_read_by_its_field():
    words = "--rate 1e-3 --count 2 --eager --lone --column a=b --column c=d --warmth 3 --warmth 0.5"
    assert run(*words.split()) == {
        "rate": 1e-3,
        "count": 2,
        "eager": True,
        "lone": True,
        "columns": {"a": "b", "c": "d"},
        "warmths": (3.0, 0.5),
    }
    assert run("--no-eager") == {"eager": False}
    # One is text where the setting may be text.
    assert run("--source", "a", "--file", "b") == {"sources": "a", "files": ("b",)}
    assert run("--source", "a", "--source", "b") == {"sources": ("a", "b")}


def test_help_shows_defaults():
    @click.command()
    @options_of(Settings, ["rate", "count"], help={"rate": "Top."}, defaults={"count": 7})
    def command(**options):
        pass

    assert [one.help for one in command.params] == ["Top. [5e-5]", "Steps. [7]"]
    texts = [default_text(Settings, name) for name in ("count", "eager", "columns", "warmths")]
    assert texts == ["as many as there are", "no", None, "1 and 2"]


def test_an_option_of_another_dataclass_keeps_what_is_not_changed():
    assert Other() == Other(rate=None, eager=False, columns={})
    assert [default_text(Other, name) for name in ("rate", "eager")] == ["5e-5", "no"]
    assert Other.__dataclass_fields__["eager"].metadata["help"] == "Soon."
    assert Other.__dataclass_fields__["rate"].metadata["help"] == "Peak."


def test_mutable_defaults_are_made_anew():
    Settings().columns["a"] = "b"
    default_of(Settings, "columns")["a"] = "b"
    assert Settings().columns == {}


def test_options_override_a_file_and_mappings_are_merged(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("rate: 1e-4\ncolumns: {a: x, e: f}\nmax_steps: 9\n")
    options = {"rate": 1e-3, "columns": ("a=b",), "count": None, "warmths": ()}
    assert read_settings(str(file), options, Settings) == {
        "rate": 1e-3,
        "columns": {"a": "b", "e": "f"},
        "max_steps": 9,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": "fast"}, "rate must be a number, got 'fast'"),
        ({"count": 1.5}, "count must be a whole number or nothing, got 1.5"),
        ({"eager": 1}, "eager must be true or false, got 1"),
        ({"columns": {"a": 1}}, "columns must be a mapping of names to names"),
    ],
)
def test_types_are_checked(settings, message):
    @dataclass(frozen=True, kw_only=True)
    class Checked(Other):
        rate: float = 1.0
        count: int | None = None

    with pytest.raises(SettingError, match=message):
        check_types(Checked(**settings))
    check_types(Checked())


def test_unknown_names_get_a_suggestion():
    with pytest.raises(SettingError, match="file: unknown setting 'rat'. Did you mean 'rate'?"):
        check_names({"rat": 1}, Other, "file")
    check_names({"rate": 1}, Other, "file")


def test_names_of_elsewhere_are_understood():
    known = [field.name for field in fields(TrainConfig)]
    meant = {
        "lr": "learning_rate",
        "bs": "batch_size",
        "per_device_train_batch_size": "batch_size",
        "gradient-accumulation-steps": "grad_accumulation",
        "num_train_epochs": "epochs",
        "learningrate": "learning_rate",
        "warmup_ratio": "warmup",
        "output-dir": "output",
        "model": "student",
        "teacher_model": "teacher",
        "val_data": "eval_data",
        "max_new_token": "max_new_tokens",
        "lerning_rate": "learning_rate",
    }
    assert {name: closest(name, known)[0] for name in meant} == meant
    assert closest("steps", known)[0] == "max_steps"
    assert closest("temperature", known) == []


def test_a_file_may_name_settings_as_other_tools_do(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: a\nper-device-train-batch-size: 2\nlora_r: 4\n")
    assert read_config_file(file) == {"student": "a", "batch_size": 2, "lora_rank": 4}
    file.write_text("batch_size: 2\nper_device_train_batch_size: 2\n")
    with pytest.raises(SettingError, match="gives batch_size twice, once as per_device_train"):
        read_config_file(file)
