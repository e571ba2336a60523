"""A comparison that is killed and moved ends like one that is not, and repeats nothing."""

import dataclasses
import json
from collections import Counter

import pytest

from ctkd.compare.records import Record
from ctkd.compare.run.folder import read_records
from tests.compare.run import interrupted

pytestmark = pytest.mark.slow

STEPS = 3

# Where each process dies: the second step, say, that it makes itself.
MOMENTS = [
    ("answer", 2),  # of the teacher, while the cache is made
    ("step", 2),
    ("finished", 1),  # trained to the end, not measured
    ("half a record", 1),
    ("deleting weights", 1),
    ("step", 3),  # all steps done, none of them saved
]
# Before this process the folder is moved.
MOVED = 2


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is left of a chain of processes."""

    processes: list[str]
    records: dict[str, Record]
    log: list[list]

    def counted(self, what: str) -> Counter:
        return Counter(json.dumps(detail) for kind, detail in self.log if kind == what)


@pytest.fixture(scope="module")
def chains(place, forks) -> dict[str, Ended]:
    """A comparison that nothing stops, and one that is killed at each of the moments."""
    settings = {
        "losses": ["sft", "uld"], "sweep": {"learning_rate": [1e-3, 1e-2]},
        "student": str(place.student), "teacher": str(place.teacher), "data": str(place.rows),
        "task": "text", "max_steps": STEPS, "save_steps": 1, "logging_steps": 1,
        "max_new_tokens": 3, "device": "cpu",
    }  # fmt: skip
    moments = {"straight": [None], "killed": [*MOMENTS, None]}
    attempts = {
        name: [
            {
                "settings": {**settings, "output": str(folder if number >= MOVED else first)},
                "moment": moment,
                "log": str(place.folder / f"{name}.log"),
                "move": [str(first), str(folder)] if number == MOVED else None,
            }
            for number, moment in enumerate(chosen)
        ]
        for name, chosen in moments.items()
        for folder in [place.folder / name]
        for first in [folder if name == "straight" else place.folder / "elsewhere"]
    }
    output, ends = place.folder / "output", place.folder / "ends"
    every = [*attempts["straight"], *attempts["killed"]]
    assert forks.run(interrupted.main, every, str(ends), output=output) == 0, output.read_text()
    ended = json.loads(ends.read_text())
    found = {}
    for name, part in (("straight", ended[:1]), ("killed", ended[1:])):
        lines = (place.folder / f"{name}.log").read_text().splitlines()
        records = read_records(place.folder / name)
        found[name] = Ended(part, records, [json.loads(line) for line in lines])
    return found


@pytest.fixture
def straight(chains) -> Ended:
    return chains["straight"]


@pytest.fixture
def killed(chains) -> Ended:
    return chains["killed"]


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
