"""The command ``ctkd losses``: the losses, and all that is known of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ctkd.cli.options import show
from ctkd.cli.plain_text import plain_text
from ctkd.errors import CtkdError

if TYPE_CHECKING:
    from ctkd.loss import Measured

__all__ = ["losses"]

_EXAMPLES = """
\b
Examples:
  ctkd losses
  ctkd losses multilevelot
"""
_GAP = """
Of the gap: what a loss closed of that between fine-tuning alone and the teacher, where a small
Llama of random weights learned stories, at the best of several weights (ctkd losses NAME); nothing
seen: no more than seeds differ. With other models it may be otherwise: try ctkd compare."""
# Contents of a teacher cache that a loss needs.
_TEACHER_NEEDS = {"rows": "whole rows", "top_k": "top k", "observed": "observed tokens"}


@click.command(epilog=_EXAMPLES)
@click.argument("name", required=False)
def losses(name: str | None) -> None:
    """List the losses, or show all that is known of one."""
    from tabulate import tabulate

    from ctkd.registry import describe, list_losses

    if name is None:
        rows = []
        for each in list_losses():
            try:
                facts = describe(each)
            except CtkdError as error:
                # One that is broken does not hide the others.
                show(f"warning: {error}", err=True)
                rows.append([each, "cannot be loaded", "", "", ""])
                continue
            paper, needs = f"arXiv:{facts.paper.arxiv}", _needs(facts.needs)
            rows.append([each, facts.matches, paper, needs, _share(facts.measured)])
        show(tabulate(rows, headers=["loss", "matches", "paper", "needs", "of the gap"]))
        show(_GAP)
        return
    facts = describe(name)
    show(f"{facts.name}: {facts.matches}")
    show(f"{facts.paper.title}, arXiv:{facts.paper.arxiv}, {facts.paper.equation}")
    show(
        f"unit: {facts.unit}; needs: {_needs(facts.needs)}; teacher: "
        f"{_TEACHER_NEEDS[facts.teacher_needs]}; default weights: "
        f"ce {facts.default_weights.ce:g}, kd {facts.default_weights.kd:g}"
    )
    if (found := facts.measured) is not None:
        default = facts.default_weights.kd
        apart = f"; at {default:g} {found.at_default:+.4f} on development texts, with one seed"
        show(
            f"where all were compared: {found.difference:+.4f} bits per byte to fine-tuning alone, "
            f"95 % from {found.low:+.4f} to {found.high:+.4f}, beside ce 1 at kd {found.kd:g}, the "
            f"best of several weights{'' if found.kd == default else apart}"
        )
    show("")
    settings = list(facts.settings.items())
    # As --loss-option takes it.
    show(tabulate(settings, headers=["setting", "default"], missingval="null"))
    show(f"\n{plain_text(facts.doc)}")


def _share(found: Measured | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.share:.1f} %" if found.helped else "nothing seen"


def _needs(needs: frozenset[str]) -> str:
    return ", ".join(sorted(needs)) or "logits"
