"""Bottlenecks on fused blocks against the model's own code: alone, beside layers that are adapted, two in a sum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.unit.model.conftest import FAMILIES, base
from tests.unit.model.steps import BATCHES, adapted, assert_all_fused, assert_near_under_autocast, quantized, stir
from transformers import PreTrainedModel

from veneer import BottleneckConfig, IA3Config, LoraConfig, prepare_model_for_kbit_training
from veneer.contract import MethodConfig

LORA = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", lora_dropout=0.2)
DORA = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", use_dora=True)
BEHIND = BottleneckConfig.houlsby(reduction_factor=7, scaling=0.7, dropout=0.2)
NORMED = BottleneckConfig.pfeiffer(reduction_factor=5)
BESIDE = BottleneckConfig.parallel(reduction_factor=7, after_attention=True)
ALONE: dict[str, MethodConfig] = {
    "houlsby": BottleneckConfig.houlsby(reduction_factor=7, scaling=0.7),
    "pfeiffer and dropout": BottleneckConfig.pfeiffer(reduction_factor=7, dropout=0.3),
    "parallel": BESIDE,
}
TOGETHER: dict[str, tuple[MethodConfig, ...]] = {
    "houlsby, lora": (BEHIND, LORA),
    "lora, parallel": (LORA, BESIDE),
    "ia3, parallel": (IA3Config(), BESIDE),
    "dora, houlsby": (DORA, BEHIND),
    "houlsby, parallel": (BEHIND, BESIDE),
    "parallel, pfeiffer, lora": (BESIDE, NORMED, LORA),
}


def with_all(model: PreTrainedModel, configs: tuple[MethodConfig, ...]) -> PreTrainedModel:
    """With an adapter of each, all of them active and trained."""
    adapted(model, copy.deepcopy(configs[0]))
    taken: Any = model
    names = ["default"]
    for place, config in enumerate(configs[1:]):
        names.append(f"number{place}")
        taken.add_adapter(names[-1], copy.deepcopy(config))
    taken.set_adapter(names)
    taken.set_requires_grad(names)
    stir(model)
    return model


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_on_every_family(family: str, kind: str, halves: list[str]) -> None:
    assert_all_fused(adapted(base(family), ALONE[kind]), BATCHES["packed"], halves)


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_every_kind_on_a_quantized_base(quant_type: str, kind: str, halves: list[str]) -> None:
    assert_all_fused(adapted(quantized(base("llama"), quant_type), ALONE[kind]), BATCHES["padded"], halves)


@pytest.mark.parametrize("kinds", TOGETHER)
@pytest.mark.parametrize("family", ["llama", "gemma3", "neox", "gpt2"])
def test_beside_adapted_layers_and_in_a_sum(family: str, kinds: str, halves: list[str]) -> None:
    assert_all_fused(with_all(base(family), TOGETHER[kinds]), BATCHES["padded"], halves)


@pytest.mark.parametrize("kinds", [(BEHIND,), (BESIDE,), (BESIDE, NORMED, LORA)], ids=["behind", "beside", "three"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_under_autocast(family: str, kinds: tuple[MethodConfig, ...], halves: list[str]) -> None:
    model = quantized(base(family, torch.bfloat16), "nf4")
    model = with_all(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), kinds)
    assert_near_under_autocast(model, halves)
