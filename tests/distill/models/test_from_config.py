"""Students of random weights, made from a configuration."""

import filecmp
import json
import shutil

import pytest
import torch

from ctkd.cache_folder import cache_dir
from ctkd.distill.models.from_config import described, prepare_student
from ctkd.distill.models.loading import load_model, load_tokenizer, most_positions
from ctkd.errors import ModelError
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace, error_of, finish, invoke, record, weights

TINY = {
    "llama": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "dtype": "bfloat16",
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))


def write(path, kind="llama", **changes) -> str:
    settings = {"model_type": kind, "vocab_size": 300, **TINY.get(kind, {}), **changes}
    path.write_text(json.dumps(settings))
    return str(path)


def same(first, second) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("kind", TINY)
def test_weights_follow_from_the_seed_and_the_vocabulary_from_the_texts(kind, tmp_path, capsys):
    source = write(tmp_path / "small.json", kind)
    state = torch.get_rng_state()
    made = prepare_student(source, tiny.TEXTS, 3)
    assert torch.equal(state, torch.get_rng_state())
    model, tokenizer = load_model(str(made)), load_tokenizer(str(made))
    assert (model.config.model_type, model.dtype) == (kind, torch.float32)
    assert next(model.parameters()).shape == (300, 16)
    assert most_positions(str(made)) == (64 if kind == "gpt2" else 128)
    end = tokenizer.eos_token_id
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ids == (end, end, end) and tokenizer.eos_token == "<|endoftext|>"
    text = "Größe: 時間, an\tindented\n\n    line"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Some merges of what the texts repeat.
    assert len(tokenizer(tiny.TEXTS[0]).input_ids) < len(tiny.TEXTS[0]) / 1.5
    # Made once; where the file lies decides over nothing.
    capsys.readouterr()
    moved = write(tmp_path / "moved.json", kind)
    assert prepare_student(moved, list(tiny.TEXTS), 3) == made
    assert capsys.readouterr().err == ""
    made.rename(tmp_path / "first")
    shutil.rmtree(cache_dir())
    assert prepare_student(source, tiny.TEXTS, 3) == made
    files = sorted(one.name for one in made.iterdir())
    assert filecmp.cmpfiles(made, tmp_path / "first", files, shallow=False)[0] == files
    other_seed = prepare_student(source, tiny.TEXTS, 4)
    assert other_seed != made and not same(other_seed, made)
    assert load_tokenizer(str(other_seed)).get_vocab() == tokenizer.get_vocab()
    other_texts = prepare_student(source, tiny.TEXTS[:2], 3)
    assert same(other_texts, made)
    assert load_tokenizer(str(other_texts)).get_vocab() != tokenizer.get_vocab()
    larger = prepare_student(write(tmp_path / "small.json", kind, vocab_size=310), tiny.TEXTS, 3)
    assert load_model(str(larger)).get_output_embeddings().weight.shape == (310, 16)
    assert described(larger).endswith(" weights, 310 tokens")
    # What a short text does not yield stays unused, which is said.
    short = prepare_student(source, ["ab ab"], 3)
    assert described(short).endswith(f" {len(load_tokenizer(str(short)))} tokens in 310 columns")


def test_a_tokenizer_beside_the_configuration_is_taken(tmp_path):
    folder = tmp_path / "folder"
    own = tiny.tokenizer(280)
    own.save_pretrained(folder)
    write(folder / "config.json")
    made = prepare_student(str(folder), ["nothing of this is learned"], 0)
    assert load_tokenizer(str(made)).get_vocab() == own.get_vocab()
    assert prepare_student(str(folder), tiny.TEXTS, 0) == made
    config = load_model(str(made)).config
    assert (config.eos_token_id, config.pad_token_id) == (own.eos_token_id, own.pad_token_id)
    # A file is the configuration alone.
    alone = prepare_student(str(folder / "config.json"), tiny.TEXTS, 0)
    assert load_tokenizer(str(alone)).get_vocab() != own.get_vocab()
    tiny.tokenizer(270).save_pretrained(folder)
    assert prepare_student(str(folder), tiny.TEXTS, 0) != made
    tiny.tokenizer(300).save_pretrained(folder)
    write(folder / "config.json", vocab_size=270)
    with pytest.raises(ModelError, match="vocab_size of .* tokenizer beside it, which has 300 tok"):
        prepare_student(str(folder), tiny.TEXTS, 0)


