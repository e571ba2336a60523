"""What a cache holds is what the teacher says, and a cache that is not whole is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import ctkd
from ctkd.distill.data.encoding import EncodedSide
from ctkd.distill.models.loading import load_model
from ctkd.distill.preparing import Forms, encode, load_examples, load_models
from ctkd.distill.teachers.cache import FORMAT, TeacherCache, row_key, write_record
from ctkd.errors import DataError, OutputError, SettingError
from ctkd.logits import DenseLogits, TopK
from tests.distill import tiny
from tests.distill.tiny_caches import save_teacher, write_ragged_rows

TEMPERATURES = (1.0, 2.0, 0.5)


@pytest.fixture(scope="module")
def caches(place) -> dict[int, TeacherCache]:
    """Of nothing, of some and of all columns, in shards that no batch size divides."""
    return {
        k: place.cache(f"k{k}", k=k, temperatures=TEMPERATURES, shard_rows=7, texts="none")
        for k in (0, 5, 10_000)
    }


@pytest.fixture(scope="module")
def sides(place) -> list[EncodedSide]:
    """The teacher's side of every row."""
    return [row.teacher for row in rows_of(place)]


def rows_of(place, **settings):
    config = place.config(**settings)
    training, held_out = load_examples(config, lambda line: None)
    models = load_models(config, lambda line: None)
    forms = Forms.of(config, training)
    return [
        row
        for chosen in (training, held_out)
        for row in encode(config, models, chosen, forms, "training", lambda line: None).rows
    ]


def live(place, side: EncodedSide, k: int) -> dict[str, torch.Tensor]:
    """What the teacher says of one row, asked alone and without padding."""
    model = load_model(str(place.teacher))
    size = len(tiny.tokenizer(330))
    assert model.lm_head.out_features == size + 7
    with torch.no_grad():
        logits = model(torch.tensor([[*side.prompt_ids, *side.answer_ids]])).logits
    logits = logits[:, len(side.prompt_ids) - 1 :, :size]
    targets = torch.tensor([[*side.answer_ids, side.eos_id]])
    kept = TopK.of(DenseLogits(logits), targets, min(k, size), TEMPERATURES)
    log_probs = F.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return {**{name: value[0] for name, value in kept.tensors().items()}, "label": log_probs[0]}


@pytest.mark.parametrize("k", [0, 5, 10_000])
def test_a_row_is_what_the_teacher_says_of_it(place, caches, sides, k):
    cache = caches[k]
    assert len(cache.record["shards"]) == 3
    assert len(cache) == len(sides) == 20
    assert cache.vocab_size == len(tiny.tokenizer(330))
    assert cache.k == min(k, cache.vocab_size)
    for side in sides:
        count = len(side.answer_ids) + 1
        stored = cache.batch([side], count)
        expected = live(place, side, k)
        assert stored.keys() | {"label"} == expected.keys()
        for name, value in stored.items():
            assert value.shape == (1, *expected[name].shape), name
            assert value.dtype == expected[name].dtype, name
            assert torch.allclose(value[0].double(), expected[name].double(), 1e-5, 1e-5), name
        assert stored["label_ids"].tolist() == [[*side.answer_ids, side.eos_id]]
        plain = stored["label_values"] - stored["log_normalizers"][..., 0, 0]
        assert torch.allclose(plain[0], expected["label"], 0, 1e-5)


def test_ids_are_those_of_the_teacher_without_ties(place, caches, sides):
    for side in sides[:3]:
        stored = caches[5].batch([side], len(side.answer_ids) + 1)["ids"][0]
        assert torch.equal(stored, live(place, side, 5)["ids"])
        assert not stored.eq(stored.roll(1, -1)).any()


