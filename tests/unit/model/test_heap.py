"""What is freed within training stays with the process, is taken again without a page fault, and goes at the end."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from veneer.model.heap import freed_memory_kept, kept_bytes
from veneer.model.memory import available_bytes

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt"
)
N_PAGES = 20_011
N = N_PAGES * 4096 // 4


def faults() -> int:
    """Pages that the system made while a block of `N` values was taken, written and freed."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(N)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_a_freed_block_is_taken_again_and_goes_at_the_end() -> None:
    faults()
    assert faults() > 0.9 * N_PAGES
    with freed_memory_kept():
        faults()
        assert faults() < 0.05 * N_PAGES
        held = resident()
    assert held - resident() > 0.9 * 4096 * N_PAGES
    assert faults() > 0.9 * N_PAGES


def test_what_is_kept_counts_as_available() -> None:
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


def test_two_threads_enter_and_leave_by_turns() -> None:
    first, second = freed_memory_kept(), freed_memory_kept()
    with ThreadPoolExecutor(1) as pool:
        first.__enter__()
        pool.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        faults()
        assert faults() < 0.05 * N_PAGES
        pool.submit(second.__exit__, None, None, None).result()
    faults()
    assert faults() > 0.9 * N_PAGES


def test_within_another_nothing_goes() -> None:
    with freed_memory_kept():
        faults()
        with freed_memory_kept():
            faults()
        assert faults() < 0.05 * N_PAGES


def test_an_error_ends_it() -> None:
    with contextlib.suppress(KeyError), freed_memory_kept():
        raise KeyError("step")
    faults()
    assert faults() > 0.9 * N_PAGES
