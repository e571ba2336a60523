"""The command ``ctkd losses``: the losses, and all that is known of one."""

from __future__ import annotations

import click

from ctkd.cli.options import show
from ctkd.cli.plain_text import plain_text
from ctkd.errors import CtkdError

__all__ = ["losses"]

_EXAMPLES = """
\b
Examples:
  ctkd losses
  ctkd losses multilevelot
"""
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
                rows.append([each, "cannot be loaded", "", ""])
                continue
            rows.append([each, facts.matches, f"arXiv:{facts.paper.arxiv}", _needs(facts.needs)])
        show(tabulate(rows, headers=["loss", "matches", "paper", "needs"]))
        return
    facts = describe(name)
    show(f"{facts.name}: {facts.matches}")
    show(f"{facts.paper.title}, arXiv:{facts.paper.arxiv}, {facts.paper.equation}")
    show(
        f"unit: {facts.unit}; needs: {_needs(facts.needs)}; teacher: "
        f"{_TEACHER_NEEDS[facts.teacher_needs]}; default weights: "
        f"ce {facts.default_weights.ce:g}, kd {facts.default_weights.kd:g}\n"
    )
    settings = list(facts.settings.items())
    # As --loss-option takes it.
    show(tabulate(settings, headers=["setting", "default"], missingval="null"))
    show(f"\n{plain_text(facts.doc)}")


def _needs(needs: frozenset[str]) -> str:
    return ", ".join(sorted(needs)) or "logits"
