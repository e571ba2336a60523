"""Memory that every loss needs beyond the logits and their gradient.

The peak of a fresh process that runs a loss once, forward and backward, minus that of one that
only holds its inputs and the gradient. Then the same for losses that make their logits from hidden
states a block at a time, against published ones that need all of them.

Run with `python -m benchmarks.loss_memory`.
"""

from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.loss_inputs import (
    DTYPES,
    TINY,
    UNIT,
    VOCABULARIES,
    Measured,
    Vocabularies,
    VocabulariesType,
    chosen,
)
from benchmarks.loss_speed import verdict
from benchmarks.measuring import append_row, draw_bars, environment, peak_of
from benchmarks.options import note_option, results_option

PARTS = ("losses", "head")
LOSS_BAR = 10.0
HEAD_BAR = 15.0
HEAD_LINES = {"multilevelot": "multilevelot, as published", "uld": "uld, as published"}
MEBIBYTE = 2**20


def arguments(
    label: str, vocabularies: Vocabularies, dtype: str, size: tuple[int, int], *more: str
) -> list[str]:
    """Of Python, for one `benchmarks.peak_process`."""
    options = {"pair": vocabularies.name, "dtype": dtype, "sequences": size[0], "tokens": size[1]}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["-m", "benchmarks.peak_process", label, *flags, *more]


def compile_once(dtype: str) -> None:
    """Have compiled loops put on disk: the process that compiles them holds a compiler as well."""
    click.echo(f"compiling loops for {dtype}, if they are not on disk")
    peak_of(arguments(UNIT, TINY, dtype, (1, 4)), 1)


def measure_losses(
    lines: list[Measured],
    vocabularies: Vocabularies,
    dtype: str,
    size: tuple[int, int],
    repeats: int,
) -> dict[str, Any]:
    """Extra bytes of each line, and as a percentage of the student's logits."""
    logits_bytes = size[0] * size[1] * vocabularies.student * DTYPES[dtype].itemsize
    held: dict[tuple[bool, bool], int] = {}
    extra: dict[str, int] = {}
    refused: dict[str, str] = {}
    with tqdm(lines, desc=f"{vocabularies.name} {dtype}", unit="loss") as progress:
        for line in progress:
            progress.set_postfix_str(line.label)
            refused[line.label] = line.refusal(DTYPES[dtype])
            if refused[line.label]:
                continue
            asked = arguments(line.label, vocabularies, dtype, size)
            # Inputs and imported packages are what these two say.
            key = line.stored, line.uses_trl
            if key not in held:
                held[key] = peak_of([*asked, "--hold"], repeats)
            extra[line.label] = peak_of(asked, repeats) - held[key]
    return {
        "pair": vocabularies.name,
        "vocabularies": str(vocabularies),
        "dtype": dtype,
        "logits_bytes": logits_bytes,
        "extra_bytes": extra,
        "percent": {name: round(100 * value / logits_bytes, 1) for name, value in extra.items()},
        "refused": {label: why for label, why in refused.items() if why},
    }


def losses_table(lines: list[Measured], case: dict[str, Any]) -> str:
    """One row per line: MiB, percent of a tensor of logits, bar, and whether it holds."""
    rows = []
    for line in lines:
        name = line.label
        if name in case["refused"]:
            rows.append([name, "", "refused", "", ""])
            continue
        bar = LOSS_BAR if line.loss else None
        percent = case["percent"][name]
        mebibytes = f"{case['extra_bytes'][name] / MEBIBYTE:.1f}"
        holds = verdict(percent, bar)
        rows.append([name, mebibytes, f"{percent:.1f} %", f"{bar:g} %" if bar else "", holds])
    title = f"{case['pair']} ({case['vocabularies']}) {case['dtype']}"
    printed = tabulate(
        rows,
        headers=[title, "extra MiB", "of one tensor of logits", "bar", "holds"],
        colalign=("left", "right", "right", "right", "left"),
        disable_numparse=True,
    )
    return "\n".join([printed, *(f"{name}: {why}" for name, why in case["refused"].items())])


