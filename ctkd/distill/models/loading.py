"""Models and tokenizers by packaged name, folder, GGUF file or hub id.

An adapter of peft stands for its model with it. Language models alone, decoder-only and
encoder-decoder; code that ships in a model's repository is never run. Nothing here trains:
gradients stay as transformers leaves them.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctkd.distill.config import UNTRAINED
from ctkd.distill.models import adapters
from ctkd.distill.models.checks import (
    auto_class,
    check_causal,
    check_complete,
    check_layers,
    one_line,
    quiet,
)
from ctkd.distill.models.gguf_convert import convert_gguf
from ctkd.distill.models.packaged import PACKAGED, prepare
from ctkd.distill.models.quantized import rounding_to
from ctkd.distill.models.untrained import prepare_untrained
from ctkd.distill.printable import NO_TEXT, is_text
from ctkd.errors import BatchError, ModelError

__all__ = [
    "accepts_position_ids",
    "below_wrappers",
    "check_token_ids",
    "decoder_start",
    "decoder_start_of",
    "evaluating",
    "has_tokenizer",
    "head_width",
    "last_logits",
    "load_model",
    "load_tokenizer",
    "make_savable",
    "most_positions",
    "positions_of",
    "reads_padding",
    "resolve",
    "sources",
    "supports_logits_to_keep",
]

_HUB_TIMEOUT_S = 10
_TRIED_TOKENS = 6
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHT_FILES = ("*.safetensors*", "*.bin*", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json")


def resolve(name: str) -> str:
    """Return what transformers can load for a name: a folder's path, or a hub id.

    A packaged model is fetched, and a GGUF file converted, on first use; "pocket-llama" is made
    from random weights. The order: a packaged name (write `./NAME` for a folder called so), a path
    that exists, a hub id. What is found may be an adapter.

    Args:
        name: a packaged model's name, a folder, a `.gguf` file, or a hub id.

    Raises:
        ModelError: nothing goes by that name, or it cannot be fetched or converted.
    """
    if name in PACKAGED:
        return str(prepare(PACKAGED[name]))
    if name == UNTRAINED:
        return str(prepare_untrained())
    if not name.strip():
        raise ModelError(f"the name of a model is empty; give one. {_packaged_names(name)}")
    path = Path(name).expanduser()
    if path.exists() and not is_text(str(path)):
        raise ModelError(f"cannot load {name}: {NO_TEXT}")
    if path.is_dir():
        return str(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{name} is a file, but no .gguf file; give the folder of the model instead, or a "
                "configuration to --student-config of another command than evaluate"
            )
        return str(convert_gguf(path))
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"there is no file {name}; check the path. {_packaged_names(name)}")
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder {name}; check the path. {_packaged_names(name)}")
    if problem := _hub_problem(name):
        raise ModelError(
            f"there is no model {name!r}: it is neither a packaged model nor a folder, and "
            f"{problem}. {_packaged_names(name)}"
        )
    return name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        name: as for `resolve`.

    Raises:
        ModelError: nothing goes by that name, or it has no usable tokenizer.
    """
    source = resolve(name)
    folder = Path(source)
    if folder.is_dir() and not has_tokenizer(folder):
        # An adapter that was saved alone.
        source = sources(name)[-1]
        folder = Path(source)
    # transformers makes up an empty tokenizer for some architectures if there are no files.
    if folder.is_dir() and not has_tokenizer(folder):
        raise ModelError(
            f"{name} has no tokenizer: expected tokenizer.json in the folder; copy the "
            "tokenizer's files there (tokenizer.save_pretrained writes them)"
        )
    try:
        with quiet(show_downloads=sys.stderr.isatty()):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            # Some of its settings are read only here.
            tokenizer("a")
    except Exception as error:
        raise ModelError(
            f"cannot load the tokenizer of {name}: {_cause(error)}; its tokenizer files may be "
            "missing, damaged or made for another version of transformers"
        ) from error
    if tokenizer.vocab_size == 0:
        raise ModelError(f"{name} has no tokenizer: the one that was loaded has no tokens")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds files of a tokenizer."""
    return any(any(folder.glob(files)) for files in _TOKENIZER_FILES)


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trainable_adapter: bool = False,
    bits: int | None = None,
) -> PreTrainedModel:
    """Load a language model, in evaluation mode.

    Args:
        name: as for `resolve`.
        dtype: of the weights, whatever the file holds. Quantized checkpoints keep their own.
        device: where the model goes; by default it stays in main memory.
        trainable_adapter: Of an adapter: keep it apart from its model, for more training. By
            default it is made part of the weights.
        bits: 8 or 4, to round the weights of linear layers but the head to; None to leave them.

    Raises:
        ModelError: nothing goes by that name; it is no language model; its files are
            missing, damaged or incomplete; it does not fit on the device; or it cannot be rounded.
    """
    whole, *attached = reversed(sources(name))
    rounding: dict[str, Any] = {}
    if bits is not None:
        if attached:
            raise ModelError(
                f"{name} is an adapter, which rounded weights cannot take up; make it a whole "
                "model first (--lora-merge), or load it as it is"
            )
        rounding = {"quantization_config": rounding_to(bits, dtype)}
        if device is not None:
            rounding["device_map"] = {"": torch.device(device)}
    model = _load_whole(whole, name, dtype, **rounding)
    for source in attached:
        if has_tokenizer(Path(source)):
            # Its vocabulary may have grown.
            size = len(load_tokenizer(source))
            if size > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(size, mean_resizing=False)
        is_last = source == attached[-1]
        model = adapters.attach(model, source, name, trainable=trainable_adapter and is_last)
        if not (trainable_adapter and is_last):
            model = adapters.merged(model)
    try:
        if device is not None:
            model.to(device)
    except Exception as error:
        raise ModelError(
            f"cannot put {name} on the device {str(device)!r}: {one_line(error)}; choose another "
            "device, such as cpu, or a smaller dtype"
        ) from error
    model.eval()
    return model


def _load_whole(source: str, name: str, dtype: torch.dtype, **rounding: Any) -> PreTrainedModel:
    if Path(source).is_dir():
        _check_has_config(Path(source))
    try:
        with quiet(show_downloads=sys.stderr.isatty()):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            check_causal(config, name)
            model, report = auto_class(config).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **rounding,
            )
    except ModelError:
        raise
    except Exception as error:
        way_out = "its files may be missing, damaged or made for another version of transformers"
        folder = Path(source)
        if folder.is_dir() and not any(any(folder.glob(files)) for files in _WEIGHT_FILES):
            way_out = "`ctkd compare` keeps the weights of its runs with --keep-models"
        raise ModelError(f"cannot load the model {name}: {_cause(error)}; {way_out}") from error
    check_complete(report["missing_keys"], name)
    check_layers(report["unexpected_keys"], config, name)
    _set_dtype(model, dtype)
    return cast(PreTrainedModel, model)


def sources(name: str) -> list[str]:
    """What a name stands for, as `resolve` returns it, and of an adapter the models below it.

    Args:
        name: As for `resolve`.

    Raises:
        ModelError: If one of them is not there, or below itself.
    """
    found = [resolve(name)]
    while (base := adapters.base_of(found[-1])) is not None:
        try:
            below = resolve(base)
        except ModelError as error:
            raise ModelError(
                f"{name} is an adapter, whose model cannot be loaded: {error}"
            ) from error
        if below in found:
            raise ModelError(
                f"{name} is an adapter of {base}, which lies above it; name its model as "
                "base_model_name_or_path in its adapter_config.json"
            )
        found.append(below)
    return found


def head_width(model: PreTrainedModel) -> int:
    """Return the size of the last axis of a model's logits.

    It can exceed the tokenizer's length: some models pad it to a round number.

    Args:
        model: a language model.

    Raises:
        ModelError: the model has no output embedding.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding; give a language model")
    # Not the weight's shape where it can be helped: a sharded or packed weight is smaller.
    width = getattr(head, "out_features", None)
    return int(head.weight.shape[0] if width is None else width)


