"""Bad inputs of every command: one sentence that names what came, and nothing on disk is touched.

Settings and data that `ctkd train` and `ctkd cache` refuse are in `test_cli` and `test_cache` too.
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from ctkd.distill.models import loading
from tests.distill.tiny_caches import CachePlace, save_teacher
from tests.distill.tiny_runs import error_of, finish, invoke

ROW = '{"prompt": "Who?", "answer": "I"}\n'
FILES = {
    "latin.jsonl": ROW.replace("Who", "Köln").encode("latin-1"),
    "binary.jsonl": bytes(range(256)),
    "third.jsonl": f"{ROW}{ROW}nope\n",
    "blank.jsonl": '{"prompt": "Who?", "answer": " "}\n',
    "number.jsonl": '{"prompt": "Who?", "answer": 1945}\n',
    "list.jsonl": '{"prompt": ["Who?"], "answer": "I"}\n',
    "surrogate.jsonl": ROW.replace("Who", r"\ud800"),
    "ragged.csv": "prompt,answer\nWho?,I,II\n",
    "junk.parquet": "PAR1 and so on",
    "cut.jsonl.gz": gzip.compress(ROW.encode() * 9)[:-9],
    "plain.jsonl.gz": ROW,
    "folder.jsonl/inside": "",
    "empty.csv": "",
    "cut.gguf": "GGUF\3",
    "list.yaml": "- loss\n",
    "binary.yaml": bytes(range(256)),
    "number.yaml": "7: uld\n",
    "type.yaml": "batch_size: many\n",
    "answers.jsonl": '{"id": "r1", "prediction": "I"}\n',
    "no-answers.jsonl": '{"id": "r1", "prediction": 1945}\n',
}


def damaged(folder: Path) -> None:
    """Copies of a model, of a finished run and of a cache, each damaged in one way."""

    def copy(name: str, of: str, file: str) -> Path:
        shutil.copytree(folder / of, folder / name)
        return next((folder / name).glob(file))

    copy("no-tokenizer", "student", "tokenizer.json").unlink()
    (folder / "no-tokenizer" / "tokenizer_config.json").unlink()
    copy("broken-tokenizer", "student", "tokenizer.json").write_text("{}")
    copy("broken-config", "student", "config.json").write_text('{"hidden')
    copy("list-config", "student", "config.json").write_text("[]")
    file = copy("other-kind", "student", "config.json")
    file.write_text(file.read_text().replace('"llama"', '"lamma"'))
    file = copy("cut-weights", "student", "model.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    copy("no-weights", "student", "model.safetensors").unlink()
    copy("cut-record", "done", "ctkd.json").write_text('{"settings')
    copy("other-record", "done", "ctkd.json").write_text('{"settings": [], "results": {}}')
    file = copy("odd-results", "done", "ctkd.json")
    record = json.loads(file.read_text())
    record["results"]["seconds per step"] = "soon"
    file.write_text(json.dumps(record))
    file = copy("cut-shard", "cache", "logits-*")
    file.write_bytes(file.read_bytes()[:-9])
    file = copy("changed-cache", "cache", "cache.json")
    file.write_text(file.read_text().replace('"k": 5', '"k": 4'))
    copy("half-cache", "cache", "cache.json").write_text('{"format": 3}')
    copy("no-texts", "cache", "texts.jsonl").write_bytes(b"")
    save_teacher(folder / "other-teacher", seed=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    """With a finished run, a teacher cache, and what is wrong with such things."""
    place = CachePlace(tmp_path_factory.mktemp("place"))
    finish(*place.train("done", "--loss", "uld", "--measure", "nothing"))
    finish(*place.words("cache", "--output", str(place.folder / "cache"), "--k", "5"))
    for name, content in FILES.items():
        path = place.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    damaged(place.folder)
    return place


def words_of(place: CachePlace, command: str, options: list[str]) -> list[str]:
    """A command that would end well, but for the options."""
    new = str(place.folder / "new")
    if command == "train":
        return place.train("new", "--loss", "uld", *options)
    if command == "evaluate":
        return place.evaluate(*options)
    if command == "cache":
        return place.words("cache", "--output", new, *options)
    if command == "compare":
        few = ("--output", new, "--losses", "sft,uld", "--max-steps", "1")
        return place.words("compare", *few, *options)
    if command == "doctor":
        models = ("--student", str(place.student), "--teacher", str(place.teacher))
        return ["doctor", *models, "--data", str(place.rows), "--task", "text", *options]
    return [command, *options]


CASES = {
    # Data.
    "encoding": ("train --data HERE/latin.jsonl", "latin.jsonl is not UTF-8 text (line 1)"),
    "binary": ("train --eval-data HERE/binary.jsonl", "binary.jsonl is not UTF-8 text (line 2)"),
    "line 3": ("train --data HERE/third.jsonl", "third.jsonl line 3 is not JSON: Expecting value"),
    "no answer": ("train --data HERE/blank.jsonl", "blank.jsonl row 1 has no answer in column"),
    "number": ("train --data HERE/number.jsonl", "holds int 1945 as an answer; expected text"),
    "list": ("train --data HERE/list.jsonl", "column 'prompt' holds list ['Who?']; expected text"),
    "unicode": ("train --data HERE/surrogate.jsonl", "half a surrogate pair at character 1"),
    "cells": ("train --data HERE/ragged.csv", "ragged.csv row 1 (line 2) has 3 cells, but the he"),
    "parquet": ("train --data HERE/junk.parquet", "junk.parquet cannot be read as Parquet"),
    "cut gz": ("train --data HERE/cut.jsonl.gz", "cut.jsonl.gz cannot be read: Compressed file en"),
    "no gz": ("train --data HERE/plain.jsonl.gz", "plain.jsonl.gz cannot be read: Not a gzipped"),
    "folder": ("train --data HERE/folder.jsonl", "folder.jsonl is a folder that save_to_disk did"),
    "no name": ("doctor --data=", "the name of the data is empty; name a file"),
    # Models.
    "tokenizer": ("train --student HERE/no-tokenizer", "HERE/no-tokenizer has no tokenizer: exp"),
    "its file": ("train --teacher HERE/broken-tokenizer", "load the tokenizer of HERE/broken-tok"),
    "config": ("train --student HERE/broken-config", "broken-config/config.json' is not a valid"),
    "config of a list": ("train --student HERE/list-config", "HERE/list-config: "),
    "kind": ("train --student HERE/other-kind", "model type `lamma` but Transformers does not"),
    "weights": ("train --student HERE/cut-weights", "cannot load the model HERE/cut-weights"),
    "teacher's": ("cache --teacher HERE/cut-weights", "cannot load the model HERE/cut-weights"),
    "none": ("evaluate HERE/no-weights", "no file named model.safetensors"),
    "gguf": ("train --student HERE/cut.gguf", "cannot read HERE/cut.gguf: "),
    "a file": ("train --teacher HERE/rows.jsonl", "HERE/rows.jsonl is a file, but no .gguf file"),
    "nameless": ("train --student=", "student must be a name or a word, got ''"),
    "nameless teacher": ("doctor --teacher=", "the name of a model is empty; give one. Packaged"),
    # Settings.
    "yaml list": ("train --config HERE/list.yaml", "list.yaml must hold settings as 'name: value"),
    "yaml bytes": ("compare --config HERE/binary.yaml", "cannot read the configuration HERE/bina"),
    "yaml name": ("train --config HERE/number.yaml", "number.yaml: unknown setting 7. Known: lo"),
    "yaml type": ("train --config HERE/type.yaml", "batch_size must be a whole number, got 'many'"),
    "day": ("train --date 2026-02-30", "date must be a day as YYYY-MM-DD, got '2026-02-30'"),
    "nan": ("train --learning-rate nan", "learning_rate must be a finite number of at least 0, go"),
    "epochs": ("train --epochs 1e300", "epochs must be at most 1000000000000000000, got 1e+300"),
    "template": ("train --teacher-template chat", "the teacher's tokenizer (TokenizersBackend) h"),
    "shots": ("train --teacher-shots 500", "500 shots need training examples of 500 groups, there"),
    "cuda": ("evaluate HERE/student --device cuda", "device cuda was asked for, but torch finds"),
    # Runs and caches that are there.
    "done": ("train --output HERE/done", "HERE/done exists already; go on with --resume, replace"),
    "other settings": (
        "train --output HERE/done --resume --seed 3",
        "was started with other settings (measure 'nothing' -> 'all', seed 0 -> 3)",
    ),
    "record": ("train --output HERE/cut-record --resume", "cut-record/ctkd.json cannot be read"),
    "not a record": (
        "evaluate HERE/other-record",
        "other-record/ctkd.json was not written by ctkd",
    ),
    "results": (
        "train --output HERE/odd-results --resume --measure nothing",
        "HERE/odd-results/ctkd.json holds results that ctkd did not write",
    ),
    "shard": ("train --teacher-cache HERE/cut-shard", "cut-shard/logits-00000.safetensors is miss"),
    "changed cache": (
        "train --teacher-cache HERE/changed-cache",
        "cache.json is not as it was written; res",
    ),
    "half a cache": (
        "cache --output HERE/half-cache",
        "HERE/half-cache/cache.json is not as it was wri",
    ),
    "texts": ("train --teacher-cache HERE/no-texts", "HERE/no-texts/texts.jsonl holds 0 of 2 text"),
    "other weights": (
        "train --teacher-cache HERE/cache --teacher HERE/other-teacher",
        "the teacher cache HERE/cache was made from other weights than those of HERE/other-teach",
    ),
    "unwritable": ("cache --output HERE/rows.jsonl/x", "cannot make HERE/rows.jsonl/x: Not a dir"),
    # Evaluation, doctor, losses.
    "nothing": ("evaluate", "name a MODEL to evaluate, or a file of answers with --predictions"),
    "both": ("evaluate HERE/student --predictions HERE/answers.jsonl", "without MODEL; MODEL's"),
    "no file": ("evaluate --predictions HERE/none.jsonl", "predictions from HERE/none.jsonl: No s"),
    "answers": ("evaluate --predictions HERE/no-answers.jsonl", "no-answers.jsonl, line 1: expec"),
    "few": ("evaluate --predictions HERE/answers.jsonl", "no prediction for 'r0', 'r2', 'r3'"),
    "its data": ("evaluate HERE/student --output HERE/rows.jsonl", "HERE/rows.jsonl holds the da"),
    "share": ("doctor --min-coverage 2", "min_coverage must be from 0 to 1, got 2.0"),
    "long": (f"losses {'u' * 5000}", "unknown loss 'uuuu"),
    "loss": ("losses uldd", "unknown loss 'uldd'. Did you mean 'uld'?"),
    # Comparisons.
    "twice": ("compare --losses sft,sft", "two methods are called 'sft'; leave one out"),
    "method": ("compare --losses uld:bogus=1", "uld has no setting 'bogus'; it has learning_rate"),
    "sweep": ("compare --sweep nope.kd_weight=1,2", "the sweep 'nope.kd_weight' names no method"),
    "seeds": ("compare --seed 4294967295 --seeds 2", "seed must lie between 0 and 4294967295, got"),
    "a run": ("compare --output HERE/done", "HERE/done is not empty and holds no comparison.json"),
    "no place": ("compare --output HERE/rows.jsonl", "HERE/rows.jsonl is a file; choose a folder"),
    "rows": ("compare --data HERE/third.jsonl", "third.jsonl line 3 is not JSON"),
    "needs": ("compare --losses gold --top-k 2", "gold needs whole rows of the teacher"),
    "no cache": ("compare --teacher-cache HERE/cut-shard", "logits-00000.safetensors is missing"),
    "form": ("compare --format xml", "'xml' is not one of 'table', 'markdown', 'json'"),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_named_in_one_sentence_and_touches_nothing(place, monkeypatch, case):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def out_of_reach(*arguments, **settings):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(loading.HfApi, "model_info", out_of_reach)
    text, message = (one.replace("HERE", str(place.folder)) for one in CASES[case])
    command, *options = text.split()
    before = contents(place.folder)
    result = invoke(*words_of(place, command, options))
    said = error_of(result)
    assert message in said
    assert result.exit_code in (1, 2)
    assert not said.startswith("unexpected")
    assert len(said) <= 1_000
    assert contents(place.folder) == before
