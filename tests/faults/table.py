"""The table of what became of each fault, kept in `results.md`."""

import time
from collections import Counter
from pathlib import Path

from tests.faults.listing import Fault
from tests.faults.measuring import Result

HEAD = """# Planted faults

Written by `python -m tests.faults --results tests/faults/results.md`; the faults are in the
`*.toml` files beside this one. Tests were run with -x, so the test named is the first that failed.
"""
_COLUMNS = ("fault", "what is wrong", "outcome", "by", "seconds", "commit", "date")


class Table:
    """Rows by fault; those of faults that are not measured now are kept."""

    def __init__(self, path: Path, faults: list[Fault], *, commit: str, versions: str) -> None:
        self.path, self.faults = path, faults
        self.commit, self.versions = commit, versions
        self.rows = _read(path)
        self.before = {name: row[2] for name, row in self.rows.items()}

    def add(self, result: Result) -> None:
        fault = result.fault
        day = time.strftime("%Y-%m-%d")
        cells = (fault.id, fault.wrong, result.outcome, result.by, f"{result.seconds:.0f}",
                 self.commit, day)  # fmt: skip
        self.rows[fault.id] = [_cell(one) for one in cells]
        self.write()

    def lost(self) -> list[str]:
        """Faults that were caught before and survive now."""
        return [
            name
            for name, row in self.rows.items()
            if row[2] == "survived" and self.before.get(name) == "caught"
        ]

    def write(self) -> None:
        names = {fault.id for fault in self.faults}
        counts = Counter(row[2] for name, row in self.rows.items() if name in names)
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        lines = [
            HEAD,
            f"Last measured with {self.versions}.\n",
            f"{told}, of {len(self.faults)}.\n",
        ]
        if argued := [one for one in self.faults if self._survived(one)]:
            lines += ["## What survived\n"]
            lines += [f"- `{one.id}`: {one.argued or 'a gap in the tests.'}" for one in argued]
            lines += [""]
        for area in dict.fromkeys(fault.area for fault in self.faults):
            lines += [f"## {area}\n", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
            names = [fault.id for fault in self.faults if fault.area == area]
            lines += [_line(self.rows[name]) for name in names if name in self.rows]
            lines += [""]
        self.path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")

    def _survived(self, fault: Fault) -> bool:
        return fault.id in self.rows and self.rows[fault.id][2] == "survived"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _read(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(_COLUMNS) and cells[0] not in (_COLUMNS[0], "---"):
            rows[cells[0]] = cells
    return rows
