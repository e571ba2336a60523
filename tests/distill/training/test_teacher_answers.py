"""Training on what the teacher writes, live or from a cache."""

import json
from dataclasses import replace

import pytest
import torch

from ctkd.distill import preparing
from ctkd.distill.models.generation import Generated
from ctkd.distill.preparing import Forms, load_examples, load_models
from ctkd.distill.teachers import texts as teacher_texts
from ctkd.distill.training import measuring
from ctkd.distill.training import run as training
from ctkd.distill.training.run import train
from ctkd.errors import DataError, OutputError, SettingError
from tests.distill.tiny_caches import CachePlace
from tests.distill.tiny_runs import weights

SEQKD = {"loss": "sft", "answers": "teacher"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    place = CachePlace(tmp_path_factory.mktemp("place"))
    place.all = place.cache("all", k=400, texts="all", shard_rows=7)
    return place


@pytest.fixture(autouse=True)
def own_texts(monkeypatch, tmp_path):
    """Nothing is kept for other tests."""
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "kept"))


@pytest.fixture
def answered(monkeypatch) -> list:
    """Prompts of which some model was asked for a text."""
    found = []
    generate = teacher_texts.generate
    monkeypatch.setattr(
        teacher_texts,
        "generate",
        lambda model, tokenizer, prompts, **settings: (
            found.extend(prompts) or generate(model, tokenizer, prompts, **settings)
        ),
    )
    return found


def same(first, second) -> bool:
    first, second = weights(first.path), weights(second.path)
    return all(torch.equal(first[name], second[name]) for name in first)


def quiet(line: str) -> None:
    pass


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompts_of(place) -> dict[str, list[int]]:
    """The teacher's prompt of each example, held-out ones too."""
    config = place.config(**SEQKD)
    training, held_out = load_examples(config, quiet)
    form = Forms.of(config, training).teacher
    tokenizer = load_models(config, quiet).teacher_tokenizer
    chosen = [*training, *held_out]
    ids = form.ids(tokenizer, chosen)
    return {one.id: prompt for one, prompt in zip(chosen, ids, strict=True)}


def test_the_same_is_learned_live_from_a_cache_and_from_a_file(
    place, tmp_path, answered, monkeypatch
):
    live = train(place.config(output=str(tmp_path / "live"), **SEQKD), say=quiet)
    assert len(answered) == 18
    again = train(place.config(output=str(tmp_path / "again"), **SEQKD), say=quiet)
    assert len(answered) == 18
    cached = train(place.cached(place.all, str(tmp_path / "cached"), **SEQKD), say=quiet)
    prompts = prompts_of(place)
    rows = [json.loads(line) for line in place.rows.read_text().splitlines()]
    texts = {row["id"]: place.all.texts.text(prompts[row["id"]]) for row in rows}
    assert len(set(texts.values())) > 10
    taught, held_out = tmp_path / "taught.jsonl", tmp_path / "held-out.jsonl"
    learned = {one.id for one in load_examples(place.config(), quiet)[0]}
    write(
        taught,
        [
            {**row, "answer": f" {texts[row['id']]}"}
            for row in rows
            if row["id"] in learned and texts[row["id"]]
        ],
    )
    write(held_out, [row for row in rows if row["id"] not in learned])
    files = {"data": str(taught), "eval_data": str(held_out)}
    whole = train(place.config(output=str(tmp_path / "whole"), loss="sft", **files), say=quiet)

    def cut(config, say):
        """What the teacher did not end itself is no example of where to stop."""
        taught, held_out = load_examples(config, say)
        ended = [place.all.texts.ended(prompts[one.id]) for one in taught]
        assert not all(ended)
        chosen = zip(taught, ended, strict=True)
        return [replace(one, ends=end) for one, end in chosen], held_out

    with monkeypatch.context() as patched:
        patched.setattr(training, "load_examples", cut)
        by_hand = train(place.config(output=str(tmp_path / "hand"), loss="sft", **files), say=quiet)
    data = train(place.config(output=str(tmp_path / "data"), loss="sft"), say=quiet)
    assert same(live, again)
    assert same(live, cached)
    assert same(live, by_hand)
    assert not same(live, whole)
    assert not same(live, data)


def test_held_out_references_stay_those_of_the_data(place, tmp_path):
    config = place.cached(place.all, str(tmp_path / "run"), measure="all", **SEQKD)
    folder = train(config, say=quiet)
    rows = {row["id"]: row for row in map(json.loads, place.rows.read_text().splitlines())}
    lines = (folder.path / "predictions-teacher.jsonl").read_text().splitlines()
    for entry in map(json.loads, lines):
        assert entry["references"] == [rows[entry["id"]]["answer"]]
    assert len(lines) == 2
    assert list(folder.results["losses after"]) == ["ce"]
    # Such a teacher reads no row, so its bits are not known.
    (bits,) = (
        one for one in measuring.summarize(folder).splitlines() if one.startswith("bits per")
    )
    assert len(bits.split()) == len("bits per byte of given answers before after".split())


