"""Models whose linear layers are rounded to 8 or 4 bits when they are loaded, by bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ctkd.errors import ModelError

__all__ = ["rounding_to"]


def rounding_to(bits: int, dtype: torch.dtype) -> Any:
    """What has transformers round the weights of linear layers; the head and norms stay whole.

    Args:
        bits: 8 for integers with a scale per row, 4 for NF4 (arXiv 2305.14314).
        dtype: Of all else, and of what is computed.

    Raises:
        ModelError: If bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ModelError(
            f"weights in {bits} bits need bitsandbytes, for CUDA or an x86 or ARM CPU: "
            "`pip install bitsandbytes`; or load the teacher as it is"
        )
    # Of every layer and step it says what it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
