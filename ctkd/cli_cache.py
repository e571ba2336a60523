"""The command that stores what a teacher says of a data set."""

from __future__ import annotations

from typing import Any

import click

from ctkd.cli_options import (
    data_options,
    model_options,
    named_columns,
    prompt_options,
    quieten,
    say,
)

__all__ = ["cache"]

_EXAMPLES = """
\b
Examples:
  ctkd cache --output teacher-cache
  ctkd cache --teacher runs/teacher --data rows.jsonl --k 512 --output teacher-cache
  ctkd train --loss multilevelot --teacher-cache teacher-cache
  ctkd cache --texts all --output teacher-cache    for ctkd train --answers teacher
"""


@click.command(epilog=_EXAMPLES)
@model_options
@data_options
@click.option("--eval-data", help="Held-out data. Default: a part of --data, by passage.")
@click.option("--output", required=True, help="Folder of the cache.")
@click.option(
    "--k",
    type=int,
    default=256,
    show_default=True,
    help="Largest logits kept per position; 0 keeps those of observed tokens alone.",
)
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    help="At which a loss may ask. Repeatable. [1 and 2]",
)
@click.option(
    "--texts",
    type=click.Choice(["none", "held-out", "all"]),
    default="held-out",
    show_default=True,
    help="Prompts that the teacher also answers; all, for --answers teacher.",
)
@click.option("--answers", help="Rows' answers: those of the data, or the teacher's own. [data]")
@prompt_options
@click.option("--batch-size", type=int, help="Rows asked about together. [4]")
@click.option("--shard-rows", type=int, default=64, show_default=True, help="Rows per file.")
@click.option("--dtype", help="float32 or bfloat16, of the teacher. [float32]")
@click.option("--device", help="auto, cpu or cuda. [auto]")
@click.option("--seed", type=int, help="Of the held-out part and the shots. [0]")
@click.option("--eval-limit", type=int, help="Most held-out examples. [200]")
@click.option("--max-new-tokens", type=int, help="Longest generated answer. [32]")
def cache(
    output: str,
    k: int,
    temperatures: tuple[float, ...],
    texts: Any,
    shard_rows: int,
    columns: tuple[str, ...],
    **settings: Any,
) -> None:
    """Ask the teacher once about every row, and keep its answers for training without it.

    Stopped at any moment, the same command goes on where it was.
    """
    quieten()
    from pathlib import Path

    from ctkd.distill.cache_writing import DEFAULT_TEMPERATURES, write_cache
    from ctkd.distill.config import TrainConfig

    given = {name: value for name, value in settings.items() if value is not None}
    config = TrainConfig.from_mapping({**given, "columns": named_columns(columns)})
    found = write_cache(
        config,
        Path(output).expanduser(),
        k=k,
        temperatures=temperatures or DEFAULT_TEMPERATURES,
        texts=texts,
        shard_rows=shard_rows,
        say=say,
    )
    size = sum(path.stat().st_size for path in found.path.iterdir()) / 2**20
    told = ", ".join(f"{one:g}" for one in found.temperatures)
    click.echo(
        f"{found.path}: {len(found)} rows, top {found.k} of {found.vocab_size}, temperatures "
        f"{told}, {len(found.texts)} texts, {size:.1f} MiB"
    )
