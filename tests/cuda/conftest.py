"""Tests that need a CUDA device, collected where there is one.

CTKD_TEST_DEVICE=cpu collects them without: on tiny rows, those that capture or use streams skipped.
"""

import torch

from tests.cuda.device import DEVICE

if DEVICE.type == "cuda" and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