def measure_head(
    vocabularies: Vocabularies, dtype: str, size: tuple[int, int], hidden: int, repeats: int
) -> dict[str, Any]:
    """Extra bytes beyond the heads, the hidden states and the gradient of the student's head."""
    extra = {}
    from_hidden = ("--hidden", str(hidden))
    labels = [label for both in HEAD_LINES.items() for label in both]
    asked = arguments(labels[0], vocabularies, dtype, size, *from_hidden)
    held = peak_of([*asked, "--hold"], repeats)
    with tqdm(labels, desc="from hidden states", unit="loss") as progress:
        for label in progress:
            progress.set_postfix_str(label)
            asked = arguments(label, vocabularies, dtype, size, *from_hidden)
            extra[label] = peak_of(asked, repeats) - held
    return {
        "vocabularies": str(vocabularies),
        "dtype": dtype,
        "hidden": hidden,
        "extra_bytes": extra,
        "percent": {
            ours: round(100 * extra[ours] / extra[theirs], 2) for ours, theirs in HEAD_LINES.items()
        },
    }


def head_table(case: dict[str, Any]) -> str:
    """One row per loss: MiB from hidden states, MiB as published on logits, percent, bar."""
    rows = [
        [
            name,
            f"{case['extra_bytes'][name] / MEBIBYTE:.0f}",
            f"{case['extra_bytes'][published] / MEBIBYTE:.0f}",
            f"{case['percent'][name]:.1f} %",
            f"{HEAD_BAR:g} %",
            verdict(case["percent"][name], HEAD_BAR),
        ]
        for name, published in HEAD_LINES.items()
    ]
    headers = ["HeadLogits", "extra MiB", "as published, MiB", "part", "bar", "holds"]
    return tabulate(
        rows,
        headers=headers,
        colalign=("left", "right", "right", "right", "right", "left"),
        disable_numparse=True,
    )


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[both]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="[both]")
@click.option("--pair", "pairs", multiple=True, type=VocabulariesType(), help="[wide and narrow]")
@click.option("--loss", "names", multiple=True, help="A loss or a line of the table. [all]")
@click.option("--sequences", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--head-pair", default="wide", show_default=True, type=VocabulariesType(), help="Of the head."
)
@click.option("--head-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--hidden", default=896, show_default=True, type=click.IntRange(min=1))
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@note_option
@results_option
def main(
    parts: tuple[str, ...],
    dtypes: tuple[str, ...],
    pairs: tuple[Vocabularies, ...],
    names: tuple[str, ...],
    sequences: int,
    tokens: int,
    head_pair: Vocabularies,
    head_tokens: int,
    hidden: int,
    repeats: int,
    note: str,
    results: Path,
) -> None:
    """Print the peak memory of each loss, and what hidden states instead of logits save.

    As published, the second part needs about ten times the memory of its logits: 13 GB by default.
    """
    path = results / "loss_memory.jsonl"
    row = {**environment(), "note": note, "repeats": repeats}
    for dtype in dtypes or DTYPES:
        compile_once(dtype)
    if "losses" in (parts or PARTS):
        lines = chosen(names)
        cases = []
        for vocabularies in pairs or VOCABULARIES.values():
            for dtype in dtypes or DTYPES:
                case = measure_losses(lines, vocabularies, dtype, (sequences, tokens), repeats)
                click.echo(f"\n{losses_table(lines, case)}\n")
                cases.append(case)
        shape = f"{sequences} x {tokens}"
        append_row(path, {**row, "part": "losses", "rows": shape, "cases": cases})
        draw_bars(
            results / "loss_memory.svg",
            {f"{case['vocabularies']}, {case['dtype']}": case["percent"] for case in cases},
            across="extra memory, % of one tensor of logits",
            limits={line.label: LOSS_BAR for line in lines if line.loss},
        )
    if "head" in (parts or PARTS):
        case = measure_head(head_pair, "float32", (sequences, head_tokens), hidden, repeats)
        click.echo(f"\n{head_table(case)}\n")
        shape = f"{sequences} x {head_tokens}"
        append_row(path, {**row, "part": "head", "rows": shape, "case": case})
        gibibytes = {name: value / 2**30 for name, value in case["extra_bytes"].items()}
        draw_bars(
            results / "head_memory.svg",
            {f"{case['vocabularies']}, {shape} tokens": gibibytes},
            across="GiB beyond the heads and their gradient",
            limits={
                name: HEAD_BAR / 100 * gibibytes[theirs] for name, theirs in HEAD_LINES.items()
            },
        )


if __name__ == "__main__":
    main()
