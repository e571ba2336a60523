"""The list of planted faults fits the package, and what runs it tells caught from survived."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.listing import Fault, check, chosen, read_faults
from tests.faults.measuring import Copy, Result, measure
from tests.faults.table import Table

FAULTS = read_faults()


def test_every_fault_can_be_planted():
    assert check(FAULTS) == []
    for fault in FAULTS:
        assert fault.first and fault.wrong.endswith("."), fault.id


def test_ids_are_distinct():
    ids = [fault.id for fault in FAULTS]
    assert len(ids) == len(set(ids)) >= 70
    assert not set(ids) & {fault.area for fault in FAULTS}


FAULT = Fault(
    id="half",
    wrong="Two is three.",
    file="ctkd/half.py",
    old="x / 2",
    new="x / 3",
    first=["tests/test_half.py"],
    area="arithmetic",
)
OTHERS = {
    "caught": FAULT,
    "survived": replace(FAULT, old="+ 0", new="- 0"),
    "error": replace(FAULT, old="def half", new="def third"),
    "timeout": replace(FAULT, old="return", new="while True:\n        pass\n    return"),
}


@pytest.fixture
def project(tmp_path) -> Path:
    root = tmp_path / "project"
    (root / "ctkd").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "ctkd" / "half.py").write_text("def half(x):\n    return x / 2 + 0\n")
    (root / "tests" / "test_half.py").write_text(
        "from ctkd.half import half\n\n\ndef test_half():\n    assert half(4) == 2\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_what_becomes_of_a_fault(project, tmp_path):
    copy = Copy(project, tmp_path / "copy")
    found = {
        outcome: measure(copy, fault, timeout=3.0 if outcome == "timeout" else 60.0)
        for outcome, fault in OTHERS.items()
    }
    assert {name: result.outcome for name, result in found.items()} == {
        name: name for name in OTHERS
    }
    assert found["caught"].by == "tests/test_half.py::test_half"
    # Nothing is left of them, in the copy or in compiled code.
    assert copy.run(FAULT.first, 60.0).outcome == "survived"
    assert check([FAULT], project) == []


def test_what_keeps_a_fault_from_being_planted(project):
    for changes, told in (
        ({"old": "x / 4"}, "occurs 0 times"),
        ({"old": "half", "file": "tests/test_half.py"}, "occurs 4 times"),
        ({"new": "x (/"}, "invalid syntax"),
        ({"file": "ctkd/third.py"}, "No such file"),
        ({"first": ["tests/test_third.py"]}, "there is no tests/test_third.py"),
    ):
        (problem,) = check([replace(FAULT, **changes)], project)
        assert told in problem


def test_faults_are_chosen_by_id_and_area():
    first = FAULTS[0]
    assert chosen(FAULTS, [first.id]) == [first]
    assert chosen(FAULTS, [first.area]) == [one for one in FAULTS if one.area == first.area]
    assert chosen(FAULTS, []) == FAULTS
    with pytest.raises(ValueError, match="named nothing"):
        chosen(FAULTS, ["nothing"])


def test_the_table_keeps_what_is_not_measured_again(tmp_path):
    path, other = tmp_path / "results.md", replace(FAULT, id="other", wrong="One | two.")
    both = [FAULT, other]
    for outcomes, lost in ((("caught", "survived"), []), (("survived",), ["half"])):
        table = Table(path, both, commit="0123abc", versions="Python")
        for fault, outcome in zip(both, outcomes, strict=False):
            table.add(Result(fault=fault, outcome=outcome, by="a test", seconds=1.0))
        assert table.lost() == lost
    text = path.read_text()
    assert "2 survived, of 2." in text
    assert "| other | One / two. | survived | a test | 1 | 0123abc |" in text
