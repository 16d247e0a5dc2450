"""Seconds and bytes of a call: by events on a GPU, and without the host where the call can be captured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM, ROUNDS = 3, 15
Call = Callable[[], Any]


def seconds_of(call: Call, device: torch.device, rounds: int = ROUNDS) -> float:
    """The median seconds of a call, the host's time in it."""
    return in_turns([call], device, rounds)[0]


def in_turns(calls: list[Call], device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """The median seconds of calls that take turns, so that a slow minute hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + WARM):  # the first compile and warm up
        for taken, call in zip(times, calls, strict=True):
            seconds = _seconds(call, device)
            if number >= WARM:
                taken.append(seconds)
    return [statistics.median(taken) for taken in times]


def _seconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def replayed(call: Call, device: torch.device, rounds: int = ROUNDS) -> float | None:
    """The median seconds of a call without the host: ten replays of its graph. None if it cannot be captured."""
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it reads a value on the host, or copies from memory that is not pinned
        torch.cuda.synchronize()
        return None

    def replays() -> None:
        for _ in range(10):
            graph.replay()

    return seconds_of(replays, device, rounds) / 10


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """The number of bytes held at most above those at the start; 0 where the device does not count them."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before
