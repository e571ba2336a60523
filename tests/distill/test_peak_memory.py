"""The peak is that of the stretch measured, not of what came before."""

import sys

import numpy as np
import pytest
import torch

from ctkd.distill import peak_memory
from ctkd.distill.peak_memory import PeakMemory

SIZE = 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the mark")
def test_what_is_held_for_a_moment_counts_and_what_came_before_does_not():
    before = np.ones(2 * SIZE, dtype=np.uint8)
    del before
    peak = PeakMemory(torch.device("cpu"))
    low = peak.read()
    assert low is not None
    held = np.ones(SIZE, dtype=np.uint8)
    del held
    high = peak.read()
    assert SIZE * 0.9 < high - low < SIZE * 1.5
    assert abs(PeakMemory(torch.device("cpu")).read() - low) < SIZE // 2


def test_where_it_cannot_be_measured_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_RESET", tmp_path / "none" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).read() is None
    monkeypatch.setattr(peak_memory, "_RESET", tmp_path / "clear_refs")
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name: python\n")
    assert PeakMemory(torch.device("cpu")).read() is None
    (tmp_path / "status").write_text("Name: python\nVmHWM:\t  12 kB\n")
    assert PeakMemory(torch.device("cpu")).read() == 12 * 1024


def test_a_gpu_is_asked_for_what_torch_holds(monkeypatch):
    asked = []
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda one: asked.append(one) or 7)
    assert PeakMemory(device).read() == 7
    assert asked == [device, device]
