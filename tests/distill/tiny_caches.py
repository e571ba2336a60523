"""Teacher's caches of models and data small enough for a test."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ctkd.distill.config import CacheSettings, TrainConfig
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.cache_writing import write_cache
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace


class CachePlace(Workplace):
    """A workplace with answers of many lengths, and a teacher wider than its tokenizer."""

    def __init__(self, folder: Path, *, rows: int = 20) -> None:
        super().__init__(folder)
        save_teacher(self.teacher)
        write_ragged_rows(self.rows, rows)

    def config(self, **settings: Any) -> TrainConfig:
        """The settings of a run of three steps that measures nothing."""
        defaults: dict[str, Any] = {
            "loss": "uld",
            "student": str(self.student),
            "teacher": str(self.teacher),
            "data": str(self.rows),
            "task": "text",
            "max_steps": 3,
            "batch_size": 3,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "max_new_tokens": 3,
            "device": "cpu",
            "measure": "nothing",
        }
        return TrainConfig(**{**defaults, **settings})

    def cache(self, name: str, *, say: Any = print, **options: Any) -> TeacherCache:
        """Write or complete a cache; names of settings go to the settings."""
        own = {"k", "states", "temperatures", "texts", "shard_rows"}
        settings = {key: value for key, value in options.items() if key not in own}
        given = {key: value for key, value in options.items() if key in own}
        return write_cache(
            self.config(**settings), self.folder / name, CacheSettings(**given), say=say
        )

    def cached(self, cache: TeacherCache, output: str, **settings: Any) -> TrainConfig:
        """The settings of a run that asks the cache."""
        config = self.config(output=str(self.folder / output), **settings)
        return replace(config, teacher_cache=str(cache.path))

    def words(self, command: str, *options: str) -> list[str]:
        """The words of a command on these models and rows."""
        return [
            *(command, "--student", str(self.student), "--teacher", str(self.teacher)),
            *(() if "--data" in options else ("--data", str(self.rows))),
            *("--task", "text", "--max-new-tokens", "3", "--device", "cpu"),
            *options,
        ]


def save_teacher(folder: Path, *, seed: int = 2) -> None:
    """A teacher whose texts depend on the prompt: small weights would only repeat its end."""
    tokenizer = tiny.tokenizer(330)
    tokenizer.save_pretrained(folder)
    model = tiny.model(len(tokenizer) + 7, seed, hidden=24)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight *= 8
    model.save_pretrained(folder)


def write_ragged_rows(path: Path, count: int, *, first: int = 0) -> None:
    rows = [
        {
            "id": f"r{number}",
            "prompt": f"{tiny.TEXTS[number % 4]} {'Well? ' * (number % 3)}{number}? Answer:",
            "answer": tiny.ANSWERS[number % len(tiny.ANSWERS)] * (1 + number % 2),
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
