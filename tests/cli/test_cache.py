"""`ctkd cache`: what it prints, what it refuses, and how it is stopped."""

import time

import pytest

from ctkd.cli import main
from ctkd.distill.config import CacheSettings, TrainConfig
from ctkd.distill.options import default_text
from ctkd.distill.teachers import cache_writing
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.training import measuring
from tests.distill.tiny_caches import CachePlace
from tests.distill.tiny_runs import error_of, finish, invoke, record


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    return CachePlace(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def made(place):
    """A cache by the command, and what was printed."""
    output = str(place.folder / "made")
    return finish(*place.words("cache", "--output", output, "--k", "9", "--shard-rows", "8"))


def test_the_result_is_one_line_on_stdout(place, made):
    cache = TeacherCache.open(place.folder / "made")
    size = sum(path.stat().st_size for path in cache.path.iterdir()) / 2**20
    assert made.stdout == (
        f"{cache.path}: 20 rows, top 9 of {cache.vocab_size}, temperatures 1, 2; 2 texts written, "
        f"{size:.1f} MiB\n"
    )
    assert "caching 20 distinct rows, " in made.stderr
    assert f"loading the teacher: {place.teacher}" in made.stderr


def test_repeating_the_command_does_nothing(place, made):
    again = finish(
        *place.words("cache", "--output", str(place.folder / "made")),
        *("--k", "9", "--shard-rows", "8"),
    )
    assert again.stdout == made.stdout
    assert "loading the teacher" not in again.stderr
    assert "caching" not in again.stderr


def test_options_become_settings(place):
    output = place.folder / "options"
    shown = finish(
        *place.words("cache", "--output", str(output), "--k", "0", "--temperature", "1.5"),
        *("--temperature", "3", "--texts", "all", "--eval-limit", "1"),
        *("--batch-size", "2", "--seed", "1", "--teacher-shots", "1", "--dtype", "bfloat16"),
        *("--max-length", "100"),
    )
    cache = TeacherCache.open(output)
    assert "top 0 of " in shown.stdout
    assert cache.temperatures == (1.5, 3.0)
    assert cache.record["dtype"] == "bfloat16"
    assert len(cache.record["prompt"]["shots"]) == 1
    assert len(cache) == len(cache.texts) == 19


def test_a_cache_of_the_teachers_own_answers(place, tmp_path):
    words = place.words("cache", "--output", str(tmp_path / "own"), "--answers", "teacher")
    assert "20 texts" in finish(*words).stdout


def test_the_command_that_trains_takes_what_it_wrote(place, made, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "plot_curves", lambda history, path: None)
    cache, output = str(place.folder / "made"), str(tmp_path / "run")
    words = place.words("train", "--teacher-cache", cache, "--output", output, "--max-steps", "2")
    shown = finish(*words, "--loss", "uld")
    assert f"teacher: {place.teacher}, from the cache {cache}" in shown.stderr
    assert record(tmp_path / "run")["settings"]["teacher_cache"] == cache
    assert shown.stdout.splitlines()[0].split()[-1] == "teacher"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "-1"], "k, the entries kept per position, must be at least 0, got -1"),
        (["--temperature", "0"], "a temperature must be"),
        (["--shard-rows", "0"], "shard_rows must be"),
        (["--answers", "mine"], "answers must be one of data, teacher, got 'mine'"),
        (["--dtype", "float16"], "dtype must be one of float32, bfloat16, bfloat16-pure"),
        (["--data", "HERE/none.jsonl"], "none.jsonl does not exist"),
        (["--teacher", "./none"], "there is no folder ./none; check the path"),
        (["--column", "prompt"], "a column is FIELD=COLUMN"),
        (["--max-length", "5"], "longer than 5 tokens"),
        (["--output", "HERE/student"], "HERE/student exists and is no teacher cache; choose ano"),
        (["--output", "HERE/rows.jsonl"], "HERE/rows.jsonl exists and is no teacher cache"),
        (["--output", "HERE/made"], "was begun with another k (9, now 256); give the same opt"),
    ],
)
def test_what_is_wrong_is_one_line(place, made, words, message):
    here = str(place.folder)
    words = ["--output", f"{here}/new", *(word.replace("HERE", here) for word in words)]
    said = error_of(invoke(*place.words("cache", *words)))
    assert message.replace("HERE", here) in said
    assert not (place.folder / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache"], "Missing option '--output'"),
        (["cache", "--output", "x", "--texts", "some"], "'some' is not one of 'none', 'held-out'"),
        (["cache", "--output", "x", "--k", "many"], "'many' is not a valid integer"),
    ],
)
def test_a_wrong_option_is_named(words, message):
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in error_of(result)


def test_a_cache_that_cannot_serve_is_one_line(place, made, tmp_path):
    words = place.words("train", "--teacher-cache", str(place.folder / "made"))
    words += ["--output", str(tmp_path / "run"), "--loss"]
    said = error_of(invoke(*words, "gold"))
    assert "gold needs whole rows of the teacher's logits" in said
    said = error_of(invoke(*words, "uld", "--loss-option", "teacher_temperature=1.5"))
    assert "was made for 1, 2; cache it again with --temperature 1.5" in said
    said = error_of(invoke(*words, "uld", "--teacher-cache", str(tmp_path)))
    assert "holds no teacher cache (cache.json is missing); make one with `ctkd cache" in said
    assert not (tmp_path / "run").exists()


def test_a_cache_that_is_stopped_goes_on(place, made, tmp_path, monkeypatch):
    save_shard = cache_writing._save_shard
    saved = []

    def interrupted(path, tensors):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        return save_shard(path, tensors)

    monkeypatch.setattr(cache_writing, "_save_shard", interrupted)
    words = place.words("cache", "--output", str(tmp_path / "stopped"), "--k", "9")
    words += ["--shard-rows", "8"]
    assert error_of(invoke(*words)) == "stopped; repeat the command to go on behind the last file"

    class Deleted:
        def __del__(self):
            raise KeyboardInterrupt

    def dropped(path, tensors):
        # Python prints what is raised here, and goes on.
        Deleted()
        for _ in range(1000):
            time.sleep(0.01)
        raise AssertionError("the interrupt was lost")

    monkeypatch.setattr(cache_writing, "_save_shard", dropped)
    assert error_of(invoke(*words)) == "stopped; repeat the command to go on behind the last file"
    monkeypatch.setattr(cache_writing, "_save_shard", save_shard)
    said = error_of(
        invoke(
            *place.words("train", "--teacher-cache", str(tmp_path / "stopped")),
            *("--output", str(tmp_path / "run"), "--loss", "uld"),
        )
    )
    assert "is not finished; repeat the `ctkd cache` that began it" in said
    before = saved[0].read_bytes()
    finish(*words)
    assert saved[0].read_bytes() == before
    for path in (place.folder / "made").iterdir():
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes(), path.name


def test_help_has_examples_and_defaults():
    shown = finish("cache", "--help").stdout
    assert "Examples:" in shown
    assert "\\b" not in shown
    assert "  ctkd train --loss multilevelot --teacher-cache teacher-cache\n" in shown
    options = {option.name: option for option in main.commands["cache"].params}
    assert f"[{CacheSettings().k}]" in options["k"].help
    assert CacheSettings().temperatures == (1.0, 2.0)
    assert "[1 and 2]" in options["temperatures"].help
    for name, value in TrainConfig().as_dict().items():
        if name in options and value not in (None, {}):
            shown = default_text(TrainConfig, name)
            assert f"[{shown}]" in options[name].help, name
