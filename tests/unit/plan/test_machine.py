"""Measurements of a machine: products as in a step, disturbance by others, and kept results."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.errors import UnmeasuredError
from veneer.ops.scaled import ScaledCodes, decode_scaled
from veneer.ops.traced import tracing
from veneer.plan import budget, machine, others
from veneer.plan.budget import MeasuringTime
from veneer.plan.machine import Rates
from veneer.plan.products import MatrixProduct
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


def test_a_rate_measured_while_others_use_the_cores_is_told_as_a_range_and_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    busy, share = False, 1.0
    monkeypatch.setattr(machine, "is_busy", lambda: busy)
    monkeypatch.setattr(machine.Others, "free_share", lambda others: share)
    monkeypatch.setattr(Rates, "moved", lambda rates: 0.0)
    monkeypatch.setattr(Rates, "large_op_byte", lambda rates: 0.0)
    Rates.here()._once("attention", lambda: 5.0)
    share = 0.25
    Rates.here()._once("decoded", lambda: 7.0)
    busy = True
    rates = Rates.here()
    assert rates.known == {"decoded": 7.0, "attention": 5.0}
    found = seconds_here(Work(decoded=1.0, attention=1.0), rates)
    assert (found.source, found.step, found.between) == (ROUGH, 12.0, (5 + 7 / 4, 12.0))
    busy, share = False, 1.0
    assert Rates.here().known == {"attention": 5.0}
    assert Rates.here(MeasuringTime(0)).known == {"decoded": 7.0, "attention": 5.0}  # nothing would be measured instead
    assert Rates.here()._once("decoded", lambda: 3.0) == 3.0
    busy = True
    assert Rates.here().known == {"decoded": 3.0, "attention": 5.0}
    assert not Rates.here().rough
    assert seconds_here(Work(decoded=1.0), Rates.here()).between is None


def test_measurements_have_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now))
    rates = Rates(tmp_path / "rates.json", budget=MeasuringTime(20.0))
    assert rates._once("attention", lambda: 5.0) == 5.0
    now = 119.0
    assert rates._once("decoded", lambda: 7.0) == 7.0
    now = 121.0
    with pytest.raises(UnmeasuredError, match="measuring stops after 20 s: repeat the command"):
        rates._once("updated in 8 bits", lambda: 7.0)
    assert rates._once("decoded", lambda: 0.0) == 7.0  # known
    with pytest.raises(UnmeasuredError, match="this machine's speed was not measured"):
        Rates(tmp_path / "rates.json", budget=MeasuringTime(0))._once("decoded", lambda: 7.0)


def test_a_measurement_can_be_interrupted(tmp_path: Path) -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    rates = Rates(tmp_path / "rates.json")
    rates._once("attention", lambda: 5.0)
    for _ in range(2):
        with pytest.raises(UnmeasuredError, match=r"interrupted|measuring stops after"):
            rates._once("decoded", interrupted)
    assert not rates.budget.is_open
    assert rates.known == {"attention": 5.0}


def test_rows_of_other_lengths_are_products_that_were_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of each set of data and of each batch have a length of their own."""
    measured: list[tuple[int, ...]] = []

    def product_seconds(*shape: Any) -> float:
        measured.append(shape[:3])
        return 1.0

    monkeypatch.setattr(machine, "_product_seconds", product_seconds)
    rates = Rates(tmp_path / "rates.json")
    for n_tokens in range(450, 600, 7):
        for each in (MatrixProduct(n_tokens, 576, 8, "float32"), MatrixProduct(8, n_tokens, 1536, "float32")):
            shape = (512, 512, 8) if each.m > 8 else (8, 512, 1536)
            assert rates.product(each) == pytest.approx(each.flops / (2 * math.prod(shape)))
    assert measured == [(512, 512, 8), (8, 512, 1536)]
    rates.product(MatrixProduct(7, 5, 100_000, "float32"))
    assert measured[-1] == (7, 5, 4096)


def test_others_are_seen_and_this_process_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0, 0.0, 0.0]  # clock, cores of all, cores of this process
    monkeypatch.setattr(others, "_looked", lambda: others._Looked(*now))
    monkeypatch.setattr(others.os, "cpu_count", lambda: 4)
    seen = others.Others()
    assert seen.free_share() == 1.0  # no time has passed
    now[:] = [10.0, 30.0, 20.0]
    assert seen.free_share() == 0.75
    now[:] = [10.0, 40.0, 0.0]
    assert seen.free_share() == others.LEAST_SHARE
    monkeypatch.undo()
    looked = others._looked()
    assert looked.all >= looked.own > 0


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
