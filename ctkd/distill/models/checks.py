"""Checks shared by all ways to load a model, silence while loading, one-line causes.

It loads nothing itself.
"""

import logging as levels
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.utils import logging

from ctkd.errors import ModelError

__all__ = ["auto_class", "check_causal", "check_complete", "check_layers", "one_line", "quiet"]

_LONGEST_CAUSE = 300
# What configurations call the number of layers of a model, or of its decoder.
_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
# Of a weight's name: the number of its layer.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+)\.")


def one_line(error: BaseException) -> str:
    r"""Return an exception's message on one line, cut where it rambles.

    Example:
        >>> one_line(ValueError("no weights\n  in this file"))
        'no weights in this file'
        >>> one_line(MemoryError())
        'MemoryError'
    """
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else text[: _LONGEST_CAUSE - 3] + "..."


@contextmanager
def quiet(*, show_downloads: bool = False) -> Iterator[None]:
    """Silence transformers' and the hub's bars and log lines, and restore them afterwards.

    Args:
        show_downloads: leave the hub's download bars as they are.
    """
    verbosities = [one.get_verbosity() for one in (logging, hub_logging)]
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    _set_verbosities([levels.ERROR] * 2)
    _show_bars(transformers=False, hub=hub_bars and show_downloads)
    try:
        yield
    finally:
        _set_verbosities(verbosities)
        _show_bars(transformers=bars, hub=hub_bars)


def _set_verbosities(wanted: Sequence[int]) -> None:
    """Set transformers' and the hub's where they differ: setting one clears all loggers' caches."""
    for library, level in zip((logging, hub_logging), wanted, strict=True):
        if library.get_verbosity() != level:
            library.set_verbosity(level)


def _show_bars(*, transformers: bool, hub: bool) -> None:
    # The hub warns when an environment variable outranks these calls: the variable is meant.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # transformers' switch turns the hub's bars as well, so the hub's comes second.
        (logging.enable_progress_bar if transformers else logging.disable_progress_bar)()
        (enable_progress_bars if hub else disable_progress_bars)()


def check_causal(config: PretrainedConfig, name: str) -> None:
    """Refuse a model that does not predict each token of an answer from those before it.

    Args:
        config: the model's configuration.
        name: what the user called the model, for the message.

    Raises:
        ModelError: it is an encoder, or has no language-model head.
    """
    if config.is_encoder_decoder:
        fits = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    else:
        reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
            config, "is_decoder", False
        )
        fits = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not reads_both_ways
    if not fits:
        raise ModelError(
            f"{name} has no causal language-model head (it is of the kind "
            f"{config.model_type or 'unknown'}); give a language model that is decoder-only, such "
            "as smollm2-135m-instruct, or an encoder-decoder"
        )


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a model of a configuration that was checked."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_complete(missing: Collection[str], name: str) -> None:
    """Refuse a model some of whose weights were in no file: transformers leaves them random.

    Args:
        missing: the names of those weights.
        name: what the user called the model, for the message.

    Raises:
        ModelError: there are any.
    """
    if missing:
        raise ModelError(
            f"the files of {name} lack {len(missing)} of the model's weights, {min(missing)} for "
            "one, which would stay random; give a complete causal language model"
        )


def check_layers(unexpected: Collection[str], config: PretrainedConfig, name: str) -> None:
    """Refuse a model whose configuration has fewer layers than its files: it would be cut short.

    Args:
        unexpected: Names of the weights in the files that the model has no place for.
        config: The model's configuration.
        name: What the user called the model, for the message.

    Raises:
        ModelError: If there are any of further layers.
    """
    said = ((getattr(config, setting, None), setting) for setting in _DEPTHS)
    known = [(layers, setting) for layers, setting in said if layers is not None]
    numbers = [int(one[1]) for one in map(_LAYER.search, unexpected) if one is not None]
    if known and numbers and max(numbers) >= min(known)[0]:
        layers, setting = min(known)
        raise ModelError(
            f"the files of {name} hold {max(numbers) + 1} layers, but its config.json says "
            f"{setting} {layers}, and the others would be left out; mend config.json, or save a "
            "model of that many layers"
        )
