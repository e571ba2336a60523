"""Models and tokenizers by folder, GGUF file, packaged name and hub id; and what is refused."""

import json
import logging

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from ctkd.distill.models import loading as models
from ctkd.distill.models.checks import quiet
from ctkd.distill.models.loading import (
    accepts_position_ids,
    check_token_ids,
    head_width,
    load_model,
    load_tokenizer,
    most_positions,
    resolve,
    supports_logits_to_keep,
)
from ctkd.distill.models.packaged import PACKAGED
from ctkd.errors import ModelError
from tests.distill.models.gguf_files import byte_level_backend, tiny_llama, write_gguf


def a_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<begin>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), **names, **special)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch):
    """The answer of a hub that is never really asked: an exception, or None for 'I have it'."""
    answer = {"error": None, "asked": []}

    def model_info(self, name, **options):
        answer["asked"].append(name)
        if answer["error"] is not None:
            raise answer["error"]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *args: None)
    return answer


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "llama"
    tokenizer = a_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_llama(len(tokenizer)).save_pretrained(path)
    return path


def message(name, load=load_model, **options):
    with pytest.raises(ModelError) as caught:
        load(str(name), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- loading


def test_a_folder(folder):
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    expected = tiny_llama(len(tokenizer)).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name])
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    text = "the cat sat"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_have_the_dtype_asked_for(tmp_path, stored, asked):
    tiny_llama(300).to(stored).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=asked)
    assert {weight.dtype for weight in model.parameters()} == {asked}
    # Rotary frequencies in half precision would move every position.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_float32_is_the_default_even_for_bfloat16_files(tmp_path):
    tiny_llama(300).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32


def test_weights_that_transformers_keeps_wide_are_cast_too(folder, monkeypatch):
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM._keep_in_fp32_modules_strict", {"mlp"}, raising=False
    )
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_gguf_file(tmp_path):
    path = tmp_path / "Tiny Model.GGUF"
    weights = write_gguf(path)
    model, tokenizer = load_model(str(path)), load_tokenizer(str(path))
    assert model.dtype == torch.float32
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[name], weights[name].bfloat16().float())
    check_token_ids(model, tokenizer)


def test_a_packaged_name_wins_and_dot_slash_gives_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma-3-270m").mkdir()
    monkeypatch.setattr(models, "prepare", lambda model: f"prepared {model.name}")
    assert resolve("gemma-3-270m") == "prepared gemma-3-270m"
    assert resolve("./gemma-3-270m") == "gemma-3-270m"


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/llama") == str(folder)


def test_a_hub_id_is_handed_on(hub):
    assert resolve("owner/model") == "owner/model"
    assert hub["asked"] == ["owner/model"]


def test_the_hub_is_not_asked_for_what_lies_in_its_cache(hub, monkeypatch):
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *args: "/somewhere/config.json")
    assert resolve("owner/model") == "owner/model"
    assert hub["asked"] == []


def test_remote_code_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "their-own"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert "it needs Python code that ships with it" in message(folder)


# --- names that are nothing


def test_a_name_that_is_nothing_lists_the_packaged_ones(hub):
    hub["error"] = ConnectionError("no network")
    text = message("smolm2-135m-instruct", load_tokenizer)
    assert "the hub did not answer (no network)" in text
    assert all(name in text for name in PACKAGED)
    assert text.endswith("did you mean smollm2-135m-instruct?")
    assert "did you mean" not in message("owner/something-else")


def test_a_repository_that_does_not_exist(hub):
    # The error's constructor wants a response; its message is not used.
    hub["error"] = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    assert "has no such repository, or it is private" in message("owner/model")


def test_offline(hub):
    hub["error"] = OfflineModeIsEnabled("offline")
    assert "switched off by HF_HUB_OFFLINE" in message("owner/model")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "..", "two words"]
)
def test_a_path_that_is_nothing_does_not_go_to_the_hub(hub, name, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: False)
    assert message(name).startswith(f"there is no folder {name}; check the path. Packaged models:")
    assert hub["asked"] == []


def test_a_gguf_file_that_is_not_there(hub):
    assert message("models/x.gguf").startswith("there is no file models/x.gguf; check the path")
    assert hub["asked"] == []


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "is a file, but no .gguf file" in message(tmp_path / "model.safetensors")


# --- folders that do not do


