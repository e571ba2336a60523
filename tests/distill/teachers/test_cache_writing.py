"""A cache is written once: what is there stays, and what is missing or damaged is asked again."""

import json
import shutil

import filelock
import pytest
import torch

from ctkd.distill.config import CacheSettings
from ctkd.distill.models.loading import load_model
from ctkd.distill.teachers import cache_writing
from ctkd.distill.teachers import texts as teacher_texts
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.cache_writing import LazyTeacher, write_cache
from ctkd.errors import CtkdError, DataError, OutputError, SettingError
from tests.distill.tiny_caches import save_teacher, write_ragged_rows
from tests.distill.tiny_runs import save

GIVEN = {"k": 6, "shard_rows": 4, "texts": "held-out"}


@pytest.fixture(scope="module")
def made(place) -> TeacherCache:
    return place.cache("made", **GIVEN)


@pytest.fixture
def copied(place, made, tmp_path):
    """The same cache, to be damaged."""
    folder = tmp_path / "cache"
    shutil.copytree(made.path, folder)
    return folder


@pytest.fixture
def asked(monkeypatch) -> dict[str, list]:
    """The teachers that were loaded, the rows asked about, and the prompts answered."""
    found = {"loaded": [], "rows": [], "prompts": []}
    load, kept = cache_writing.load_teacher, LazyTeacher.kept
    generate = teacher_texts.generate

    def loading(config, device):
        found["loaded"].append(config.teacher)
        return load(config, device)

    def asking(self, sides, record):
        found["rows"] += [tuple(side.answer_ids) for side in sides]
        return kept(self, sides, record)

    def answering(model, tokenizer, prompts, **settings):
        found["prompts"] += [tuple(prompt) for prompt in prompts]
        return generate(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(cache_writing, "load_teacher", loading)
    monkeypatch.setattr(LazyTeacher, "kept", asking)
    monkeypatch.setattr(teacher_texts, "generate", answering)
    return found


def files(folder) -> dict[str, bytes]:
    there = sorted(path for path in folder.iterdir() if path.name != ".lock")
    return {path.name: path.read_bytes() for path in there}


def test_two_processes_do_not_write_one_cache(place, made, copied):
    with filelock.FileLock(copied / ".lock"):
        with pytest.raises(OutputError, match="another process writes the teacher cache"):
            write_cache(place.config(), copied, CacheSettings(**GIVEN), say=lambda line: None)


def test_the_folder_holds_what_it_says(made):
    assert sorted(files(made.path)) == [
        "cache.json",
        *(f"logits-0000{number}.safetensors" for number in range(5)),
        "texts.jsonl",
    ]
    record = json.loads((made.path / "cache.json").read_text())
    assert record["finished"] is True
    assert [len(shard["rows"]) for shard in record["shards"]] == [4] * 5
    assert (record["k"], record["temperatures"], record["dtype"]) == (6, [1.0, 2.0], "float32")
    assert record["texts"] == len(made.texts) == 2


def test_a_finished_cache_is_opened_without_the_teacher(place, made, asked):
    before = files(made.path)
    place.cache("made", **GIVEN)
    assert asked == {"loaded": [], "rows": [], "prompts": []}
    assert files(made.path) == before


def test_two_caches_of_one_teacher_are_the_same_files(place, made, asked):
    place.cache("twin", **GIVEN)
    assert files(place.folder / "twin") == files(made.path)
    assert asked["loaded"] == [str(place.teacher)]
    assert len(asked["rows"]) == 20
    assert len(asked["prompts"]) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_exactly_what_is_damaged_is_asked_again(place, made, copied, asked, damage):
    shard = copied / "logits-00002.safetensors"
    if damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 128
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    said = []
    write_cache(place.config(), copied, CacheSettings(**GIVEN), say=said.append)
    assert f"{shard} is missing or damaged and is computed again" in said
    assert files(copied) == files(made.path)
    assert len(asked["rows"]) == 4
    assert asked["prompts"] == []


def test_exactly_the_texts_that_are_missing_are_written_again(place, made, copied, asked):
    lines = (copied / "texts.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "texts.jsonl").write_bytes(lines[1])
    found = write_cache(place.config(), copied, CacheSettings(**GIVEN))
    assert len(found.texts) == 2
    assert asked["rows"] == []
    # They are answered in groups, and these two are one.
    assert len(asked["prompts"]) == 2


def test_more_texts_are_added_to_a_cache(place, made, copied, asked):
    found = write_cache(place.config(), copied, CacheSettings(**{**GIVEN, "texts": "all"}))
    assert len(found.texts) == 20
    assert len(asked["prompts"]) == 18
    assert asked["rows"] == []
    assert len(TeacherCache.open(copied).texts) == 20
    assert len(write_cache(place.config(), copied, CacheSettings(**GIVEN)).texts) == 20


def test_equal_rows_are_asked_about_once(place, tmp_path, asked):
    write_ragged_rows(tmp_path / "rows.jsonl", 20)
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text + text.replace('"id": "r', '"id": "s'))
    config = place.config(data=str(tmp_path / "rows.jsonl"))
    found = write_cache(config, tmp_path / "cache", CacheSettings(**GIVEN))
    assert len(found) == len(asked["rows"]) == 20


def test_rows_are_asked_about_longest_first(place, asked):
    place.cache("ordered", **GIVEN)
    record = TeacherCache.open(place.folder / "ordered").record
    counts = [count for shard in record["shards"] for _, count in shard["rows"]]
    assert counts == [len(answer) + 1 for answer in asked["rows"]]
    shutil.rmtree(place.folder / "ordered")


@pytest.fixture(scope="module")
def others(place, tmp_path_factory):
    """Other rows, another teacher, another tokenizer and another student."""
    folder = tmp_path_factory.mktemp("others")
    write_ragged_rows(folder / "other.jsonl", 20, first=1)
    save_teacher(folder / "weights", seed=3)
    shutil.copytree(place.teacher, folder / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / "words" / name
        file.write_text(file.read_text().replace("<pad>", "<bad>"))
    save(folder / "student", vocabulary=290, padded=0, hidden=16, seed=5)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 7}, r"begun with another k \(6, now 7\); give the same options"),
        ({"temperatures": [1.0, 3.0]}, r"another temperatures \(\[1.0, 2.0\], now \[1.0, 3.0\]\)"),
        ({"shard_rows": 5}, r"another shard_rows \(4, now 5\)"),
        ({"max_new_tokens": 4}, r"another max_new_tokens \(3, now 4\)"),
        ({"dtype": "bfloat16"}, r"another dtype \(float32, now bfloat16\)"),
        ({"teacher_shots": 1}, "another prompt form"),
        ({"data": "HERE/other.jsonl"}, "other data or answers, another student's tokenizer, len"),
        ({"teacher": "HERE/weights"}, "another teacher"),
        ({"teacher": "HERE/words"}, "another tokenizer"),
        ({"student": "HERE/student", "min_coverage": 0.1}, None),
        ({"batch_size": 2}, None),
    ],
)
def test_another_question_in_the_same_folder_is_refused(
    place, made, copied, others, changes, message
):
    changes = {
        name: value.replace("HERE", str(others)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    own = {name: changes.pop(name) for name in list(changes) if name in (*GIVEN, "temperatures")}
    before = files(copied)
    if message is None:
        write_cache(place.config(**changes), copied, CacheSettings(**{**GIVEN, **own}))
    else:
        with pytest.raises(OutputError, match=message):
            write_cache(place.config(**changes), copied, CacheSettings(**{**GIVEN, **own}))
    assert files(copied) == before


def test_a_folder_with_something_else_is_refused_before_anything_is_loaded(place, tmp_path, asked):
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(OutputError, match="exists and is no teacher cache; choose another"):
            write_cache(place.config(), folder)
    with pytest.raises(OutputError, match="cannot make .*thesis.tex/cache: .*choose another"):
        write_cache(place.config(), tmp_path / "thesis.tex" / "cache")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".cache.json.partial").write_text('{"form')
    assert len(place.cache(str(tmp_path / "begun"), k=0, texts="none")) == 20
    assert not (tmp_path / "begun" / ".cache.json.partial").exists()
    asked["rows"].clear()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cache.json").write_text('{"format": 0}')
    with pytest.raises(DataError, match="not written by this version of ctkd"):
        write_cache(place.config(), tmp_path / "old")
    assert asked["prompts"] == asked["rows"] == []
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k, the entries kept per position, must be at least 0, got -1"),
        ({"k": True}, "must be at least 0, got True"),
        ({"temperatures": []}, "at least one temperature is needed"),
        ({"temperatures": [0.0]}, "a temperature must be"),
        ({"temperatures": [1.0, float("nan")]}, "a temperature must be"),
        ({"texts": "some"}, "texts must be one of none, held-out, all, got 'some'"),
        ({"shard_rows": 0}, "shard_rows must be"),
        ({"loss": "sft"}, "loss 'sft' asks no teacher, so there is nothing to cache"),
        ({"device": "tpu"}, "device must be one of"),
    ],
)
def test_wrong_options_are_refused(place, options, message):
    with pytest.raises(SettingError, match=message):
        place.cache("never", **options)
    assert not (place.folder / "never").exists()


