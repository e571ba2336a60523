"""What holds for all tests of runs."""

from collections.abc import Iterator

import pytest

from tests.distill.tiny_runs import undrawn


@pytest.fixture(scope="session", autouse=True)
def curves_are_not_drawn() -> Iterator[None]:
    """One test has them drawn."""
    with undrawn():
        yield
