"""Students of random weights, from a configuration as transformers writes it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ctkd.cache_folder import cache_dir
from ctkd.distill.config import UNTRAINED
from ctkd.distill.models.checks import check_causal, one_line, quiet
from ctkd.distill.models.fingerprint import file_sha256
from ctkd.distill.models.loading import check_token_ids, has_tokenizer, load_tokenizer
from ctkd.distill.models.untrained import (
    LEAST_VOCABULARY,
    POCKET_CONFIG,
    draw_model,
    made_once,
    train_tokenizer,
)
from ctkd.errors import ModelError

__all__ = ["described", "prepare_student", "prepare_tokenizer"]

_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def prepare_student(source: str, texts: Sequence[str] | None, seed: int) -> Path:
    """Return the folder of a model with random weights, which is made on first use.

    Its name stands for the configuration, the vocabulary and the seed. A folder's own tokenizer is
    taken; where there is none, a byte-level BPE of the configuration's ``vocab_size`` is learned
    from the texts, whatever the seed.

    Args:
        source: A configuration of transformers as a JSON file, a folder with a ``config.json``, or
            "pocket-llama" for the shape of that model.
        texts: To learn the vocabulary from; None if it is not to be learned.
        seed: Of the weights.

    Raises:
        ModelError: If the configuration cannot be read or is none of a language model, its
            vocabulary is too small or would have to be learned, or the cache cannot be written.
    """
    settings, folder = _read(source)
    config = _configured(settings, source)
    place = _tokenizer(config, source, folder, texts)
    vocabulary = [place.name]
    if place == folder:
        vocabulary = [
            f"{path.name} {file_sha256(path)}"
            for path in sorted(folder.iterdir())
            if path.suffix in _TOKENIZER_SUFFIXES
        ]
    tokenizer = load_tokenizer(str(place))
    made = json.dumps([settings, vocabulary, seed], sort_keys=True)
    name = hashlib.sha256(made.encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        try:
            model = draw_model(config, tokenizer, seed)
        except Exception as error:
            raise ModelError(
                f"no model can be made of the configuration {source}: {one_line(error)}; mend it"
            ) from error
        try:
            check_token_ids(model, tokenizer)
        except ModelError as error:
            raise ModelError(
                f"vocab_size of the configuration {source} is smaller than the tokenizer beside "
                f"it, which has {len(tokenizer)} tokens; raise it to that"
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once(cache_dir() / "models" / f"random-{config.model_type}-{name}", write)


def prepare_tokenizer(source: str, texts: Sequence[str]) -> tuple[Path, int]:
    """Return the folder of such a model's tokenizer, and the width of its head; draws no weights.

    Args:
        source: As in `prepare_student`.
        texts: To learn the vocabulary from, where the source has none.

    Raises:
        ModelError: As `prepare_student`.
    """
    settings, folder = _read(source)
    config = _configured(settings, source)
    place = _tokenizer(config, source, folder, texts)
    width: int = config.get_text_config().vocab_size
    return place, width


def described(folder: Path) -> str:
    """The size of a model that was made, for a person."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    tokens = len(load_tokenizer(str(folder)))
    # Short texts yield fewer tokens than a configuration has columns.
    columns = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    unused = f" in {columns:,} columns" if columns > tokens else ""
    return f"{count:,} weights, {tokens:,} tokens{unused}"


def _read(source: str) -> tuple[dict[str, Any], Path | None]:
    """The content of a configuration, and the folder that holds it if one was named."""
    if source == UNTRAINED:
        return POCKET_CONFIG, None
    path = Path(source).expanduser()
    folder = path if path.is_dir() else None
    file = path if folder is None else path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"there is no configuration {file}; give a JSON file as transformers writes it, its "
            f"folder, or {UNTRAINED} for the shape of that model"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"the configuration {file} cannot be read as JSON: {one_line(error)}; mend it"
        ) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ModelError(
            f"the configuration {file} does not say what it is of; expected an object with a "
            'model_type, such as "llama"'
        )
    return settings, folder


def _configured(settings: dict[str, Any], source: str) -> PretrainedConfig:
    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"the configuration {source} is of the architecture {kind!r}, which transformers "
            f"{transformers.__version__} does not have; give one that it has, or upgrade it"
        )
    if settings.get("quantization_config"):
        raise ModelError(
            f"the configuration {source} is of a quantized model, which cannot be trained from "
            "random weights; remove its quantization_config"
        )
    try:
        with quiet():
            config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(settings)
    except Exception as error:
        raise ModelError(
            f"the configuration {source} is none of a {kind}: {one_line(error)}; mend it"
        ) from error
    check_causal(config, source)
    return config


def _tokenizer(
    config: PretrainedConfig, source: str, folder: Path | None, texts: Sequence[str] | None
) -> Path:
    """The folder of a tokenizer: that of the configuration, if it holds one, or a learned one."""
    if folder is not None and has_tokenizer(folder):
        return folder
    if texts is None:
        raise ModelError(
            f"{source} has no tokenizer, and none is learned from rows that are streamed; name a "
            "folder that holds one beside its config.json"
        )
    return _learned(config, source, texts)


def _learned(config: PretrainedConfig, source: str, texts: Sequence[str]) -> Path:
    """The folder of a tokenizer that was learned from texts."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int) or size < LEAST_VOCABULARY:
        raise ModelError(
            f"vocab_size {size} of the configuration {source} is too small: a vocabulary of bytes "
            f"has {LEAST_VOCABULARY} tokens, the end included; raise it"
        )
    digest = hashlib.sha256(f"{size}\n".encode())
    for text in texts:
        # Lengths as well, that no text may end where another begins.
        content = text.encode(errors="surrogatepass")
        digest.update(f"{len(content)} ".encode() + content)
    final = cache_dir() / "models" / f"vocabulary-{digest.hexdigest()[:16]}"
    return made_once(final, lambda folder: train_tokenizer(texts, size).save_pretrained(folder))
