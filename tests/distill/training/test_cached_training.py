"""Training from a cache is training with the teacher, and the teacher is never loaded for it."""

import pytest
import torch
from transformers import TrainingArguments

import ctkd
from ctkd.distill import preparing
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.preparing import Forms, encode, load_examples, load_models
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.training import run as training
from ctkd.distill.training.run import train
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import DataError, ModelError, SettingError
from tests.distill import tiny
from tests.distill.tiny_caches import CachePlace, save_teacher, write_ragged_rows
from tests.distill.tiny_runs import record, save, weights


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    place = CachePlace(tmp_path_factory.mktemp("place"))
    place.whole = place.cache("whole", k=10_000, shard_rows=7)
    place.part = place.cache("part", k=32, shard_rows=7)
    place.observed = place.cache("observed", k=0, texts="none", shard_rows=7)
    return place


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The models that were loaded."""
    found = []
    load = preparing.load_model
    monkeypatch.setattr(
        preparing,
        "load_model",
        lambda source, **settings: found.append(source) or load(source, **settings),
    )
    return found


class Doubled(TeacherCache):
    """What the teacher said, in float64, as the live teacher says it in that test."""

    def batch(self, sides, positions, *, with_eos=True):
        stored = super().batch(sides, positions, with_eos=with_eos)
        return {
            name: value.double() if value.is_floating_point() else value
            for name, value in stored.items()
        }


def trainer(
    place, folder, name, cache, *, score_eos, batch_size=4, accumulation=1, **settings
) -> CrossTokenizerTrainer:
    """Plain gradient steps on a student in float64, so that only the teacher can round."""
    config = place.config(score_eos=score_eos, **settings)
    examples, held_out = load_examples(config, lambda line: None)
    models = load_models(config, lambda line: None, cache=cache)
    forms = Forms.of(config, examples)
    rows, held_out_rows = (
        encode(config, models, chosen, forms, "training", lambda line: None).rows
        for chosen in (examples, held_out)
    )
    student = models.student.double()
    pair = models.pair.narrowed(10**6, models.teacher_width)
    return CrossTokenizerTrainer(
        student,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=3,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            data_seed=0,
        ),
        loss=ctkd.get_loss(name, pair=pair),
        teacher=None if models.teacher is None else models.teacher.double(),
        teacher_cache=cache,
        weights=ctkd.Weights(0.5, 1.0),
        student_vocab_size=pair.student_size,
        teacher_vocab_size=pair.teacher_size,
        data_collator=Collator(
            student_pad_id=padding_id(models.student_tokenizer),
            teacher_pad_id=padding_id(models.teacher_tokenizer),
            score_eos=score_eos,
            teacher_cache=cache,
        ),
        train_dataset=rows,
        eval_dataset=held_out_rows,
    )


def state(run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "score_eos", "accumulation"),
    [
        ("uld", False, 1),
        ("multilevelot", True, 2),
        ("mined", True, 1),
        ("alm", False, 2),
        ("gold", True, 2),
        ("gold", False, 1),
    ],
)
def test_steps_with_all_columns_cached_are_those_with_the_teacher(
    place, tmp_path, name, score_eos, accumulation
):
    settings = {"score_eos": score_eos, "batch_size": 4 // accumulation}
    settings["accumulation"] = accumulation
    live = trainer(place, tmp_path, name, None, **settings)
    cached = trainer(place, tmp_path, name, Doubled.open(place.whole.path), **settings)
    assert cached.teacher is None
    before = state(live)
    first, second = live.evaluate(), cached.evaluate()
    live.train()
    cached.train()
    moved, same = state(live), state(cached)
    assert max((moved[one] - before[one]).abs().max() for one in moved) > 1e-2
    for one in moved:
        assert torch.allclose(moved[one], same[one], 0, 1e-6), one
    for ours, theirs in zip(live.state.log_history, cached.state.log_history, strict=True):
        for key in (one for one in ours if one.startswith(("ce", "kd"))):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-6, abs=1e-6), key
    for key in (one for one in first if one.startswith(("eval_ce", "eval_kd"))):
        assert second[key] == pytest.approx(first[key], rel=1e-6, abs=1e-6), key


def test_answers_that_were_cut_are_scored_as_with_the_teacher(place, tmp_path):
    name = "multilevelot"
    settings = {"max_length": 54, "on_long": "cut"}
    whole = place.cache("cut", k=10_000, texts="none", **settings)
    cached = trainer(place, tmp_path, name, Doubled.open(whole.path), score_eos=True, **settings)
    ends = [row.teacher.eos_id for row in cached.train_dataset]
    assert None in ends
    assert any(end is not None for end in ends)
    live = trainer(place, tmp_path, name, None, score_eos=True, **settings)
    live.train()
    cached.train()
    moved, same = state(live), state(cached)
    for one in moved:
        assert torch.allclose(moved[one], same[one], 0, 1e-6), one


def test_without_weight_a_cached_teacher_teaches_nothing(place, tmp_path):
    plain = train(place.config(output=str(tmp_path / "sft"), loss="sft"), say=lambda line: None)
    config = place.cached(place.part, str(tmp_path / "cached"), kd_weight=0.0)
    cached = train(config, say=lambda line: None)
    ours, theirs = weights(plain.path), weights(cached.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tokenizer_with_one_special_token_too_many(place, tmp_path):
    teacher = tmp_path / "teacher"
    save(teacher, vocabulary=330, padded=0, hidden=24, seed=2)
    tokenizer = tiny.tokenizer(330)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(teacher)
    settings = {"loss": "gold", "teacher": str(teacher)}
    cache = place.cache(str(tmp_path / "cache"), k=10_000, texts="none", **settings)
    assert cache.k == cache.vocab_size == len(tokenizer) - 1
    live = train(place.config(output=str(tmp_path / "live"), **settings), say=lambda line: None)
    config = place.cached(cache, str(tmp_path / "cached"), **settings)
    cached = train(config, say=lambda line: None)
    for one, value in weights(live.path).items():
        assert torch.allclose(value, weights(cached.path)[one], 0, 1e-4), one


def test_a_whole_run_needs_nothing_of_the_teacher_but_its_tokenizer(place, tmp_path, asked):
    live = train(place.config(output=str(tmp_path / "live"), measure="all"), say=lambda line: None)
    assert asked == [str(place.student), str(place.teacher)]
    asked.clear()
    said = []
    config = place.cached(place.whole, str(tmp_path / "cached"), measure="all")
    cached = train(config, say=said.append)
    assert asked == [str(place.student)]
    assert f"teacher: {place.teacher}, from the cache {place.whole.path}" in said
    ours, theirs = live.results, cached.results
    for stage in ("student before", "teacher", "student after"):
        assert ours[stage] == pytest.approx(theirs[stage], rel=1e-6)
    for stage in ("losses before", "losses after"):
        assert theirs[stage] == pytest.approx(ours[stage], rel=1e-4)
    for name, value in weights(live.path).items():
        assert torch.allclose(value, weights(cached.path)[name], 0, 1e-4), name
    file = "predictions-teacher.jsonl"
    assert (live.path / file).read_text() == (cached.path / file).read_text()


@pytest.mark.parametrize(
    ("name", "cache", "options"),
    [
        ("uld", "part", {}),
        ("multilevelot", "part", {"k": 32}),
        ("mined", "part", {}),
    ],
)
def test_part_of_the_columns_is_enough_for_most(place, tmp_path, asked, name, cache, options):
    config = place.cached(
        getattr(place, cache), str(tmp_path / "run"), loss=name, loss_options=options
    )
    folder = train(config, say=lambda line: None)
    logs = [entry for entry in folder.results["history"] if "kd" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3]
    assert all(0 < entry["kd"] < 1e3 for entry in logs)
    assert asked == [str(place.student)]


def test_observed_tokens_alone_are_all_that_alm_needs(place, tmp_path):
    found = [
        train(place.cached(cache, str(tmp_path / name), loss="alm"), say=lambda line: None)
        for name, cache in (("k0", place.observed), ("kV", place.whole))
    ]
    first, second = (weights(folder.path) for folder in found)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("cache", "settings", "message"),
    [
        ("part", {"loss": "gold"}, "gold needs whole rows of the teacher's.*--states bfloat16"),
        ("observed", {"loss": "uld"}, "uld needs the teacher's largest logits, .*--k 256"),
        ("observed", {"loss": "multilevelot"}, "needs the teacher's largest logits"),
        (
            "part",
            {"loss_options": {"teacher_temperature": 1.5}},
            "--temperature 1.5, or train it",
        ),
        (
            "part",
            {"loss": "mined", "loss_options": {"k": 40}},
            "looks up the 40 largest entries .* keeps 32; cache the teacher again with --k 40 or",
        ),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_before_anything_is_trained(
    place, tmp_path, cache, settings, message
):
    config = place.cached(getattr(place, cache), str(tmp_path / "run"), **settings)
    with pytest.raises(SettingError, match=message):
        train(config, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_survives_a_cache_that_cannot_serve(place, tmp_path):
    output = str(tmp_path / "run")
    train(place.cached(place.part, output), say=lambda line: None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(SettingError, match="gold needs whole rows"):
        train(place.cached(place.part, output, loss="gold"), overwrite=True, say=print)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_other_data_is_refused_before_anything_is_trained(place, tmp_path):
    rows = tmp_path / "other.jsonl"
    write_ragged_rows(rows, 20, first=10)
    config = place.cached(place.part, str(tmp_path / "run"), data=str(rows))
    with pytest.raises(DataError, match=r"8 of 18 training rows are not .*same options"):
        train(config, say=lambda line: None)
    longer = place.cached(place.part, str(tmp_path / "run"), teacher_shots=1)
    # The example that is the shot is asked without it.
    with pytest.raises(DataError, match="17 of 18 training rows are not in the teacher cache"):
        train(longer, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_refused(place, tmp_path):
    save_teacher(tmp_path / "other", seed=3)
    config = place.cached(place.part, str(tmp_path / "run"), teacher=str(tmp_path / "other"))
    with pytest.raises(SettingError, match="made from other weights than those of"):
        train(config, say=lambda line: None)
    save(tmp_path / "words", vocabulary=320, padded=0, hidden=24, seed=2)
    config = place.cached(place.part, str(tmp_path / "run"), teacher=str(tmp_path / "words"))
    with pytest.raises(SettingError, match="made for the tokenizer of"):
        train(config, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_its_weights_is_enough(place, tmp_path):
    bare = tmp_path / "bare"
    save_teacher(bare)
    (bare / "model.safetensors").unlink()
    said = []
    config = place.cached(place.part, str(tmp_path / "run"), teacher=str(bare))
    folder = train(config, say=said.append)
    assert folder.results["steps"] == 3
    assert f"the weights of {bare} are not here, so they are not compared with the cache's" in said
    (bare / "config.json").unlink()
    config = place.cached(place.part, str(tmp_path / "more"), teacher=str(bare))
    with pytest.raises(ModelError, match="holds no model: it has no config.json"):
        train(config, say=lambda line: None)


def test_texts_of_another_length_are_no_measure_of_the_teacher(place, tmp_path):
    said = []
    config = place.cached(place.part, str(tmp_path / "run"), measure="all", max_new_tokens=5)
    results = train(config, say=said.append).results
    assert "teacher" not in results
    assert "teacher: its stored answers have up to 3 tokens, not 5, not scored" in said
    said.clear()
    config = place.cached(place.observed, str(tmp_path / "none"), measure="all", loss="alm")
    assert "teacher" not in train(config, say=said.append).results
    assert "teacher: 2 held-out prompts have no stored answer, not scored" in said


def test_another_precision_is_said(place, tmp_path):
    said = []
    config = place.cached(place.part, str(tmp_path / "run"), dtype="bfloat16")
    train(config, say=said.append)
    assert "note: the cached teacher was asked in float32, a live one would be in bfloat16" in said


def test_a_cache_in_the_output_folder_is_not_overwritten(place, tmp_path):
    run = tmp_path / "run"
    train(place.cached(place.part, str(run)), say=lambda line: None)
    inside = place.cache(str(run / "cache"), k=3, texts="none")
    with pytest.raises(ctkd.errors.OutputError, match="teacher_cache .* lies in the output folder"):
        train(place.cached(inside, str(run)), overwrite=True, say=lambda line: None)
    assert record(run)["results"]["finished"]


def test_a_cache_needs_a_loss_that_learns_from_it(place):
    with pytest.raises(SettingError, match="learns from no teacher; leave the cache out"):
        place.cached(place.part, "run", loss="sft")
    with pytest.raises(SettingError, match="a cache stands for the teacher; give one of them"):
        models = load_models(place.config(), lambda line: None)
        CrossTokenizerTrainer(
            models.student,
            TrainingArguments(output_dir="unused", remove_unused_columns=False, use_cpu=True),
            loss=ctkd.get_loss("uld"),
            teacher=models.teacher,
            teacher_cache=place.part,
        )


def test_training_stops_at_a_cache_that_is_damaged(place, tmp_path):
    cache = place.cache("damaged", k=3, texts="none")
    file = cache.path / "logits-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="logits-00000.safetensors is missing or not as it was"):
        train(place.cached(cache, str(tmp_path / "run")), say=lambda line: None)
    assert not (tmp_path / "run").exists()
    assert training.OutputFolder.record_of(tmp_path / "run") == {"settings": {}}
