"""How the cost of every loss grows with the tokens, and with the vocabulary.

The time per token and column, forward and backward, over that at the smallest size: 1 is linear
growth. All sizes take turns, each from given-back memory as in `benchmarks.loss_speed`.
Cross-entropy is among the lines, because caches end for it as well.

Run with `python -m benchmarks.scaling`.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from benchmarks.loss_inputs import DTYPES, VOCABULARIES, Inputs, Measured, Vocabularies, chosen
from benchmarks.loss_speed import verdict
from benchmarks.measuring import append_row, draw_lines, environment, time_in_turn
from benchmarks.options import note_option, results_option, threads_option
from ctkd.distill.devices import give_back_freed_memory

BAR = 1.10
SEQUENCES = 4
Size = tuple[Vocabularies, int]


def sizes_of(
    tokens: tuple[int, ...], columns: tuple[int, ...], columns_tokens: int
) -> dict[str, dict[int, Size]]:
    """Vocabularies and tokens of every point, by what grows and how far."""
    return {
        "tokens": {count: (VOCABULARIES["narrow"], count) for count in tokens},
        "vocabulary": {
            count: (Vocabularies(str(count), count, count, 0.5), columns_tokens)
            for count in columns
        },
    }


def measure(
    lines: list[Measured], sizes: dict[int, Size], dtype: torch.dtype, repeats: int, what: str
) -> dict[str, dict[int, float]]:
    """Median seconds of every line at every size."""
    inputs = {
        size: Inputs.make(
            vocabularies, sequences=SEQUENCES, tokens=tokens // SEQUENCES, dtype=dtype
        )
        for size, (vocabularies, tokens) in sizes.items()
    }
    functions: dict[str, Callable[[], object]] = {}
    places = {}
    for line in lines:
        for size, one in inputs.items():
            name = f"{line.label}, {size}"
            functions[name], places[name] = line.on(one), (line.label, size)

    def clear() -> None:
        for one in inputs.values():
            one.clear()
        give_back_freed_memory()

    found: dict[str, dict[int, float]] = {line.label: {} for line in lines}
    for name, seconds in time_in_turn(functions, repeats, between=clear, label=what).items():
        label, size = places[name]
        found[label][size] = statistics.median(seconds)
    return found


def growth(seconds: dict[int, float]) -> dict[int, float]:
    """Time per token and column at each size, over that at the first."""
    first = next(iter(seconds))
    return {size: value / seconds[first] * first / size for size, value in seconds.items()}


def table(what: str, growths: dict[str, dict[int, float]]) -> str:
    """One row per line, one column per size, and whether the worst of them is near linear."""
    sizes = list(next(iter(growths.values())))
    rows = [
        [
            name,
            *(f"{values[size]:.2f}" for size in sizes),
            f"{BAR:.2f}",
            verdict(max(values.values()), BAR),
        ]
        for name, values in growths.items()
    ]
    headers = [what, *(f"{size:,}" for size in sizes), "bar", "holds"]
    return tabulate(rows, headers=headers, disable_numparse=True)


@click.command()
@click.option("--loss", "names", multiple=True, help="A loss or a line of the table. [all]")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)))
@click.option(
    "--tokens",
    multiple=True,
    default=(64, 128, 256, 512, 1024),
    show_default=True,
    type=click.IntRange(min=SEQUENCES),
    help=f"In all, in {SEQUENCES} sequences, at {VOCABULARIES['narrow']} columns.",
)
@click.option(
    "--columns",
    multiple=True,
    default=(16_000, 32_000, 64_000, 128_000, 256_000),
    show_default=True,
    type=click.IntRange(min=8),
    help="Of either vocabulary.",
)
@click.option(
    "--columns-tokens",
    default=128,
    show_default=True,
    type=click.IntRange(min=SEQUENCES),
    help="Tokens where the vocabulary grows.",
)
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=1))
@threads_option
@note_option
@results_option
def main(
    names: tuple[str, ...],
    dtype: str,
    tokens: tuple[int, ...],
    columns: tuple[int, ...],
    columns_tokens: int,
    repeats: int,
    note: str,
    results: Path,
) -> None:
    """Print the time per token and column of each loss, relative to the smallest size."""
    if any(count % SEQUENCES for count in (*tokens, columns_tokens)):
        raise click.BadParameter(f"tokens are shared among {SEQUENCES} sequences; give multiples")
    lines = [line for line in chosen(names) if not line.refusal(DTYPES[dtype])]
    result = {**environment(), "note": note, "dtype": dtype, "repeats": repeats}
    asked = sizes_of(tuple(sorted({*tokens})), tuple(sorted({*columns})), columns_tokens)
    growths: dict[str, dict[str, dict[int, float]]] = {}
    seconds: dict[str, Any] = {}
    for what, sizes in asked.items():
        found = measure(lines, sizes, DTYPES[dtype], repeats, what)
        growths[what] = {name: growth(values) for name, values in found.items()}
        seconds[what] = {
            name: {size: round(value, 6) for size, value in values.items()}
            for name, values in found.items()
        }
        click.echo(f"\n{table(what, growths[what])}\n")
    append_row(results / "scaling.jsonl", {**result, "seconds": seconds})
    panels = {
        what: {name: list(values.items()) for name, values in lines.items()}
        for what, lines in growths.items()
    }
    draw_lines(
        results / "scaling.svg",
        panels,
        across=(
            f"tokens, at {VOCABULARIES['narrow']} columns",
            f"columns of either side, at {columns_tokens} tokens",
        ),
        up="time per token and column",
        limit=BAR,
    )


if __name__ == "__main__":
    main()
