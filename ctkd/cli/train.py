"""The command ``ctkd train``."""

from __future__ import annotations

from typing import Any

import click

from ctkd.cli.options import config_option, options_of, quieten, read_settings, say, show
from ctkd.distill.config import TrainConfig

__all__ = ["train"]

_EXAMPLES = """
\b
Examples:
  ctkd train
  ctkd train --loss multilevelot --loss-option k=20 --loss-option matching=greedy
  ctkd train --loss sft --student gemma-3-270m --data rows.jsonl --output runs/teacher
  ctkd train --loss uld --kd-weight 1.5 --student my-model --teacher runs/teacher --data rows.jsonl
  ctkd train --loss uld --teacher-cache teacher-cache
  ctkd train --loss sft --answers teacher --student my-model --data rows.jsonl
  ctkd train --config run.yaml --seed 1
  torchrun --nproc_per_node 2 -m ctkd train --config run.yaml
  ctkd train --config run.yaml --dry-run
"""


@click.command(epilog=_EXAMPLES)
@options_of(TrainConfig)
@config_option
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@click.option(
    "--dry-run",
    "only_said",
    is_flag=True,
    help="Check everything, try two batches, and say what the run would be and cost.",
)
@click.option("--use-peft", is_flag=True, hidden=True)
def train(
    config_file: str | None,
    resume: bool,
    overwrite: bool,
    only_said: bool,
    use_peft: bool,
    **options: Any,
) -> None:
    """Distill a teacher into a student, and measure both before and after."""
    quieten()
    from ctkd.distill.processes import is_first
    from ctkd.distill.training.measuring import summarize
    from ctkd.distill.training.run import dry_run
    from ctkd.distill.training.run import train as run

    settings = read_settings(config_file, options, TrainConfig)
    if settings.pop("use_peft", False) or use_peft:
        # As TRL says it, with its rank.
        settings.setdefault("lora_rank", 16)
    config = TrainConfig.from_mapping(settings, source=config_file or "options")
    if only_said:
        show(dry_run(config, resume=resume, overwrite=overwrite, say=say))
        return
    folder = run(config, resume=resume, overwrite=overwrite, say=say)
    if is_first():
        show(summarize(folder))
