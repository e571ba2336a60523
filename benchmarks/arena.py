"""Losses compared where they can be told apart: small students, many seeds, bits per byte.

    python -m benchmarks.arena scratch [FOLDER]

trains a Llama of 2 million random weights, with 4,096 byte-level tokens of its own, towards
SmolLM2-135M-Instruct on passages of FairytaleQA, whose two parquet files lie in the folder; without
a folder, on chapters of Python's reference. Of each method it tries weights on development texts,
first a tenth, a third and the whole of its default, then one beyond an end that is best, and trains
other seeds at the best weight, which it measures on texts of stories that nothing was chosen on.

Every finished run is a row of a file. Stopped at any moment, the same command goes on; several
processes share the work with ``--share 1/2`` and ``--share 2/2``. ``--report`` trains nothing, and
writes what the rows say. A run takes some two minutes on one core.
"""

import hashlib
import itertools
import json
import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from tabulate import tabulate

import ctkd
from benchmarks.measuring import append_row, environment
from benchmarks.options import results_option
from ctkd.cache_folder import cache_dir
from ctkd.cli.options import quieten
from ctkd.compare.analysis.statistics import (
    CrossedMean,
    crossed_mean,
    holm,
    smallest_detectable_difference,
)
from ctkd.distill.config import SFT, UNTRAINED, TrainConfig
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.pydocs import read_pydocs
from ctkd.distill.data.rows import Rows, load_rows
from ctkd.distill.data.tasks import Example, examples
from ctkd.distill.evaluation.bits import text_bits
from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.teachers.memory import KnownStates
from ctkd.distill.training.run import train
from ctkd.errors import CtkdError, DataError

TEACHER = "smollm2-135m-instruct"
WINDOWS = {"train": 605, "dev": 150, "test": 151}
SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 8, "learning_rate": 2e-3}
FACTORS = (0.1, 0.3, 1.0)
MOST_WEIGHTS = 5
# Seed 0 chooses weights; the others are what is compared.
SEEDS, MORE_SEEDS, BEST = 5, 12, 5


@dataclass(frozen=True)
class Method:
    """A loss with its settings.

    Attributes:
        label: Of the tables.
        loss: Its name, or sft.
        options: Its settings.
    """

    label: str
    loss: str
    options: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> list[float]:
        """The weights that are tried first, ascending."""
        if self.loss == SFT:
            return [0.0]
        default = ctkd.describe(self.loss).default_weights.kd
        return [_rounded(factor * default) for factor in FACTORS]


def _rounded(weight: float) -> float:
    """Weights are compared as they are written."""
    return float(f"{weight:.3g}")


def all_methods() -> list[Method]:
    """Plain fine-tuning, and every loss: by position and by chunk where there are both."""
    found = [Method(SFT, SFT)]
    for name in ctkd.list_losses():
        if "pairing" in ctkd.describe(name).settings:
            found += [
                Method(f"{name}, {pairing}", name, {"pairing": pairing})
                for pairing in ("position", "chunk")
            ]
        else:
            found.append(Method(name, name))
    # What has no column of its own on the other side is left free, or put into one class.
    rests = {"bpm": "renormalize", "shared_kl": "class"}
    return found + [Method(f"{name}, {rest}", name, {"rest": rest}) for name, rest in rests.items()]


Documents = Mapping[str, tuple[float, int]]
"""Bits and bytes by story."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        method: Its label.
        weight: Of the loss.
        seed: Of the weights and the order of the rows.
        seconds: Of training.
        dev: Of the development texts.
        test: Of the test texts.
    """

    method: str
    weight: float
    seed: int
    seconds: float
    dev: Documents
    test: Documents

    @property
    def key(self) -> tuple[str, float, int]:
        return self.method, self.weight, self.seed


def bits_per_byte(documents: Documents) -> float:
    """All bits over all bytes."""
    bits, sizes = zip(*documents.values(), strict=True)
    return math.fsum(bits) / sum(sizes)


