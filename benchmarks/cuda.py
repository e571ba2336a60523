"""Every loss on a GPU: the tests that need one, then time and peak memory beside cross-entropy.

One command for a machine with a GPU and no network. A time is the device's, between two events:
once from an idle device, as a caller waits for it, and once behind other work, so that the
processor is ahead, as in training. Given is the median of the repeats with the 95 % interval that
their order gives it. Peaks are beyond the inputs; the gradient is part of them.

Run with `python -m benchmarks.cuda`.
"""

import os
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import ctkd
from baselines.multilevelot_released import sinkhorn_plan
from benchmarks.loss_inputs import DTYPES, TINY, UNIT, VOCABULARIES, Inputs, Vocabularies, chosen
from benchmarks.measuring import append_row, draw_bars, environment
from benchmarks.options import note_option, results_option
from benchmarks.peak_process import Heads
from ctkd.distill.devices import PeakMemory, now
from ctkd.ot.sinkhorn import sinkhorn

PARTS = ("tests", "losses", "transport", "head")
GIGABYTE = 1e9
ITERATIONS, REGULARIZATION = 20, 0.1
# Of other work: some 20 ms, longer than the processor takes to start a loss.
_CYCLES = 40_000_000
_ROOT = Path(__file__).parents[1]

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured: by default of a GPU."""

    vocabularies: Vocabularies = VOCABULARIES["wide"]
    sequences: int = 8
    tokens: int = 256
    hidden: int = 2048
    problems: tuple[int, int, int] = (8, 256, 256)


TINY_SIZES = Sizes(vocabularies=TINY, sequences=2, tokens=4, hidden=8, problems=(2, 8, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One part: functions by name, of which one is the unit of the others' times.

    Args:
        title: What they are given.
        functions: Each runs forward and backward.
        unit: Name of the one that ratios are to.
        clear: Forgets gradients, before each run.
    """

    title: str
    functions: Mapping[str, Run]
    unit: str
    clear: Callable[[], None]


