"""The clock of a run's steps, whose figures plan later runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from veneer.train import callbacks
from veneer.train.callbacks import StepClock

ARGS = SimpleNamespace(gradient_accumulation_steps=2, device=torch.device("cpu"))


def ticked(steps: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Return the clock's entry of the log after steps of so many seconds and tokens."""
    now, tokens = 100.0, 1000
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = StepClock(lambda: tokens)
    for seconds, read in steps:
        clock.on_step_begin(ARGS, None, None)  # type: ignore[arg-type]
        now, tokens = now + seconds, tokens + read
        clock.on_step_end(ARGS, None, None)  # type: ignore[arg-type]
    return clock.results()


def test_a_micro_batch_is_timed_without_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(90.0, 700), (2.0, 10), (8.0, 30), (4.0, 20), (6.0, 40), (10.0, 50)]
    found = {"device": "cpu", "micro_batch": {"seconds": [2.0, 3.0, 4.0], "tokens": 15.0}}
    assert ticked(steps, monkeypatch) == found
    assert ticked(steps[:1], monkeypatch)["micro_batch"] == {"seconds": [45.0, 45.0, 45.0], "tokens": 350.0}
    assert ticked([], monkeypatch) == {}