def test_rows_of_a_batch_are_cut_and_padded_to_what_is_asked(caches, sides):
    ragged = sorted(sides, key=lambda side: len(side.answer_ids))
    ragged = [ragged[0], ragged[-1], ragged[7]]
    lengths = [len(side.answer_ids) for side in ragged]
    assert lengths[0] < lengths[2] < lengths[1]
    longest = max(lengths)
    stored = caches[5].batch(ragged, longest)
    for name, value in stored.items():
        assert value.shape[:2] == (3, longest), name
        for row, side in enumerate(ragged):
            alone = caches[5].batch([side], len(side.answer_ids) + 1)[name][0]
            end = min(len(side.answer_ids) + 1, longest)
            assert torch.equal(value[row, :end], alone[:end]), name
            assert not value[row, end:].any(), name
    logits = caches[5].logits(stored, torch.ones(3, longest, dtype=torch.bool))
    assert logits.shape == (3, longest, caches[5].vocab_size)


def test_files_take_four_bytes_an_entry(caches):
    cache = caches[5]
    tensors = load_file(cache.path / "logits-00000.safetensors")
    assert {value.element_size() for value in tensors.values()} == {4}
    assert len(tensors["ids"]) == sum(count for _, count in cache.record["shards"][0]["rows"])


def test_a_row_is_found_by_all_that_the_teacher_reads_and_is_scored_on(caches, sides):
    side = sides[0]
    assert side in caches[5]
    for changes in (
        {"prompt_ids": [*side.prompt_ids, 5]},
        {"answer_ids": side.answer_ids[:-1]},
        {"eos_id": None},
        {"prompt_ids": side.prompt_ids + side.answer_ids[:1], "answer_ids": side.answer_ids[1:]},
    ):
        other = replace(side, **{"chunk_ids": [], **changes})
        assert row_key(other) != row_key(side)
        assert other not in caches[5]
        with pytest.raises(DataError, match="a row is not in the teacher cache .*same options"):
            caches[5].batch([other], 1)
    assert replace(side, chunk_ids=[]) in caches[5]


def test_rows_that_were_not_asked_about_are_named(place, caches, tmp_path):
    write_ragged_rows(tmp_path / "more.jsonl", 24)
    rows = rows_of(place, data=str(tmp_path / "more.jsonl"))
    with pytest.raises(DataError, match="4 of 24 training rows are not in the teacher cache"):
        caches[5].check_rows(rows, "training")
    caches[5].check_rows(rows_of(place), "training")


@pytest.fixture
def copied(place, caches, tmp_path):
    """A cache to be damaged."""
    for file in caches[5].path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    TeacherCache.open(tmp_path)
    return tmp_path


def flip(path, place=-10):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


SHARD = "logits-00001.safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / SHARD),
        lambda folder: flip(folder / SHARD, 20),
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100]),
        lambda folder: (folder / SHARD).write_bytes(b""),
        lambda folder: (folder / SHARD).unlink(),
    ],
    ids=["flipped", "flipped-header", "cut", "empty", "missing"],
)
def test_a_damaged_shard_is_named_with_a_way_out(copied, damage):
    damage(copied)
    with pytest.raises(DataError, match=rf"{SHARD} is missing or not as it was written; repeat"):
        TeacherCache.open(copied)


