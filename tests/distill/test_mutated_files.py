"""Damaged files end in a sentence that names them, or are read as what they hold."""

import csv
import functools
import gzip
import io
import json
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ctkd.compare.run.folder import append_record, read_records
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.tasks import examples
from ctkd.distill.evaluation.metrics import read_predictions
from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.distill.options import read_config_file
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.training.checkpoints import Checkpoints
from ctkd.distill.training.measuring import summarize
from ctkd.distill.training.output_folder import OutputFolder
from ctkd.errors import CtkdError
from tests.compare.run.test_folder import record
from tests.distill.mutations import mutations
from tests.distill.teachers.test_cache import rows_of
from tests.distill.tiny_caches import CachePlace
from tests.distill.tiny_runs import finish

pytestmark = pytest.mark.slow

MOST_SECONDS = 20

TEXT_ROWS = [{"id": f"r{n}", "prompt": f"Question {n}?", "answer": f" word{n} é"} for n in range(4)]
QA_ROWS = [
    {"context": f"Passage {n}.", "question": f"Why {n}?", "answers": [f"word{n}", "so"]}
    for n in range(4)
]
ALPACA_ROWS = [{"instruction": f"Do {n}.", "input": "", "output": f"Done {n}."} for n in range(4)]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": f"Passage {n}.",
                    "qas": [
                        {
                            "id": f"q{n}", "question": "Why?", "is_impossible": n == 0,
                            "answers": [{"text": f"word{n}", "answer_start": 0}] if n else [],
                        }
                    ],
                }
                for n in range(3)
            ],
        }
    ],
}  # fmt: skip


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({name: str(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


DATA: dict[str, tuple[str, Callable[[], bytes]]] = {
    "rows.jsonl": ("text", lambda: lines(TEXT_ROWS)),
    "list.json": ("text", lambda: json.dumps(TEXT_ROWS, indent=1).encode()),
    "rows.csv": ("text", lambda: table(TEXT_ROWS)),
    "rows.tsv": ("text", lambda: table(TEXT_ROWS, "\t")),
    "answers.csv": ("qa", lambda: table(QA_ROWS)),
    "rows.jsonl.gz": ("text", lambda: gzip.compress(lines(TEXT_ROWS))),
    "rows.parquet": ("text", lambda: parquet(TEXT_ROWS)),
    "qa.parquet": ("qa", lambda: parquet(QA_ROWS)),
    "qa.jsonl": ("qa", lambda: lines(QA_ROWS)),
    "squad.json": ("qa", lambda: json.dumps(SQUAD).encode()),
    "alpaca.json": ("text", lambda: json.dumps(ALPACA_ROWS).encode()),
}


@contextmanager
def in_time() -> Iterator[None]:
    """Ends what hangs."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Reading:
    """Reads damaged files, and keeps what went otherwise than it should."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.refused = self.read = 0

    def of(
        self, path: Path, content: bytes, count: int, seed: int, read: Callable[[], Any],
        is_right: Callable[[Any], bool], names: str = "",
    ) -> None:  # fmt: skip
        """Read a file in many damaged forms, and leave it as it was.

        Args:
            path: The file.
            content: As it should be.
            count: How many forms.
            seed: Of the damage.
            read: The way a command reads it.
            is_right: Whether what was read can be what the file holds.
            names: What a refusal calls it; by default the file's name.
        """
        for number, damaged in enumerate(mutations(content, count, seed)):
            path.write_bytes(damaged)
            try:
                with in_time(), warnings.catch_warnings(action="ignore"):
                    found = read()
            except CtkdError as error:
                self.refused += 1
                if (names or path.name) not in str(error):
                    self._fault(path, seed, number, f"refused with {error!r:.300}")
            except (Exception, TimeoutError) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                self._fault(
                    path, seed, number, f"{error!r:.300} at {where.filename}:{where.lineno}"
                )
            else:
                self.read += 1
                if not is_right(found):
                    self._fault(path, seed, number, f"read as {found!r:.300}")
        path.write_bytes(content)

    def _fault(self, path: Path, seed: int, number: int, what: str) -> None:
        self.faults.append(f"{path.name}, mutation {number} of seed {seed}: {what}")


def data(reading: Reading, folder: Path, count: int, seed: int) -> None:
    """Data files of all kinds."""
    for name, (task, made) in DATA.items():
        path, content = folder / name, made()
        whole = None

        def read(path=path, task=task):
            return examples(read_rows(str(path), task, say=lambda line: None), task)

        path.write_bytes(content)
        whole = read()

        def is_right(found, path=path, whole=whole, name=name):
            texts = [text for one in found for text in (one.id, one.prompt, *one.references)]
            if not texts or not all(isinstance(text, str) for text in texts):
                return False
            if name.endswith(".gz"):
                return found == whole
            held = path.read_bytes()
            # Nothing is escaped: an answer stands there as it was read.
            plain = not (b"\\" in held or b'"' in held and name.endswith((".csv", ".tsv")))
            return (
                name.endswith("parquet")
                or not plain
                or all(one.references[0].strip().encode() in held for one in found)
            )

        reading.of(path, content, count, seed, read, is_right)


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def caches(reading: Reading, place: CachePlace, count: int, seed: int) -> None:
    """The files of a teacher cache."""
    folder = place.folder / "cache"
    sides = [row.teacher for row in rows_of(place)]

    def read():
        cache = TeacherCache.open(folder)
        return cache.batch(sides, 9), cache.texts._texts, cache.record

    tensors, texts, record = read()

    def is_right(found):
        return same(found[0], tensors) and found[1] == texts and found[2] == record

    for file in sorted(folder.iterdir()):
        if file.name != ".lock":
            reading.of(file, file.read_bytes(), count, seed, read, is_right)


def checkpoints(reading: Reading, place: CachePlace, count: int, seed: int) -> None:
    """The files of the last of two checkpoints: it is left out, or whole."""
    folder = place.folder / "run"
    last = folder / "checkpoint-2"
    files = {one: one.read_bytes() for one in sorted(last.iterdir())}

    for file, content in files.items():

        def is_right(found, file=file):
            whole = file.name == "ctkd_checkpoint.json"
            return found.name == "checkpoint-1" or whole and found == last

        def read():
            return Checkpoints(folder, lambda line: None).last()

        reading.of(file, content, count, seed, read, is_right)


def models(reading: Reading, place: CachePlace, count: int, seed: int) -> None:
    """The files of a model."""
    folder = place.folder / "model"
    if not folder.exists():
        shutil.copytree(place.student, folder)
    ids = torch.tensor([[3, 4, 5]])

    def read(file):
        # A model reads no file of a tokenizer's, and a tokenizer none of weights.
        found = []
        if file.suffix != ".safetensors":
            found.append(load_tokenizer(str(folder))("The cat").input_ids)
        if not file.name.startswith("tokenizer"):
            with torch.no_grad():
                found.append(load_model(str(folder))(ids).logits)
        return found

    def is_right(found):
        return all(
            isinstance(one, list) if not torch.is_tensor(one) else one.shape[:2] == ids.shape
            for one in found
        )

    for file in sorted(folder.iterdir()):
        reading.of(
            file, file.read_bytes(), count, seed, functools.partial(read, file), is_right,
            names=str(folder),
        )  # fmt: skip


def runs(reading: Reading, place: CachePlace, count: int, seed: int) -> None:
    """Records of a run and of a comparison, answers, and settings in a file."""
    path = place.folder / "run" / "ctkd.json"
    settings = json.loads(path.read_text())["settings"]

    def resumed():
        return summarize(OutputFolder.check(path.parent, settings, resume=True, overwrite=False))

    reading.of(path, path.read_bytes(), count, seed, resumed, str.strip, names=str(path.parent))

    folder = place.folder / "comparison"
    folder.mkdir(exist_ok=True)
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    for key in "ab":
        append_record(folder, record(key))
    whole = read_records(folder)
    reading.of(
        results, results.read_bytes(), count, seed, lambda: read_records(folder),
        lambda found: all(whole.get(key) == one for key, one in found.items()),
    )  # fmt: skip

    answers = place.folder / "answers.jsonl"
    content = lines([{"id": n, "prediction": f"so {n}", "references": ["so"]} for n in range(4)])
    reading.of(
        answers, content, count, seed, lambda: read_predictions(answers),
        lambda found: all(isinstance(one.prediction, str) for one in found),
    )  # fmt: skip

    yaml = place.folder / "settings.yaml"
    reading.of(
        yaml, b"loss: uld\nlearning_rate: 1e-4\nloss_options: {top_k: 5}\n", count, seed,
        lambda: read_config_file(yaml), lambda found: isinstance(found, dict),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    return made(tmp_path_factory.mktemp("place"))


def made(folder: Path) -> CachePlace:
    """With a cache of few rows, and a run with two checkpoints."""
    place = CachePlace(folder, rows=6)
    options = ("--measure", "nothing", "--keep-checkpoints", "--save-steps", "1")
    finish(*place.train("run", "--loss", "uld", *options))
    place.cache("cache", k=3, shard_rows=3)
    return place


def test_damaged_data_are_refused_or_read_as_what_they_hold(tmp_path):
    check(data, tmp_path, 90, least=990)


@pytest.mark.parametrize(
    ("what", "count", "least"),
    [(caches, 80, 320), (checkpoints, 30, 330), (models, 60, 300), (runs, 100, 400)],
)
def test_damaged_files_of_runs_are_refused_or_right(place, what, count, least):
    check(what, place, count, least)


def check(what: Callable[..., None], where: Any, count: int, least: int) -> None:
    reading = Reading()
    what(reading, where, count, 1)
    assert not reading.faults, "\n".join(reading.faults[:20])
    assert reading.refused + reading.read >= least
    assert reading.read
