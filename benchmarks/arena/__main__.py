"""Losses compared where they can be told apart: small students, many seeds, bits per byte.

    python -m benchmarks.arena scratch [FOLDER]
    python -m benchmarks.arena transfer [FOLDER]
    python -m benchmarks.arena few_labels FOLDER
    python -m benchmarks.arena paper FOLDER

``scratch`` trains a Llama of 2 million random weights, with 4,096 byte-level tokens of its own,
towards SmolLM2-135M-Instruct, and tries several weights of every loss on development texts.
``transfer`` gives Gemma 3 270M the vocabulary of SmolLM2, and trains it towards Gemma as it was, so
that what can be recovered is known. Texts are passages of FairytaleQA, whose two parquet files lie
in the folder; without a folder, chapters of Python's reference. ``few_labels`` has 128, 32 and 512
labelled questions of FairytaleQA, and the answers of a teacher to others. ``paper`` has the three
data sets of the MultiLevelOT paper, whole, with labels and without, and needs a GPU.

Every finished run is a row of a file. Stopped at any moment, as by ``--minutes``, the same command
goes on; several processes share the work with ``--share 1/2`` and ``--share 2/2``. ``--report``
trains nothing, and writes what the rows say.
"""

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.arena.few_labels import LABELS, FewLabels
from benchmarks.arena.paper import TASKS, Paper
from benchmarks.arena.report import write_report
from benchmarks.arena.runs import Arena, Method, read_runs, wanted
from benchmarks.arena.scratch import Scratch
from benchmarks.arena.transfer import Transfer
from benchmarks.measuring import append_row, environment
from benchmarks.options import results_option
from ctkd.cache_folder import cache_dir
from ctkd.cli.options import quieten
from ctkd.distill.training.run import Interrupted
from ctkd.errors import CtkdError


class Share(click.ParamType[tuple[int, int]]):
    """A part of the work, such as 1/2."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        number, _, count = str(value).partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(f"{value!r} is no share of the work such as 1/2", param, ctx)
        return int(number), int(count)


Makers = Sequence[Callable[[Path | None, Path], Arena]]
ARENAS: dict[str, Makers] = {
    "scratch": [Scratch],
    "transfer": [Transfer],
    "few_labels": [partial(FewLabels, labels=count) for count in LABELS],
    "paper": [
        partial(Paper, data_set=data_set, labelled=labelled)
        for data_set in TASKS
        for labelled in (True, False)
    ],
}


_ARENAS = """
\b
  scratch     a small Llama of random weights learns passages; all losses, three
              weights and more of each (4 to 8 hours on two cores)
  transfer    Gemma 3 270M with another vocabulary learns from itself (5 hours)
  few_labels  questions of which few keep their label, a teacher answers others
  paper       the three tasks of the MultiLevelOT paper; on a GPU alone
"""


@click.command(epilog=_ARENAS)
@click.argument("name", type=click.Choice(list(ARENAS)))
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--share",
    default="1/1",
    type=Share(),
    show_default=True,
    help="The part of the runs that this process trains.",
)
@click.option("--minutes", type=float, help="Stop after so many. [when all is done]")
@click.option("--report", "only_report", is_flag=True, help="Train nothing.")
@results_option
def main(
    name: str,
    folder: Path | None,
    share: tuple[int, int],
    minutes: float | None,
    only_report: bool,
    results: Path,
) -> None:
    """Compare losses where they can be told apart, in bits per byte over many seeds.

    FOLDER holds fairytaleqa_train.parquet and fairytaleqa_validation.parquet, and for the arena
    paper the same of qed and dialogsum. Without one, scratch and transfer take Python's reference.
    Each finished run is a row in --results, and the same command goes on there.
    """
    if minutes is not None and not 0 <= minutes < math.inf:
        raise click.BadParameter(f"{minutes} is no time to train for", param_hint="--minutes")
    quieten()
    path = results / f"arena_{name}.jsonl"
    try:
        begun = time.monotonic()
        # All of them first, so that what one lacks is said before another has trained for hours.
        for arena in [make(folder, cache_dir() / "arena") for make in ARENAS[name]]:
            report = partial(
                write_report, results, arena, path, name if folder is None else f"{name} FOLDER"
            )
            try:
                if not only_report:
                    with stopped_after(minutes, begun):
                        work_off(arena, path, share)
            except (Interrupted, KeyboardInterrupt):
                report()
                raise
            report()
    except (Interrupted, KeyboardInterrupt):
        click.echo("stopped; the same command goes on")
    except CtkdError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def stopped_after(minutes: float | None, begun: float) -> Iterator[None]:
    """Stop as Ctrl-C does when the time since the beginning is up: a run keeps what it has done."""
    if minutes is None:
        yield
        return
    left = 60 * minutes - (time.monotonic() - begun)
    if left <= 0:
        raise KeyboardInterrupt
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As shells start what runs in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work_off(arena: Arena, path: Path, share: tuple[int, int]) -> None:
    """Train what is wanted, each process its share, until nothing is left."""

    def keep(row: dict[str, Any]) -> None:
        about = environment("transformers", "tokenizers")
        append_row(path, {**about, "data": arena.data, **row})

    prepared = waited = False
    while True:
        runs, models = read_runs(path, arena.data, arena.plan.methods)
        left = list(wanted(arena.plan, runs))
        if not left:
            return
        if not prepared:
            arena.prepare()
            prepared = True
        unmeasured = [one for one in arena.models if one not in models]
        if unmeasured and share[0] == 1:
            keep(arena.of_model(unmeasured[0]))
            continue
        mine = [one for one in left if _place(one, share[1]) == share[0] - 1]
        if not mine:
            # What is left belongs to others, and what follows may be ours.
            if not waited:
                click.echo(f"waiting for {len(left)} runs of other shares")
            waited = True
            time.sleep(20)
            continue
        waited = False
        method, weight, seed = mine[0]
        click.echo(f"{len(runs)} runs done; {method.label}, weight {weight:g}, seed {seed}")
        keep(arena.run(method, weight, seed))


def _place(run: tuple[Method, float, int], count: int) -> int:
    """The process that a run belongs to."""
    method, weight, seed = run
    key = f"{method.label} {weight:g} {seed}".encode()
    return hashlib.sha256(key).digest()[0] % count


if __name__ == "__main__":
    main()
