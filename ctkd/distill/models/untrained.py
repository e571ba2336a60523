"""A small model made from nothing: a vocabulary of its own, and random weights.

It shows in minutes, on any machine, what a loss brings across from a teacher: all that it knows
afterwards it learned in the run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ctkd.cache_folder import building, cache_dir, locked, say
from ctkd.distill.config import UNTRAINED
from ctkd.distill.data.pydocs import read_pydocs

__all__ = ["prepare_untrained"]

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
    final = cache_dir() / "models" / f"{UNTRAINED}-{name}"
    if final.is_dir():
        return final
    with locked(final):
        if not final.is_dir():
            say(f"making {UNTRAINED} from random weights, once")
            with building(final) as folder:
                _write(folder, texts)
    return final


def _write(folder: Path, texts: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=_END, eos_token=_END, pad_token=_END
    )
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCAB_SIZE,
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=end,
                **_SHAPE,
            )
        )
    model.save_pretrained(folder)
