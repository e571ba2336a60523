"""Texts of the arenas, by split: no story, and no chapter, is in two of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ctkd.distill.data.pydocs import read_pydocs
from ctkd.distill.data.rows import Rows, load_rows
from ctkd.distill.data.tasks import examples, get_task
from ctkd.errors import DataError

WINDOWS = {"train": 605, "dev": 150, "test": 151}
"""Of up to 400 bytes, as the task lm cuts them."""


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


def cut(
    rows: Mapping[str, Sequence[Mapping[str, str]]], size: int, most: Mapping[str, int]
) -> dict[str, list[dict[str, str]]]:
    """Pieces of texts of up to so many bytes, the first ones of each split."""
    task = replace(get_task("lm"), window=size)
    return {
        split: [
            {"story": piece.group, "text": piece.answer}
            for piece in examples(Rows(split, list(some)), task, {"group": "story"})
        ][: most[split]]
        for split, some in rows.items()
    }
