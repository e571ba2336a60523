"""Plants faults in copies of the working tree and says which of them tests catch.

python -m tests.faults [ID | AREA ...] [--jobs N] [--whole] [--results FILE]
"""

import argparse
import queue
import sys
import tempfile
import threading
from pathlib import Path

from tests.faults.listing import ROOT, check, chosen, read_faults
from tests.faults.measuring import Copy, commit_of, measure, versions
from tests.faults.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ID|AREA", help="default: all faults")
    parser.add_argument("--jobs", type=int, default=1, help="copies to work in at a time")
    parser.add_argument("--whole", action="store_true", help="run the whole suite on survivors")
    parser.add_argument("--results", type=Path, help="a table to keep, such as results.md here")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for first tests")
    parser.add_argument("--survivors", action="store_true", help="only those in --results")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a fault")
    given = parser.parse_args()
    everything = read_faults()
    try:
        faults = chosen(everything, given.names)
    except ValueError as error:
        parser.error(str(error))
    if problems := check(faults):
        sys.exit("\n".join(problems))
    path = given.results or Path(tempfile.gettempdir()) / "faults.md"
    table = Table(path, everything, commit=commit_of(ROOT), versions=versions())
    if given.survivors:
        faults = [fault for fault in faults if table.before.get(fault.id) == "survived"]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copies = [Copy(ROOT, Path(folder) / str(number)) for number in range(given.jobs)]
        if not given.trust:
            tests = sorted({test for fault in faults for test in fault.first})
            clean = copies[0].run(tests, 7200.0)
            print(f"without a fault: {clean.outcome} {clean.by} {clean.seconds:.0f} s", flush=True)
            if clean.outcome != "survived":
                return 2
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for number, fault in enumerate(faults, 1):
            waiting.put((number, fault))
        lock = threading.Lock()

        def work(copy: Copy) -> None:
            while True:
                try:
                    number, fault = waiting.get_nowait()
                except queue.Empty:
                    return
                result = measure(copy, fault, timeout=given.timeout, whole=given.whole)
                with lock:
                    told = f"{result.outcome:8} {result.seconds:5.0f} s  {fault.id}  {result.by}"
                    print(f"{number}/{len(faults)} {told}", flush=True)
                    table.add(result)

        threads = [threading.Thread(target=work, args=(copy,)) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(f"the table is in {path}")
    if lost := table.lost():
        print(f"caught before, not now: {', '.join(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
