"""Chat templates that write the date: a run and a cache have one day, however long they take."""

import datetime
import json
import shutil

import pytest
from transformers import AutoTokenizer

from ctkd.distill.config import TrainConfig
from ctkd.distill.data.prompts import PLAIN, PromptForm
from ctkd.distill.teachers import cache_writing
from ctkd.distill.training import run as training
from ctkd.errors import SettingError
from tests.distill.tiny import examples
from tests.distill.tiny_runs import error_of, finish, invoke, record

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.role }}: {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = ["--student-template", "chat", "--teacher-template", "chat"]


@pytest.fixture(scope="module")
def dated(place):
    """Student and teacher whose templates write the date."""
    for name in ("student", "teacher"):
        folder = place.folder / f"dated-{name}"
        shutil.copytree(place.folder / name, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return place


@pytest.fixture
def on(monkeypatch):
    """Makes it another day."""

    def change(day: str) -> None:
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        for module in (training, cache_writing):
            monkeypatch.setattr(module, "date", Date)

    return change


@pytest.fixture
def days(monkeypatch) -> list[tuple[str, str]]:
    """The days of both prompt forms, at each encoding."""
    found, encode = [], training.encode

    def encoded(config, models, chosen, forms, what, say, **settings):
        found.append((forms.student.day, forms.teacher.day))
        return encode(config, models, chosen, forms, what, say, **settings)

    monkeypatch.setattr(training, "encode", encoded)
    return found


def words(place, output: str, *options: str) -> list[str]:
    models = ["--student", str(place.folder / "dated-student")]
    models += ["--teacher", str(place.folder / "dated-teacher")]
    return place.train(output, *models, *CHAT, "--measure", "nothing", *options)


def test_a_prompt_has_the_day_of_its_form(dated):
    tokenizer = AutoTokenizer.from_pretrained(dated.folder / "dated-student")
    (example,) = examples(1)
    form = PromptForm(template="chat", day="2026-03-01")
    assert form.chat_text(tokenizer, example).startswith("01 Mar 2026 user: ")
    today = PromptForm(template="chat").chat_text(tokenizer, example)
    assert today.startswith(f"{datetime.date.today():%d %b %Y} ")
    assert form.writes_day(tokenizer) and not PLAIN.writes_day(tokenizer)


def test_a_run_that_goes_on_the_next_day_writes_the_first(dated, on, days, monkeypatch):
    on("2026-03-01")

    def stopped(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_train_from", stopped)
        error_of(invoke(*words(dated, "overnight")))
    on("2026-03-02")
    shown = finish(*words(dated, "overnight", "--resume"))
    for side in ("student", "teacher"):
        line = f"the {side}'s chat template writes the date: 2026-03-01 throughout (--date)"
        assert line in shown.stderr
    assert set(days) == {("2026-03-01", "2026-03-01")}
    assert record(dated.folder / "overnight")["date"] == "2026-03-01"
    assert record(dated.folder / "overnight")["settings"]["date"] is None


def test_a_day_may_be_given(dated, on, days):
    on("2026-03-02")
    finish(*words(dated, "given", "--date", "2025-12-24"))
    assert set(days) == {("2025-12-24", "2025-12-24")}
    with pytest.raises(SettingError, match="date must be a day as YYYY-MM-DD, got 'tomorrow'"):
        TrainConfig(date="tomorrow")


def test_a_cache_serves_on_other_days(dated, on, days, tmp_path):
    on("2026-03-01")
    folder = tmp_path / "cache"
    models = ["--student", str(dated.folder / "dated-student")]
    models += ["--teacher", str(dated.folder / "dated-teacher"), *CHAT]
    make = ["cache", *models, "--data", str(dated.rows), "--task", "text", "--k", "8"]
    make += ["--max-new-tokens", "3", "--device", "cpu", "--output", str(folder)]
    finish(*make)
    assert json.loads((folder / "cache.json").read_text())["date"] == "2026-03-01"
    on("2026-03-02")
    finish(*make)
    finish(*words(dated, "cached", "--loss", "uld", "--teacher-cache", str(folder)))
    assert set(days) == {("2026-03-01", "2026-03-01")}
    # Another day is another prompt, and the cache says that it has none for it.
    other = words(dated, "other", "--teacher-cache", str(folder), "--date", "2026-03-02")
    assert "are not in the teacher cache" in error_of(invoke(*other, "--loss", "uld"))
