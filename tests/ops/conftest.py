"""Fixtures of the tests of operations."""

import pytest

from tests.ops.reading import READINGS, read_by


@pytest.fixture(params=[READINGS[0], READINGS[3]])
def reading(request, monkeypatch) -> str:
    """How rows are read: at once as on a CPU, or in small blocks as on a device."""
    read_by(monkeypatch, request.param)
    return request.param
