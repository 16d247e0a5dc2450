"""Memory given back: pages of a mapped file that nobody wrote, and never a page that somebody did."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch import program
from patience import wait_until
from veneer.model.memory.give_back import SMAPS, give_back

pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
N = 1_000_003


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in memory."""
    return sum(place.rss for place in psutil.Process().memory_maps(grouped=False) if place.path == str(file))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({name: torch.arange(N, dtype=torch.float32) * k for k, name in enumerate("abc", start=2)}, tmp_path / "w")
    return tmp_path / "w"


def read(tensors: Mapping[str, Tensor], file: Path, least: int) -> None:
    """Read tensors until so many bytes of their file are in memory: a system that is short of it takes some back."""
    wait_until(lambda: all(tensor.sum() > 0 for tensor in tensors.values()) and resident(file) > least)


def mapped(file: Path) -> nn.ParameterDict:
    """One of the tensors of a file, all of which were read."""
    tensors = load_file(file)
    read(tensors, file, 11 * N)
    return nn.ParameterDict({"b": nn.Parameter(tensors["b"])})


def test_pages_go_and_come_back(file: Path) -> None:
    model = mapped(file)
    give_back(model)
    assert resident(file) == 0
    assert torch.equal(model["b"], torch.arange(N, dtype=torch.float32) * 3)
    read(dict(model), file, 3 * N)
    assert resident(file) < 5 * N


def test_a_page_that_was_written_stays(file: Path) -> None:
    model = mapped(file)
    with torch.no_grad():
        model["b"][N // 2] = -7.0
    give_back(model)
    assert resident(file) > 5 * N
    assert model["b"][N // 2] == -7.0


def test_files_of_others_stay(file: Path) -> None:
    model = mapped(file)
    give_back(nn.Linear(3, 5))
    assert resident(file) > 5 * N
    assert model["b"][1] == 3.0


BETWEEN = """
import mmap, torch
from peak_memory import own_bytes
from torch import nn
from veneer.model.memory.give_back import give_back

others = [mmap.mmap(-1, 4096) for _ in range(10_007)]  # their list takes megabytes, as in a process that did much
blocks = [torch.ones(12_289) for _ in range(2_003)]
kept = blocks[::97]
del blocks
before = own_bytes()
give_back(nn.Linear(3, 5))
assert before - own_bytes() > 1_700 * 4 * 12_289, before - own_bytes()
assert all(block.sum() == 12_289 for block in kept)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc's malloc_trim")
def test_what_was_freed_between_blocks_in_use_goes() -> None:
    """In a process of its own: what other tests left behind would be listed, and lie among the blocks."""
    run = program(BETWEEN)
    assert run.returncode == 0, run.stderr
