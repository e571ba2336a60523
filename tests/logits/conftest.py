"""Fixtures of the tests of logits."""

import gc
from collections.abc import Iterator

import pytest

from ctkd.logits.sources import HeadRows, TensorRows
from tests.logits.cases import ENGINES, Engine
from tests.ops.reading import read_by


@pytest.fixture
def engine(request, monkeypatch) -> Engine:
    """A dtype with the backend that it has, and a way of reading rows; one of `ENGINES`."""
    engine = ENGINES[request.param]
    read_by(monkeypatch, engine.reading)
    return engine


@pytest.fixture
def passes(monkeypatch) -> list[object]:
    """Sources that were worked through backward, one entry for each time."""
    done: list[object] = []
    for kind in (TensorRows, HeadRows):

        def backward(self, *arguments, original=kind.backward):
            done.append(self)
            return original(self, *arguments)

        monkeypatch.setattr(kind, "backward", backward)
    return done


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
