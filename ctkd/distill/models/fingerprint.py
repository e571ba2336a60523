"""Fingerprints of models, from their files, without loading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ctkd.distill.models.loading import sources
from ctkd.errors import ModelError

__all__ = ["file_sha256", "model_fingerprint"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
_NO_WEIGHTS = ("training_args.bin", "ctkd_loss.safetensors")
_CHUNK = 1 << 22


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def model_fingerprint(name: str) -> str:
    """SHA-256 over a model's configuration and weights, or a hub model's commit.

    The configuration of its generation counts too: it names tokens that end a text. Of an adapter,
    its model's counts as well.

    Args:
        name: As `ctkd.distill.models.loading.resolve` takes it.

    Returns:
        Text that differs for models that answer differently; for a hub model that is not on this
        machine yet, its id.

    Raises:
        ModelError: If nothing goes by that name, or its folder holds no weights.
    """
    parts = [_fingerprint(name, source) for source in sources(name)]
    return parts[0] if len(parts) == 1 else hashlib.sha256(repr(parts).encode()).hexdigest()


def _fingerprint(name: str, source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        cached = [try_to_load_from_cache(source, one) for one in _SETTINGS]
        commits = [Path(one).parent.name for one in cached if isinstance(one, str)]
        return f"{source}@{commits[0]}" if commits else source
    digest = hashlib.sha256()
    weights = {
        path
        for pattern in _WEIGHTS
        for path in folder.glob(pattern)
        if path.name not in _NO_WEIGHTS
    }
    if not weights:
        raise ModelError(f"{name} holds no weights; give a folder of a saved model")
    for path in sorted({*(folder / name for name in _SETTINGS), *weights}):
        if path.is_file():
            digest.update(f"{path.name} {file_sha256(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