def check_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that writes ids the model has no embedding for.

    Special tokens that only a text spelling them out would yield are let pass, since some
    published models have one too many (Gemma 3's image token, on its text-only sizes).
    A model wider than its tokenizer is fine.

    Args:
        model: a language model.
        tokenizer: the tokenizer that is to feed it.

    Raises:
        ModelError: an ordinary token, or the padding, begin or end token, is out of range.
    """
    width = min(head_width(model), model.get_input_embeddings().weight.shape[0])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    outside = {
        token: i
        for token, i in tokenizer.get_vocab().items()
        if i >= width and (i in used or i not in special)
    }
    if outside:
        token, i = max(outside.items(), key=lambda item: item[1])
        raise ModelError(
            f"token ids out of a model's range: the tokenizer writes ids up to {i} ({token!r}), "
            f"but {type(model).__name__} has embeddings for ids up to {width - 1} only; give the "
            "model's own tokenizer, or resize the embeddings with resize_token_embeddings"
        )


def below_wrappers(model: nn.Module) -> nn.Module:
    """The model itself, below adapters and compilers whose `forward` takes anything."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and "get_base_model" in dir(model):
            inner = cast(Any, model).get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def supports_logits_to_keep(model: nn.Module) -> bool:
    """Tell whether `forward` can compute logits for some positions only."""
    return "logits_to_keep" in inspect.signature(below_wrappers(model).forward).parameters


def accepts_position_ids(model: nn.Module) -> bool:
    """Tell whether `forward` takes `position_ids`."""
    return "position_ids" in inspect.signature(below_wrappers(model).forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def reads_padding(model: PreTrainedModel) -> bool:
    """Tell whether logits depend on masked tokens in front of a text.

    It is tried out, for models that carry a state along a text: some of them take a mask and pay no
    heed to it.
    """
    if not getattr(below_wrappers(model), "_is_stateful", False):
        return False
    embeddings = model.get_input_embeddings().weight
    count = 2 * _TRIED_TOKENS
    ids = torch.arange(1, 1 + count, device=embeddings.device).remainder(embeddings.shape[0])
    mask = (torch.arange(count, device=ids.device) >= _TRIED_TOKENS).long()
    text = slice(_TRIED_TOKENS, None)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(0) - 1).clamp_min(0),
    }
    with evaluating(model):
        padded, plain = (
            last_logits(model, model, {name: one[part][None] for name, one in inputs.items()}, 1)
            for part in (slice(None), text)
        )
    error = (padded - plain).abs().max()
    tolerance = max(1e-3, 8.0 * torch.finfo(plain.dtype).eps)
    return bool(error > tolerance * plain.abs().max())


