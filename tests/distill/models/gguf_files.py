"""A tiny GGUF file with a Llama of random 8-bit weights and a byte-level tokenizer."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, HIDDEN, INNER, LAYERS = 2, 64, 96, 2
SPECIALS = ["<unk>", "<begin>", "<end>"]
LINES = ["the cat sat on the mat  1", "a dog\n\nran after the cat  23", "It's 1648, isn't it?"]
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def byte_level_backend(*, digits_apart: bool = False) -> Tokenizer:
    """Train the tokenizer; ids of `SPECIALS` come first."""
    backend = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, plain]) if digits_apart else plain
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


def tiny_llama(vocabulary: int, *, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path, *, pre: str = "smollm", pad: int | None = 2, sized: bool = True
) -> dict[str, Tensor]:
    """Write the file; return its dequantised weights by the names transformers gives them.

    Without `sized` it does not say how large its vocabulary is: its tokens are to be counted.
    """
    backend = byte_level_backend(digits_apart=pre == "smollm")
    model = tiny_llama(backend.get_vocab_size())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if sized:
        writer.add_vocab_size(backend.get_vocab_size())
    _write_tokenizer(writer, backend, pre, pad)
    weights = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
            weights[name] = weight
            continue
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp keeps the two halves of each rotated pair side by side.
            values = values.reshape(HEADS, 2, -1, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=kind)
        unpacked = dequantize(packed, kind)
        if "q_proj" in name or "k_proj" in name:
            unpacked = unpacked.reshape(HEADS, -1, 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        weights[name] = torch.from_numpy(unpacked.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _write_tokenizer(
    writer: gguf.GGUFWriter, backend: Tokenizer, pre: str, pad: int | None
) -> None:
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    special, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([special if token in SPECIALS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if pad is not None:
        writer.add_pad_token_id(pad)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"
