"""GGUF files become folders that transformers loads, once and whole."""

import json
import threading
from contextlib import nullcontext

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

from ctkd.distill.models import gguf_convert
from ctkd.distill.models.gguf_convert import convert_gguf, converted_folder
from ctkd.errors import ModelError
from tests.distill.models.gguf_files import byte_level_backend, tiny_llama, write_gguf

TEXTS = ("the cat  12\n\n3 4", " It's", "naïve 日本 😀", "tab\tand  two", "<end>")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def folders(cache):
    return [entry.name for entry in (cache / "models").iterdir() if entry.is_dir()]


def test_weights_are_the_dequantised_ones_rounded_to_bfloat16(path):
    weights = write_gguf(path)
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(path), dtype="auto")
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name], weight.bfloat16()), name
    assert state.keys() - weights.keys() == {"lm_head.weight"}


def test_reading_quickly_changes_no_byte(path, tmp_path, monkeypatch):
    # Counted tokens, arrays too long for a setting, and tensors in several groups with a rest.
    write_gguf(path, sized=False)
    monkeypatch.setattr(gguf_convert, "_LONGEST_SETTING", 10)
    monkeypatch.setattr(gguf_convert, "_GROUP", 32 * 500)
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "dequantize")}
    parsed = []
    real = gguf.GGUFReader._get_field_parts
    monkeypatch.setattr(
        gguf.GGUFReader,
        "_get_field_parts",
        lambda *args: (parsed.append(args), real(*args))[1],
    )
    written, counts = [], []
    for name in ("quick", "plain"):
        parsed.clear()
        (tmp_path / name).mkdir()
        gguf_convert.write_converted(path, tmp_path / name)
        counts.append(len(parsed))
        files = (tmp_path / name).iterdir()
        written.append({file.name: file.read_bytes() for file in files})
        monkeypatch.setattr(gguf_convert, "_quick_gguf", nullcontext)
    assert written[0] == written[1]
    # Else this would compare the same way of reading with itself.
    assert counts[0] < 50 < 1000 < counts[1]
    assert before == {name: getattr(gguf, name) for name in before}


def test_every_kind_of_weights_is_unpacked_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(gguf_convert, "_GROUP", 1024)
    generator = np.random.default_rng(0)
    kinds = [*gguf.quants._type_traits, gguf.GGMLQuantizationType.F16]
    assert len(kinds) > 15
    for kind in kinds:
        size = 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        data = generator.integers(256, size=(17, 3 * size), dtype=np.uint8)
        # Scales of random bits overflow and are no numbers now and then.
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, kind)
            values = gguf_convert._dequantize(data, kind)
        assert values.shape == expected.shape, kind.name
        assert values.tobytes() == expected.tobytes(), kind.name


