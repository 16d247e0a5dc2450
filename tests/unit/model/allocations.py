"""Allocations and frees of a piece of work, as torch's own record of it counts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def allocations_of(work: Callable[[], T]) -> tuple[T, list[int]]:
    """The result of ``work()``, and in their order the bytes of each allocation (above zero) and free (below)."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # what earlier work left in reference cycles would be freed within, and counted against this one
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            result = work()
    finally:
        if collects:
            gc.enable()
    changes = (event for event in run.profiler.kineto_results.events() if event.name() == "[memory]")
    return result, [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
