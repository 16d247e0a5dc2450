"""Records that are kept between steps: those of the parameters that are there, and gone when the adapter goes."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import torch
from tests.unit.model.conftest import base
from torch import nn

from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.adapted.linear import AdaptedLinear
from veneer.model.fused.decoder import fuse

IDS = (torch.arange(2 * 7).view(2, 7) * 31 + 5) % 97
CONFIGS: list[MethodConfig] = [LoraConfig(r=5, lora_alpha=7, target_modules="all-linear"), IA3Config()]


def adapted(config: MethodConfig) -> Any:
    return get_peft_model(base("llama"), config)


def held(model: nn.Module) -> dict[str, set[str]]:
    return {path: set(vars(module)) for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_nothing_is_left_of_an_adapter_unloaded_from_a_fused_model() -> None:
    for config in CONFIGS:
        before = held(base("llama"))
        model = adapted(config)
        assert fuse(model)
        model(IDS, use_cache=False).logits.sum().backward()
        factors = [weakref.ref(p) for p in model.parameters() if p.requires_grad]
        plain = model.unload()
        gc.collect()
        assert factors
        assert not any(factor() is not None for factor in factors)
        after = held(plain)
        assert {path: names - before[path] for path, names in after.items() if names - before[path]} == {}


def test_what_is_computed_at_a_layer_is_kept_in_one_place() -> None:
    """So that unloading cannot forget a part of it."""
    before = held(base("llama"))
    model = adapted(LoraConfig(r=5, target_modules="all-linear", use_dora=True, lora_dropout=0.3)).train()
    model(IDS, use_cache=False).logits.sum().backward()
    model.merge_adapter()
    ours = {"site_name", "adapter_state", "originals", "kept"}
    assert all(names - before[path] in (ours, set()) for path, names in held(model).items())
    assert all(names == before[path] for path, names in held(model.unload()).items())


def test_a_record_of_parameters_is_kept_until_one_is_replaced() -> None:
    model = adapted(CONFIGS[0])
    layer = cast(AdaptedLinear, model.model.layers[0].self_attn.q_proj)
    first = layer.kept_record("default")
    assert layer.kept_record("default") is first
    holder = cast(nn.Module, layer.adapters["default"])
    holder.lora_A = nn.Parameter(holder.lora_A.detach() * 2)
    again = layer.kept_record("default")
    assert again.low_rank.a is holder.lora_A
    assert again.low_rank.b is first.low_rank.b


def test_a_record_that_is_computed_is_computed_each_time() -> None:
    model = adapted(LoraConfig(r=5, target_modules=["q_proj"], use_dora=True))
    layer = cast(AdaptedLinear, model.model.layers[0].self_attn.q_proj)
    first = layer.kept_record("default")
    with torch.no_grad():
        cast(nn.Module, layer.adapters["default"]).lora_magnitude_vector.mul_(3)
    again = layer.kept_record("default")
    torch.testing.assert_close(again.output_scale, 3 * first.output_scale)