def test_what_no_student_can_be_made_of_is_refused_in_a_line(tmp_path):
    path = tmp_path / "one.json"
    for changes, said in (
        ({"vocab_size": 256}, "vocab_size 256 .* is too small: a vocabulary of bytes has 257"),
        ({"kind": "whisper"}, "one.json has no causal language-model head .* of the kind whisper"),
        ({"kind": "bert"}, "one.json has no causal language-model head"),
        ({"kind": "vit"}, "one.json has no causal language-model head"),
        ({"kind": "lamma"}, "architecture 'lamma', which transformers [0-9.]+ does not have"),
        ({"model_type": None}, "does not say what it is of; expected an object with a model_type"),
        ({"quantization_config": {"bits": 4}}, "is of a quantized model, which cannot be trained"),
        ({"num_attention_heads": 3}, "configuration .*one.json"),
        ({"hidden_act": "wavy"}, "no model can be made of the configuration .*one.json: "),
        ({"hidden_size": "wide"}, "configuration .*one.json is none of a llama: "),
    ):  # fmt: skip
        write(path, **changes)
        with pytest.raises(ModelError, match=said) as caught:
            prepare_student(str(path), tiny.TEXTS, 0)
        assert "\n" not in str(caught.value)
    for text, said in (("{", "cannot be read as JSON"), ("[]", "does not say what it is of")):
        path.write_text(text)
        with pytest.raises(ModelError, match=said):
            prepare_student(str(path), tiny.TEXTS, 0)
    with pytest.raises(ModelError, match="there is no configuration .*config.json; give a JSON"):
        prepare_student(str(tmp_path), tiny.TEXTS, 0)
    left = {one.name.split("-")[0] for one in cache_dir().glob("models/*") if one.is_dir()}
    assert left == {"vocabulary"}


@pytest.mark.slow
def test_a_run_begins_from_it_goes_on_and_is_evaluated(tmp_path):
    place = Workplace(tmp_path)
    source = write(place.folder / "small.json")
    words = place.train("random")
    words[words.index("--student") : words.index("--teacher")] = ["--student-config", source]
    finish(*words)
    folder = place.folder / "random"
    kept = record(folder)
    settings = kept["settings"]
    assert settings["student_config"] == settings["student"] == source
    assert (settings["learning_rate"], settings["epochs"]) == (2e-3, 4.0)
    # The control, too, begins from the same weights.
    control = record(folder / "control")["results"]["history"][0]["eval_ce"]
    assert control == kept["results"]["losses before"]["ce"]
    made = cache_dir() / "models" / kept["models"]["student"]
    assert not same(made, folder)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(made)).get_vocab()
    assert "rouge_lsum" in finish(*place.evaluate(str(folder))).stdout
    # Made anew where the cache was emptied.
    del kept["results"]["finished"]
    (folder / "ctkd.json").write_text(json.dumps(kept))
    shutil.rmtree(made)
    finish(*words, "--resume")
    assert made.is_dir() and "finished" in record(folder)["results"]
    kept = record(folder)
    del kept["results"]["finished"]
    (folder / "ctkd.json").write_text(json.dumps(kept))
    write(place.folder / "small.json", initializer_range=0.1)
    assert "is another configuration, or has another" in error_of(invoke(*words, "--resume"))
    both = error_of(invoke(*place.train("both"), "--student-config", source))
    assert both.endswith("are two students; leave one of them out")
    lost = error_of(invoke("doctor", "--student", source))
    assert "or a configuration to --student-config" in lost
