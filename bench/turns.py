"""Several ways to compute one thing, timed in turns, and a table of what each took beside one of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bench.report import done, working


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one step: of the wall, and of the process's CPU, which other work on the machine disturbs less."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Timing:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Timing) -> Timing:
        return Timing(self.wall - start.wall, self.cpu - start.cpu)


def median(timings: list[Timing]) -> Timing:
    return Timing(statistics.median(t.wall for t in timings), statistics.median(t.cpu for t in timings))


def timed(run: Callable[[], object]) -> Timing:
    """The time of one call."""
    start = Timing.now()
    run()
    return Timing.now().since(start)


def in_turns(ways: Mapping[str, Callable[[], Timing]], repeats: int) -> dict[str, Timing]:
    """Medians of each way's own timings, one after the other ``repeats`` times behind a turn that is not counted.

    A slow minute of the machine so hits all of them.
    """
    found: dict[str, list[Timing]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            working(f"turn {turn} of {repeats}, {name}")
            timing = way()
            if turn:
                found[name].append(timing)
    done()
    return {name: median(timings) for name, timings in found.items()}


@dataclass(frozen=True, slots=True)
class Goal:
    """A way is to take at most ``times`` as long as the way of another ``name``."""

    name: str
    times: float


def show(title: str, timings: Mapping[str, Timing], beside: str, goals: Mapping[str, Goal] | None = None) -> None:
    """Print a table: seconds, and how many times as long as the way named ``beside``; a goal with what was reached."""
    width = max(map(len, timings))
    print(f"\n{title}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'':{width}}  {'wall s':>8} {'CPU s':>8}  times as long as {beside}: wall, CPU")
    for name, timing in timings.items():
        base = timings[beside]
        line = f"{name:{width}}  {timing.wall:8.3f} {timing.cpu:8.3f}  {timing.wall / base.wall:6.2f}x "
        line += f"{timing.cpu / base.cpu:6.2f}x"
        goal = (goals or {}).get(name)
        if goal is not None:
            reached = timing.wall / timings[goal.name].wall
            line += f"  goal: at most {goal.times:.2f} of {goal.name}; {reached:.2f}"
            line += " reached" if reached <= goal.times else " missed"
        print(line, flush=True)


def product_time(size: int, dtype: torch.dtype) -> Timing:
    """Return the seconds of one floating-point operation in a product of square matrices by torch."""
    a, b = torch.randn(2, size, size).to(dtype)
    a @ b
    times, n_operations = 3, 2 * size**3
    taken = timed(lambda: [a @ b for _ in range(times)])
    return Timing(taken.wall / (times * n_operations), taken.cpu / (times * n_operations))


def faster_dtype() -> torch.dtype:
    """bf16 or float32, whichever this CPU multiplies faster; small matrices tell, as bf16 takes minutes on some."""
    return min((torch.float32, torch.bfloat16), key=lambda dtype: product_time(256, dtype).wall)
