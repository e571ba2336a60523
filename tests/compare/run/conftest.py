"""Fixtures of comparisons on small models."""

import pytest

from tests.distill.conftest import curves_are_not_drawn as curves_are_not_drawn
from tests.distill.tiny_runs import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("place"))
