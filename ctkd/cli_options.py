"""Options that several commands share, and how they become settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ctkd.errors import SettingError

__all__ = [
    "data_options",
    "model_options",
    "named_columns",
    "options",
    "prompt_options",
    "quieten",
    "say",
    "step_options",
]


def options(*some: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Put several options on a command, in this order."""

    def add(function: Any) -> Any:
        for option in reversed(some):
            function = option(function)
        return function

    return add


model_options = options(
    click.option("--teacher", help="Packaged name, folder, GGUF file or hub id. [gemma-3-270m]"),
    click.option("--student", help="The same for the student. [smollm2-135m-instruct]"),
)

data_options = options(
    click.option("--data", help="pocketqa, a file, a folder or a hub id. [pocketqa]"),
    click.option("--task", help="qa, summarization or text. [qa]"),
    click.option(
        "--column",
        "columns",
        multiple=True,
        metavar="FIELD=COLUMN",
        help="Name of a field's column in the data, such as context=passage. Repeatable.",
    ),
)

prompt_options = options(
    click.option("--max-length", type=int, help="Longest prompt and answer, in tokens. [1024]"),
    click.option(
        "--on-long", help="Longer training rows: drop, cut (on both sides), refuse. [drop]"
    ),
    click.option(
        "--min-coverage",
        type=float,
        help="Least share of the answers' bytes that both tokenizers must spell alike. [0.95]",
    ),
    click.option("--student-template", help="The student's prompts: plain, or chat. [plain]"),
    click.option("--teacher-template", help="The same for the teacher. [plain]"),
    click.option("--teacher-shots", type=int, help="Examples the teacher reads first. [0]"),
)

step_options = options(
    click.option("--max-steps", type=int, help="Optimizer steps; goes before --epochs."),
    click.option("--epochs", type=float, help="Passes over the data. [1]"),
    click.option("--batch-size", type=int, help="Sequences per micro-batch. [4]"),
    click.option("--grad-accumulation", type=int, help="Micro-batches per step. [1]"),
    click.option("--learning-rate", type=float, help="Peak rate; the paper's is 1e-6. [5e-5]"),
    click.option("--warmup", type=float, help="Share of the steps with a rising rate. [0.1]"),
    click.option("--weight-decay", type=float, help="Of AdamW. [0]"),
)


def say(line: str) -> None:
    """Print a line of progress where it does not mix with results."""
    click.echo(line, err=True)


def named_columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """Read what ``--column`` was given."""
    found = {}
    for pair in pairs:
        field, separator, column = pair.partition("=")
        if not separator or not field or not column:
            raise SettingError(f"a column is FIELD=COLUMN, such as context=passage, got {pair!r}")
        found[field] = column
    return found


def quieten() -> None:
    """Leave the terminal to our own lines: libraries speak up only about errors."""
    import os
    import sys

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
