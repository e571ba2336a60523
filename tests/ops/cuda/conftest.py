"""Tests of kernels for CUDA by Triton's interpreter, in a process that interprets nothing else."""

import importlib.util
import os

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