def test_a_folder_without_a_cache_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no teacher cache .* make one with `ctkd cache"):
        TeacherCache.open(tmp_path)
    with pytest.raises(DataError, match="holds no teacher cache"):
        TeacherCache.open(tmp_path / "none")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(DataError, match="rows.jsonl is a file, and a teacher cache is a folder"):
        TeacherCache.open(tmp_path / "rows.jsonl")


def change(folder, **entries):
    record = json.loads((folder / "cache.json").read_text())
    del record["check"]
    write_record(folder, {**record, **entries})


def test_other_formats_and_unfinished_caches_are_refused(copied):
    change(copied, format=FORMAT - 1)
    message = f"not written by this version of ctkd .format {FORMAT}.; delete"
    with pytest.raises(DataError, match=message):
        TeacherCache.open(copied)
    text = (copied / "cache.json").read_text()
    (copied / "cache.json").write_text(
        text.replace('"k": 5', '"k": 4').replace("2,", f"{FORMAT},", 1)
    )
    with pytest.raises(DataError, match="cache.json is not as it was written; restore it, or"):
        TeacherCache.open(copied)
    change(copied, format=FORMAT, finished=False)
    with pytest.raises(DataError, match="is not finished; repeat the `ctkd cache` that began it"):
        TeacherCache.open(copied)
    (copied / "cache.json").write_text(f'{{"format": {FORMAT}, ')
    with pytest.raises(DataError, match=r"cache.json cannot be read .*delete the folder"):
        TeacherCache.open(copied)
    (copied / "cache.json").write_text("[1]")
    with pytest.raises(DataError, match="not written by this version"):
        TeacherCache.open(copied)


def test_texts_that_are_missing_or_damaged_are_noticed(place):
    folder = place.cache("texts", k=3, texts="held-out").path
    whole = (folder / "texts.jsonl").read_bytes()
    assert len(whole.splitlines()) == 2
    for damaged in (whole.splitlines(keepends=True)[0], b"", whole[:-30]):
        (folder / "texts.jsonl").write_bytes(damaged)
        with pytest.raises(DataError, match=r"holds [01] of 2 texts that can be read; repeat"):
            TeacherCache.open(folder)
    (folder / "texts.jsonl").unlink()
    with pytest.raises(DataError, match="holds 0 of 2 texts"):
        TeacherCache.open(folder)
    assert len(place.cache("texts", k=3, texts="held-out").texts) == 2


def test_a_cache_of_another_teacher_is_refused(place, caches, tmp_path):
    table = load_models(place.config(), print).pair.teacher_bytes
    save_teacher(tmp_path / "other", seed=3)
    caches[5].check_teacher(str(place.teacher), table)
    with pytest.raises(SettingError, match="made from other weights than those of .*other"):
        caches[5].check_teacher(str(tmp_path / "other"), table)
    narrower = ctkd.tokenization.token_bytes.TokenBytes.from_tokenizer(tiny.tokenizer(320))
    with pytest.raises(SettingError, match="made for the tokenizer of .*teacher, that of it"):
        caches[5].check_teacher("it", narrower)


def test_a_moved_teacher_is_the_same_teacher(place, caches, tmp_path):
    table = load_models(place.config(), print).pair.teacher_bytes
    moved = tmp_path / "moved"
    save_teacher(moved)
    caches[5].check_teacher(str(moved), table)
    again = place.cache("moved", teacher=str(moved), k=5, temperatures=TEMPERATURES, texts="none")
    assert again.fingerprint == caches[5].fingerprint
    assert caches[0].fingerprint != caches[5].fingerprint


def test_a_fingerprint_depends_on_all_that_answers_depend_on(caches):
    record = caches[5].record
    names = ("rows", "prompt", "k", "temperatures", "vocab_size", "dtype", "max_new_tokens")
    others = [{**record, name: "another"} for name in names]
    others += [{**record, "teacher": {**record["teacher"], "weights": "others"}}]
    fingerprints = {TeacherCache(caches[5].path, one).fingerprint for one in (record, *others)}
    assert len(fingerprints) == 1 + len(others)


def test_every_loss_is_served_by_all_columns(place, caches):
    pair = load_models(place.config(), print).pair
    temperatures = {
        temperature
        for name in ctkd.list_losses()
        for temperature in ctkd.get_loss(name, pair=pair).teacher_temperatures
    }
    record = {**caches[10_000].record, "temperatures": sorted(temperatures)}
    cache = TeacherCache(caches[10_000].path, record)
    for name, options in (
        *((name, {}) for name in ctkd.list_losses()),
        ("mined", {"alignment": "dtw"}),
        ("alm", {"debias": True}),
        ("multilevelot", {"matching": "greedy"}),
    ):
        cache.check_serves(ctkd.get_loss(name, pair=pair, **options), name)


def test_hidden_states_serve_every_loss_as_the_live_teacher_does(place, sides):
    pair = load_models(place.config(), print).pair
    rows = [sides[0], sides[9], sides[4]]
    longest = max(len(side.answer_ids) for side in rows) + 1
    dense = torch.zeros(3, longest, pair.teacher_size)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    token_ids = torch.zeros(3, longest, dtype=torch.int64)
    model = load_model(str(place.teacher))
    for row, side in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([[*side.prompt_ids, *side.answer_ids]])).logits[0]
        size = len(side.answer_ids) + 1
        dense[row, :size] = logits[len(side.prompt_ids) - 1 :, : pair.teacher_size]
        mask[row, :size] = True
        token_ids[row, :size] = torch.tensor([*side.answer_ids, side.eos_id])
    chunk_ids = torch.arange(longest).expand(3, -1)
    generator = torch.Generator().manual_seed(0)
    student_logits = torch.randn(3, longest, pair.student_size, generator=generator)

    def answers(loss, teacher_logits):
        student = student_logits.clone().requires_grad_()
        given = {"mask": mask, "chunk_ids": chunk_ids}
        student_ids = token_ids % pair.student_size
        logits = DenseLogits(student, mask=mask)
        student_side = ctkd.Side(logits=logits, token_ids=student_ids, **given)
        teacher_side = ctkd.Side(logits=teacher_logits, token_ids=token_ids, **given)
        batch = ctkd.Batch(student=student_side, teacher=teacher_side, num_chunks=longest)
        value = loss(batch).value
        value.backward()
        return value.detach(), student.grad

    for states, tolerance in (("float32", 1e-6), ("bfloat16", 0.02)):
        cache = place.cache(states, states=states, texts="none", shard_rows=7)
        stored = cache.batch(rows, longest)
        assert stored["hidden"].dtype == getattr(torch, states)
        for name in ctkd.list_losses():
            loss = ctkd.get_loss(name, pair=pair)
            cache.check_serves(loss, name)
            value, gradient = answers(loss, DenseLogits(dense, mask=mask))
            found, found_gradient = answers(loss, cache.logits(stored, mask))
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
            atol = tolerance * float(gradient.abs().max())
            torch.testing.assert_close(found_gradient, gradient, rtol=tolerance, atol=atol)
    with pytest.raises(OutputError, match="begun with another dtype of hidden states .bfloat16, n"):
        place.cache("bfloat16", texts="none", shard_rows=7)
    damaged = cache.path / "head.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="head.safetensors is missing or not as it was written"):
        TeacherCache.open(cache.path)
    place.cache("bfloat16", states="bfloat16", texts="none", shard_rows=7)
    assert damaged.read_bytes() == whole


def test_many_shards_are_read_without_keeping_files_open(place, sides):
    cache = place.cache("many", k=1, shard_rows=1, texts="none")
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").is_dir() else 0
    cache.batch(sides, 3)
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").is_dir() else 0
    assert len(cache.record["shards"]) == 20
    assert after - before < 5


def test_a_loss_that_asks_too_much_is_refused(place, caches):
    pair = load_models(place.config(), print).pair

    def serves(name, stored, **options):
        caches[stored].check_serves(ctkd.get_loss(name, pair=pair, **options), name)

    for name in ("uld", "mined", "multilevelot", "alm", "gold"):
        serves(name, 10_000)
    serves("uld", 5)
    serves("mined", 5, k=5)
    serves("alm", 0)
    with pytest.raises(SettingError, match=r"gold needs whole rows.* 5 of \d+ entries; train it"):
        serves("gold", 5)
    with pytest.raises(SettingError, match="uld needs the teacher's largest logits, but .*k is 0"):
        serves("uld", 0)
    with pytest.raises(SettingError, match="looks up the 10 largest entries .* keeps 5; cache"):
        serves("mined", 5)
    with pytest.raises(SettingError, match=r"temperature 1.5, .* was made for 1, 2, 0.5; cache it"):
        serves("uld", 5, teacher_temperature=1.5)
