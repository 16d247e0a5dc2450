"""Memory that training frees stays with the process, is taken again without a page fault, and goes at the end.

Each case is a process of its own: glibc moves a main thread to another heap once an allocation of it has failed.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from launch import program
from veneer.model.memory import heap

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt"
)
COMMON = """
import contextlib, resource
from concurrent.futures import ThreadPoolExecutor
import torch
from peak_memory import own_bytes
from veneer.model.memory.heap import freed_memory_kept, freed_memory_returned, kept_bytes
from veneer.model.memory.available import available_bytes

N_PAGES = 20_011
N = N_PAGES * 4096 // 4

def faults():  # pages that the system makes while a block of N values is taken, written and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(N)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def kept():
    faults()
    return faults() < 0.05 * N_PAGES

def given_back():
    faults()
    return faults() > 0.9 * N_PAGES

"""
CASES = {
    "a block is taken again and goes at the end": """
assert given_back()
with freed_memory_kept():
    assert kept()
    held = own_bytes()
assert held - own_bytes() > 0.9 * 4096 * N_PAGES
assert given_back()
""",
    "within another nothing goes": """
with freed_memory_kept():
    with freed_memory_kept():
        assert kept()
    assert faults() < 0.05 * N_PAGES
assert given_back()
""",
    "for a while all goes": """
with freed_memory_returned():
    assert given_back()
with freed_memory_kept():
    assert kept()
    held = own_bytes()
    with contextlib.suppress(KeyError), freed_memory_returned():
        with freed_memory_returned():
            assert held - own_bytes() > 0.9 * 4096 * N_PAGES
            assert given_back()
        assert given_back()
        raise KeyError("evaluation")
    assert kept()
assert given_back()
""",
    "an error ends it": """
with contextlib.suppress(KeyError), freed_memory_kept():
    raise KeyError("step")
assert given_back()
""",
    "two threads enter and leave by turns": """
first, second = freed_memory_kept(), freed_memory_kept()
with ThreadPoolExecutor(1) as pool:
    first.__enter__()
    pool.submit(second.__enter__).result()
    first.__exit__(None, None, None)
    assert kept()
    pool.submit(second.__exit__, None, None, None).result()
assert given_back()
""",
    "what is kept counts as available": """
device = torch.device("cpu")
assert kept_bytes() == 0
with freed_memory_kept():
    block = torch.ones(N)
    taken = available_bytes(device)
    assert kept_bytes() < 0.1 * 4 * N
    del block
    assert 0.95 * 4 * N < kept_bytes() < 1.2 * 4 * N
    assert available_bytes(device) - taken > 0.5 * 4 * N  # others take and free too
assert kept_bytes() == 0
""",
    "what was given back in between is not kept": """
with freed_memory_kept():
    beside = [torch.ones(N), torch.ones(7)]  # the small one stays behind the block: the heap's end cannot go
    del beside[0]
    assert kept_bytes() > 0.9 * 4 * N
    with freed_memory_returned():
        assert kept_bytes() == 0
    assert kept_bytes() < 0.1 * 4 * N
    faults()
    assert 0.9 * 4 * N < kept_bytes() < 1.2 * 4 * N
""",
}


@pytest.mark.parametrize("case", CASES)
def test_freed_memory_is_kept_within_training(case: str) -> None:
    run = program(COMMON + CASES[case])
    assert run.returncode == 0, run.stderr


def test_blocks_stay_mapped_whatever_else_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []
    monkeypatch.setattr(heap, "_set", wanted.append)
    with heap.blocks_mapped(), heap.freed_memory_kept(), heap.freed_memory_returned():
        assert heap.kept_bytes() == 0
    with heap.freed_memory_kept():
        with heap.blocks_mapped():
            assert heap.kept_bytes() == 0
        assert wanted == [heap.MAPPED, heap.USUAL, heap.KEPT, heap.MAPPED, heap.KEPT]
