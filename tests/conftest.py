"""What holds for all tests."""

import os

from ctkd.cache_folder import cache_dir
from tests.machines import this_machine

# Many tests have a cache folder of their own. Compiled loops are kept in one place all the same,
# also by processes that tests start. numba reads this when it is imported.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "tests"))


def pytest_report_header() -> str:
    """The machine, because vector extensions and threads change the last digits of results."""
    return f"cpu: {this_machine()}"
