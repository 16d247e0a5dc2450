"""Costs of a step that no product has: by ops, and by bytes of elementwise work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer.plan import overhead
from veneer.plan.overhead import Timed, byte_seconds, op_seconds
from veneer.plan.work import Work


def steps(monkeypatch: pytest.MonkeyPatch, *found: Timed) -> None:
    """The steps of the two paths, by turns."""
    waiting = list(found)
    monkeypatch.setattr(overhead, "_timed", lambda *args: waiting.pop(0))


def test_an_op_costs_what_a_step_takes_in_which_little_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps(monkeypatch, Timed(Work(n_ops=700), 0.011), Timed(Work(n_ops=300), 0.005))
    assert op_seconds() == pytest.approx(16e-6)


def test_a_byte_costs_what_is_left_of_a_step_and_no_less_than_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Timed(Work(moved=3e6), 0.05), Timed(Work(moved=5e6), 0.09)
    steps(monkeypatch, *both)
    assert byte_seconds(lambda work: 0.02, 1e-12) == pytest.approx(0.10 / 8e6)
    steps(monkeypatch, *both)
    assert byte_seconds(lambda work: 0.07, 2e-11) == 2e-11


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_steps_are_carried_out_as_traced_and_draw_nothing(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "WARM", 0)
    monkeypatch.setattr(overhead, "TIMED", 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found: Any = overhead._timed(overhead._TINY, fused, overhead.Batch(n_rows=1, length=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.seconds > 0
    assert found.work.n_ops > 1000
