"""Tests of compiled loops, which there are only with numba."""

try:
    import numba  # noqa: F401
except ImportError:
    collect_ignore_glob = ["*.py"]
