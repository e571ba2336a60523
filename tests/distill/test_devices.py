"""The peak is that of the stretch measured, not of what came before."""

import mmap
import platform
import sys

import pytest
import torch

from ctkd.distill import devices as peak_memory
from ctkd.distill.devices import PeakMemory

SIZE = 64 << 20


def hold(size: int) -> None:
    """Use memory straight from the system: what the C library kept of earlier work is no more."""
    with mmap.mmap(-1, size) as held:
        for start in range(0, size, mmap.PAGESIZE):
            held[start] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the mark")
def test_what_is_held_for_a_moment_counts_and_what_came_before_does_not():
    hold(2 * SIZE)
    peak = PeakMemory(torch.device("cpu"))
    low = peak.read()
    assert low is not None
    hold(SIZE)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_what_was_freed_is_given_back(forks, tmp_path):
    # Where much was freed before, what is freed here may lie among it.
    process = forks.start(give_back_and_look, output=tmp_path / "output")
    assert forks.wait(process) == 0, (tmp_path / "output").read_text()


def give_back_and_look() -> None:
    block = 64 << 10
    # What stays between the blocks keeps the C library from giving them back by itself.
    held = [(bytearray(block), bytearray(1024)) for _ in range(SIZE // block)]
    between = [small for _, small in held]
    del held
    before = PeakMemory(torch.device("cpu")).read()
    peak_memory.give_back_freed_memory()
    assert before - PeakMemory(torch.device("cpu")).read() > SIZE // 2
    del between


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_without_glibc_nothing_is_given_back_and_nothing_fails(monkeypatch, missing):
    def library(name):
        raise missing

    monkeypatch.setattr(peak_memory.ctypes, "CDLL", library)
    peak_memory.give_back_freed_memory()