def read_runs(
    path: Path, data: str, methods: Sequence[Method]
) -> tuple[list[Run], Documents | None]:
    """The runs of these methods on these data that a file holds, and the teacher's test texts."""
    runs: dict[tuple[str, float, int], Run] = {}
    teacher = None
    if path.exists():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                click.echo(f"{path}: line {number} was cut off; its run is done again", err=True)
                continue
            if row.get("data") != data:
                continue
            split = {
                name: {story: (bits, size) for story, (bits, size) in row[name].items()}
                for name in ("dev", "test")
            }
            if row["method"] == "teacher":
                teacher = split["test"]
                continue
            # Rows of a method that is no longer compared, or was defined otherwise, stay behind.
            if Method(row["method"], row["loss"], row["options"]) in methods:
                run = Run(row["method"], row["weight"], row["seed"], row["seconds"], **split)
                runs[run.key] = run
    return list(runs.values()), teacher


def chosen_weights(methods: Iterable[Method], runs: Iterable[Run]) -> dict[str, float | None]:
    """The weight of each method that is best on development texts; None while it is looked for."""
    tried: dict[str, dict[float, float]] = defaultdict(dict)
    for run in runs:
        if run.seed == 0:
            tried[run.method][run.weight] = bits_per_byte(run.dev)
    return {
        one.label: None
        if next_weight(one, tried[one.label]) is not None
        else best_weight(tried[one.label])
        for one in methods
    }


def best_weight(tried: Mapping[float, float]) -> float:
    """The weight of the least bits per byte, the smaller one of two that are equal."""
    return min(sorted(tried), key=tried.__getitem__)


def next_weight(method: Method, tried: Mapping[float, float]) -> float | None:
    """The weight to try next, or None if the best of them lies between others, or many were tried.

    Example:
        >>> next_weight(Method("uld", "uld"), {0.15: 2.1, 0.45: 2.0, 1.5: 2.2}) is None
        True
        >>> next_weight(Method("uld", "uld"), {0.15: 2.0, 0.45: 2.1, 1.5: 2.2})
        0.045
    """
    for weight in method.weights():
        if weight not in tried:
            return weight
    if len(tried) == 1 or len(tried) >= MOST_WEIGHTS:
        return None
    best = best_weight(tried)
    # Thirds, as ten is about three times three.
    if best == max(tried):
        return _rounded(best / FACTORS[1])
    return _rounded(best * FACTORS[1]) if best == min(tried) else None


def wanted(methods: Sequence[Method], runs: Sequence[Run]) -> Iterator[tuple[Method, float, int]]:
    """What is to be trained as far as the runs tell, what matters most first."""
    done = {run.key for run in runs}
    weights = chosen_weights(methods, runs)
    for method in methods:
        if weights[method.label] is None:
            tried = {
                run.weight: bits_per_byte(run.dev)
                for run in runs
                if (run.method, run.seed) == (method.label, 0)
            }
            weight = next_weight(method, tried)
            if weight is not None:
                yield method, weight, 0
    seeds = {method.label: SEEDS for method in methods}
    ranked = sorted(
        (bits_per_byte(run.dev), run.method)
        for run in runs
        if run.seed == 0 and run.weight == weights[run.method]
    )
    if all(weight is not None for weight in weights.values()):
        best = [label for _, label in ranked if label != SFT][:BEST]
        seeds |= dict.fromkeys([SFT, *best], MORE_SEEDS)
    for seed in range(1, MORE_SEEDS + 1):
        for method in methods:
            weight = weights[method.label]
            if weight is not None and seed <= seeds[method.label]:
                if (method.label, weight, seed) not in done:
                    yield method, weight, seed


