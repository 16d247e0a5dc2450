"""What is freed within training stays with the process, is taken again without a page fault, and goes at the end."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import psutil
import pytest
import torch

from veneer.model.heap import freed_memory_kept

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
