"""The list of planted faults: small changes of the package that some test must catch.

Each ``*.toml`` file beside this one is an area. A fault that survives is either argued in its
``argued`` (why no test can tell it from the right code, or why none should) or a gap.
What is not planted any more is in ``removed.md``.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    id: str
    wrong: str
    file: str
    old: str
    new: str
    first: list[str]
    area: str
    argued: str = ""

    def planted(self, text: str) -> str:
        """The faulty text of the file."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.id}: its old snippet occurs {found} times in {self.file}")
        return text.replace(self.old, self.new)


def read_faults(folder: Path = Path(__file__).parent) -> list[Fault]:
    return [
        Fault(**entry, area=path.stem)
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    ]


def chosen(faults: list[Fault], names: list[str]) -> list[Fault]:
    """Those of the named areas and ids, all of them where nothing is named."""
    known = {name for fault in faults for name in (fault.id, fault.area)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no fault or area named {', '.join(unknown)}")
    return [fault for fault in faults if not names or fault.id in names or fault.area in names]


def check(faults: list[Fault], root: Path = ROOT) -> list[str]:
    """What keeps faults from being planted: each must be in its file exactly once."""
    problems = []
    for fault in faults:
        try:
            text = (root / fault.file).read_text(encoding="utf-8")
            compile(fault.planted(text), fault.file, "exec")
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"{fault.id}: {error}")
        missing = [test for test in fault.first if not (root / test.split("::")[0]).exists()]
        problems += [f"{fault.id}: there is no {test}" for test in missing]
    return problems
