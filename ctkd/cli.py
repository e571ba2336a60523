"""The command line: train, compare, cache, evaluate, losses, doctor."""

from __future__ import annotations

import errno
import os
from typing import Any

import click

from ctkd import __version__
from ctkd.cli_cache import cache
from ctkd.cli_compare import compare
from ctkd.cli_options import (
    data_options,
    model_options,
    named_columns,
    prompt_options,
    quieten,
    say,
    step_options,
)
from ctkd.errors import CtkdError
from ctkd.registry import describe, list_losses

__all__ = ["main"]

TRACEBACK_VARIABLE = "CTKD_TRACEBACK"
_START = """
\b
Start here:
  ctkd train --loss multilevelot      real models and data, some minutes on a laptop
  ctkd compare                        four ways to train on one task, and what they show
  ctkd doctor                         whether two tokenizers suit each other, before training
  ctkd losses                         what there is to distil with
  ctkd train --help                   more examples, and every option
"""
_LOSSES_EXAMPLES = """
\b
Examples:
  ctkd losses
  ctkd losses multilevelot
"""
_TRAIN_EXAMPLES = """
\b
Examples:
  ctkd train --loss multilevelot
  ctkd train --loss uld --kd-weight 1.5 --data rows.jsonl --epochs 3
  ctkd train --loss multilevelot --loss-option k=20 --loss-option matching=greedy
  ctkd train --loss sft --student gemma-3-270m --output runs/teacher
  ctkd train --loss uld --teacher-cache teacher-cache
  ctkd train --loss sft --answers teacher
  ctkd train --config run.yaml --seed 1
"""
_EVALUATE_EXAMPLES = """
\b
Examples:
  ctkd evaluate runs/multilevelot-seed0
  ctkd evaluate runs/sft-seed0 --loss uld --teacher gemma-3-270m
  ctkd evaluate smollm2-135m-instruct --data rows.jsonl --limit 100 --predictions answers.jsonl
  ctkd evaluate --predictions answers.jsonl
"""
_DOCTOR_EXAMPLES = """
\b
Examples:
  ctkd doctor
  ctkd doctor --student my-model --teacher gemma-3-270m --data rows.jsonl
  ctkd doctor --student a/folder --teacher model.gguf --json
"""
# What a stored teacher must hold for a loss.
_TEACHER_NEEDS = {"rows": "whole rows", "top_k": "top k", "observed": "observed tokens"}


