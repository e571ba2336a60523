"""A comparison that is killed again and again ends like one that is not, and repeats nothing."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ctkd.compare.records import Record
from ctkd.compare.run.folder import read_records
from tests.distill.tiny_runs import Workplace

ROOT = Path(__file__).parents[3]
STEPS = 3

# Where each process dies: the second step, say, that it makes itself.
MOMENTS = [
    ("answer", 2),  # of the teacher, while the cache is made
    ("record", 1),  # the untrained student was measured
    ("first ctkd.json", 1),
    ("step", 2),
    ("step", 1),
    ("finished", 1),  # trained to the end, not measured
    ("answer", 2),  # of a trial
    ("half a record", 1),
    ("recorded", 1),
    ("deleting weights", 1),
    ("step", 3),  # all steps done, none of them saved
    ("answer", 1),  # of a winner, on the test split
]


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is left of a chain of processes."""

    processes: list[str]
    records: dict[str, Record]
    log: list[list]

    def counted(self, what: str) -> Counter:
        return Counter(json.dumps(detail) for kind, detail in self.log if kind == what)


def chain(place: Workplace, output: str, moments: list) -> Ended:
    settings = {
        "losses": ["sft", "uld"], "sweep": {"learning_rate": [1e-3, 1e-2]},
        "student": str(place.student), "teacher": str(place.teacher), "data": str(place.rows),
        "task": "text", "max_steps": STEPS, "save_steps": 1, "logging_steps": 1,
        "max_new_tokens": 3, "device": "cpu", "output": str(place.folder / output),
    }  # fmt: skip
    log, told = place.folder / f"{output}.log", place.folder / f"{output}.json"
    told.write_text(
        json.dumps({"log": str(log), "attempts": [[settings, moment] for moment in moments]})
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.compare.run.interrupted", str(told)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    records = read_records(place.folder / output)
    return Ended(done.stdout.split("\n")[:-1], records, [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def straight(place) -> Ended:
    return chain(place, "straight", [None])


@pytest.fixture(scope="module")
def killed(place) -> Ended:
    return chain(place, "killed", [*MOMENTS, None])


def measured(records: dict[str, Record]) -> dict[str, dict]:
    """All of the records but time, memory and the folder of the run."""
    found = {}
    for key, one in records.items():
        kept = dataclasses.asdict(one)
        for name in ("seconds", "seconds_per_step", "peak_memory"):
            del kept[name]
        for entry in kept["history"]:
            entry.pop("seconds", None)
        found[key] = kept
    return found


def test_every_process_died_where_it_was_told_to(straight, killed):
    assert straight.processes == ["code 0"]
    assert killed.processes == [*["killed"] * len(MOMENTS), "code 0"]
    assert [detail for kind, detail in killed.log if kind == "killed"] == [
        what for what, _ in MOMENTS
    ]


def test_the_records_are_the_same(straight, killed):
    assert measured(killed.records) == measured(straight.records)
    assert list(killed.records) == list(straight.records)
    stages = Counter(one.stage for one in straight.records.values())
    assert stages == {"reference": 2, "trial": 4, "final": 2}


def test_no_step_is_made_twice_but_the_interrupted(straight, killed):
    once, again = straight.counted("step"), killed.counted("step")
    assert set(once.values()) == {1}
    assert len(once) == 4 * STEPS
    assert again.keys() == once.keys()
    interrupted = [what for what, _ in MOMENTS].count("step")
    assert sum(again.values()) == sum(once.values()) + interrupted


def test_no_prompt_is_answered_twice_but_those_of_the_interrupted_group(straight, killed):
    once, again = straight.counted("answer"), killed.counted("answer")
    assert set(once.values()) == {1}
    assert again.keys() == once.keys()
    # What a process had answered when it died was not on disk yet.
    lost = sum(number for what, number in MOMENTS if what == "answer")
    assert sum(again.values()) == sum(once.values()) + lost


def test_nothing_is_left_behind(place, straight, killed):
    for name in ("straight", "killed"):
        folder = place.folder / name
        assert not list(folder.rglob("*.partial"))
        assert not list(folder.glob("runs/*/checkpoint-*"))
        assert not list(folder.glob("runs/*/*.safetensors"))
        assert len(list(folder.glob("runs/*"))) == 4


def test_a_folder_that_was_moved_goes_on_where_it_was(place, straight):
    first = chain(place, "here", [("step", 2)])
    assert first.processes == ["killed"]
    (place.folder / "here").rename(place.folder / "there")
    moved = chain(place, "there", [None])
    assert moved.processes == ["code 0"]
    assert measured(moved.records) == measured(straight.records)
    # The first step was saved, the second was not.
    assert sum(moved.counted("step").values()) == 4 * STEPS - 1