def test_a_disk_that_is_full_is_said(place, tmp_path, monkeypatch):
    def full(tensors, path):
        raise cache_writing.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(cache_writing, "save_file", full)
    with pytest.raises(OutputError, match="No space left .*make room, then repeat the command"):
        write_cache(place.config(), tmp_path / "cache")
    with pytest.raises(DataError, match="is not finished; repeat the `ctkd cache`"):
        TeacherCache.open(tmp_path / "cache")


def test_prompts_without_room_for_an_answer_are_left_out_and_said(place, tmp_path, asked):
    rows, held_out = tmp_path / "rows.jsonl", tmp_path / "held-out.jsonl"
    for file in (rows, held_out):
        write_ragged_rows(file, 4)
        long = {"id": "long", "prompt": "Well? " * 100, "answer": " I"}
        file.write_text(file.read_text() + json.dumps(long) + "\n")
    settings = {"data": str(rows), "eval_data": str(held_out)}
    said = []
    found = place.cache(str(tmp_path / "cache"), texts="all", say=said.append, **settings)
    assert len(found.texts) == 4
    for what in ("training", "held-out"):
        assert (
            f"{what}: 1 of 5 prompts are longer than the 125 tokens that leave the teacher room to "
            "answer, the first is long; left out"
        ) in said
    settings |= {"answers": "teacher", "on_long": "refuse"}
    with pytest.raises(DataError, match="the first is long; raise max_length, or shorten the pr"):
        place.cache(str(tmp_path / "refused"), **settings)


def test_bfloat16_is_one_teacher_in_both_its_forms(place, tmp_path, asked):
    place.cache(str(tmp_path / "half"), dtype="bfloat16", texts="none")
    place.cache(str(tmp_path / "half"), dtype="bfloat16-pure", texts="none")
    assert len(asked["rows"]) == 20
    half = load_model(str(place.teacher), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_teacher_without_weights_cannot_be_cached(place, tmp_path):
    save_teacher(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(CtkdError, match="bare holds no weights; give a folder of a saved model"):
        place.cache(str(tmp_path / "cache"), teacher=str(tmp_path / "bare"))
    assert not (tmp_path / "cache").exists()