def last_logits(
    model: nn.Module, unwrapped: nn.Module, inputs: Mapping[str, Tensor], count: int
) -> Tensor:
    """Logits at the last positions, (B, count, V), computed there alone where the model allows.

    Args:
        model: What is called, perhaps wrapped for training on several devices.
        unwrapped: The model itself.
        inputs: ``input_ids``, and ``attention_mask`` and ``position_ids`` if there are such. Of an
            encoder-decoder also ``decoder_input_ids``, whose positions count.
        count: How many positions.

    Raises:
        BatchError: If the inputs are those of a model with an encoder and this one has none, or the
            other way round.
    """
    encodes = bool(cast(Any, unwrapped).config.is_encoder_decoder)
    if encodes != ("decoder_input_ids" in inputs):
        kinds = ("a decoder-only model", "an encoder-decoder")
        raise BatchError(
            f"{type(unwrapped).__name__} is {kinds[encodes]}, but the rows were encoded for "
            f"{kinds[not encodes]}; encode them with a PromptForm of the model's decoder_start"
        )
    names = ["input_ids", "attention_mask", "decoder_input_ids"]
    if accepts_position_ids(unwrapped):
        names.append("position_ids")
    arguments: dict[str, Any] = {name: inputs[name] for name in names if name in inputs}
    if supports_logits_to_keep(unwrapped):
        arguments["logits_to_keep"] = count
    logits: Tensor = model(**arguments, use_cache=False).logits
    return logits[:, -count:]


