"""The group of all commands."""

from __future__ import annotations

import _thread
import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ctkd import __version__
from ctkd.cli.cache import cache
from ctkd.cli.compare import compare
from ctkd.cli.doctor import doctor
from ctkd.cli.evaluate import evaluate
from ctkd.cli.losses import losses
from ctkd.cli.options import writable
from ctkd.cli.train import train
from ctkd.distill import processes
from ctkd.distill.options import closest, own_name
from ctkd.errors import CtkdError

__all__ = ["main"]

TRACEBACK_VARIABLE = "CTKD_TRACEBACK"
_LONGEST = 1_000
_START = """
\b
Start here:
  ctkd train                          a small model learns from SmolLM2, in some minutes
  ctkd compare                        four ways to train on one task, and what they show
  ctkd doctor                         whether two tokenizers suit each other, before training
  ctkd losses                         what there is to distil with
  ctkd train --help                   more examples, and every option
"""

# In the words of the system, and of libraries that do not say which error of the system it was.
_SIGNS_OF_A_FULL_DISK = ("No space left", "iostream error")


class _Group(click.Group):
    """A group of commands whose errors are one line with a way out."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _interrupts_come_again():
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            if error.ctx is None:
                raise
            known = [name for one in error.ctx.command.params for name in one.opts]
            close = closest(error.option_name, [*known, "--help"])
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise click.UsageError(
                f"No such option {error.option_name!r}.{hint}", error.ctx
            ) from error
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
            if any(word in f"{error}" for word in _SIGNS_OF_A_FULL_DISK):
                raise click.ClickException(
                    f"no space is left on a disk ({_one_line(error)}); make room and repeat the "
                    "command, what is finished is kept"
                ) from error
            raise click.ClickException(
                f"unexpected {type(error).__name__}: {_one_line(error)} "
                f"(set {TRACEBACK_VARIABLE}=1 to see where)"
            ) from error


@contextmanager
def _interrupts_come_again() -> Iterator[None]:
    """Interrupt once more if Python dropped an interrupt because an object was being deleted."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.1, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _one_line(error: BaseException) -> str:
    text = writable(" ".join(str(error).split()), err=True)
    if not processes.is_first():
        text = f"process {processes.number()}: {text}"
    # What was given may be quoted in it, and be of any length.
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _own_flag(word: str) -> str:
    """A flag of ours for one with underscores, or as other tools call it."""
    return own_name(word).replace("_", "-")


_CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": _own_flag}


@click.group(cls=_Group, epilog=_START, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ctkd")
@click.pass_context
def main(context: click.Context) -> None:
    """Distill a language model into a smaller one with another tokenizer."""
    command = context.invoked_subcommand
    if processes.count() > 1 and command != train.name:
        raise click.UsageError(
            f"ctkd {command} works in one process, and WORLD_SIZE says {processes.count()}; start "
            "it without torchrun or accelerate, or unset WORLD_SIZE"
        )


for command in (train, evaluate, losses, doctor, cache, compare):
    main.add_command(command)