class Scratch:
    """The arena: its texts, its students, and what it trains.

    Args:
        source: Folder of FairytaleQA, or None.
        work: Folder for what is made.
    """

    def __init__(self, source: Path | None, work: Path) -> None:
        rows = python_rows() if source is None else fairytale_rows(source)
        text = json.dumps([rows, SETTINGS, TEACHER], sort_keys=True)
        self.data = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.work = work / self.data
        self.work.mkdir(parents=True, exist_ok=True)
        for split, some in rows.items():
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in some)
            (self.work / f"{split}.jsonl").write_text(lines, "utf-8")
        self._states: KnownStates = {}

    def examples(self, split: str) -> list[Example]:
        """The windows of a split."""
        return examples(load_rows(str(self.work / f"{split}.jsonl")), "lm", {"group": "story"})

    def run(self, method: Method, weight: float, seed: int) -> dict[str, Any]:
        """Train and measure a student; a row of the file."""
        label = "".join(one if one.isalnum() else "-" for one in method.label)
        output = self.work / "runs" / f"{label}-{weight:g}-{seed}"
        config = TrainConfig(
            loss=method.loss,
            loss_options=method.options,
            student_config=UNTRAINED,
            teacher=TEACHER,
            data=str(self.work / "train.jsonl"),
            eval_data=str(self.work / "dev.jsonl"),
            task="lm",
            columns={"group": "story"},
            kd_weight=None if method.loss == SFT else weight,
            seed=seed,
            output=str(output),
            measure="nothing",
            control=False,
            **SETTINGS,
        )
        before = time.monotonic()
        trained = train(config, overwrite=output.exists(), say=_silent, teacher_states=self._states)
        seconds = trained.results["training seconds"]
        measured = {split: self.measure(str(output), split) for split in ("dev", "test")}
        shutil.rmtree(output)
        return {
            **asdict(method),
            "method": method.label,
            "weight": weight,
            "seed": seed,
            "seconds": round(seconds, 1),
            "all_seconds": round(time.monotonic() - before, 1),
            **measured,
        }

    def teacher(self) -> dict[str, Any]:
        """A row of the teacher."""
        measured = {split: self.measure(TEACHER, split) for split in ("dev", "test")}
        return {"method": "teacher", **measured}

    def measure(self, model: str, split: str) -> dict[str, tuple[float, int]]:
        """Bits and bytes of each story."""
        tokenizer, chosen = load_tokenizer(model), self.examples(split)
        rows = encode_examples(chosen, tokenizer, None, max_length=1024).rows
        found = text_bits(
            ModelLogits(load_model(model)), tokenizer, chosen, [row.student for row in rows]
        )
        bits: dict[str, float] = defaultdict(float)
        sizes: dict[str, int] = defaultdict(int)
        for one, of_window, size in zip(chosen, found.bits, found.bytes, strict=True):
            bits[one.group] += of_window
            sizes[one.group] += size
        return {story: (round(bits[story], 2), sizes[story]) for story in bits}


def _silent(_: str) -> None:
    """Many runs would say the same things."""


def fairytale_rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Passages by split, one of each training story, several of the others; no story in two."""
    stories: dict[str, dict[str, list[str]]] = {}
    for name in ("train", "validation"):
        path = folder / f"fairytaleqa_{name}.parquet"
        table = load_rows(str(path))
        if missing := {"story", "context"} - set(table.columns):
            raise DataError(f"{path} has no column {', '.join(sorted(missing))}; give FairytaleQA")
        stories[name] = defaultdict(list)
        for row in table:
            passages = stories[name][row["story"]]
            if row["context"] not in passages:
                passages.append(row["context"])
    names = sorted(set(stories["train"]) - set(stories["validation"]))
    held_out = names[::8]
    return {
        "train": passages_of(stories["train"], sorted({*names} - {*held_out}), WINDOWS["train"]),
        "dev": passages_of(stories["train"], held_out, WINDOWS["dev"]),
        "test": passages_of(stories["validation"], sorted(stories["validation"]), WINDOWS["test"]),
    }


def passages_of(
    stories: Mapping[str, Sequence[str]], names: Sequence[str], windows: int
) -> list[dict[str, str]]:
    """First passages of all stories, then second ones, and so on, of so many windows."""
    found: list[dict[str, str]] = []
    left = windows
    for number in range(max(map(len, stories.values()))):
        for name in names:
            if number < len(stories[name]) and left > 0:
                row = {"story": name, "text": stories[name][number]}
                found.append(row)
                left -= len(examples(Rows("passages", [row]), "lm", {"group": "story"}))
    return found


def python_rows() -> dict[str, list[dict[str, str]]]:
    """Chapters of Python's reference: those for training, and pieces of the others in turn."""
    held_out: list[dict[str, str]] = []
    for row in read_pydocs("test"):
        paragraphs = row["text"].split("\n\n")
        for number in range(0, len(paragraphs), 4):
            text = "\n\n".join(paragraphs[number : number + 4])
            held_out.append({"story": f"{row['topic']} {number}", "text": text})
    training = [{"story": row["topic"], "text": row["text"]} for row in read_pydocs("train")]
    return {"train": training, "dev": held_out[::2], "test": held_out[1::2]}


