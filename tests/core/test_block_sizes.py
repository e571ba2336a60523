"""Blocks follow the cache of a CPU and the memory of a GPU, and a user's word before both."""

from types import SimpleNamespace

import pytest
import torch

from ctkd import block_sizes
from ctkd.block_sizes import VARIABLE, block_elements
from ctkd.errors import SettingError
from ctkd.rows import block_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delenv(VARIABLE, raising=False)
    block_sizes._found.cache_clear()
    yield
    block_sizes._found.cache_clear()


def write_cache(folder, index: int, level: str, size: str) -> None:
    place = folder / f"index{index}"
    place.mkdir()
    (place / "level").write_text(f"{level}\n")
    (place / "size").write_text(f"{size}\n")


@pytest.mark.parametrize(
    ("size", "elements"),
    [("512K", 1 << 17), ("64K", 1 << 16), ("2048K", 1 << 18), ("odd", 1 << 17)],
)
def test_a_cpu_s_second_cache(tmp_path, monkeypatch, size, elements):
    write_cache(tmp_path, 0, "1", "32K")
    write_cache(tmp_path, 1, "2", size)
    write_cache(tmp_path, 2, "3", "32768K")
    (tmp_path / "index3").mkdir()
    monkeypatch.setattr(block_sizes, "_CACHES", tmp_path)
    assert block_elements(CPU) == elements


@pytest.mark.parametrize(("threads", "elements"), [(1, 1 << 17), (3, 3 << 17), (64, 1 << 21)])
def test_threads_share_a_block(tmp_path, monkeypatch, threads, elements):
    write_cache(tmp_path, 0, "2", "512K")
    monkeypatch.setattr(block_sizes, "_CACHES", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert block_elements(CPU) == elements
    assert block_rows(4096, CPU) == elements >> 12
    # Wide rows: two for each thread.
    assert block_rows(1 << 20, CPU) == 2 * threads


@pytest.mark.parametrize(
    ("memory", "elements"), [(80 << 30, 41943040), (1 << 30, 1 << 22), (1 << 40, 1 << 26)]
)
def test_a_gpu_s_memory(monkeypatch, memory, elements):
    asked = []

    def properties(index):
        asked.append(index)
        return SimpleNamespace(total_memory=memory)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert block_elements(CUDA) == block_elements(CUDA) == elements
    assert asked == [1]


def test_what_a_user_says_goes_first(monkeypatch):
    monkeypatch.setenv(VARIABLE, "3000")
    assert block_elements(CPU) == block_elements(torch.device("meta")) == 3000
    assert block_rows(1000, CPU) == 3
    assert block_rows(5000, CPU) == 1


@pytest.mark.parametrize("given", ["0", "-5", "many", "1.5", ""])
def test_what_is_no_number_is_refused(monkeypatch, given):
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(SettingError, match=f"{VARIABLE} must be a whole number above 0.*{given!r}"):
        block_elements(CPU)
