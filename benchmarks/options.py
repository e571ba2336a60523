"""Options that the commands of this folder share."""

from pathlib import Path

import click
import torch

from benchmarks.measuring import RESULTS


def _set_threads(_: click.Context, __: click.Parameter, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _make(_: click.Context, __: click.Parameter, folder: Path) -> Path:
    # Before anything is measured: what cannot be kept would be lost.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(
            f"the folder {folder} cannot be made ({error.strerror}); give one that can be written"
        ) from error
    return folder


threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    callback=_set_threads,
    expose_value=False,
    help="[torch's choice]",
)
note_option = click.option(
    "--note", default="", help="What to write into the result, such as the load."
)
results_option = click.option(
    "--results",
    default=RESULTS,
    show_default="benchmarks/results",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_make,
    help="Folder of the rows and the pictures.",
)
