"""The command ``ctkd cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ctkd.cli.options import given, options_of, quieten, say, show
from ctkd.distill.config import CacheSettings, TrainConfig

__all__ = ["cache"]

_EXAMPLES = """
\b
Examples:
  ctkd cache --output teacher-cache
  ctkd train --loss multilevelot --teacher-cache teacher-cache
  ctkd cache --student my-model --teacher runs/teacher --data rows.jsonl --k 512 --output rows-cache
  ctkd cache --student my-model --data rows.jsonl --texts all --output with-answers
  ctkd cache --student my-model --data rows.jsonl --states bfloat16 --output for-any-loss
"""
# Settings of a run on which the contents of a cache depend, and those of reading the teacher.
_OF_RUN = (
    "student",
    "student_config",
    "teacher",
    "teacher_load_in_4bit",
    "teacher_load_in_8bit",
    "data",
    "eval_data",
    "task",
    "columns",
    "answers",
    "max_length",
    "on_long",
    "min_coverage",
    "student_template",
    "teacher_template",
    "teacher_shots",
    "batch_size",
    "dtype",
    "device",
    "seed",
    "eval_limit",
    "max_new_tokens",
)
_HELP = {
    "batch_size": "Rows read by the teacher together.",
    "dtype": "float32 or bfloat16, of the teacher.",
    "seed": "Of the held-out part and the shots.",
}


@click.command(epilog=_EXAMPLES)
@options_of(TrainConfig, _OF_RUN, help=_HELP)
@options_of(CacheSettings)
@click.option("--output", required=True, help="Folder of the cache.")
def cache(output: str, **options: Any) -> None:
    """Ask the teacher once about every row, and keep its answers for training without it.

    Stopped at any moment, the same command goes on where it was.
    """
    quieten()
    from ctkd.distill.teachers.cache_writing import write_cache

    written = write_cache(
        TrainConfig(**given(options, TrainConfig)),
        Path(output).expanduser(),
        CacheSettings(**given(options, CacheSettings)),
        say=say,
    )
    size = sum(path.stat().st_size for path in written.path.iterdir()) / 2**20
    kept = written.kept
    if not written.holds_states:
        kept += ", temperatures " + ", ".join(f"{one:g}" for one in written.temperatures)
    show(
        f"{written.path}: {len(written)} rows, {kept}; {len(written.texts)} texts written, "
        f"{size:.1f} MiB"
    )
