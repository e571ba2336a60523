"""The command ``ctkd compare``."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import click

from ctkd.cli.options import config_option, options_of, quieten, read_settings, say, show
from ctkd.compare.plan.config import NOT_SHARED, SAVE_STEPS, CompareConfig
from ctkd.distill.config import TrainConfig

__all__ = ["compare"]

_EXAMPLES = """
\b
Examples:
  ctkd compare
  ctkd compare --losses sft,seqkd,uld,mined --seeds 3 --student smollm2-135m-instruct \\
      --teacher gemma-3-270m --data rows.jsonl
  ctkd compare --losses sft,uld:kd_weight=0.15,uld:kd_weight=1.5
  ctkd compare --losses sft,strong=uld:kd_weight=1.5:top_k=64 --teacher-cache teacher-cache
  ctkd compare --losses sft,uld --sweep sft.learning_rate=1e-3,2e-3 --sweep uld.kd_weight=0.15,1.5
  ctkd compare --config compare.yaml --format json
"""
# Settings of a method, or of one run's folder, besides those that a comparison sets.
_NOT_OPTIONS = {*NOT_SHARED, "ce_weight", "score_eos", "keep_checkpoints", "report_to"}
_SHARED = [one.name for one in fields(TrainConfig) if one.name not in _NOT_OPTIONS]
_HELP = {
    "eval_data": "The test split. Default: a part of --data, by passage.",
    "eval_limit": "Most examples of a split that are measured.",
    "seed": "The first of the seeds.",
    "save_steps": "Steps between checkpoints: the most that a run repeats after a kill.",
}


@click.command(epilog=_EXAMPLES)
@options_of(CompareConfig)
@options_of(TrainConfig, _SHARED, help=_HELP, defaults={"save_steps": SAVE_STEPS})
@config_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="Form of the output; markdown is the whole report.",
)
def compare(config_file: str | None, form: str, **options: Any) -> None:
    """Train one student with several losses on equal terms, and report how they did.

    Stopped at any moment, the same command goes on where it was; losses and seeds may be added.
    Without --data, --max-steps and --epochs it is a demonstration of at most 124 steps.
    """
    quieten()
    from ctkd.compare.report.report import as_json, terminal
    from ctkd.compare.run.runner import compare as run

    settings = read_settings(config_file, options, CompareConfig, TrainConfig)
    outcome = run(CompareConfig.from_mapping(settings, source=config_file or "options"), say=say)
    path = outcome.report_path
    if form == "json":
        content = as_json(outcome.comparison, outcome.analysis)
        show(json.dumps({**content, "report": str(path)}, indent=2, ensure_ascii=False))
    elif form == "markdown":
        show(path.with_suffix(".md").read_text(encoding="utf-8"))
        say(f"report: {path}")
    else:
        show(terminal(outcome.comparison, outcome.analysis))
        show(f"\nreport: {path}")
