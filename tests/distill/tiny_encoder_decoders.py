"""Encoder-decoders small enough to train in a test, and a tokenizer of their kind."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.distill import tiny

KINDS = ("t5", "mt5", "bart")
SPECIAL = PAD, END, UNKNOWN, BEGIN = "<pad>", "</s>", "<unk>", "<s>"


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A unigram model of letters and words, an end behind each text, and for BART a begin in front.

    Where two ways to cut a text have as few pieces, the unigram model takes always the same.
    """
    text = " ".join([*tiny.TEXTS, *tiny.ANSWERS, "Well? Answer: 0123456789"])
    words = {f"▁{word}" for word in text.split() if word.isalpha()} | {"ri", "in", "ain"}
    pieces = [*SPECIAL, "▁", *sorted(set(text) - {" "}), *sorted(words)]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if kind == "bart" else f"$A {END}",
        special_tokens=[(one, number) for number, one in enumerate(SPECIAL)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, unk_token=UNKNOWN,
        bos_token=BEGIN if kind == "bart" else None,
    )  # fmt: skip


def model(kind: str, seed: int = 0, *, dropout: float = 0.0) -> PreTrainedModel:
    """Random weights in float64: T5 with one matrix of embeddings, mT5 with a head of its own.

    BART adds something to its logits, as its published models do not.
    """
    torch.manual_seed(seed)
    # Wider than the tokenizer, as published ones.
    size = len(tokenizer(kind)) + 3
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
          "vocab_size": size, "decoder_start_token_id": 0, "dropout_rate": dropout}  # fmt: skip
    made: PreTrainedModel
    if kind == "t5":
        made = T5ForConditionalGeneration(T5Config(**t5))
    elif kind == "mt5":
        made = MT5ForConditionalGeneration(MT5Config(**t5, feed_forward_proj="gated-gelu"))
        made.lm_head.weight = nn.Parameter(torch.randn(size, 16))
    else:
        config = BartConfig(
            vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=2, dropout=dropout,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=64, init_std=0.3, bos_token_id=3,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
        )  # fmt: skip
        made = BartForConditionalGeneration(config)
        made.generation_config.forced_bos_token_id = 3
        with torch.no_grad():
            made.final_logits_bias.normal_()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and ("block" in name or "layers" in name):
                # What they write depends on what they read.
                weight *= 4
    return made.double().eval()


def save(folder: Path, kind: str, seed: int = 0, *, dropout: float = 0.0) -> Path:
    """A folder of one, and its path."""
    tokenizer(kind).save_pretrained(folder)
    model(kind, seed, dropout=dropout).float().save_pretrained(folder)
    return folder
