"""What is measured of a machine: the bytes that a process starts with, once, beside the plan; products as in a step."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.model.memory import high_water
from veneer.plan import machine
from veneer.plan.machine import Rates, start_bytes, start_measured
from veneer.plan.time import ROUGH, seconds_here
from veneer.plan.work import Work


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    yield
    machine._beginning.cache_clear()
    machine._start_bytes.cache_clear()


def begun(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine._beginning.cache_clear()
    machine._start_bytes.cache_clear()
    monkeypatch.setattr(machine, "_TINY", script)


def test_a_process_is_begun_once_and_read_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("print('told 7_000_003.0'.replace('_', ''))", monkeypatch)
    rates = Rates(tmp_path / "rates.json")
    with start_measured(rates):
        first = machine._beginning()
    with start_measured(rates):
        assert machine._beginning() is first
    assert start_bytes(rates) == 7_000_003
    assert start_bytes(Rates(tmp_path / "other.json")) == 7_000_003


def test_nothing_is_begun_where_it_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("raise SystemExit(3)", monkeypatch)
    rates = Rates(tmp_path / "rates.json", {machine.START: 11.0})
    with start_measured(rates):
        assert machine._beginning.cache_info().currsize == 0
    assert start_bytes(rates) == 11


def test_a_plan_that_fails_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("import time; time.sleep(600)", monkeypatch)
    processes = []

    def plan() -> None:
        with start_measured(Rates(tmp_path / "rates.json")):
            processes.append(machine._beginning())
            raise ConfigError("not planned")

    with pytest.raises(ConfigError, match="not planned"):
        plan()
    assert processes[0].returncode is not None
    assert machine._beginning.cache_info().currsize == 0


def test_a_process_that_ends_early_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("raise SystemExit('no room')", monkeypatch)
    with pytest.raises(ConfigError, match="a process could not be measured: no room"):
        start_bytes(Rates(tmp_path / "rates.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_a_process_that_starts_is_measured_without_what_began_it() -> None:
    held = bytearray(b"x" * 400_000_000)
    run = [sys.executable, "-c", "from veneer.model.memory import high_water; print(high_water())"]
    own = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 10_000_000 < own < len(held) < (high_water() or 0)


def test_products_are_measured_on_what_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        assert (a.shape, b.shape, out.shape) == ((254, 577), (577, 1531), (254, 1531))
        places.append((a.data_ptr(), b.data_ptr(), out.data_ptr()))
        return out

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(machine, "_timed", lambda run: [run() for _ in range(200)])
    machine._product_seconds(254, 577, 1531, "bfloat16")
    n_inputs, n_weights, n_outputs = (len(set(each)) for each in zip(*places, strict=True))
    assert n_inputs * 254 * 577 * 2 > 32 << 20
    assert n_weights * 577 * 1531 * 2 > 128 << 20
    assert n_outputs * 254 * 1531 * 2 > 32 << 20


def test_runs_that_wait_for_a_core_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 20 µs, of which one in a hundred waits for 8 ms: four fifths of the time."""
    now, runs = 0.0, itertools.count(1)

    def run() -> None:
        nonlocal now
        now += 8e-3 if next(runs) % 100 == 0 else 20e-6

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now))
    assert machine._timed(run) == pytest.approx(20e-6)
    assert machine.MEASURED < now < machine.LONGEST_MEASURED


def test_a_run_longer_than_there_is_time_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 3.0

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now))
    assert machine._timed(run) == 3.0
    assert now == 6.0


def test_a_rate_measured_while_others_use_the_cores_is_told_and_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    busy = True
    monkeypatch.setattr(machine, "is_busy", lambda: busy)
    monkeypatch.setattr(Rates, "moved", lambda rates: 0.0)
    Rates.here()._once("decoded", lambda: 7.0)
    Rates.here()._once(machine.START, lambda: 5.0)
    assert Rates.here().known == {"decoded": 7.0, machine.START: 5.0}
    assert seconds_here(Work(), Rates.here()).source == ROUGH
    busy = False
    assert Rates.here().known == {machine.START: 5.0}
    assert Rates.here()._once("decoded", lambda: 3.0) == 3.0
    busy = True
    assert Rates.here().known == {"decoded": 3.0, machine.START: 5.0}
    assert not Rates.here().rough