def make_savable(model: PreTrainedModel, say: Callable[[str], None]) -> None:
    """Unset the settings of generation that have no effect and that transformers refuses to save.

    Many models come with sampling values but decode greedily.

    Raises:
        ModelError: If they cannot be saved even so.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        names = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
        for name in names:
            setattr(config, name, None)
        try:
            config.validate(strict=True)
        except ValueError as rest:
            raise ModelError(
                f"the model's generation_config.json cannot be saved again: {one_line(rest)}; "
                "mend it in the model's folder"
            ) from error
        say(
            f"note: the model's {', '.join(names)} for generation have no effect without "
            "do_sample, and are left out of what is saved"
        )


def most_positions(name: str) -> int | None:
    """The most tokens a model can read, from its configuration alone; None if it does not say.

    Raises:
        ModelError: If nothing goes by that name, or it has no configuration that can be read.
    """
    _, config = _configuration(name)
    return positions_of(config)


def positions_of(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model of this configuration can read; None if it does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def decoder_start(name: str) -> tuple[int, ...]:
    """What a model's decoder reads in front of an answer, from its configuration alone.

    Args:
        name: As for `resolve`.

    Returns:
        Of an encoder-decoder ``decoder_start_token_id``, and ``forced_bos_token_id`` where it has
        one, as BART has; of a decoder-only model nothing.

    Raises:
        ModelError: As in `most_positions`, or if an encoder-decoder does not say where it begins.
    """
    source, config = _configuration(name)
    if not config.is_encoder_decoder:
        return ()
    with _reading_configuration(name):
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:
            generation = GenerationConfig.from_pretrained(
                source, "config.json", _from_model_config=True
            )
    return _decoder_start(config, generation, name)


def decoder_start_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The same of a model that is loaded."""
    return _decoder_start(model.config, model.generation_config, type(model).__name__)


def _decoder_start(
    config: PreTrainedConfig, generation: GenerationConfig, name: str
) -> tuple[int, ...]:
    if not config.is_encoder_decoder:
        return ()
    # The last is where transformers begins without the others.
    named = (
        generation.decoder_start_token_id,
        getattr(config, "decoder_start_token_id", None),
        generation.bos_token_id,
    )
    first = next((one for one in named if one is not None), None)
    if first is None:
        raise ModelError(
            f"{name} does not say which token its decoder begins with; write it as "
            "decoder_start_token_id into its config.json: T5 begins with padding, BART with the end"
        )
    forced = generation.forced_bos_token_id
    return (int(first),) if forced is None else (int(first), int(forced))


def _configuration(name: str) -> tuple[str, PreTrainedConfig]:
    """What a model is loaded from, and its configuration."""
    source = sources(name)[-1]
    if Path(source).is_dir():
        _check_has_config(Path(source))
    with _reading_configuration(name):
        return source, AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _reading_configuration(name: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:
        raise ModelError(f"cannot read the configuration of {name}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    # transformers would have the user run the code, which no option of ctkd does.
    if "trust_remote_code" in str(error):
        return "it needs Python code that ships with it, which ctkd never runs"
    return one_line(error)


def _check_has_config(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    files = sorted(file.name for file in path.glob("*.gguf"))
    way_out = f"give the file {path / files[0]}" if files else "give a folder of a saved model"
    raise ModelError(f"the folder {path} holds no model: it has no config.json; {way_out}")


def _packaged_names(name: str) -> str:
    known = sorted([*PACKAGED, UNTRAINED])
    names = ", ".join(known)
    close = difflib.get_close_matches(name.lower(), known, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    return f"Packaged models: {names}{guess}"


def _hub_problem(name: str) -> str | None:
    """Return why the hub cannot give a model, or None if it can.

    Asked once and briefly: transformers itself tries for half a minute when there is no network.
    """
    files = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return None
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return "the hub has no such repository, or it is private"
    except OfflineModeIsEnabled:
        return "the hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE"
    except Exception as error:
        return f"the hub did not answer ({one_line(error)})"
    return None


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights that transformers kept wider; buffers are left as they are."""
    if getattr(model, "is_quantized", False):
        return
    for weight in model.parameters():
        if weight.is_floating_point() and weight.dtype != dtype:
            weight.data = weight.data.to(dtype)