def milliseconds(run: Run, device: torch.device, *, behind: bool = False) -> float:
    """Time of one run on a device, from an idle one or behind other work."""
    if device.type != "cuda":
        start = now()
        run()
        return 1000.0 * (now() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if behind:
        torch.cuda._sleep(_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median(times: Sequence[float]) -> list[float]:
    """The median, and the 95 % interval of it by order; below six times all of them."""
    ordered, count = sorted(times), len(times)
    rank = max(int((count - 1.96 * count**0.5) / 2), 0)
    return [
        round(one, 4) for one in (statistics.median(ordered), ordered[rank], ordered[-1 - rank])
    ]


def is_peer(name: str) -> bool:
    """Whether a function is others', which may refuse a dtype or a device."""
    return any(word in name for word in ("as published", "Liger", "POT", "TRL"))


def measure(table: Table, device: torch.device, repeats: int) -> dict[str, Any]:
    """Run all functions in turn. What fails is left out, with a word, and measured no further."""
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for name, run in tqdm(table.functions.items(), desc="warm-up", unit="function"):
        try:
            table.clear()
            run()
            table.clear()
            peak = PeakMemory(device)
            held = peak.read()
            run()
            most = peak.read()
            peaks[name] = None if held is None or most is None else most - held
        # Whatever it is, the others are measured.
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not is_peer(name):
                traceback.print_exc()
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in tqdm(range(repeats), desc=table.title, unit="turn"):
        for behind in (False, True):
            for name in peaks:
                table.clear()
                one = milliseconds(table.functions[name], device, behind=behind)
                times.setdefault((name, behind), []).append(one)
    return {
        "title": table.title,
        "unit": table.unit,
        "ms": {name: median(times[name, False]) for name in peaks},
        "ms_behind_other_work": {name: median(times[name, True]) for name in peaks},
        "peak_bytes": peaks,
        "failed": failed,
    }


def printed(case: dict[str, Any]) -> str:
    """One row per function: times with intervals, ratios to the unit, peak."""
    unit, rows = case["unit"], []
    for name in case["ms"]:
        row = [name]
        for kind in ("ms", "ms_behind_other_work"):
            middle, low, high = case[kind][name]
            of_unit = case[kind].get(unit, [float("nan")])[0]
            row += [f"{middle:.3f}", f"[{low:.3f}, {high:.3f}]", f"{middle / of_unit:.2f}"]
        peak = case["peak_bytes"][name]
        rows.append([*row, "" if peak is None else f"{peak / GIGABYTE:.3f}"])
    headers = [case["title"], "ms, idle", "95 %", "ratio", "ms, behind", "95 %", "ratio", "peak GB"]
    lines = tabulate(
        rows, headers=headers, colalign=("left", *("right",) * 7), disable_numparse=True
    )
    return "\n".join([lines, *(f"{name}: {why}" for name, why in case["failed"].items())])


def losses(sizes: Sizes, dtype: str, device: torch.device) -> Table:
    """All losses on logits, and published ones."""
    inputs = Inputs.make(
        sizes.vocabularies,
        sequences=sizes.sequences,
        tokens=sizes.tokens,
        dtype=DTYPES[dtype],
        device=device,
    )
    functions: dict[str, Run] = {line.label: line.on(inputs) for line in chosen(())}

    def entropy() -> None:
        _cross_entropy(inputs.batch(stored=False).student).backward()

    functions |= {f"{UNIT}, ctkd": entropy}
    title = f"{sizes.sequences * sizes.tokens:,} rows, {sizes.vocabularies}, {dtype}"
    return Table(title=title, functions=functions, unit=UNIT, clear=inputs.clear)


def _cross_entropy(side: ctkd.Side) -> Tensor:
    log_probs = side.logits.log_probs(side.token_ids.unsqueeze(-1)).squeeze(-1)
    return -log_probs.masked_fill(~side.mask, 0.0).sum() / side.mask.sum()


def transport(sizes: Sizes, device: torch.device) -> Table:
    """Sinkhorn forward and backward, beside torch's way and what is published."""
    generator = torch.Generator(device).manual_seed(0)
    cost = torch.rand(sizes.problems, generator=generator, device=device, requires_grad=True)
    settings = {"regularization": REGULARIZATION, "iterations": ITERATIONS}

    def ours(problems: Tensor) -> Tensor:
        return sinkhorn(problems, **settings).cost

    def by_torch(problems: Tensor) -> Tensor:
        with ctkd.ops.use_backend("reference"):
            return ours(problems)

    def published(problems: Tensor) -> Tensor:
        return torch.stack([(sinkhorn_plan(one, ITERATIONS) * one).sum() for one in problems])

    unit = "ctkd, by torch"
    solvers = {"ctkd": ours, unit: by_torch, "as published": published}
    if find_spec("ot") is None:
        click.echo("without POT, which is not installed", err=True)
    else:
        from benchmarks.sinkhorn import solvers as all_solvers

        solvers |= {
            name: one for name, one in all_solvers(**settings).items() if name.startswith("POT")
        }
    functions = {name: _differentiated(one, cost) for name, one in solvers.items()}
    title = f"Sinkhorn {'x'.join(map(str, sizes.problems))}x{ITERATIONS}"
    return Table(title=title, functions=functions, unit=unit, clear=lambda: None)


def _differentiated(solve: Callable[[Tensor], Tensor], cost: Tensor) -> Run:
    return lambda: torch.autograd.grad(solve(cost).sum(), cost)


def head(sizes: Sizes, dtype: str, device: torch.device) -> Table:
    """Cross-entropy and all losses on hidden states and heads, beside a GEMM and cross-entropy."""
    size = sizes.sequences, sizes.tokens, sizes.hidden
    heads = Heads(sizes.vocabularies, *size, DTYPES[dtype], device)
    hidden, weight, labels = heads.hidden[0], heads.weights[0], heads.labels[0].flatten()

    def clear() -> None:
        hidden.grad = weight.grad = None

    def whole() -> None:
        F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels).backward()

    def entropy() -> None:
        logits = ctkd.HeadLogits(hidden, weight)
        _cross_entropy(ctkd.Side.from_encoder_decoder(logits, heads.labels[0])).backward()

    def in_blocks(name: str) -> Run:
        return lambda: heads.in_blocks(name).backward()

    unit = "GEMM and F.cross_entropy"
    functions: dict[str, Run] = {unit: whole, f"{UNIT}, ctkd": entropy}
    if find_spec("liger_kernel") is None:
        click.echo("without Liger, which is not installed", err=True)
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        functions[f"{UNIT}, Liger"] = lambda: fused(weight, hidden.flatten(0, 1), labels).backward()
    functions |= {name: in_blocks(name) for name in ctkd.list_losses()}
    rows = sizes.sequences * sizes.tokens
    title = f"head, {rows:,} rows of {sizes.hidden}, {sizes.vocabularies}, {dtype}"
    return Table(title=title, functions=functions, unit=unit, clear=clear)


def run_tests(device: torch.device) -> int:
    """Run the tests marked cuda, and return pytest's exit code."""
    # No others need to be imported.
    files = [
        str(path.relative_to(_ROOT))
        for path in sorted((_ROOT / "tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text(encoding="utf-8")
    ]
    # What later versions warn of is no failure of a kernel.
    options = ["-q", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=_ROOT,
        env={**os.environ, "CTKD_TEST_DEVICE": device.type},
        check=False,
    )
    return ran.returncode


def name_of(device: torch.device) -> dict[str, Any]:
    """The card, its memory, and what runs on it."""
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "device_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


@click.command()
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    type=click.Choice(["cuda", "cpu"]),
    help="The CPU tries everything at tiny sizes; its figures say nothing of a GPU.",
)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[all]")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(list(DTYPES)))
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=1))
@note_option
@results_option
def main(
    device: str, parts: tuple[str, ...], dtype: str, repeats: int, note: str, results: Path
) -> None:
    """Run the tests that need a GPU, and print time and peak memory of every loss on it."""
    place = torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "torch finds no CUDA device; --device cpu tries everything at tiny sizes"
        )
    sizes = Sizes() if device == "cuda" else TINY_SIZES
    if device == "cpu":
        click.echo("tiny sizes on a CPU: the figures say nothing of a GPU")
    parts = parts or PARTS
    packages = [name for name in ("trl", "triton", "liger_kernel") if find_spec(name)]
    row = {**environment(*packages), **name_of(place), "note": note, "repeats": repeats}
    click.echo(", ".join(f"{key} {value}" for key, value in row["versions"].items()))
    click.echo(f"device {row['device']}")
    if "tests" in parts:
        row["tests"] = run_tests(place)
    makers: dict[str, Callable[[], Table]] = {
        "losses": lambda: losses(sizes, dtype, place),
        "transport": lambda: transport(sizes, place),
        "head": lambda: head(sizes, dtype, place),
    }
    cases = []
    for part, make in makers.items():
        if part in parts:
            # A table and its inputs are gone before the next is made.
            cases.append({"part": part, **measure(make(), place, repeats)})
            click.echo(f"\n{printed(cases[-1])}\n")
    append_row(results / "cuda.jsonl", {**row, "cases": cases})
    if cases:
        draw_bars(
            results / "cuda.svg",
            {case["title"]: {name: ms[0] for name, ms in case["ms"].items()} for case in cases},
            across="milliseconds on an idle device, forward and backward",
        )
    broken = ["the tests"] if row.get("tests") else []
    broken += [name for case in cases for name in case["failed"] if not is_peer(name)]
    if broken:
        raise click.ClickException(f"failed: {', '.join(broken)}")


if __name__ == "__main__":
    main()
