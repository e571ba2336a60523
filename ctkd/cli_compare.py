"""The command that compares several losses on equal terms."""

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
    step_options,
)

__all__ = ["compare"]

_EXAMPLES = """
\b
Examples:
  ctkd compare
  ctkd compare --losses sft,seqkd,uld,mined,multilevelot --seeds 3 --data rows.jsonl
  ctkd compare --losses sft,uld:kd_weight=0.15,uld:kd_weight=1.5
  ctkd compare --losses sft,strong=uld:kd_weight=1.5:top_k=64 --teacher-cache teacher-cache
  ctkd compare --losses sft,uld --sweep sft.learning_rate=5e-5,1e-4 --sweep uld.kd_weight=0.15,1.5
  ctkd compare --config compare.yaml --format json
"""


@click.command(epilog=_EXAMPLES)
@click.option(
    "--losses",
    metavar="METHOD,METHOD,...",
    help="Each [NAME=]LOSS[:SETTING=VALUE]..., where LOSS is one of `ctkd losses`, sft, or seqkd: "
    "sft on what the teacher writes. [sft,uld,mined,multilevelot]",
)
@click.option("--seeds", type=int, help="Runs of each method. From 2 on methods are tested. [1]")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="METHOD.SETTING=VALUE,VALUE",
    help="Settings to choose from on a development split; SETTING=... for all methods. Each "
    "method needs as many as the others. Repeatable.",
)
@click.option("--baseline", help="Method that the others are compared with. [sft, else the first]")
@click.option("--metric", help="f1, exact_match or rouge_lsum. [f1 for qa, else rouge_lsum]")
@model_options
@data_options
@click.option("--eval-data", help="The test split. Default: a part of --data, by passage.")
@click.option("--dev-data", help="To choose settings on. Default: a part of --data, by passage.")
@click.option("--dev-fraction", type=float, help="How large a part, with --sweep. [0.1]")
@click.option(
    "--teacher-cache", "cache", help="Folder of `ctkd cache`. Default: one is made in the output."
)
@click.option(
    "--live-teacher",
    is_flag=True,
    default=None,
    help="Ask the teacher at every step, for losses that need whole rows of its logits.",
)
@click.option("--top-k", type=int, help="Largest logits that the cache keeps per position. [256]")
@step_options
@prompt_options
@click.option("--eval-limit", type=int, help="Most examples of a split that are answered. [200]")
@click.option("--max-new-tokens", type=int, help="Longest generated answer. [32]")
@click.option(
    "--dtype", help="float32, bfloat16 (autocast over float32 weights), bfloat16-pure. [float32]"
)
@click.option("--device", help="auto, cpu or cuda. [auto]")
@click.option("--seed", type=int, help="The first of the seeds. [0]")
@click.option("--logging-steps", type=int, help="Steps between lines of the log. [5]")
@click.option(
    "--save-steps",
    type=int,
    help="Steps between checkpoints: the most that a run repeats after a kill. [20]",
)
@click.option("--curve-points", type=int, help="Held-out losses while training, at most. [4]")
@click.option(
    "--published",
    multiple=True,
    metavar="FILE",
    help="A published table to show beside the results. Repeatable.",
)
@click.option(
    "--published-task",
    metavar="TASK",
    help="What those tables call this data, such as fairytaleqa. Default: other data than theirs, "
    "so no number of this comparison stands beside.",
)
@click.option("--output", help="Folder of the comparison. [comparison]")
@click.option("--keep-models", is_flag=True, default=None, help="Keep all trained weights.")
@click.option("--config", "config_file", metavar="FILE.yaml", help="Settings; options override it.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="What is printed; markdown is the whole report.",
)
def compare(
    config_file: str | None,
    sweeps: tuple[str, ...],
    columns: tuple[str, ...],
    published: tuple[str, ...],
    form: str,
    **options: Any,
) -> None:
    """Train one student with several losses on equal terms, and report how they did.

    Stopped at any moment, the same command goes on where it was; losses and seeds may be added.
    Without --data, --max-steps and --epochs it is a demonstration of at most 40 steps.
    """
    quieten()
    import json

    from ctkd.distill.compare.config import CompareConfig
    from ctkd.distill.compare.methods import parse_sweep
    from ctkd.distill.compare.report import as_json, terminal
    from ctkd.distill.compare.runner import compare as run
    from ctkd.distill.config import read_config_file

    settings = {} if config_file is None else read_config_file(config_file)
    if options["epochs"] is not None:
        # Steps go before epochs, but an option goes before the file.
        settings.pop("max_steps", None)
    settings.update({name: value for name, value in options.items() if value is not None})
    if published:
        settings["published"] = published
    for name, given in (
        ("sweep", dict(parse_sweep(one) for one in sweeps)),
        ("columns", named_columns(columns)),
    ):
        there = settings.get(name)
        if given and (there is None or isinstance(there, dict)):
            settings[name] = {**(there or {}), **given}
    outcome = run(CompareConfig.from_mapping(settings, source=config_file or "options"), say=say)
    path = outcome.report_path
    if form == "json":
        found = as_json(outcome.comparison, outcome.analysis)
        click.echo(json.dumps({**found, "report": str(path)}, indent=2, ensure_ascii=False))
    elif form == "markdown":
        click.echo(path.with_suffix(".md").read_text(encoding="utf-8"))
        say(f"report: {path}")
    else:
        click.echo(terminal(outcome.comparison, outcome.analysis))
        click.echo(f"\nreport: {path}")
