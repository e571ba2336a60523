"""Losses by name, and plugins that are good, broken, or in each other's way."""

import hashlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import ctkd
from ctkd import registry
from ctkd.cli import main
from ctkd.errors import (
    CtkdError,
    DuplicateLossError,
    PluginError,
    SettingError,
    UnknownLossError,
)
from ctkd.losses.uld import ULD

BUILT_IN = [
    "multilevelot",
    "multilevelot_released",
    "multilevelot_sequence",
    "multilevelot_token",
    "uld",
]


class Plugin(ULD):
    """A loss of another package."""


class Demanding(ULD):
    """A loss with a setting that has no default."""

    def __init__(self, *, strength: float) -> None:
        super().__init__()
        self.strength = strength


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_losses", dict(registry._registered()))
    yield
    registry._plugins.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Pretend that packages with these entry points are installed."""

    def install(**values: str) -> None:
        points = tuple(EntryPoint(name, value, "ctkd.losses") for name, value in values.items())

        def entry_points(*, group: str) -> tuple[EntryPoint, ...]:
            return points if group == "ctkd.losses" else ()

        monkeypatch.setattr(registry, "entry_points", entry_points)
        registry._plugins.cache_clear()

    module = ModuleType("a_plugin_package")
    module.Good, module.Demanding, module.not_a_loss = Plugin, Demanding, len
    module.NotALoss = dict
    monkeypatch.setitem(sys.modules, "a_plugin_package", module)
    return install


def test_the_names_are_those_of_the_built_in_losses():
    assert set(BUILT_IN) <= set(ctkd.list_losses())
    assert ctkd.list_losses() == sorted(ctkd.list_losses())
    for name in BUILT_IN:
        assert ctkd.get_loss_class(name) is type(ctkd.get_loss(name))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("uld", ["uld"]),
        ("multilevelot_*", BUILT_IN[1:4]),
        ("*ot", ["multilevelot"]),
        ("?ld", ["uld"]),
        ("[u]*", ["uld"]),
        ("nothing*", []),
        ("ULD", []),
    ],
)
def test_patterns(pattern, expected, install):
    install()
    assert ctkd.list_losses(pattern) == expected


@pytest.mark.parametrize("name", ["ULD", "udl", "multilevel-ot", "multilevelot-token"])
def test_an_unknown_name_gets_a_suggestion(name):
    near = {"ULD": "uld", "udl": "uld", "multilevel-ot": "multilevelot"}.get(name)
    with pytest.raises(UnknownLossError) as caught:
        ctkd.get_loss(name)
    message = str(caught.value)
    assert f"Did you mean {near or 'multilevelot_token'!r}?" in message
    assert f"Available: {', '.join(ctkd.list_losses())}" in message
    assert "\n" not in message


def test_a_name_like_no_other_gets_the_list_alone():
    with pytest.raises(UnknownLossError, match="unknown loss 'zzz'. Available: alm, "):
        ctkd.get_loss("zzz")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sft", r"cross-entropy alone: .* run `ctkd train --loss sft`"),
        ("SFT", r"cross-entropy alone"),
        ("seqkd", r"text that the teacher wrote: generate the answers first"),
    ],
)
def test_modes_of_the_trainer_say_what_to_do(name, message):
    for function in (ctkd.get_loss, ctkd.get_loss_class, ctkd.describe):
        with pytest.raises(UnknownLossError, match=message):
            function(name)


def test_settings_reach_the_loss():
    assert ctkd.get_loss("uld", top_k=7).top_k == 7


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("student_temprature", " Did you mean 'student_temperature'?"),
        ("topk", " Did you mean 'top_k'?"),
        ("zzz", ""),
        ("name", ""),
    ],
)
def test_an_unknown_setting_gets_a_suggestion_and_the_list(setting, hint):
    with pytest.raises(SettingError) as caught:
        ctkd.get_loss("uld", **{setting: 1})
    assert str(caught.value) == (
        f"the loss 'uld' has no setting {setting!r}.{hint} "
        "It has student_temperature, teacher_temperature, top_k, pairing."
    )


def test_a_loss_without_settings_says_so():
    @ctkd.register("plain")
    class Plain(ULD):
        def __init__(self):
            super().__init__()

    with pytest.raises(SettingError, match="no setting 'k'. It has no settings."):
        ctkd.get_loss("plain", k=1)


def test_a_setting_out_of_range_is_the_loss_s_own_error():
    with pytest.raises(SettingError, match="top_k must be a whole number of at least 1, got 0"):
        ctkd.get_loss("uld", top_k=0)


def test_facts():
    for name in BUILT_IN:
        cls, facts = ctkd.get_loss_class(name), ctkd.describe(name)
        assert facts.name == name
        for field in ("matches", "paper", "unit", "needs", "default_weights", "measured"):
            assert getattr(facts, field) == getattr(cls, field)
        assert cls(**facts.settings).extra_repr() == cls().extra_repr()
        assert facts.doc.splitlines()[0].endswith(".")
        assert not facts.doc.splitlines()[-1].startswith(" ") or "References:" in facts.doc


def test_a_class_may_be_registered_twice_under_one_name_but_not_two_classes():
    ctkd.register("uld")(ULD)
    with pytest.raises(DuplicateLossError) as caught:
        ctkd.register("uld")(Plugin)
    assert str(caught.value) == f"'uld' is claimed by ctkd.losses.uld:ULD and {__name__}:Plugin"
    assert ctkd.get_loss_class("uld") is ULD


@pytest.mark.parametrize("name", ["", 5, None, "sft", "SeqKD"])
def test_what_is_no_name_of_a_loss_is_refused(name):
    with pytest.raises(SettingError, match="filed under a name other than sft and seqkd, got"):
        ctkd.register(name)


@pytest.mark.parametrize("thing", [object, 5, lambda batch: None])
def test_what_is_no_loss_is_refused(thing):
    with pytest.raises(SettingError, match="'mine' must be a subclass of ctkd.Loss, got"):
        ctkd.register("mine")(thing)
    assert not ctkd.list_losses("mine")


def test_a_class_without_a_constructor_has_no_settings():
    class Plain(Plugin):
        __init__ = ctkd.Loss.__init__

    ctkd.register("plain_loss")(Plain)
    assert isinstance(ctkd.get_loss("plain_loss"), Plain)
    assert ctkd.describe("plain_loss").settings == {}
    with pytest.raises(SettingError, match="has no settings"):
        ctkd.get_loss("plain_loss", k=3)


def test_the_decorator_returns_the_class():
    assert ctkd.register("mine")(Plugin) is Plugin
    assert ctkd.get_loss_class("mine") is Plugin
    assert ctkd.list_losses("mine") == ["mine"]


def test_a_plugin_is_listed_without_being_imported(install):
    install(good="a_plugin_package:Good", broken="no_such_package:Loss")
    assert ctkd.list_losses("[gb][or]o*") == ["broken", "good"]
    assert ctkd.get_loss_class("good") is Plugin
    assert isinstance(ctkd.get_loss("good", top_k=2), Plugin)
    assert ctkd.describe("good").doc == "A loss of another package."
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert source.startswith(registry.source_fingerprint("good"))
    assert registry.source_fingerprint("uld") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:Loss", "failed to import: No module named 'no_such_package'"),
        ("a_plugin_package:Missing", "failed to import: .*no attribute 'Missing'"),
        ("a_plugin_package:not_a_loss", "is not a subclass of ctkd.Loss"),
        ("a_plugin_package:NotALoss", "is not a subclass of ctkd.Loss"),
    ],
)
def test_a_broken_plugin_is_named_and_leaves_the_others_alone(install, value, message):
    install(broken=value)
    with pytest.raises(PluginError, match=f"plugin 'broken' \\({value}\\) {message}"):
        ctkd.get_loss("broken")
    assert ctkd.get_loss("uld")
    with pytest.raises(UnknownLossError, match="Did you mean 'broken'"):
        ctkd.get_loss("brokn")


def test_a_plugin_with_a_name_that_is_taken_is_an_error(install):
    install(uld="a_plugin_package:Good")
    with pytest.raises(DuplicateLossError) as caught:
        ctkd.get_loss("uld")
    assert str(caught.value) == (
        "'uld' is claimed by ctkd.losses.uld:ULD and a_plugin_package:Good"
    )
    install(uld="no_such_package:Loss")
    with pytest.raises(DuplicateLossError, match="no_such_package:Loss"):
        ctkd.get_loss("uld")
    assert ctkd.list_losses("uld") == ["uld"]


def test_two_plugins_with_one_name_are_an_error(monkeypatch, install):
    install()
    points = [EntryPoint("twice", f"a_plugin_package:{name}", "ctkd.losses") for name in "AB"]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(DuplicateLossError, match="by a_plugin_package:A and a_plugin_package:B"):
        ctkd.get_loss("twice")


@pytest.mark.parametrize("value", [f"{__name__}:Plugin", "a_plugin_package:Good"])
def test_a_plugin_may_register_itself_as_well(monkeypatch, install, value):
    """The entry point may name the class where it is defined or where it is re-exported."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    install(good=value)
    ctkd.register("good")(Plugin)
    for _ in range(2):
        assert ctkd.get_loss_class("good") is Plugin


