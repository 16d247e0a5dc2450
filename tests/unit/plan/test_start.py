"""The bytes that a process starts with: measured once, of a small run in a process of its own, beside the plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.model.memory import high_water
from veneer.plan import start
from veneer.plan.machine import START, Rates
from veneer.plan.start import start_bytes, start_measured


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    yield
    start._beginning.cache_clear()
    start._start_bytes.cache_clear()


def begun(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start._beginning.cache_clear()
    start._start_bytes.cache_clear()
    monkeypatch.setattr(start, "_COMMAND", (sys.executable, "-c", script))


def test_a_process_is_begun_once_and_read_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("print('told 7_000_003.0'.replace('_', ''))", monkeypatch)
    rates = Rates(tmp_path / "rates.json")
    with start_measured(rates):
        first = start._beginning()
    with start_measured(rates):
        assert start._beginning() is first
    assert start_bytes(rates) == 7_000_003
    assert start_bytes(Rates(tmp_path / "other.json")) == 7_000_003


def test_nothing_is_begun_where_it_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("raise SystemExit(3)", monkeypatch)
    rates = Rates(tmp_path / "rates.json", {START: 11.0})
    with start_measured(rates):
        assert start._beginning.cache_info().currsize == 0
    assert start_bytes(rates) == 11


def test_a_plan_that_fails_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("import time; time.sleep(600)", monkeypatch)
    processes = []

    def plan() -> None:
        with start_measured(Rates(tmp_path / "rates.json")):
            processes.append(start._beginning())
            raise ConfigError("not planned")

    with pytest.raises(ConfigError, match="not planned"):
        plan()
    assert processes[0].returncode is not None
    assert start._beginning.cache_info().currsize == 0


def test_a_process_that_ends_early_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("raise SystemExit('no room')", monkeypatch)
    with pytest.raises(ConfigError, match="a process could not be measured: no room"):
        start_bytes(Rates(tmp_path / "rates.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_what_starts_has_planned_and_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    start._beginning.cache_clear()
    start._start_bytes.cache_clear()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)
    imports = [
        sys.executable,
        "-c",
        "import veneer.train.run; from veneer.model.memory import high_water as most; print(most())",
    ]
    bare = int(subprocess.run(imports, capture_output=True, text=True, check=True).stdout)
    assert bare + 10_000_000 < start._start_bytes() < bare + 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_a_process_that_starts_is_measured_without_what_began_it() -> None:
    held = bytearray(b"x" * 400_000_000)
    run = [sys.executable, "-c", "from veneer.model.memory import high_water; print(high_water())"]
    own = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 10_000_000 < own < len(held) < (high_water() or 0)