class _Group(click.Group):
    """Turns what went wrong into one line with a way out."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except CtkdError as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            raise click.ClickException(_one_line(error)) from error
        except KeyboardInterrupt:
            way_out = "repeat the command"
            if ctx.invoked_subcommand == train.name:
                way_out += " with --resume to go on from the last checkpoint"
            elif ctx.invoked_subcommand == cache.name:
                way_out += " to go on behind the last file"
            raise click.ClickException(f"stopped; {way_out}") from None
        except Exception as error:
            # A reader that closed the pipe, such as `head`, is click's business.
            closed = isinstance(error, OSError) and error.errno == errno.EPIPE
            if closed or os.environ.get(TRACEBACK_VARIABLE):
                raise
            raise click.ClickException(
                f"unexpected {type(error).__name__}: {_one_line(error)} "
                f"(set {TRACEBACK_VARIABLE}=1 to see where)"
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@click.group(cls=_Group, epilog=_START, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ctkd")
def main() -> None:
    """Distil a language model into a smaller one with another tokenizer."""


@main.command(epilog=_TRAIN_EXAMPLES)
@click.option("--loss", help="A loss of `ctkd losses`, or sft. [multilevelot]")
@click.option(
    "--loss-option",
    "loss_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the loss; see `ctkd losses NAME`. Repeatable.",
)
@model_options
@click.option("--teacher-cache", help="Folder of `ctkd cache`, asked in the teacher's place.")
@click.option("--answers", help="Train on those of the data, or on the teacher's own. [data]")
@data_options
@click.option("--eval-data", help="Held-out data. Default: a part of --data, by passage.")
@click.option("--output", help="Folder of the run. [runs/LOSS-seedN]")
@step_options
@prompt_options
@click.option("--kd-weight", type=float, help="Weight of the loss. [the loss's own]")
@click.option("--ce-weight", type=float, help="Weight of cross-entropy. [the loss's own]")
@click.option(
    "--score-eos/--no-score-eos",
    default=None,
    help="Let distillation score the end of sequence, on both sides. [no]",
)
@click.option(
    "--dtype", help="float32, bfloat16 (autocast over float32 weights), bfloat16-pure. [float32]"
)
@click.option("--device", help="auto, cpu or cuda. [auto]")
@click.option("--seed", type=int, help="Of everything random. [0]")
@click.option("--measure", help="all, before and after training; nothing, to only train. [all]")
@click.option("--eval-limit", type=int, help="Most held-out examples used. [200]")
@click.option("--eval-steps", type=int, help="Steps between held-out losses. [only at both ends]")
@click.option("--max-new-tokens", type=int, help="Longest generated answer. [32]")
@click.option("--logging-steps", type=int, help="Steps between lines of the log. [5]")
@click.option("--save-steps", type=int, help="Steps between checkpoints. [200]")
@click.option(
    "--keep-checkpoints/--no-keep-checkpoints",
    default=None,
    help="Keep the last checkpoint of a finished run. [no]",
)
@click.option("--report-to", help="Tracker, as transformers names it. [none]")
@click.option("--config", "config_file", metavar="FILE.yaml", help="Settings; options override it.")
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
def train(
    config_file: str | None,
    resume: bool,
    overwrite: bool,
    loss_options: tuple[str, ...],
    columns: tuple[str, ...],
    **options: Any,
) -> None:
    """Distil a teacher into a student, and measure both before and after."""
    quieten()
    from ctkd.distill.config import TrainConfig, parse_loss_option, read_config_file
    from ctkd.distill.summary import summarize
    from ctkd.distill.training import train as run

    settings = {} if config_file is None else read_config_file(config_file)
    if options["epochs"] is not None:
        # Steps go before epochs, but an option goes before the file.
        settings.pop("max_steps", None)
    settings.update({name: value for name, value in options.items() if value is not None})
    _merge(settings, "loss_options", dict(parse_loss_option(option) for option in loss_options))
    _merge(settings, "columns", named_columns(columns))
    config = TrainConfig.from_mapping(settings, source=config_file or "options")
    folder = run(config, resume=resume, overwrite=overwrite, say=say)
    click.echo(summarize(folder))


@main.command(epilog=_EVALUATE_EXAMPLES)
@click.argument("model", required=False)
@data_options
@click.option("--limit", type=int, help="Use the first N examples.")
@click.option(
    "--predictions",
    metavar="FILE",
    help="With MODEL: write its answers there. Without: score the answers in it.",
)
@click.option("--loss", help="Also measure this loss against a teacher.")
@click.option("--loss-option", "loss_options", multiple=True, metavar="KEY=VALUE")
@click.option("--teacher", help="For --loss. [gemma-3-270m]")
@click.option("--template", help="plain, or chat. [as the run in MODEL was trained, else plain]")
@click.option("--teacher-template", help="plain, or chat, for --loss. [plain]")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--max-new-tokens", type=int, default=32, show_default=True)
@click.option("--max-length", type=int, default=1024, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
)
def evaluate(model: str | None, columns: tuple[str, ...], form: str, **options: Any) -> None:
    """Answer held-out prompts with MODEL and score the answers, or score a file of answers."""
    quieten()
    from ctkd.distill.config import parse_loss_option
    from ctkd.distill.evaluate_command import EvaluateRequest, run_evaluation

    request = EvaluateRequest(
        model=model,
        columns=named_columns(columns),
        **{
            **options,
            "loss_options": dict(parse_loss_option(one) for one in options["loss_options"]),
        },
    )
    result = run_evaluation(request, say=say)
    if form == "json":
        import json

        click.echo(json.dumps(result, indent=2))
        return
    from tabulate import tabulate

    rows = [
        [name, str(value) if isinstance(value, int) else f"{value:.4g}"]
        for name, value in result.items()
    ]
    click.echo(
        tabulate(rows, ["measure", "value"], disable_numparse=True, colalign=("left", "right"))
    )


@main.command(epilog=_LOSSES_EXAMPLES)
@click.argument("name", required=False)
def losses(name: str | None) -> None:
    """List the losses, or show all that is known of one."""
    from tabulate import tabulate

    if name is None:
        rows = []
        for each in list_losses():
            facts = describe(each)
            rows.append([each, facts.matches, f"arXiv:{facts.paper.arxiv}", _needs(facts.needs)])
        click.echo(tabulate(rows, headers=["loss", "matches", "paper", "needs"]))
        return
    facts = describe(name)
    click.echo(f"{facts.name}: {facts.matches}")
    click.echo(f"{facts.paper.title}, arXiv:{facts.paper.arxiv}, {facts.paper.equation}")
    click.echo(
        f"unit: {facts.unit}; needs: {_needs(facts.needs)}; teacher: "
        f"{_TEACHER_NEEDS[facts.teacher_needs]}; default weights: "
        f"ce {facts.default_weights.ce:g}, kd {facts.default_weights.kd:g}\n"
    )
    settings = list(facts.settings.items())
    # As --loss-option takes it.
    click.echo(tabulate(settings, headers=["setting", "default"], missingval="null"))
    click.echo(f"\n{facts.doc}")


@main.command(epilog=_DOCTOR_EXAMPLES)
@click.option(
    "--student", help="Packaged name, folder, GGUF file or hub id. [smollm2-135m-instruct]"
)
@click.option("--teacher", help="The same for the teacher. [gemma-3-270m]")
@data_options
@click.option("--limit", type=int, help="Use the first N rows. [200]")
@click.option(
    "--min-coverage",
    type=float,
    help="Unsound if less of the answers' bytes is spelled alike on both sides. [0.95]",
)
@click.option(
    "--min-one-to-one",
    type=float,
    help="Unsound if fewer of the chunks are one token on both sides. [0.05]",
)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
def doctor(columns: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Examine two tokenizers before any training: exit code 1 if the pair is unsound.

    No weights are loaded.
    """
    quieten()
    from ctkd.distill.doctor_command import DoctorRequest, run_doctor
    from ctkd.tokenization.doctor import Thresholds

    given = {name: value for name, value in options.items() if value is not None}
    limits = {name: given.pop(name) for name in ("min_coverage", "min_one_to_one") if name in given}
    request = DoctorRequest(
        columns=named_columns(columns), thresholds=Thresholds(**limits), **given
    )
    report = run_doctor(request, say=say)
    if as_json:
        import json

        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        click.echo(report.page())
    if not report.sound:
        raise click.exceptions.Exit(1)


def _needs(needs: frozenset[str]) -> str:
    return ", ".join(sorted(needs)) or "logits"


def _merge(settings: dict[str, Any], name: str, given: dict[str, Any]) -> None:
    """Let options override single entries of a mapping in the file."""
    there = settings.get(name)
    if given and (there is None or isinstance(there, dict)):
        settings[name] = {**(there or {}), **given}


main.add_command(cache)
main.add_command(compare)
