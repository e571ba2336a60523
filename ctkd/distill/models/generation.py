"""Answers of a model, by greedy decoding.

Nothing is sampled: settings that a model brings along for chatting (temperature, repetition
penalty, a sampling switch) are set aside while the answers are made.
"""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ctkd.distill.models.loading import (
    below_wrappers,
    decoder_start_of,
    evaluating,
    reads_padding,
)
from ctkd.errors import DataError, SettingError

__all__ = ["BATCH_SIZE", "Generated", "generate"]

BATCH_SIZE = 16
"""Prompts decoded together, unless a number is given."""

# Tokens between two looks at which texts have ended; a look costs a few milliseconds.
_STRIDE = 4


@dataclass(frozen=True, slots=True)
class Generated:
    """A text that a model wrote.

    Args:
        text: Without special tokens and white space at its ends.
        ended: Whether the model ended it; else it was cut after the most tokens.
    """

    text: str
    ended: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = BATCH_SIZE,
    stop_at_newline: bool = True,
    ends: Collection[int] = (),
    progress: bool | str = False,
) -> list[Generated]:
    """Continue each prompt with the most likely token, again and again.

    A text ends before the first end-of-sequence token, that of the tokenizer, one of the model's
    generation config or one of `ends`, or after `max_new_tokens`. With `stop_at_newline` it also
    ends before the first newline, so an answer that begins with one is empty. White space at both
    ends is removed, special tokens are left out.

    Prompts are padded on the left, those of an encoder-decoder on the right, and masked, so an
    answer does not depend on its batch, up to rounding. A row leaves its batch soon after it has
    ended, but in an encoder-decoder with the last of them. The model comes back as it was: training
    mode per module, generation config and `config.use_cache` alike.

    Args:
        model: A language model; it runs where it lies and in its own dtype.
        tokenizer: The model's tokenizer, to decode and for its end-of-sequence token. A padding
            token is not needed.
        prompts: Token ids of each prompt, at least one each, ids below the model's vocabulary.
        max_new_tokens: Most tokens per answer, at least 1. The paper uses 150.
        batch_size: Prompts decoded together, at least 1. Similar lengths share a batch. A model
            that pays heed to padding answers one prompt after another.
        stop_at_newline: Whether an answer is a single line.
        ends: Further tokens that end a text, such as the end of a turn, see `PromptForm.ends`.
        progress: Whether to show a bar on stderr; a text is shown as its description.

    Returns:
        One text per prompt, in the order of `prompts`.

    Raises:
        SettingError: If `max_new_tokens` or `batch_size` is below 1, or a decoder cannot write so
            many tokens.
        DataError: If a prompt is empty, holds an id outside the model's vocabulary, or leaves too
            little of the model's positions for the answer.
        ModelError: If an encoder-decoder does not say where it begins.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}")
    begun = decoder_start_of(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = _positions(model)
    if begun and max_new_tokens > longest - len(begun):
        raise SettingError(
            f"max_new_tokens {max_new_tokens} is more than the {int(longest) - len(begun)} tokens "
            "that the model's decoder can write; lower it"
        )
    _check_prompts(prompts, vocabulary, longest if begun else longest - max_new_tokens)
    stops = _end_tokens(model, tokenizer, vocabulary) | {*ends}
    padding = _padding_token(tokenizer, stops, vocabulary)
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=padding,
        decoder_start_token_id=begun[0] if begun else None,
    )
    newline = _NewlineSeen(tokenizer)
    criteria = StoppingCriteriaList([newline] if stop_at_newline else [])

    def is_last(token: int) -> bool:
        return token in stops or (stop_at_newline and newline.held_by(token))

    if batch_size > 1 and reads_padding(model):
        batch_size = 1
    # Longest first: a batch that does not fit in memory fails at once, and the bar speeds up.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [Generated("", True)] * len(prompts)
    bar = tqdm(
        total=len(prompts),
        desc=progress if isinstance(progress, str) else "generating",
        unit="prompt",
        # Where there is no terminal, a log is not filled with bars.
        disable=None if progress else True,
    )
    with bar, _set_aside(model, greedy), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[index] for index in chosen]
            if begun:
                rows = _from_decoder(model, batch, begun, greedy, criteria)
            else:
                rows = _continued(model, batch, padding, greedy, criteria, is_last)
            for index, row in zip(chosen, rows, strict=True):
                texts[index] = _text(tokenizer, row, stops, stop_at_newline)
            bar.update(len(chosen))
    return texts


def _from_decoder(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    begun: tuple[int, ...],
    greedy: GenerationConfig,
    criteria: StoppingCriteriaList,
) -> list[list[int]]:
    """Tokens that the decoder of an encoder-decoder writes, as those of `_continued`."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=greedy.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    written = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        decoder_input_ids=torch.tensor([begun] * len(rows), device=model.device),
        generation_config=greedy,
        stopping_criteria=criteria,
    )
    found: list[list[int]] = written[:, len(begun) :].tolist()
    return found


