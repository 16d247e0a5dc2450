"""The life of adapters on a model, as PEFT's users know it."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from veneer import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from veneer.adapters.peft_model import become_peft_model
from veneer.errors import AdapterNameError, CompositionError, ConfigError, TargetError

from .conftest import close, exactly, logits

CONFIG = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
OTHER = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def test_the_model_stays_the_object_and_the_class_that_it_was(tiny: Any) -> None:
    base = tiny()
    keys = set(base.state_dict())
    layer, weight = base.model.layers[0].self_attn.q_proj, base.model.layers[0].self_attn.q_proj.weight
    model = get_peft_model(base, CONFIG)
    assert model is base
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, PeftModel)
    assert isinstance(layer, nn.Linear)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_base_model() is base
    assert keys < set(model.state_dict())
    assert "model.layers.0.self_attn.q_proj.adapters.default.lora_A" in model.state_dict()
    back = model.unload()
    assert type(back) is LlamaForCausalLM
    assert set(back.state_dict()) == keys
    assert type(layer) is nn.Linear
    assert back.model.layers[0].self_attn.q_proj is layer
    assert layer.weight is weight
    assert not any(name in vars(module) for module in back.modules() for name in ("adapter_state", "site_name"))


def test_start_values_follow_the_global_seed(tiny: Any) -> None:
    def factors(seed: int) -> Tensor:
        base = tiny()
        torch.manual_seed(seed)
        return get_peft_model(base, CONFIG).model.layers[1].self_attn.q_proj.adapters["default"]["lora_A"]

    exactly(factors(5), factors(5))
    assert not torch.equal(factors(5), factors(6))


def test_print_trainable_parameters_shows_what_matched(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=3, modules_to_save=["lm_head"]))
    model.print_trainable_parameters()
    shown = capsys.readouterr().out
    q, v, head = 3 * (40 + 40), 3 * (40 + 20), 101 * 40
    total = sum(p.numel() for p in tiny().parameters()) + 2 * (q + v) + head
    share = 100 * (2 * (q + v) + head) / total
    assert shown.splitlines() == [
        f"trainable params: {2 * (q + v) + head:,d} || all params: {total:,d} || trainable%: {share:.4f}",
        "adapter 'default' (LORA) on 4 modules: q_proj ×2, v_proj ×2; trained whole: lm_head",
    ]


def test_several_adapters(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    alone = {}
    for name, config in {"default": CONFIG, "b": OTHER}.items():
        torch.manual_seed(3)
        one = get_peft_model(tiny(), config, name)
        alone[name] = logits(one, ids)
        one.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "b" / "adapter_config.json").is_file()

    model = PeftModel.from_pretrained(tiny(), tmp_path)
    model.load_adapter(tmp_path / "b", "b")
    assert model.active_adapter == "default"
    exactly(logits(model, ids), alone["default"])
    model.set_adapter("b")
    assert model.active_adapters == ["b"]
    exactly(logits(model, ids), alone["b"])
    model.set_adapter(["default", "b"])
    both = logits(model, ids)
    model.merge_adapter()
    close(logits(model, ids), both)
    model.unmerge_adapter()
    exactly(logits(model, ids), both)
    model.delete_adapter("default")
    assert set(model.peft_config) == {"b"}
    exactly(logits(model, ids), alone["b"])
    model.delete_adapter("b")
    exactly(logits(model, ids), logits(tiny(), ids))
    with pytest.raises(ConfigError, match="no adapter is active"):
        _ = model.active_adapter


def test_deleting_an_adapter_that_is_not_active_activates_none(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny(), config).save_pretrained(tmp_path)
    model = become_peft_model(tiny())
    for name in ("a", "b"):
        model.load_adapter(tmp_path, name)
    model.delete_adapter("a")
    assert model.active_adapters == []
    exactly(logits(model, ids), logits(tiny(), ids))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_independent(duplicate: Any, tiny: Any, ids: Tensor, randomize: Any) -> None:
    model = get_peft_model(
        tiny(), LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    )
    randomize(model)
    before = logits(model, ids)
    other = duplicate(model)
    exactly(logits(other, ids), before)
    randomize(other, seed=7)
    other.set_adapter("default")
    with other.disable_adapter():
        exactly(logits(model, ids), before)
    assert not torch.equal(logits(other, ids), before)
    assert type(other.unload()) is LlamaForCausalLM
    exactly(logits(model, ids), before)


def test_accelerates_hooks_see_the_adapter(tiny: Any, ids: Tensor) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    base = tiny()
    layer = base.model.layers[0].self_attn.q_proj
    expected = logits(get_peft_model(tiny(), CONFIG), ids)
    add_hook_to_module(layer, ModelHook())
    torch.manual_seed(0)
    _ = tiny()
    model = get_peft_model(base, CONFIG)
    exactly(logits(model, ids), expected)
    model.unload()
    exactly(logits(base, ids), logits(tiny(), ids))
    remove_hook_from_module(layer)
    assert type(layer) is nn.Linear
    exactly(logits(base, ids), logits(tiny(), ids))


def test_a_patched_forward_is_refused(tiny: Any, ids: Tensor) -> None:
    base = tiny()
    layer = base.model.layers[1].self_attn.q_proj
    layer.forward = functools.partial(nn.Linear.forward, layer)
    with pytest.raises(TargetError, match="replaced on the module itself"):
        get_peft_model(base, CONFIG)
    assert type(base) is LlamaForCausalLM
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("name", ["", "a.b", "../out", "a/b", "keys", "x\0"])
def test_names_that_cannot_name_a_module_and_a_folder(name: str, tiny: Any) -> None:
    with pytest.raises(AdapterNameError, match="is not allowed"):
        get_peft_model(tiny(), CONFIG, name)


def test_errors_name_what_is_there(tiny: Any) -> None:
    model = get_peft_model(tiny(), CONFIG)
    with pytest.raises(AdapterNameError, match=r"'x'; loaded: \['default'\]"):
        model.set_adapter("x")
    with pytest.raises(AdapterNameError, match="no adapter is named or active"):
        model.set_adapter([])
    with pytest.raises(AdapterNameError, match="is there already"):
        model.add_adapter("default", OTHER)
    with pytest.raises(AdapterNameError, match="'x'"):
        model.merge_adapter(["x"])
    with pytest.raises(AdapterNameError, match="'x'"):
        model.set_requires_grad("x")
    with pytest.raises(TargetError, match=r"'lm_haed'.*nearest: lm_head"):
        model.add_adapter("c", LoraConfig(modules_to_save=["lm_haed"]))
    assert set(model.peft_config) == {"default"}
    with pytest.raises(TargetError, match="nearest: q_proj"):
        get_peft_model(tiny(), LoraConfig(target_modules=["q_prj"]))


def test_adapters_that_cannot_act_together(tiny: Any) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=3, modules_to_save=["lm_head"]))
    model.add_adapter("b", LoraConfig(r=3, modules_to_save=["lm_head"]))
    with pytest.raises(CompositionError, match=r"each have their own lm_head\.weight"):
        model.set_adapter(["default", "b"])
    model.add_adapter("ia3", IA3Config())
    with pytest.raises(CompositionError, match="scale or rotate its inputs or outputs"):
        model.set_adapter(["default", "ia3"])
    assert model.active_adapters == ["default"]


def test_status(tiny: Any) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.add_adapter("frozen", LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True))
    whole = model.get_model_status()
    assert whole.base_model_type == "LlamaForCausalLM"
    assert whole.peft_types == {"default": "LORA", "frozen": "LORA"}
    assert whole.requires_grad == {"default": True, "frozen": False}
    assert (whole.num_adapter_layers, whole.enabled, whole.active_adapters) == (4, True, ["default"])
    assert whole.available_adapters == ["default", "frozen"]
    assert whole.devices == {"default": ["cpu"], "frozen": ["cpu"]}
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert layers["model.layers.0.mlp.down_proj"].available_adapters == ["default"]
    assert layers["model.layers.0.self_attn.q_proj"].module_type == "AdaptedLinear"
    model.model.layers[0].self_attn.q_proj.adapters["default"]["lora_A"].requires_grad_(False)
    assert model.get_model_status().requires_grad["default"] == "irregular"
    model.merge_adapter(["default"])
    with model.disable_adapter():
        assert not model.get_model_status().enabled
    from veneer.adapters.status import get_model_status

    with pytest.raises(ConfigError, match="has no adapters"):
        get_model_status(tiny())


def test_a_model_that_is_not_of_transformers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)).double()
    x = torch.randn(5, 7, dtype=torch.float64)
    base = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted = model(x)
    assert not torch.allclose(adapted, base)
    plain = model.merge_and_unload()
    assert type(plain) is nn.Sequential
    torch.testing.assert_close(plain(x), adapted, rtol=1e-12, atol=1e-12)


def test_a_compiled_model_takes_no_adapter(tiny: Any) -> None:
    with pytest.raises(TargetError, match=r"is compiled.*attach them first"):
        get_peft_model(torch.compile(tiny(), backend="eager"), LoraConfig())


def test_a_compiled_model_is_looked_into_when_asked(tiny: Any) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=3, target_modules=["q_proj"]))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(AdapterNameError, match="it is compiled: pass unwrap_compiled=True"):
        get_peft_model_state_dict(compiled)
    found = get_peft_model_state_dict(compiled, unwrap_compiled=True)
    assert found.keys() == get_peft_model_state_dict(model).keys()


def test_the_active_config_and_its_fields(tiny: Any) -> None:
    model = get_peft_model(
        tiny(), LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2}), "a"
    )
    model.add_adapter("b", IA3Config())
    model.set_adapter("b")
    assert model.active_peft_config is model.peft_config["b"]
    fields = model.peft_config["a"].to_dict()
    assert (fields["peft_type"], fields["r"], fields["target_modules"]) == ("LORA", 3, ["q_proj"])
    fields["rank_pattern"].clear()
    assert model.peft_config["a"].rank_pattern == {"0.self_attn.q_proj": 2}


def test_loading_reports_as_pefts_does(tiny: Any, tmp_path: Path) -> None:
    """Strict loading has nothing to report, but who looks finds the fields."""
    model = get_peft_model(tiny(), CONFIG)
    model.save_pretrained(tmp_path)
    report = model.load_adapter(tmp_path, "again")
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    report = set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