def test_the_model_computes_what_its_weights_say(path):
    # The query and key rows are stored permuted: equal logits show that they were put back.
    weights = write_gguf(path)
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(path), dtype=torch.float32)
    expected = tiny_llama(model.config.vocab_size, seed=1)
    expected.load_state_dict({name: w.bfloat16().float() for name, w in weights.items()}, False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_text_is_tokenized_as_by_the_original(path, pre):
    write_gguf(path, pre=pre)
    original = byte_level_backend(digits_apart=pre == "smollm")
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_the_digit_rule_matters_for_the_texts_above():
    apart, plain = byte_level_backend(digits_apart=True), byte_level_backend()
    cut = [backend.pre_tokenizer.pre_tokenize_str(TEXTS[0]) for backend in (apart, plain)]
    assert cut[0] != cut[1]


def test_an_unknown_splitting_rule_is_told(path, capsys):
    write_gguf(path, pre="unheard-of")
    convert_gguf(path)
    assert "splits text by the rules 'unheard-of'" in capsys.readouterr().err


@pytest.mark.parametrize(("pad", "expected"), [(0, 0), (None, 2)])
def test_generation_config_has_the_tokenizer_s_ids(path, pad, expected):
    write_gguf(path, pad=pad)
    config = json.loads((convert_gguf(path) / "generation_config.json").read_text())
    assert config["bos_token_id"] == 1
    assert config["eos_token_id"] == 2
    assert config["pad_token_id"] == expected


def test_the_folder_can_be_trained_and_saved_again(path, tmp_path):
    write_gguf(path)
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(path), dtype=torch.float32)
    assert not getattr(model, "is_quantized", False)
    model(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


def test_a_second_call_takes_the_folder_and_an_edited_file_does_not(path, monkeypatch):
    write_gguf(path)
    calls = []
    real = gguf_convert.write_converted
    monkeypatch.setattr(
        gguf_convert, "write_converted", lambda *args: (calls.append(args), real(*args))
    )
    first = convert_gguf(path)
    assert convert_gguf(path) == first
    assert len(calls) == 1
    write_gguf(path, pad=0)
    assert convert_gguf(path) != first
    assert len(calls) == 2


def test_one_stage_line_and_no_other_noise(path, capfd):
    write_gguf(path)
    convert_gguf(path)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [f"converting tiny.gguf ({path.stat().st_size / 1e6:.0f} MB), once"]


def test_a_failed_conversion_leaves_nothing_and_the_next_one_succeeds(path, cache, monkeypatch):
    write_gguf(path)

    def half_done(source, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "write_converted", half_done)
        with pytest.raises(KeyboardInterrupt):
            convert_gguf(path)
    assert folders(cache) == []
    assert (convert_gguf(path) / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_replaced(path, cache):
    write_gguf(path)
    final = converted_folder("tiny", gguf_convert._sha256(path, 0, 0))
    left = final.with_name(final.name + ".partial")
    left.mkdir(parents=True)
    (left / "stray").touch()
    assert convert_gguf(path) == final
    assert folders(cache) == [final.name]
    assert not (final / "stray").exists()


def test_two_at_once_convert_once(path, monkeypatch):
    write_gguf(path)
    calls = []
    entered, go_on = threading.Event(), threading.Event()

    def slow(source, folder):
        calls.append(source)
        entered.set()
        go_on.wait(10)
        (folder / "done").touch()

    told = threading.Event()
    monkeypatch.setattr(gguf_convert, "write_converted", slow)
    monkeypatch.setattr(
        "ctkd.cache_folder.say", lambda line: told.set() if "waiting" in line else None
    )
    results = []
    threads = [threading.Thread(target=lambda: results.append(convert_gguf(path))) for _ in "12"]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    assert told.wait(10), "the second did not say that it waits"
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1
    assert results[0] == results[1]
    assert (results[0] / "done").is_file()


def test_truncated_file(path, cache):
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cannot read .*tiny\.gguf: .*cut short") as caught:
        convert_gguf(path)
    assert "\n" not in str(caught.value)
    assert folders(cache) == []


def test_file_that_is_no_gguf(path):
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ModelError, match="no GGUF file: it starts with"):
        convert_gguf(path)


def test_file_with_a_missing_weight(path, monkeypatch):
    write_gguf(path)
    monkeypatch.setattr(
        "ctkd.distill.models.gguf_convert.AutoModelForCausalLM.from_pretrained",
        lambda *args, **kwargs: (tiny_llama(300), {"missing_keys": {"model.norm.weight"}}),
    )
    with pytest.raises(ModelError, match="lack 1 of the model's weights, model.norm.weight"):
        convert_gguf(path)


def test_encoder_decoder_file(path, monkeypatch):
    write_gguf(path)
    monkeypatch.setattr(
        "ctkd.distill.models.gguf_convert.AutoConfig.from_pretrained",
        lambda *args, **kwargs: T5Config(),
    )
    with pytest.raises(ModelError, match=r"encoder-decoder model \(t5\), which is not read from"):
        convert_gguf(path)


def test_disk_full(path, cache, monkeypatch):
    write_gguf(path)

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ModelError, match="No space left on device; free some space"):
        convert_gguf(path)
    assert folders(cache) == []


def test_unreadable_file(path):
    with pytest.raises(ModelError, match="cannot read .*tiny.gguf: No such file"):
        convert_gguf(path)
