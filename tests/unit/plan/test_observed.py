"""Seconds of earlier runs, for the plans of later ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.plan import observed
from veneer.plan.observed import flops_a_second, remember
from veneer.plan.time import seconds_by, seconds_like


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "model": "base", "task": "sft", "method": "lora", "quantization": "none", "path": "fused", "parameters": 97,
        "batch": {"rows": 2, "length": 50, "packed": False}, "trained": {"parameters": 7}, "flops": 1e9,
    } | changes  # fmt: skip


def test_rows_of_another_length_take_their_share() -> None:
    remember(plan(), {"seconds": [2.0, 3.0, 5.0], "tokens": 20.0})
    run = observed.observed(plan())
    assert run is not None
    assert seconds_by(run, 40.0).step == 6.0
    assert seconds_by(run, 40.0).between == (4.0, 10.0)
    assert seconds_by(run, None).step == 3.0
    remember(plan(), {"seconds": [2.9, 3.0, 3.1], "tokens": 20.0})
    steady = observed.observed(plan())
    assert steady is not None
    assert seconds_by(steady, 20.0).between is None


def test_other_settings_are_told_as_a_range() -> None:
    assert flops_a_second(plan(), 1e9) is None
    remember(plan(), {"seconds": [2.0, 2.0, 2.0], "tokens": 20.0})  # a fifth of the planned tokens: 1e8 FLOPs a second
    remember(plan(method="dora"), {"seconds": [4.0, 4.0, 4.0], "tokens": 0.0})  # not counted: 2.5e8 FLOPs a second
    remember(plan(path="general"), {"seconds": [1.0, 1.0, 1.0], "tokens": 0.0})
    assert observed.observed(plan(method="vera")) is None
    remember(plan(flops=1e5), {"seconds": [1.0, 1.0, 1.0], "tokens": 0.0})  # a tiny model's says nothing of this one
    rates = flops_a_second(plan(method="vera"), 1e9)
    assert rates == pytest.approx((1e8 / 1.5, 2.5e8 * 1.5))
    assert rates is not None
    assert seconds_like(1e9, rates).between == pytest.approx((1 / 0.375, 15.0))
    assert flops_a_second(plan(method="vera"), 1e7) is None


def test_the_newest_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "MOST_RUNS", 2)
    for method in ("lora", "dora", "lora", "vera"):
        remember(plan(method=method), {"seconds": [1.0, 1.0, 1.0], "tokens": 0.0})
    known = [observed.observed(plan(method=method)) is not None for method in ("lora", "dora", "vera")]
    assert known == [True, False, True]


@pytest.mark.parametrize("kept", ["", "[]", "{"])
def test_a_file_that_says_nothing_is_no_run(kept: str, tmp_path: Path) -> None:
    remember(plan(), {"seconds": [1.0, 1.0, 1.0], "tokens": 0.0})
    (file,) = (tmp_path / "plan").glob("runs-*")
    file.write_text(kept)
    assert observed.observed(plan()) is None
