"""The command ``ctkd evaluate``."""

from __future__ import annotations

import json
import math
from typing import Any

import click
from tabulate import tabulate

from ctkd.cli.options import given, options_of, quieten, say, show
from ctkd.distill.config import EvaluateRequest

__all__ = ["evaluate"]

_EXAMPLES = """
\b
Examples:
  ctkd evaluate runs/multilevelot-seed0
  ctkd evaluate runs/sft-seed0 --loss uld --teacher gemma-3-270m
  ctkd evaluate smollm2-135m-instruct --data rows.jsonl --limit 100 --output answers.jsonl
  ctkd evaluate --predictions answers.jsonl
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model", required=False)
@options_of(EvaluateRequest)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
)
@click.option("--overwrite", is_flag=True, help="Replace the file of --output.")
def evaluate(model: str | None, form: str, overwrite: bool, **options: Any) -> None:
    """Answer held-out prompts with MODEL and score the answers, or score a file of answers."""
    quieten()
    from ctkd.distill.evaluation.evaluate import run_evaluation

    request = EvaluateRequest(model=model, **given(options, EvaluateRequest))
    result = run_evaluation(request, overwrite=overwrite, say=say)
    if form == "json":
        # JSON has no word for what is no number.
        finite = {name: one if math.isfinite(one) else None for name, one in result.items()}
        show(json.dumps(finite, indent=2))
        return
    rows = [
        [name, str(value) if isinstance(value, int) else f"{value:.4g}"]
        for name, value in result.items()
    ]
    show(tabulate(rows, ["measure", "value"], disable_numparse=True, colalign=("left", "right")))
