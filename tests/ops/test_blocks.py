"""Blocks follow the memory of a device, and a user's word before it."""

from types import SimpleNamespace

import pytest
import torch

from ctkd.errors import SettingError
from ctkd.ops.blocks import VARIABLE, block_rows, head_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def no_word_of_the_user(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_cpu_has_as_many_rows_as_its_caches_hold():
    assert block_rows(1 << 10, CPU) == 1 << 8
    assert block_rows(1 << 30, CPU) == block_rows((1 << 18) + 1, CPU) == 1
    # Rows without columns are no reason to divide by 0.
    assert block_rows(0, CPU) == 1 << 18


@pytest.mark.parametrize(
    ("memory", "elements"), [(80 << 30, 41943040), (1 << 30, 1 << 22), (1 << 40, 1 << 26)]
)
def test_a_gpu_s_memory(monkeypatch, memory, elements):
    asked, free = [], memory

    def properties(index):
        asked.append(index)
        return SimpleNamespace(total_memory=memory)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - (1 << 20), memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 21)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert block_rows(1 << 10, CUDA) == elements >> 10
    assert asked == [1]
    # A head's product is worthwhile from so many rows on.
    assert head_rows(1 << 17, CUDA) == min(1 << 10, memory >> 22)
    assert head_rows(1 << 17, CUDA, 1) == max(elements, 1 << 24) >> 17
    # What others have taken is not there; what torch holds and does not use is.
    free = 1 << 25
    assert block_rows(1 << 10, CUDA) == head_rows(1 << 10, CUDA) == 1 << 10
    # A graph that is captured may not ask.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert block_rows(1 << 10, CUDA) == elements >> 10


def test_a_head_computes_enough_rows_for_a_product():
    assert head_rows(1 << 14, CPU) == 1 << 10
    assert head_rows(1 << 25, CPU) == 1
    assert head_rows(1 << 25, torch.device("meta")) == 1 << 10


def test_what_a_user_says_goes_first(monkeypatch):
    monkeypatch.setenv(VARIABLE, "3000")
    for device in (CPU, torch.device("meta")):
        assert block_rows(1000, device) == 3
        assert block_rows(5000, device) == 1
        assert head_rows(1000, device) == 3


def test_what_is_no_number_is_refused(monkeypatch):
    for given in ("0", "-5", "many", "1.5", ""):
        monkeypatch.setenv(VARIABLE, given)
        message = f"{VARIABLE} must be a whole number above 0.*{given!r}"
        with pytest.raises(SettingError, match=message):
            block_rows(1, CPU)