def _continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    padding: int,
    greedy: GenerationConfig,
    criteria: StoppingCriteriaList,
    is_last: Callable[[int], bool],
) -> list[list[int]]:
    """Tokens that follow each prompt; those behind the last one of a text are any."""
    rows_can_leave = _has_plain_cache(model)
    ids, mask = _left_padded(prompts, padding, model.device)
    cache = None
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    some = copy.copy(greedy)
    some.return_dict_in_generate = True
    rest = greedy.max_new_tokens
    while True:
        some.max_new_tokens = min(_STRIDE, rest) if rows_can_leave else rest
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=some,
            stopping_criteria=criteria,
        )
        new = output.sequences[:, ids.shape[1] :]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            written[row] += tokens
        rest -= new.shape[1]
        going = [place for place, row in enumerate(rows) if not any(map(is_last, written[row]))]
        if not going or rest <= 0:
            return written
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        ids, cache = output.sequences, output.past_key_values
        if len(going) < len(rows):
            kept = torch.tensor(going, device=ids.device)
            ids, mask, rows = ids[kept], mask[kept], [rows[place] for place in going]
            if cache is not None:
                cache.batch_select_indices(kept)


def _has_plain_cache(model: PreTrainedModel) -> bool:
    """Tell whether all that a model carries along a text are keys and values of each token."""
    adapter = getattr(model, "active_peft_config", None)
    # Learned prompts lie in front of the text, where no id and no mask speaks of them.
    if getattr(below_wrappers(model), "_is_stateful", False) or (
        adapter is not None and adapter.is_prompt_learning
    ):
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class _NewlineSeen(StoppingCriteria):  # type: ignore[misc]
    r"""Marks the rows whose last token holds a newline.

    A newline is one byte in UTF-8, so it lies within a single token and a look at each token
    decoded alone finds it, be it "\n", ".\n" or the byte token "<0x0A>".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: Any) -> Tensor:
        seen = [self.held_by(token) for token in input_ids[:, -1].tolist()]
        return torch.tensor(seen, dtype=torch.bool, device=input_ids.device)

    def held_by(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = "\n" in _decoded(self._tokenizer, [token])
        return self._known[token]


@contextlib.contextmanager
def _set_aside(model: PreTrainedModel, greedy: GenerationConfig) -> Iterator[None]:
    """Put the model in evaluation mode with its own generation settings out of reach."""
    # transformers fills whatever a config leaves open from the model's own. A wrapper (of adapters,
    # say) and the model within may each hold one.
    configured = [
        (module, module.generation_config)
        for module in model.modules()
        if "generation_config" in vars(module)
    ]
    for module, _ in configured:
        module.generation_config = greedy
    try:
        with evaluating(model):
            yield
    finally:
        for module, config in configured:
            module.generation_config = config


def _check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, longest: float) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise DataError(
                f"prompt {number} holds the token id {wrong}, but the model knows 0 to "
                f"{vocabulary - 1}; use the tokenizer that belongs to the model"
            )
        if len(prompt) > longest:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, but the model has room for "
                f"{max(int(longest), 0)} before the answer; shorten it or lower max_new_tokens"
            )


def _positions(model: PreTrainedModel) -> float:
    held = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return float("inf") if held is None else int(held)


def _end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> set[int]:
    ends = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends.update(configured if isinstance(configured, list | tuple) else [configured])
    return {int(token) for token in ends if token is not None and token < vocabulary}


def _padding_token(tokenizer: PreTrainedTokenizerBase, ends: set[int], vocabulary: int) -> int:
    # Masked and cut off again, so that any id the model knows would do.
    padding = tokenizer.pad_token_id
    return padding if padding is not None and padding < vocabulary else min(ends, default=0)


def _left_padded(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _text(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: set[int], stop_at_newline: bool
) -> Generated:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    text = _decoded(tokenizer, tokens[:end])
    line, newline, _ = text.partition("\n")
    stopped = stop_at_newline and bool(newline)
    return Generated((line if stopped else text).strip(), end is not None or stopped)


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
