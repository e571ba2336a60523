"""Encoded examples of rows that are read a block at a time, as often as training needs them."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.utils.data import IterableDataset, get_worker_info

from ctkd.distill.data.encoding import EncodedExample
from ctkd.errors import DataError

__all__ = ["BLOCK", "BUFFER", "ExampleStream"]

BLOCK = 256
"""Rows that are read, tokenized and aligned together."""
BUFFER = 1024
"""Examples among which the next one is drawn."""


# torch does not type what it exports as IterableDataset.
class ExampleStream(IterableDataset):  # type: ignore[misc]
    """Examples without an end: where they end they begin again.

    So every batch is whole, and a run that is resumed skips as many of them as it was trained on,
    over all passes. Several processes read the same ones, of which `accelerate` gives each its own.

    Args:
        blocks: Encodes all rows once, a block at a time. Called with the number of the pass, from
            0.
        seed: To shuffle them with, in another order in each pass; None to leave them as they are.

    Raises:
        DataError: While it is read, if there is no example, or as `blocks` does.

    Example:
        >>> letters = ExampleStream(lambda number: ["ab", "c"])
        >>> list(itertools.islice(letters, 5))
        ['a', 'b', 'c', 'a', 'b']
    """

    def __init__(
        self,
        blocks: Callable[[int], Iterable[Sequence[EncodedExample]]],
        *,
        seed: int | None = None,
    ) -> None:
        self._blocks, self._seed = blocks, seed

    def __iter__(self) -> Iterator[EncodedExample]:
        for number in itertools.count():
            examples: Iterator[EncodedExample]
            examples = itertools.chain.from_iterable(self._blocks(number))
            if self._seed is not None:
                examples = _shuffled(examples, random.Random(f"{self._seed} {number}"))
            first = next(examples, None)
            if first is None:
                # datasets gives nothing to a worker for which there is no file.
                if get_worker_info() is not None:
                    return
                raise DataError(
                    "no row is left to train on: the data have none, all of theirs were left out, "
                    "or they can be read only once and max_steps asks for more of them"
                )
            yield first
            yield from examples


def _shuffled(examples: Iterable[EncodedExample], draw: random.Random) -> Iterator[EncodedExample]:
    """The same examples, each drawn from a buffer of those that were read but not drawn yet."""
    buffer: list[EncodedExample] = []
    for example in examples:
        if len(buffer) < BUFFER:
            buffer.append(example)
            continue
        place = draw.randrange(BUFFER)
        yield buffer[place]
        buffer[place] = example
    draw.shuffle(buffer)
    yield from buffer