def paired(
    method: Iterable[Run], other: Iterable[Run]
) -> tuple[CrossedMean | None, list[float], int]:
    """Differences of bits per byte on test texts, of runs of equal seeds but 0.

    Their mean, each seed's, and the number of texts; None with fewer than two seeds.

    Raises:
        DataError: If the runs were not measured on the same texts.
    """
    ours, theirs = ({run.seed: run.test for run in some if run.seed} for some in (method, other))
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None, [], 0
    texts = {story: size for story, (_, size) in ours[seeds[0]].items()}
    for some, seed in itertools.product((ours, theirs), seeds):
        if {story: size for story, (_, size) in some[seed].items()} != texts:
            raise DataError(
                f"expected runs on the same texts, got others with seed {seed}; remove its rows"
            )
    sizes = np.array(list(texts.values()), float)
    bits = np.array(
        [[ours[seed][story][0] - theirs[seed][story][0] for story in texts] for seed in seeds]
    )
    values = bits / sizes
    return crossed_mean(values, sizes), list(values @ (sizes / sizes.sum())), len(texts)


class Report:
    """What the rows of an arena say.

    Args:
        methods: Those compared.
        runs: All of them.
        teacher: Its test texts.
    """

    def __init__(
        self, methods: Sequence[Method], runs: Sequence[Run], teacher: Documents | None
    ) -> None:
        self.weights = chosen_weights(methods, runs)
        self.runs = runs
        self.teacher = None if teacher is None else bits_per_byte(teacher)
        self.methods = [one.label for one in methods if self.weights[one.label] is not None]
        sft = self.of(SFT)
        self.against_sft = {
            label: found
            for label in self.methods
            if label != SFT and (found := paired(self.of(label), sft)[0]) is not None
        }
        adjusted = holm([found.p_value for found in self.against_sft.values()])
        self.p_values = dict(zip(self.against_sft, adjusted, strict=True))

    def of(self, label: str) -> list[Run]:
        """Runs at the method's chosen weight."""
        chosen = self.weights.get(label)
        return [run for run in self.runs if (run.method, run.weight) == (label, chosen)]

    def mean(self, label: str) -> float:
        """Bits per byte of test texts over seeds but 0."""
        return statistics.fmean(bits_per_byte(run.test) for run in self.of(label) if run.seed)

    def table(self) -> str:
        """A row for each method, those that help most first."""
        rows = []
        gap = 0.0
        if self.teacher is not None and self.against_sft:
            gap = self.mean(SFT) - self.teacher
        for label, found in sorted(self.against_sft.items(), key=lambda one: one[1].mean):
            low, high = found.interval()
            # A teacher that is no better than sft leaves no gap to close.
            share = f"{-100 * found.mean / gap:+.1f} %" if gap > 0 else ""
            detectable = smallest_detectable_difference(
                found.standard_error, comparisons=len(self.against_sft), degrees=found.degrees
            )
            seeds = sum(1 for run in self.of(label) if run.seed)
            rows.append(
                [
                    label,
                    f"{self.weights[label]:g}",
                    seeds,
                    f"{self.mean(label):.4f}",
                    f"{found.mean:+.4f}",
                    f"[{low:+.4f}, {high:+.4f}]",
                    f"{self.p_values[label]:.2g}",
                    share,
                    f"{detectable:.4f}",
                ]
            )
        heads = ["method", "weight", "seeds", "bits per byte", "to sft", "95 %", "p (Holm)"]
        heads += ["of the gap", "detectable"]
        return tabulate(rows, heads, tablefmt="github", disable_numparse=True)

    def contrasts(self) -> str:
        """MultiLevelOT against ULD, in each pairing and form."""
        rows = []
        for ours in ("multilevelot", "multilevelot_released"):
            for pairing in ("position", "chunk"):
                label = ours if ours in self.weights else f"{ours}, {pairing}"
                found, each, _ = paired(self.of(label), self.of(f"uld, {pairing}"))
                if found is not None:
                    low, high = found.interval()
                    rows.append(
                        [
                            label,
                            f"uld, {pairing}",
                            len(each),
                            f"{found.mean:+.4f}",
                            f"[{low:+.4f}, {high:+.4f}]",
                        ]
                    )
        if not rows:
            return "Not measured yet."
        heads = ["method", "other", "seeds", "difference", "95 %"]
        return tabulate(rows, heads, tablefmt="github", disable_numparse=True)

    def trials(self) -> str:
        """Development bits per byte of every weight that was tried with seed 0."""
        rows = []
        for label in dict.fromkeys(run.method for run in self.runs):
            tried = {run.weight: run for run in self.runs if (run.method, run.seed) == (label, 0)}
            each = [f"{one:g}: {bits_per_byte(tried[one].dev):.4f}" for one in sorted(tried)]
            rows.append([label, "; ".join(each)])
        return tabulate(rows, ["method", "weight: bits per byte"], tablefmt="github")


