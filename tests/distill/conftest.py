"""What holds for all tests of runs."""

from collections.abc import Iterator

import pytest

from tests.distill.tiny_runs import undrawn


@pytest.fixture(scope="session", autouse=True)
def curves_are_not_drawn() -> Iterator[None]:
    """A test of what a run leaves behind draws them itself."""
    with undrawn():
        yield