def test_a_folder_without_a_model(tmp_path):
    assert "has no config.json; give a folder of a saved model" in message(tmp_path)
    (tmp_path / "x.gguf").touch()
    assert message(tmp_path).endswith(f"give the file {tmp_path / 'x.gguf'}")


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_gpt2])
def test_a_folder_without_a_tokenizer(tmp_path, tiny):
    # For GPT-2, transformers would make up a tokenizer of one token.
    tiny(300).save_pretrained(tmp_path)
    assert "has no tokenizer: expected tokenizer.json" in message(tmp_path, load_tokenizer)


def test_a_tokenizer_alone_will_do_for_load_tokenizer(tmp_path):
    a_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(a_tokenizer())


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer of" in message(folder, load_tokenizer)


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot load the model" in message(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    said = message(folder)
    assert "no file named model.safetensors" in said
    assert said.endswith("`ctkd compare` keeps the weights of its runs with --keep-models")


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "nope"}'])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    assert "cannot load the model" in message(folder)


def test_weights_that_would_stay_random(tmp_path):
    config = tiny_llama(300).config
    config.tie_word_embeddings = False
    config.architectures = None
    LlamaModel(config).save_pretrained(tmp_path)
    assert "lack 1 of the model's weights, lm_head.weight for one" in message(tmp_path)


@pytest.mark.parametrize(("kind", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_configuration_with_fewer_layers_than_the_files(tmp_path, kind, layers):
    sizes = {"n_embd": 16, "n_head": 2} if kind == "gpt2" else {"hidden_size": 16}
    if kind == "llama":
        sizes |= {"intermediate_size": 16, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=40, **sizes, **{layers: 3})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.num_hidden_layers == 3
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, layers: 2}))
    said = message(tmp_path)
    assert "hold 3 layers, but its config.json says num_hidden_layers 2" in said


def test_an_encoder_decoder(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))) is T5ForConditionalGeneration
    assert most_positions(str(tmp_path)) is None
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_decoder_layers": 1}))
    said = message(tmp_path)
    assert "hold 2 layers, but its config.json says num_decoder_layers 1" in said


def test_an_encoder(tmp_path):
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    assert "has no causal language-model head (it is of the kind bert)" in message(tmp_path)


def test_a_device_that_is_none(folder):
    assert "cannot put" in message(folder, device="nowhere")


# --- facts about models


def test_head_width():
    model = tiny_llama(300)
    assert head_width(model) == 300
    model.resize_token_embeddings(320)
    assert head_width(model) == 320
    with pytest.raises(ModelError, match="LlamaModel has no output embedding"):
        head_width(LlamaModel(model.config))


def test_token_ids_out_of_range():
    tokenizer = a_tokenizer()
    check_token_ids(tiny_llama(len(tokenizer)), tokenizer)
    check_token_ids(tiny_llama(len(tokenizer) + 7), tokenizer)
    with pytest.raises(ModelError, match="token ids out of a model's range.* up to 279 only"):
        check_token_ids(tiny_llama(280), tokenizer)


def test_a_special_token_too_many_matters_only_if_it_is_used():
    tokenizer = a_tokenizer()
    model = tiny_llama(len(tokenizer))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<picture>"]})
    check_token_ids(model, tokenizer)
    tokenizer.pad_token = "<picture>"
    with pytest.raises(ModelError, match=r"'<picture>'.*resize_token_embeddings"):
        check_token_ids(model, tokenizer)


def test_an_ordinary_token_too_many():
    tokenizer = a_tokenizer()
    model = tiny_llama(len(tokenizer))
    tokenizer.add_tokens(["word"])
    with pytest.raises(ModelError, match="'word'"):
        check_token_ids(model, tokenizer)


def test_what_forward_takes():
    llama = tiny_llama(300)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    assert supports_logits_to_keep(llama)
    assert accepts_position_ids(llama)
    assert not supports_logits_to_keep(t5)
    assert not accepts_position_ids(t5)


# --- noise


def test_loading_is_silent_and_restores_the_loggers(folder, capfd):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(str(folder))
    load_tokenizer(str(folder))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before
    assert not are_progress_bars_disabled()


def test_without_quiet_loading_is_not_silent(folder, capfd):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err


def test_quiet_restores_after_a_failure_and_keeps_what_was_off():
    transformers_logging.disable_progress_bar()
    try:
        with pytest.raises(ValueError), quiet():
            assert transformers_logging.get_verbosity() == logging.ERROR
            raise ValueError
        assert not transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_downloads_may_be_shown():
    with quiet(show_downloads=True):
        assert not transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    with quiet():
        assert are_progress_bars_disabled()
