"""The command line on models and data small enough for a test."""

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from click.testing import CliRunner, Result
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from ctkd.cli import main
from ctkd.distill.training import measuring
from tests.distill import tiny

WORDS = ["cat", "dog", "rain", "bridge", "train", "night", "mat"]
ANSWER = " the mat"


class Workplace:
    """A folder with a student, a teacher and twenty rows of the task text, all with one answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student, self.teacher = folder / "student", folder / "teacher"
        self.rows = folder / "rows.jsonl"
        save(self.student, vocabulary=280, padded=6, hidden=16, seed=1)
        save(self.teacher, vocabulary=330, padded=0, hidden=24, seed=2)
        write_rows(self.rows, 20)

    def train(self, output: str, *options: str) -> list[str]:
        """The words of a short training run; later options override earlier ones."""
        return [
            *("train", "--student", str(self.student), "--teacher", str(self.teacher)),
            *(() if "--data" in options else ("--data", str(self.rows))),
            *(() if "--loss" in options else ("--loss", "multilevelot")),
            *("--task", "text", "--output", str(self.folder / output)),
            *("--max-steps", "2", "--logging-steps", "1", "--max-new-tokens", "3"),
            *("--device", "cpu"),
            *options,
        ]

    def evaluate(self, *options: str) -> list[str]:
        """The words of an evaluation on the same rows."""
        return [
            "evaluate",
            *(() if "--data" in options else ("--data", str(self.rows))),
            *("--task", "text", "--max-new-tokens", "3", "--device", "cpu"),
            *options,
        ]


def save(folder: Path, *, vocabulary: int, padded: int, hidden: int, seed: int) -> None:
    tokenizer = tiny.tokenizer(vocabulary)
    tokenizer.save_pretrained(folder)
    tiny.model(len(tokenizer) + padded, seed, hidden=hidden).save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    rows = [
        {
            "id": f"r{number}",
            "prompt": f"{tiny.TEXTS[number % 4]} {WORDS[number % 7]} {number // 4}? Answer:",
            "answer": ANSWER,
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def undrawn() -> AbstractContextManager[object]:
    """Curves of runs are empty files: to draw them takes as long as a short run."""
    return mock.patch.object(measuring, "plot_curves", lambda _, path: path.write_bytes(b""))


def invoke(*words: str, environment: dict[str, str] | None = None) -> Result:
    """Run the command line in this process, warnings being errors, and leave no trace in it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    try:
        # Where the user chose what becomes of warnings, the command line leaves them alone.
        with mock.patch.object(sys, "warnoptions", ["error"]):
            return CliRunner(env=environment).invoke(main, list(words), prog_name="ctkd")
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (enable_progress_bars if hub_bars else disable_progress_bars)()


def finish(*words: str) -> Result:
    """As `invoke`, for what has to end well."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result


def error_of(result: Result) -> str:
    """The one line that a command failed with."""
    assert result.exit_code != 0, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "Error:" not in result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.endswith(errors[0] + "\n")
    return errors[0].removeprefix("Error:").strip()


def record(folder: Path) -> dict:
    """What a run's ctkd.json holds."""
    return json.loads((folder / "ctkd.json").read_text())


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder."""
    return load_file(folder / "model.safetensors")
