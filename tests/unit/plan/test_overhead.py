"""Costs of a step that no product has: by ops, and by bytes of elementwise work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer.plan import overhead
from veneer.plan.overhead import Timed, byte_seconds, op_seconds, watched_seconds
from veneer.plan.work import Work
from veneer.recipe.recipe import Recipe


def steps(monkeypatch: pytest.MonkeyPatch, **found: Timed) -> None:
    """The step of each path: ``off`` or ``auto``, ``selective`` where checkpointing is."""

    def timed(config: Any, recipe: Recipe, batch: Any, *clock: Any) -> Timed:
        args = recipe.training_config()
        return found["selective" if args.gradient_checkpointing else args.fused]

    monkeypatch.setattr(overhead, "_timed", timed)


def test_an_op_costs_what_a_step_of_its_path_takes_in_which_little_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps(monkeypatch, auto=Timed(Work(n_ops=700), 0.014), off=Timed(Work(n_ops=300), 0.009))
    assert op_seconds(general=False) == pytest.approx(20e-6)
    assert op_seconds(general=True) == pytest.approx(30e-6)


def test_a_watched_op_costs_what_checkpointing_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    steps(monkeypatch, selective=Timed(Work(n_ops=400, n_watched=110), 0.019))
    assert watched_seconds(op=20e-6) == pytest.approx(100e-6)
    assert watched_seconds(op=50e-6) == 0.0


def test_a_byte_costs_what_is_left_of_a_step_and_no_less_than_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    steps(monkeypatch, auto=Timed(Work(moved=3e6), 0.05), off=Timed(Work(moved=5e6), 0.09))
    assert byte_seconds(lambda work: 0.02, 1e-12) == pytest.approx(0.10 / 8e6)
    assert byte_seconds(lambda work: 0.07, 2e-11) == 2e-11


@pytest.mark.parametrize(("general", "checkpointing"), [(False, False), (True, False), (True, "selective")])
def test_steps_are_carried_out_as_traced_and_draw_nothing(
    general: bool, checkpointing: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "WARM", 0)
    monkeypatch.setattr(overhead, "TIMED", 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batch = overhead.Batch(n_rows=1, length=8)
    found = overhead._timed(overhead._TINY, overhead._recipe(general, batch, checkpointing), batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.seconds > 0
    assert found.work.n_general == found.work.n_ops * general
    assert found.work.n_ops > 1000
    assert (found.work.n_watched > 100) == bool(checkpointing)
