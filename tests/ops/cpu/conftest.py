"""Tests of compiled loops, which there are only with numba."""

from importlib import import_module

try:
    import_module("numba")
except ImportError:
    collect_ignore_glob = ["*.py"]
