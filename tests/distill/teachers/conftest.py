"""Fixtures of teacher caches of small models."""

import pytest

from tests.distill.tiny_caches import CachePlace


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> CachePlace:
    return CachePlace(tmp_path_factory.mktemp("place"))
