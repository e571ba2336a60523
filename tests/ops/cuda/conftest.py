"""These tests run in a process of their own: TRITON_INTERPRET=1, set before triton is imported."""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*"]
