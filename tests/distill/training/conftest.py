"""Fixtures of training runs on small models."""

import pytest

from tests.distill.tiny_runs import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("place"))