def test_a_teacher_that_teaches_by_texts_alone_is_not_loaded_with_a_cache(
    place, tmp_path, monkeypatch
):
    load, asked = preparing.load_model, []
    monkeypatch.setattr(
        preparing, "load_model", lambda name, **given: asked.append(name) or load(name, **given)
    )
    train(place.cached(place.all, str(tmp_path / "run"), measure="all", **SEQKD), say=quiet)
    assert asked == [str(place.student)]


@pytest.mark.parametrize("way", ["live", "cached"])
def test_an_example_without_a_text_is_left_out_and_said(place, tmp_path, monkeypatch, way):
    generate = teacher_texts.generate
    emptied = sorted(map(tuple, prompts_of(place).values()))[:5]

    def sometimes(model, tokenizer, prompts, **settings):
        texts = generate(model, tokenizer, prompts, **settings)
        return [
            replace(one, text="") if tuple(prompt) in emptied else one
            for prompt, one in zip(prompts, texts, strict=True)
        ]

    monkeypatch.setattr(teacher_texts, "generate", sometimes)
    config = place.config(output=str(tmp_path / "run"), **SEQKD)
    if way == "cached":
        cache = place.cache(str(tmp_path / "cache"), k=0, texts="all")
        config = place.cached(cache, str(tmp_path / "run"), **SEQKD)
    training, _ = load_examples(config, quiet)
    prompts = prompts_of(place)
    empty = sum(
        tuple(prompts[one.id]) in emptied or not place.all.texts.text(prompts[one.id])
        for one in training
    )
    assert 4 < empty < 18
    said = []
    train(config, say=said.append)
    assert f"left out {empty} examples to which the teacher wrote nothing" in said
    assert any(line.startswith(f"training: encoded {18 - empty} answers:") for line in said)


def test_a_teacher_that_writes_nothing_at_all_teaches_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(
        teacher_texts,
        "generate",
        lambda model, tokenizer, prompts, **_: [Generated("", True)] * len(prompts),
    )
    with pytest.raises(DataError, match="the teacher wrote nothing to any prompt; raise max_new"):
        train(place.config(output=str(tmp_path / "run"), **SEQKD), say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_cache_without_the_training_texts_says_how_to_make_it(place, tmp_path):
    cache = place.cache(str(tmp_path / "cache"), k=0, texts="held-out")
    config = place.cached(cache, str(tmp_path / "run"), **SEQKD)
    with pytest.raises(DataError, match=r"holds no answer of the teacher to example .*--texts all"):
        train(config, say=quiet)
    assert not (tmp_path / "run").exists()
    config = place.cached(place.all, str(tmp_path / "run"), max_new_tokens=5, **SEQKD)
    with pytest.raises(SettingError, match="answers of up to 3 tokens, but max_new_tokens is 5"):
        train(config, say=quiet)


def test_a_loss_scores_the_teachers_own_answers(place, tmp_path, answered):
    settings = {"loss": "uld", "answers": "teacher"}
    cache = place.cache(str(tmp_path / "cache"), k=400, **settings)
    assert len(cache.texts) == 20
    answered.clear()
    cached = train(place.cached(cache, str(tmp_path / "cached"), **settings), say=quiet)
    assert answered == []
    live = train(place.config(output=str(tmp_path / "live"), **settings), say=quiet)
    ours, theirs = weights(live.path), weights(cached.path)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], 0, 1e-4), name
    mine, others = (
        [entry["kd"] for entry in run.results["history"] if "kd" in entry] for run in (live, cached)
    )
    assert len(mine) == 3
    assert others == pytest.approx(mine, rel=1e-4)
    with pytest.raises(DataError, match=r"1[78] of 1[78] training rows are not in the"):
        train(place.cached(cache, str(tmp_path / "data"), loss="uld"), say=quiet)
    with pytest.raises(DataError, match=r"1[78] of 1[78] training rows are not in the"):
        train(place.cached(place.all, str(tmp_path / "data"), **settings), say=quiet)
    with pytest.raises(OutputError, match="begun with other data or answers"):
        place.cache(str(tmp_path / "cache"), k=400)


def test_texts_kept_for_another_teacher_are_not_used(place, tmp_path, answered):
    train(place.config(output=str(tmp_path / "one"), **SEQKD), say=quiet)
    train(place.config(output=str(tmp_path / "two"), dtype="bfloat16", **SEQKD), say=quiet)
    assert len(answered) == 36
    assert len(list((tmp_path / "kept" / "teacher_texts").iterdir())) == 2
    train(place.config(output=str(tmp_path / "three"), dtype="bfloat16-pure", **SEQKD), say=quiet)
    assert len(answered) == 36
