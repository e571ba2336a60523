"""Models made from nothing: random weights, and a vocabulary learned from texts.

All that such a model knows after a run it learned there. One of them is packaged: ``pocket-llama``
shows in minutes, on any machine, what a loss brings across from a teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ctkd.cache_folder import building, cache_dir, locked, say
from ctkd.distill.config import UNTRAINED
from ctkd.distill.data.pydocs import read_pydocs
from ctkd.distill.models.checks import auto_class, quiet

__all__ = [
    "LEAST_VOCABULARY",
    "POCKET_CONFIG",
    "draw_model",
    "made_once",
    "prepare_untrained",
    "train_tokenizer",
]

LEAST_VOCABULARY = 257
"""Tokens of a byte-level vocabulary without any merge: the bytes, and the end of a text."""

_VOCAB_SIZE = 4096
_END = "<|endoftext|>"
_SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
POCKET_CONFIG = {"model_type": "llama", "vocab_size": _VOCAB_SIZE, **_SHAPE}
"""The configuration of ``pocket-llama``, as its config.json would say it."""


def prepare_untrained() -> Path:
    """Return the folder of the untrained model, which is made on first use.

    A Llama of 2.1 million parameters, with weights drawn from seed 0. Its byte-level BPE has 4,096
    tokens, learned on the training chapters of ``pydocs``.

    Raises:
        DataError: If there are no such chapters.
        ModelError: If the cache cannot be written.
    """
    texts = [row["text"] for row in read_pydocs("train")]
    name = hashlib.sha256(repr((texts, _SHAPE, _VOCAB_SIZE)).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(texts, _VOCAB_SIZE)
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(vocab_size=_VOCAB_SIZE, **_SHAPE)
        draw_model(config, tokenizer, seed=0).save_pretrained(folder)

    return made_once(cache_dir() / "models" / f"{UNTRAINED}-{name}", write)


def made_once(final: Path, write: Callable[[Path], object]) -> Path:
    """A folder of the cache, written by one process if it is not there yet.

    Args:
        final: The folder; its name stands for all that decides over its content.
        write: Fills an empty folder.

    Raises:
        ModelError: If the cache cannot be written.
    """
    if not final.is_dir():
        with locked(final):
            if not final.is_dir():
                say(f"making {final.name}, once")
                with building(final) as folder, quiet():
                    write(folder)
    return final


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: any text comes back from its tokens as it was.

    Args:
        texts: To learn from.
        size: Most tokens, at least `LEAST_VOCABULARY`; short texts yield fewer.
    """
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=_END, eos_token=_END, pad_token=_END
    )


def draw_model(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A language model with random weights, in float32.

    Args:
        config: The model's; it gets the tokenizer's ids of the begin, the end and padding. The
            decoder of an encoder-decoder begins with the end.
        tokenizer: The model's.
        seed: Of the draw, which leaves the state of torch's random numbers as it was.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    return model
