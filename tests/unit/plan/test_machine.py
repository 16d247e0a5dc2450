"""What is measured of a machine: products as in a step, what others disturb, what is kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from veneer.ops.scaled import ScaledCodes, decode_scaled
from veneer.ops.traced import tracing
from veneer.plan import machine
from veneer.plan.machine import Rates
from veneer.plan.time import ROUGH, seconds_here
from veneer.plan.work import CountWork, Work


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
    busy = False
    monkeypatch.setattr(machine, "is_busy", lambda: busy)
    monkeypatch.setattr(Rates, "moved", lambda rates: 0.0)
    Rates.here()._once("attention", lambda: 5.0)
    busy = True
    Rates.here()._once("decoded", lambda: 7.0)
    assert Rates.here().known == {"decoded": 7.0, "attention": 5.0}
    assert seconds_here(Work(), Rates.here()).source == ROUGH
    busy = False
    assert Rates.here().known == {"attention": 5.0}
    assert Rates.here()._once("decoded", lambda: 3.0) == 3.0
    busy = True
    assert Rates.here().known == {"decoded": 3.0, "attention": 5.0}
    assert not Rates.here().rough


@pytest.mark.parametrize("weight", [
    ScaledCodes(torch.zeros(6, 48, dtype=torch.uint8), torch.ones(6, 3), 48, 16, zeros=torch.ones(6, 3)),
    ScaledCodes(torch.zeros(6, 24, dtype=torch.uint8), torch.ones(6, 3), 48, 16, bits=4),
    ScaledCodes(torch.zeros(6, 48, dtype=torch.uint8), torch.ones(2, 3), 48, 16, "e4m3", height=4),
    ScaledCodes(
        torch.zeros(6, 24, dtype=torch.uint8), torch.ones(6, 3).to(torch.float8_e4m3fn), 48, 16, "e2m1", 4,
        overall=torch.tensor(2.0), divides=True, rounding=torch.bfloat16,
    ),
])  # fmt: skip
def test_a_tile_that_is_timed_is_coded_as_the_weight(weight: ScaledCodes, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, timed = CountWork(), []
    counted.on = True
    with tracing(counted.kernel):
        decode_scaled(weight, slice(0, 6), backend="cpu")
    (codec,) = counted.passes[0].decoded_tiles
    monkeypatch.setattr(machine, "decode_scaled", lambda tile, rows: timed.append(tile))
    machine._scaled_tile(8, 96, *codec.numbers)()

    def facts(w: ScaledCodes) -> tuple[object, ...]:
        beside = [None if t is None else t.dtype for t in (w.scales, w.zeros, w.overall)]
        return w.bits, w.coding, w.group, w.height, w.divides, w.rounding, beside

    assert facts(timed[0]) == facts(weight)
