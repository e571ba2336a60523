"""The command ``ctkd doctor``."""

from __future__ import annotations

import json
from typing import Any

import click

from ctkd.cli.options import given, options_of, quieten, say, show
from ctkd.distill.config import DoctorRequest
from ctkd.tokenization.thresholds import Thresholds

__all__ = ["doctor"]

_EXAMPLES = """
\b
Examples:
  ctkd doctor
  ctkd doctor --student my-model --teacher gemma-3-270m --data rows.jsonl
  ctkd doctor --student a/folder --teacher model.gguf --json
"""


@click.command(epilog=_EXAMPLES)
@options_of(DoctorRequest)
@options_of(Thresholds)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
def doctor(as_json: bool, **options: Any) -> None:
    """Examine two tokenizers before any training: exit code 1 if the pair is unsound.

    No weights are loaded.
    """
    quieten()
    from ctkd.cli.doctor_page import doctor_page
    from ctkd.distill.evaluation.doctor import run_doctor

    thresholds = Thresholds(**given(options, Thresholds))
    request = DoctorRequest(thresholds=thresholds, **given(options, DoctorRequest))
    report = run_doctor(request, say=say)
    show(json.dumps(report.as_dict(), indent=2) if as_json else doctor_page(report))
    if not report.sound:
        raise click.exceptions.Exit(1)
