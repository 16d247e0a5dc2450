"""Attributes that PEFT's users read of an adapted model and its modules, and set on a config."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel

from veneer import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from veneer.errors import AdapterNameError, ConfigError, FrozenConfigError

CONFIG = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
OTHER = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)


def two(tiny: Any) -> Any:
    model = get_peft_model(tiny(), CONFIG)
    model.add_adapter("second", OTHER)
    return model


def test_a_module_says_what_acts_on_it(tiny: Any) -> None:
    model = two(tiny)
    both, one = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.down_proj
    model.set_adapter(["default", "second"])
    assert both.active_adapters == one.active_adapters == ["default", "second"]
    assert (both.merged_adapters, both.disable_adapters) == ([], False)
    model.merge_adapter(["second"])
    assert (both.merged_adapters, one.merged_adapters) == (["second"], [])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert both.disable_adapters
    assert not both.disable_adapters
    assert torch.equal(model.lm_head.modules_to_save["second"].weight, model.lm_head._parameters["weight"])
    with pytest.raises(AttributeError):
        both.disable_adapters = True


def test_a_module_trained_whole_names_the_adapters_that_train_it(tiny: Any) -> None:
    model = two(tiny)
    assert model.active_adapters == ["default"]
    assert model.lm_head.active_adapters == []
    model.set_adapter(["default", "second"])
    assert model.lm_head.active_adapters == ["second"]


def test_adapters_are_switched_off_and_on(tiny: Any, ids: Tensor) -> None:
    model, plain = two(tiny), tiny()
    with torch.no_grad():
        adapted = model(ids).logits
        model.merge_adapter()
        assert model.has_active_enabled_adapter
        model.disable_adapter_layers()
        assert not model.has_active_enabled_adapter
        assert torch.equal(model(ids).logits, plain(ids).logits)
        model.enable_adapter_layers()
        assert torch.equal(model(ids).logits, adapted)
    assert not torch.equal(adapted, plain(ids).logits)


def test_base_model_is_what_transformers_says_and_else_the_module_itself(tiny: Any) -> None:
    model = two(tiny)
    assert type(model.base_model) is LlamaModel
    bare = nn.Sequential(nn.Linear(7, 5))
    assert get_peft_model(bare, LoraConfig(r=3, target_modules=["0"])).base_model is bare


def test_which_modules_are_changed(tiny: Any) -> None:
    names = two(tiny).targeted_module_names
    assert names == [f"model.layers.{n}.{end}" for n in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")]


def test_forward_takes_adapter_names_and_keeps_its_signature(tiny: Any, ids: Tensor) -> None:
    plain = inspect.signature(tiny().forward)
    model = two(tiny)
    assert inspect.signature(model.forward) == plain
    names = ["second", "__base__"]
    with torch.no_grad():
        mixed = model.forward(ids, adapter_names=names).logits
        assert torch.equal(mixed, model(ids, adapter_names=names).logits)
        assert not torch.equal(mixed, model.forward(ids).logits)
    with pytest.raises(AdapterNameError, match="thrid"):
        model.forward(ids[:1], adapter_names=["thrid"])


def test_a_density_is_not_looked_at_where_nothing_is_thinned_out(tiny: Any) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.add_adapter("second", replace(CONFIG, r=2))
    for name, density in (("with", 0.3), ("without", None)):
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], name, "linear", density=density)
    layer = model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.record("with").low_rank.b, layer.record("without").low_rank.b)


@pytest.mark.parametrize("config", [CONFIG, IA3Config(target_modules=["a"], feedforward_modules=["a"])])
def test_a_config_that_is_set_says_how_to_make_another(config: Any) -> None:
    with pytest.raises(FrozenConfigError, match=r"dataclasses\.replace\(config, target_modules=\['b'\]\)") as caught:
        config.target_modules = ["b"]
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, FrozenInstanceError)
    with pytest.raises(FrozenConfigError, match="tarket_modules"):
        config.tarket_modules = ["b"]


def test_which_configs_are_of_virtual_tokens() -> None:
    assert PromptTuningConfig(num_virtual_tokens=3).is_prompt_learning
    assert not CONFIG.is_prompt_learning