def _this_module() -> ModuleType:
    module = ModuleType(__name__)
    module.Plugin = Plugin
    return module


def test_a_setting_without_a_default_is_asked_for(install):
    install(demanding="a_plugin_package:Demanding")
    assert ctkd.get_loss("demanding", strength=2.0).strength == 2.0
    with pytest.raises(SettingError, match="the loss 'demanding' needs the setting 'strength'"):
        ctkd.get_loss("demanding")


def test_every_error_is_a_ctkd_error():
    for error in (UnknownLossError, DuplicateLossError, PluginError, SettingError):
        assert issubclass(error, CtkdError)
    assert issubclass(UnknownLossError, LookupError) and not issubclass(UnknownLossError, KeyError)


def test_a_loss_that_says_too_little_of_itself_is_named(monkeypatch):
    class Silent(ctkd.Loss):
        matches = "nothing"

        def forward(self, batch):
            return None

        units = forward

    monkeypatch.setitem(registry._losses, "silent", Silent)
    with pytest.raises(PluginError, match="'silent' .*does not say its paper, unit, default_wei"):
        ctkd.describe("silent")


def test_the_list_survives_a_broken_plugin(install):
    install(broken="no_such_package:Loss")
    shown = CliRunner().invoke(main, ["losses"])
    assert shown.exit_code == 0
    assert "warning: plugin 'broken' (no_such_package:Loss) failed to import" in shown.stderr
    table, note = shown.stdout.split("\n\n")
    assert note.startswith("Of the gap: ")
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "cannot be loaded" in rows["broken"]
    assert rows["bpm"].endswith("  11.1 %") and rows["uld"].endswith("  nothing seen")
    shown = CliRunner().invoke(main, ["losses", "bpm"]).stdout
    assert "-0.0939 bits per byte to fine-tuning alone, 95 % from -0.1059 to -0.0820" in shown
    assert "one seed" not in shown  # the best weight is the default
    shown = CliRunner().invoke(main, ["losses", "uld"]).stdout
    assert "best of several weights; at 1.5 +0.0978 on development texts, with one seed" in shown
    assert {"uld", "multilevelot"} <= rows.keys()
