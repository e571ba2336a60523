"""Data that are read while they are trained on, in blocks, for corpora of any size.

Each block goes the way that all rows go at once without streaming, so that a row becomes the same
batch. What is asked of data as a whole, coverage and shots, is asked of the first block.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ctkd.distill.config import TrainConfig
from ctkd.distill.data.encoding import EncodedExample
from ctkd.distill.data.example_stream import BLOCK, BUFFER, ExampleStream
from ctkd.distill.data.layouts import brought
from ctkd.distill.data.rows import NothingLeft, names_of, paths_of, stream_parts
from ctkd.distill.data.tasks import Example, examples, get_task
from ctkd.distill.preparing import Forms, Models, encode, read_held_out
from ctkd.distill.printable import say_nothing
from ctkd.errors import DataError

__all__ = ["StreamedData", "Tally"]

_END = 1 << 20


@dataclass(slots=True)
class Tally:
    """What became of the rows that were read, over all passes.

    Attributes:
        rows: How many rows were read.
        examples: What they made, without what is held out: several of a document.
        kept: Those that were encoded, and may be trained on.
        cut: Those among them that were cut.
        text_bytes: Of their answers, before any was left out or cut.
        covered_bytes: How many of these bytes both tokenizers spell alike.

    Example:
        >>> Tally(rows=512, examples=500, kept=498, cut=3, text_bytes=9, covered_bytes=9).report()
        '512 rows read, 498 of 500 examples taken, 3 cut, 100.0 % of their bytes spelled alike'
    """

    rows: int = 0
    examples: int = 0
    kept: int = 0
    cut: int = 0
    text_bytes: int = 0
    covered_bytes: int = 0

    def report(self) -> str:
        """Say it in one line."""
        share = self.covered_bytes / max(self.text_bytes, 1)
        return (
            f"{self.rows:,} rows read, {self.kept:,} of {self.examples:,} examples taken, "
            f"{self.cut:,} cut, {100 * share:.1f} % of their bytes spelled alike"
        )


class StreamedData:
    """The rows that a run streams, of which the first are held out unless there are data for that.

    Whatever is about the same passage as a held-out row is not trained on, wherever it is.

    Args:
        config: The settings.
        say: Prints one line of progress.

    Attributes:
        held_out: The held-out examples.
        first: Training examples of the first block that has some.
        tally: What was read since training began.

    Raises:
        DataError: If the data cannot be streamed, or there is nothing to train on.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._parts = stream_parts(config.data)
        self._held_out_groups: set[str] = set()
        self.tally = Tally()
        held_out = read_held_out(config, say)
        if held_out is None:
            held_out = self._first_examples(config.eval_limit)
            self._held_out_groups = {one.group for one in held_out}
            say(f"no evaluation data given: the first {len(held_out)} examples are held out")
        self.held_out = held_out
        first = next(self._blocks(say), None)
        if first is None:
            raise DataError(
                f"{names_of(config.data)} holds nothing but the {len(held_out)} examples that are "
                "held out, and what is about the same; lower eval_limit, or give eval_data"
            )
        self.first: Sequence[Example] = first
        size = get_task(config.task).window
        cut = f"; documents are cut into pieces of up to {size} bytes" if size else ""
        say(
            f"training examples are streamed, {len(self.held_out)} held out{cut}; what is said of "
            f"those to train on is of the first {BLOCK} rows, and the first step waits until "
            f"{BUFFER:,} are read to draw from"
        )

    def encoded(self, config: TrainConfig, models: Models, forms: Forms) -> ExampleStream:
        """The training examples, encoded while they are read.

        Args:
            config: The settings, with the student that was made if one was.
            models: Whose tokenizers.
            forms: The prompt form of each side.
        """
        # A block of few rows may lie below what the first one was checked for.
        config = replace(config, min_coverage=0.0)

        def blocks(number: int) -> Iterator[list[EncodedExample]]:
            if number == 0:
                self.tally = Tally()
            tally = self.tally
            for block in self._blocks(say_nothing, tally):
                tally.examples += len(block)
                try:
                    found = encode(config, models, block, forms, "training", say_nothing)
                except NothingLeft:
                    continue
                tally.kept += len(found)
                tally.cut += len(found.cut)
                tally.text_bytes += found.coverage.text_bytes
                tally.covered_bytes += found.coverage.covered_bytes
                yield found.rows

        return ExampleStream(blocks, seed=config.seed)

    def fingerprint(self) -> str:
        """SHA-256 of the sizes and both ends of all files, as corpora are too long to read twice.

        An edit between the first and the last MiB that leaves a file's size goes unnoticed.
        """
        digest = hashlib.sha256()
        for place in paths_of(self._config.data):
            # What `datasets` computes it keeps beside the rows.
            inside = (one for one in place.rglob("*") if one.is_file() and "cache-" not in one.name)
            for path in sorted(inside) if place.is_dir() else [place]:
                with path.open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    ends = []
                    for start in (0, max(size - _END, 0)):
                        file.seek(start)
                        ends.append(hashlib.sha256(file.read(_END)).hexdigest())
                digest.update(f"{path.name} {size} {ends}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _first_examples(self, count: int) -> list[Example]:
        found: list[Example] = []
        for block in self._blocks(say_nothing):
            found += block
            if len(found) >= count:
                break
        return found[:count]

    def _blocks(
        self, say: Callable[[str], None], tally: Tally | None = None
    ) -> Iterator[list[Example]]:
        """Training examples of all rows, a block at a time, called by file and row.

        Layouts are said for the first block alone.
        """
        task, columns = get_task(self._config.task), self._config.columns
        reason: NothingLeft | None = None
        empty = True
        for rows in itertools.chain.from_iterable(part.blocks(BLOCK) for part in self._parts):
            if tally is not None:
                tally.rows += len(rows)
            try:
                found = examples(brought(rows, task, columns, say), task, columns)
            except NothingLeft as error:
                reason = error
                continue
            empty, say = False, say_nothing
            block = [one for one in found if one.group not in self._held_out_groups]
            if block:
                yield [replace(one, id=one.where) for one in block]
        if empty:
            raise reason or DataError(
                f"{names_of(self._config.data)} has no rows; expected at least one"
            )
