"""Time of every loss, forward and backward, beside cross-entropy on the same student logits.

Losses of the package with a live and with a stored teacher, and published ones, in turn, on 256
scored tokens. Building the batch from raw logits is part of the time.

Before each run, freed memory is handed back to the system, so that every function pays for the
pages of what it allocates, as it does by default for tensors of 32 MiB or more. Otherwise
a function that leaves large free blocks behind would make the next one three times as fast.

Run with `python -m benchmarks.loss_speed`.
"""

import statistics
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from benchmarks.loss_inputs import (
    DTYPES,
    UNIT,
    VOCABULARIES,
    Inputs,
    Measured,
    Vocabularies,
    VocabulariesType,
    chosen,
)
from benchmarks.measuring import (
    append_row,
    draw_bars,
    environment,
    ratios_to,
    time_in_turn,
)
from benchmarks.options import note_option, results_option, threads_option
from ctkd.distill.devices import give_back_freed_memory


def verdict(value: float, bar: float | None) -> str:
    """Whether a figure is as low as its bar asks."""
    if bar is None:
        return ""
    return "yes" if value <= bar else "NO"


def measure(
    lines: list[Measured],
    vocabularies: Vocabularies,
    dtype: str,
    sequences: int,
    tokens: int,
    repeats: int,
    keep_freed: bool,
) -> dict[str, Any]:
    """Time all lines on one pair of vocabularies and one dtype."""
    refused = {line.label: line.refusal(DTYPES[dtype]) for line in lines}
    inputs = Inputs.make(vocabularies, sequences=sequences, tokens=tokens, dtype=DTYPES[dtype])
    functions = {line.label: line.on(inputs) for line in lines if not refused[line.label]}

    def between() -> None:
        inputs.clear()
        if not keep_freed:
            give_back_freed_memory()

    seconds = time_in_turn(
        functions, repeats, between=between, label=f"{vocabularies.name} {dtype}"
    )
    return {
        "pair": vocabularies.name,
        "vocabularies": str(vocabularies),
        "dtype": dtype,
        "seconds": {name: round(statistics.median(all_), 5) for name, all_ in seconds.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios_to(seconds, UNIT).items()},
        "refused": {label: why for label, why in refused.items() if why},
    }


def table(lines: list[Measured], case: dict[str, Any]) -> str:
    """One row per line: milliseconds, ratio, bar, and whether it holds."""
    rows = []
    for line in lines:
        name = line.label
        if name in case["refused"]:
            rows.append([name, "", "refused", "", ""])
            continue
        ratio = case["ratios"][name]
        bar = "" if line.bar is None else f"{line.bar:g}"
        milliseconds = f"{1000 * case['seconds'][name]:.1f}"
        rows.append([name, milliseconds, f"{ratio:.2f}", bar, verdict(ratio, line.bar)])
    title = f"{case['pair']} ({case['vocabularies']}) {case['dtype']}"
    printed = tabulate(
        rows,
        headers=[title, "ms", f"/ {UNIT}", "bar", "holds"],
        colalign=("left", "right", "right", "right", "left"),
        disable_numparse=True,
    )
    return "\n".join([printed, *(f"{name}: {why}" for name, why in case["refused"].items())])


@click.command()
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="[both]")
@click.option("--pair", "pairs", multiple=True, type=VocabulariesType(), help="[wide and narrow]")
@click.option("--loss", "names", multiple=True, help="A loss or a line of the table. [all]")
@click.option("--sequences", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=1))
@threads_option
@click.option("--keep-freed", is_flag=True, help="Leave freed memory to the C library.")
@note_option
@results_option
def main(
    dtypes: tuple[str, ...],
    pairs: tuple[Vocabularies, ...],
    names: tuple[str, ...],
    sequences: int,
    tokens: int,
    repeats: int,
    keep_freed: bool,
    note: str,
    results: Path,
) -> None:
    """Print the time of each loss as a ratio to cross-entropy, forward and backward."""
    lines = chosen(names)
    packages = ["trl"] if any(line.uses_trl for line in lines) else []
    result = {**environment(*packages), "note": note, "rows": f"{sequences} x {tokens}"}
    cases = []
    for vocabularies in pairs or VOCABULARIES.values():
        for dtype in dtypes or DTYPES:
            case = measure(lines, vocabularies, dtype, sequences, tokens, repeats, keep_freed)
            click.echo(f"\n{table(lines, case)}\n")
            cases.append(case)
    result |= {"repeats": repeats, "keep_freed": keep_freed, "cases": cases}
    append_row(results / "loss_speed.jsonl", result)
    draw_bars(
        results / "loss_speed.svg",
        {f"{case['vocabularies']}, {case['dtype']}": case["ratios"] for case in cases},
        across=f"time / {UNIT}",
        limits={line.label: line.bar for line in lines if line.bar is not None},
    )


if __name__ == "__main__":
    main()
