"""Checks shared by all ways to load a model, silence while loading, one-line causes.

It loads nothing itself.
"""

import logging as levels
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
)
from transformers.utils import logging

from ctkd.errors import ModelError

__all__ = ["check_causal", "check_complete", "check_layers", "one_line", "quiet"]

_LONGEST_CAUSE = 300
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
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity(levels.ERROR)
    hub_logging.set_verbosity(levels.ERROR)
    _show_bars(transformers=False, hub=hub_bars and show_downloads)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        _show_bars(transformers=bars, hub=hub_bars)


def _show_bars(*, transformers: bool, hub: bool) -> None:
    # The hub warns when an environment variable outranks these calls: the variable is meant.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # transformers' switch turns the hub's bars as well, so the hub's comes second.
        (logging.enable_progress_bar if transformers else logging.disable_progress_bar)()
        (enable_progress_bars if hub else disable_progress_bars)()


def check_causal(config: PretrainedConfig, name: str) -> None:
    """Refuse a model that does not predict each token from those before it.

    Args:
        config: the model's configuration.
        name: what the user called the model, for the message.

    Raises:
        ModelError: it is an encoder-decoder, or an encoder, or has no language-model head.
    """
    kind = config.model_type or "unknown"
    way_out = "give a decoder-only language model, such as smollm2-135m-instruct"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({kind}), which ctkd does not take; {way_out}"
        )
    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    if reads_both_ways or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{name} has no causal language-model head (it is of the kind {kind}); {way_out}"
        )


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
    layers = getattr(config, "num_hidden_layers", None)
    numbers = [int(one[1]) for one in map(_LAYER.search, unexpected) if one is not None]
    if layers is not None and numbers and max(numbers) >= layers:
        raise ModelError(
            f"the files of {name} hold {max(numbers) + 1} layers, but its config.json says "
            f"num_hidden_layers {layers}, and the others would be left out; mend config.json, or "
            "save a model of that many layers"
        )
