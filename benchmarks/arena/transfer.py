"""A model that is given another vocabulary, and finds its way back to itself."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.arena.runs import DEFAULT_WEIGHTS
from benchmarks.arena.students import TextArena
from benchmarks.arena.texts import cut, fairytale_rows, python_rows
from ctkd.cache_folder import cache_dir
from ctkd.distill.models.fingerprint import model_fingerprint
from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.distill.models.untrained import made_once
from ctkd.tokenization.token_bytes import TokenBytes

TEACHER, VOCABULARY = "gemma-3-270m", "smollm2-135m-instruct"
SETTINGS: dict[str, Any] = {"max_steps": 100, "batch_size": 4, "learning_rate": 1e-4}
# Texts of some 64 tokens, each of which is read once.
BYTES, TEXTS = 260, {"train": 400, "dev": 20, "test": 100}


class Transfer(TextArena):
    """Gemma's body with SmolLM2's vocabulary, towards Gemma.

    Args:
        source: Folder of FairytaleQA; None for chapters of Python's reference.
        work: Folder for what is made.
    """

    name = "transfer"
    limits = """\
It is one body and one vocabulary, 100 steps of 4 texts, and each loss at its default weight alone.
Intervals are Student's, for other seeds on other texts of this kind; the seeds differ in the order
of the texts, as all students start from the same weights. Models are packaged ones, whose weights
were rounded to some 4 bits.
"""

    def __init__(self, source: Path | None, work: Path) -> None:
        rows = cut(python_rows() if source is None else fairytale_rows(source), BYTES, TEXTS)
        super().__init__(rows, TEACHER, SETTINGS, DEFAULT_WEIGHTS, work, keep_rows=False)

    @property
    def student(self) -> str:
        name = f"{model_fingerprint(TEACHER)} {model_fingerprint(VOCABULARY)}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]

        def write(folder: Path) -> None:
            model, tokenizer = load_model(TEACHER), load_tokenizer(VOCABULARY)
            give_vocabulary(model, load_tokenizer(TEACHER), tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return str(made_once(cache_dir() / "models" / f"transplanted-{digest}", write))


@torch.no_grad()
def give_vocabulary(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase
) -> None:
    """Replace embeddings by those of another vocabulary: each is the mean of its bytes' old tokens.

    Args:
        model: Embeddings and head are one tensor.
        old: Its tokenizer.
        new: The tokenizer that it gets.
    """
    before = model.get_input_embeddings().weight.clone()
    embeddings = before.mean(0).repeat(len(new), 1)
    of_old = TokenBytes.from_tokenizer(old)
    of_role = {role: index for index, role in enumerate(of_old.roles) if role != "text"}
    of_byte = {one: index for index, one in enumerate(of_old.bytes_of) if len(one) == 1}
    of_new = TokenBytes.from_tokenizer(new).first(len(new))
    for index, (piece, role) in enumerate(zip(of_new.bytes_of, of_new.roles, strict=True)):
        if role != "text":
            ids = [of_role[role]] if role in of_role else []
        else:
            try:
                ids = old(piece.decode(), add_special_tokens=False).input_ids
            except UnicodeDecodeError:
                ids = [of_byte[one] for byte in piece if (one := bytes([byte])) in of_byte]
        if ids:
            embeddings[index] = before[ids].mean(0)
    model.resize_token_embeddings(len(new), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(embeddings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(new, name))
