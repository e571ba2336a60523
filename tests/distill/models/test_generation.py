import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctkd.distill.models.generation import Generated, generate
from ctkd.errors import DataError, ModelError, SettingError

EOS = 256
DOT_NEWLINE = 257
SIZE = 258


def texts_of(*args, **settings) -> list[str]:
    return [one.text for one in generate(*args, **settings)]


def byte_tokenizer(**special):
    """Every byte is the token of its value; 256 is "<eos>", 257 is ".\\n"."""
    letters = bytes_to_unicode()
    vocabulary = {letters[value]: value for value in range(256)}
    vocabulary["<eos>"] = EOS
    vocabulary["." + letters[10]] = DOT_NEWLINE
    backend = Tokenizer(models.BPE(vocabulary, [(".", letters[10])]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<eos>"]})
    return tokenizer


def word_tokenizer():
    """Decodes ids 3, 5 to "w3 w5", so that texts are equal only if the ids are."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def random_llama(**overrides):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **overrides,
    )
    return LlamaForCausalLM(config).eval()


def random_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config).eval()


def scripted(followers):
    """A Llama whose next token depends on the last one alone, as `followers` says; else "z"."""
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(SIZE))
        for token in range(SIZE):
            model.lm_head.weight[followers.get(token, ord("z")), token] = 1.0
    return model


def greedy_by_hand(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def ragged_prompts(count=7):
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 9, 9, 30, 2][:count]
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def sliding_gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [random_llama, random_gpt2, sliding_gemma])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_greedy_by_hand(build, batch_size):
    model, prompts = build(), ragged_prompts()
    ids = [greedy_by_hand(model, prompt, 12) for prompt in prompts]
    wanted = [" ".join(f"w{i}" for i in row) for row in ids]
    assert len(set(wanted)) == len(wanted)
    got = texts_of(model, word_tokenizer(), prompts, max_new_tokens=12, batch_size=batch_size)
    assert got == wanted


def test_rows_that_have_ended_leave_their_batch():
    # "a" ends at once, "b" after six tokens, "d" never.
    model = scripted({ord("a"): EOS, **{ord("b") + i: ord("b") + i + 1 for i in range(5)}})
    model.lm_head.weight.data[:, ord("g")] = torch.eye(SIZE)[EOS]
    rows = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    tokenizer = byte_tokenizer(eos_token="<eos>")
    prompts = [[ord("a")], [ord("b")], [ord("z")], [ord("a")]]
    got = generate(model, tokenizer, prompts, max_new_tokens=12)
    wanted = [("", True), ("cdefg", True), ("z" * 12, False), ("", True)]
    assert got == [Generated(*one) for one in wanted]
    assert rows == [4] * 4 + [2] * 4 + [1] * 4


def test_the_comparison_sees_a_missing_mask():
    """The models above are sensitive enough: unmasked padding changes their answers."""
    model, prompt = random_llama(), ragged_prompts()[3]
    assert greedy_by_hand(model, [0] * 5 + prompt, 12) != greedy_by_hand(model, prompt, 12)


def test_stops_before_a_newline_and_before_the_end_token():
    followers = {
        ord("a"): ord("b"), ord("b"): ord("\n"), ord("\n"): ord("c"),
        ord("d"): ord("e"), ord("e"): EOS, EOS: ord("f"),
        ord("g"): ord(" "), ord(" "): ord("h"), ord("h"): DOT_NEWLINE, DOT_NEWLINE: ord("i"),
        ord("x"): ord("\n"),
    }  # fmt: skip
    model = scripted(followers)
    prompts = [[ord(letter)] for letter in "adgxy"]
    tokenizer = byte_tokenizer(eos_token="<eos>")
    got = texts_of(model, tokenizer, prompts, max_new_tokens=6, batch_size=5)
    assert got == ["b", "e", "h.", "", "zzzzzz"]
    got = texts_of(model, tokenizer, prompts, max_new_tokens=6, stop_at_newline=False)
    assert got == ["b\nczzz", "e", "h.\nizz", "czzzz", "zzzzzz"]


@pytest.mark.parametrize("configured", [ord("!"), [ord("!"), EOS], None])
def test_end_tokens_of_tokenizer_and_generation_config(configured):
    model = scripted({ord("a"): ord("b"), ord("b"): ord("!"), ord("d"): ord("e"), ord("e"): EOS})
    model.generation_config.eos_token_id = configured
    tokenizer = byte_tokenizer(eos_token="<eos>")
    got = texts_of(model, tokenizer, [[ord("a")], [ord("d")], [ord("z")]], max_new_tokens=5)
    assert got == ["b" if configured else "b!zzz", "e", "zzzzz"]


def test_similar_lengths_share_a_batch_longest_first():
    model, shapes = random_llama(), []
    model.register_forward_pre_hook(
        lambda _, arguments, keywords: shapes.append(tuple(keywords["input_ids"].shape)),
        with_kwargs=True,
    )
    texts_of(model, byte_tokenizer(), ragged_prompts(), max_new_tokens=1, batch_size=2)
    assert shapes == [(2, 30), (2, 9), (2, 3), (1, 1)]


def test_a_text_ends_at_further_tokens_that_are_named():
    model, tokenizer = random_llama(), byte_tokenizer()
    prompt, settings = ragged_prompts(3)[2], {"max_new_tokens": 6, "stop_at_newline": False}
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0].tolist()
    written = ids[len(prompt) :]
    (whole,) = generate(model, tokenizer, [prompt], **settings)
    for end in sorted({*written}):
        (cut,) = generate(model, tokenizer, [prompt], ends=[end], **settings)
        kept = tokenizer.decode(written[: written.index(end)], skip_special_tokens=True)
        assert cut == Generated(kept.strip(), True)
    assert not whole.ended


@pytest.mark.parametrize(
    ("stop_at_newline", "calls"),
    # Four tokens until the last row has ended; all of 40 otherwise.
    [(True, 4), (False, 40)],
)
def test_stops_early_once_every_row_has_ended(stop_at_newline, calls):
    followers = {ord("a"): DOT_NEWLINE, ord("b"): EOS}
    followers |= {ord("p"): ord("q"), ord("q"): ord("r"), ord("r"): ord("s"), ord("s"): ord("\n")}
    model = scripted(followers)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    got = texts_of(
        model,
        byte_tokenizer(eos_token="<eos>"),
        [[ord("a")], [ord("p")], [ord("b")]],
        max_new_tokens=40,
        stop_at_newline=stop_at_newline,
    )
    assert len(seen) == calls
    assert got[2] == ""
    if stop_at_newline:
        assert got == [".", "qrs", ""]


@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>"}, {"pad_token": "<pad>"}])
def test_any_padding_token_will_do(special):
    # "<pad>" is added as id 258, past the model's 258 rows.
    model, prompts, tokenizer = random_llama(), ragged_prompts(4), byte_tokenizer(**special)
    alone = [
        texts_of(model, tokenizer, [prompt], max_new_tokens=8, stop_at_newline=False)[0]
        for prompt in prompts
    ]
    assert len(set(alone)) == 4
    together = texts_of(model, tokenizer, prompts, max_new_tokens=8, stop_at_newline=False)
    assert together == alone


def test_the_models_own_sampling_settings_are_set_aside_and_put_back():
    model, prompts, tokenizer = random_llama(), ragged_prompts(3), word_tokenizer()
    plain = texts_of(model, tokenizer, prompts, max_new_tokens=10)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=200, repetition_penalty=1e6, min_new_tokens=2
    )
    before, own = model.generation_config.to_dict(), model.generation_config
    assert texts_of(model, tokenizer, prompts, max_new_tokens=10) == plain
    assert model.generation_config is own
    assert own.to_dict() == before


def test_the_model_comes_back_as_it_was_and_can_be_trained():
    model = random_llama(attention_dropout=0.5)
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    used_cache = []
    model.register_forward_hook(
        lambda module, arguments, keywords, output: used_cache.append(
            (keywords.get("use_cache"), module.training)
        ),
        with_kwargs=True,
    )
    tokenizer, prompts = byte_tokenizer(), ragged_prompts(3)
    first = texts_of(model, tokenizer, prompts, max_new_tokens=5)
    assert first == texts_of(model, tokenizer, prompts, max_new_tokens=5)
    assert set(used_cache) == {(True, False)}
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    model(torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss.backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_the_model_comes_back_even_when_decoding_fails():
    model = random_llama().train()
    own = model.generation_config

    def fail(*_):
        raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        texts_of(model, byte_tokenizer(), [[1]])
    assert model.training
    assert model.generation_config is own


@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>", "pad_token": "<eos>"}])
def test_says_nothing(special, transformers_log, capfd):
    model = random_gpt2()
    texts_of(model, byte_tokenizer(**special), ragged_prompts(3), max_new_tokens=4)
    assert transformers_log == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("progress", "shown"), [(True, "generating"), ("student", "student")])
def test_progress_goes_to_a_terminal(progress, shown, capfd, monkeypatch):
    given = random_llama(), byte_tokenizer(), ragged_prompts(3)
    texts_of(*given, max_new_tokens=1, progress=progress)
    # A file is not filled with bars.
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    texts_of(*given, max_new_tokens=1, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert shown in err
    assert "3/3" in err


def test_no_prompts():
    assert texts_of(random_llama(), byte_tokenizer(), []) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2 is empty"),
        ([[1, SIZE]], "prompt 1 holds the token id 258, but the model knows 0 to 257"),
        ([[1], [1, -100]], "prompt 2 holds the token id -100"),
        ([[1] * 33], "prompt 1 has 33 tokens, but the model has room for 32"),
    ],
)
def test_refuses_prompts(prompts, message):
    with pytest.raises(DataError, match=message):
        texts_of(random_gpt2(), byte_tokenizer(), prompts, max_new_tokens=32)
    assert len(texts_of(random_gpt2(), byte_tokenizer(), [[1] * 32], max_new_tokens=32)) == 1


@pytest.mark.parametrize("setting", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_refuses_settings(setting):
    with pytest.raises(SettingError, match="must be at least 1, got 0"):
        texts_of(random_llama(), byte_tokenizer(), [[1]], **setting)


def test_an_encoder_decoder_that_does_not_say_where_it_begins():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="write it as decoder_start_token_id into its config"):
        texts_of(model, byte_tokenizer(), [[1]])


def test_it_tells_which_texts_the_model_ended():
    followers = {ord("a"): ord("b"), ord("b"): EOS, ord("c"): DOT_NEWLINE, ord("z"): ord("z")}
    tokenizer = byte_tokenizer(eos_token="<eos>")
    prompts = [[ord("a")], [ord("c")], [ord("z")], [ord("b")]]
    found = generate(scripted(followers), tokenizer, prompts, max_new_tokens=3)
    assert found == [
        Generated("b", True),
        Generated(".", True),
        Generated("zzz", False),
        Generated("", True),
    ]
    without = generate(
        scripted(followers), tokenizer, [[ord("c")]], max_new_tokens=3, stop_at_newline=False
    )
    assert not without[0].ended
    # The end may be the last token that was allowed.
    assert generate(scripted(followers), tokenizer, [[ord("a")]], max_new_tokens=2) == [
        Generated("b", True)
    ]