LIMITS = """\
## What this does not show

It is one pair of models, of which the student knows nothing at first, one kind of text, one length
of training and one learning rate. Weights were chosen with one seed. Intervals are Student's, for
other seeds on other texts of this kind; they hold one by one, the p values together.
"""


def write_report(folder: Path, methods: Sequence[Method], rows: Path, data: str) -> None:
    """Write the tables and the picture."""
    runs, teacher = read_runs(rows, data, methods)
    report = Report(methods, runs, teacher)
    if not report.against_sft:
        raise DataError(f"{rows} has no two seeds of a method and of sft yet; train more")
    words = [
        "# The arena scratch\n",
        f"{len(runs)} runs, the last of {time.strftime('%Y-%m-%d')}; texts {data}. Test texts in "
        f"bits per byte: sft {report.mean(SFT):.4f}"
        + ("" if report.teacher is None else f", teacher {report.teacher:.4f}")
        + ". Repeat with `python -m benchmarks.arena scratch`.\n",
        f"{report.table()}\n",
        "## MultiLevelOT against ULD\n",
        f"{report.contrasts()}\n",
        "## Weights that were tried, on development texts\n",
        f"{report.trials()}\n",
        LIMITS,
    ]
    path = folder / "arena_scratch.md"
    path.write_text("\n".join(words), "utf-8")
    click.echo(f"wrote {path}")


class Share(click.ParamType[tuple[int, int]]):
    """A part of the work, such as 1/2."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        number, _, count = str(value).partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(f"{value!r} is no share of the work such as 1/2", param, ctx)
        return int(number), int(count)


@click.command()
@click.argument("name", type=click.Choice(["scratch"]))
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--share",
    default="1/1",
    type=Share(),
    show_default=True,
    help="The part of the runs that this process trains.",
)
@click.option("--minutes", type=float, help="Begin no run after so many. [until all is done]")
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
    """Compare losses where they can be told apart.

    FOLDER holds fairytaleqa_train.parquet and fairytaleqa_validation.parquet; without one, texts
    come from Python's reference.
    """
    quieten()
    path = results / f"arena_{name}.jsonl"
    methods = all_methods()
    try:
        arena = Scratch(folder, cache_dir() / "arena")
        if not only_report:
            work_off(arena, methods, path, share, minutes)
        write_report(results, methods, path, arena.data)
    except CtkdError as error:
        raise click.ClickException(str(error)) from error


def work_off(
    arena: Scratch,
    methods: Sequence[Method],
    path: Path,
    share: tuple[int, int],
    minutes: float | None,
) -> None:
    """Train what is wanted, each process its share, until nothing is left or the time is up."""
    begun = time.monotonic()

    def keep(row: dict[str, Any]) -> None:
        about = environment("transformers", "tokenizers")
        append_row(path, {**about, "data": arena.data, **row})

    while minutes is None or time.monotonic() - begun < 60 * minutes:
        runs, teacher = read_runs(path, arena.data, methods)
        if teacher is None and share[0] == 1:
            keep(arena.teacher())
        left = list(wanted(methods, runs))
        mine = [one for one in left if _place(one, share[1]) == share[0] - 1]
        if not left:
            return
        if not mine:
            # What is left belongs to others, and what follows may be ours.
            time.sleep(20)
            continue
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
