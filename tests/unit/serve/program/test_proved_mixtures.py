"""Proofs of mixtures in 16 bits: near ties of routers are no fault, and experts in another order are one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.model.blueprint.families import FAMILIES, model_of

from veneer.errors import DescriptionError
from veneer.model.fused.block import FusedBlock
from veneer.model.fused.decoder import fused
from veneer.ops.linear.experts import ExpertLayers
from veneer.serve.runners import program_runner
from veneer.serve.runners.program_runner import proved

MIXTURES = [family for family in FAMILIES if "experts" in family or family in ("dots1", "gpt_oss", "mixtral", "olmoe")]
HALF = [torch.bfloat16, torch.float16]


def halves_of(model: Any) -> list[bool]:
    """Which halves of feed-forward are fused."""
    with fused(model):
        blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
        return [block.fused_program.mlp is not None for block in blocks]


@pytest.mark.parametrize("family", MIXTURES)
def test_router_ties_do_not_stop_a_program(family):
    proved(model_of(family, torch.bfloat16), 40)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", MIXTURES)
def test_router_ties_do_not_stop_a_fused_half(family, dtype):
    found = halves_of(model_of(family, dtype))
    assert found
    assert all(found)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_in_another_order_have_no_program(family, monkeypatch):
    pack = program_runner.pack_experts

    def rolled(*args: Any, **how: Any) -> Any:
        inner, down = pack(*args, **how)
        return inner, replace(down, panels=down.panels.view(down.n_experts, -1).roll(1, 0).flatten())

    monkeypatch.setattr(program_runner, "pack_experts", rolled)
    with pytest.raises(DescriptionError, match="away from the model's own"):
        proved(model_of(family, torch.bfloat16), 40)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_in_another_order_are_not_fused(family, monkeypatch):
    before = ExpertLayers.forward

    def rolled(self: ExpertLayers, *args: Any) -> Any:
        return before(replace(self, weights=(*self.weights[1:], self.weights[0])), *args)

    monkeypatch.setattr(ExpertLayers, "forward", rolled)
    assert not all(halves_of(model_of(family, torch.bfloat16)))
