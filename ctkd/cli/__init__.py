"""The command line: one file per command."""

from ctkd.cli.group import main

__all__ = ["main"]
