"""Two ways to compute one thing, timed in turns, beside the bound that this machine sets for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass(frozen=True)
class Pair:
    """``moved`` bytes are read or written and ``flops`` computed, at the least, in one call of either side."""

    name: str
    theirs: Run
    ours: Run
    moved: int
    flops: int


@dataclass(frozen=True)
class Rates:
    """Bytes and floating-point operations a second."""

    moved: float
    flops: float

    def bound_ms(self, pair: Pair) -> float:
        return max(pair.moved / self.moved, pair.flops / self.flops) * 1e3


def measure_rates(copied: Tensor, left: Tensor, right: Tensor) -> Rates:
    """The rates of a copy of one tensor and of the product of two (rows, depth) and (columns, depth)."""
    target = torch.empty_like(copied)
    copying, multiplying = lambda: target.copy_(copied), lambda: left @ right.T
    seconds = [statistics.median(best_ms(run, 10) for _ in range(5)) / 1e3 for run in (copying, multiplying)]
    return Rates(2 * copied.nbytes / seconds[0], 2 * left.shape[0] * right.numel() / seconds[1])


def alternate(pair: Pair, repeats: int, calls: int) -> tuple[float, float]:
    """Median milliseconds of theirs and ours, taken in turns, so that a slow minute of the machine hits both."""
    sides = (pair.theirs, pair.ours)
    for run in sides:
        run()
    times = [[best_ms(run, calls) for run in sides] for _ in range(repeats)]
    theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return theirs, ours


def best_ms(run: Run, calls: int) -> float:
    """Milliseconds a call, the best of a few in a row."""
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e3
