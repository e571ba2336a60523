"""GGUF files, converted once to a folder of bfloat16 safetensors and a tokenizer.

A GGUF-loaded model can be neither trained nor saved as it is, and takes long to unpack. The
folder is keyed by the file's SHA-256, so an edited file is converted anew. Split files
(`-00001-of-00003.gguf`) are not joined.
"""

import hashlib
import io
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctkd.cache_folder import building, cache_dir, locked, say
from ctkd.distill.models.checks import check_causal, check_complete, one_line, quiet
from ctkd.errors import ModelError

__all__ = ["convert_gguf", "converted_folder", "write_converted"]

# Raised when the same file would be converted differently: folders of before are then left alone.
_CONVERSION = 1

# An array of more elements is a vocabulary's; those of a configuration have one for each layer.
_LONGEST_SETTING = 4096

# Numbers that are unpacked together: a processor's cache holds them.
_GROUP = 1 << 18

# Held while the functions of gguf are replaced.
_REPLACING = threading.Lock()

# The pre-tokenizers that are the plain byte-level one.
_PLAIN = {"default", "gpt-2", "mpt", "olmo", "phi-2"}


def converted_folder(stem: str, sha256: str) -> Path:
    """Return the folder of the cache in which a GGUF file's conversion lies or will lie.

    Args:
        stem: the file's name without `.gguf`; it is there for people who look into the cache.
        sha256: of the whole file, in hexadecimal.
    """
    return cache_dir() / "models" / f"{stem}-{sha256[:16]}-v{_CONVERSION}"


def convert_gguf(path: Path) -> Path:
    """Return the converted folder of a GGUF file, converting it if that was not done before.

    Args:
        path: the file.

    Raises:
        ModelError: it is no GGUF file, is cut short, holds no causal language model, is of an
            architecture that transformers cannot read, or the cache cannot be written.
    """
    try:
        status = path.stat()
        sha256 = _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    final = converted_folder(path.stem, sha256)
    if final.is_dir():
        return final
    with locked(final):
        if not final.is_dir():
            say(f"converting {path.name} ({status.st_size / 1e6:.0f} MB), once")
            with building(final) as folder:
                write_converted(path, folder)
    return final


def write_converted(path: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into a folder that `from_pretrained` reads.

    Weights are dequantized and rounded to bfloat16. The generation configuration, which a GGUF
    file has not, is made from the tokenizer's special tokens.

    Args:
        path: the GGUF file.
        folder: an existing folder.

    Raises:
        ModelError: the file cannot be read as a causal language model, or the folder not written.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it starts with {magic!r}, not b'GGUF'")
    try:
        with quiet(), _quick_gguf():
            tokenizer = _read_tokenizer(path)
            model = _read_model(path)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot read {path}: {one_line(error)}; the file may be cut short or of an "
            "architecture that this version of transformers cannot read from GGUF"
        ) from error
    pad = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"cannot write the converted model to {folder}: {one_line(error)}; free some space "
            "there, or set CTKD_CACHE to another folder"
        ) from error


def _read_model(path: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    check_causal(config, str(path))
    if config.is_encoder_decoder:
        raise ModelError(
            f"{path} is an encoder-decoder model ({config.model_type}), which is not read from "
            "GGUF files; give its folder or hub id"
        )
    # Later versions of transformers keep some architectures packed unless told otherwise.
    packing = getattr(transformers, "GgufConfig", None)
    with _bar_for_people_only():
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=packing(dequantize=True) if packing else None,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_complete(report["missing_keys"], str(path))
    # The weights are dense now; without these three, transformers refuses to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    backend = tokenizer.backend_tokenizer
    # transformers falls back to the plain byte-level splitting where it does not know a file's.
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        field = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre")
        kind = field.contents() if field else "default"
        if kind == "smollm":
            # Digits apart, before anything else: else two spaces before a digit are split too.
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
            )
        elif kind not in _PLAIN:
            say(
                f"note: {path.name} splits text by the rules {kind!r}, which transformers cannot "
                "rebuild; some words may be tokenized otherwise than the model was trained on"
            )
    return tokenizer


@contextmanager
def _quick_gguf() -> Iterator[None]:
    """Let transformers read a GGUF file in a fifth of the time, to the same numbers.

    It parses the whole header three times, makes the table of tensor names anew for every module,
    and unpacks sixteen rows at a time. It looks these functions up when it calls them.
    """
    quick = {
        "GGUFReader": cache(_HeaderReader),
        "get_tensor_name_map": cache(gguf.get_tensor_name_map),
        "dequantize": _dequantize,
    }
    with _REPLACING:
        slow = {name: getattr(gguf, name) for name in quick}
        vars(gguf).update(quick)
        try:
            yield
        finally:
            vars(gguf).update(slow)


class _HeaderReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
    """A reader that passes over vocabularies: one text of n characters stands for n texts.

    A configuration needs their number alone, and tokenizers are made by another reader. As they
    are, every text and every number would become an array of its own.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
        if count <= _LONGEST_SETTING or kind == gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        element = gguf.GGUFValueType(kind)
        types = [gguf.GGUFValueType.ARRAY, element]
        end = orig_offs + struct.calcsize("<IQ")
        if element != gguf.GGUFValueType.STRING:
            end += count * np.dtype(self.gguf_scalar_to_np[element]).itemsize
            return end - orig_offs, [], [], types
        for _ in range(count):
            end += 8 + struct.unpack_from("<Q", self.data, end)[0]
        return end - orig_offs, [np.full(count, ord(" "), np.uint8)], [0], types


def _dequantize(data: NDArray[Any], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """Do what `gguf.dequantize` does, many rows at a time."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values: NDArray[np.float32]
    if block == 1:
        values = gguf.quants.dequantize(data, kind)
        return values
    blocks = data.reshape(-1, size)
    values = np.empty((len(blocks), block), np.float32)
    step = _GROUP // block
    for start in range(0, len(blocks), step):
        row = blocks[start : start + step].reshape(1, -1)
        values[start : start + step] = gguf.quants.dequantize(row, kind).reshape(-1, block)
    return values.reshape(*data.shape[:-1], -1)


def _bar_for_people_only() -> AbstractContextManager[object]:
    # transformers' switch does not reach the bar of its GGUF reader: it goes where stderr goes.
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    # Size and time are in the key, so that a file that changed is read again.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
