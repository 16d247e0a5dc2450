"""Folding adapters into the weights and taking them out again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from veneer import (
    IA3Config,
    LoraConfig,
    get_peft_model,
)
from veneer.errors import AdapterNameError, CompositionError

from .conftest import close, exactly, logits

CONFIG = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
OTHER = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def test_disable_adapter_can_be_nested(tiny: Any, ids: Tensor) -> None:
    base = logits(tiny(), ids)
    model = get_peft_model(tiny(), LoraConfig(r=3, init_lora_weights=False, bias="all", modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.copies["default"].weight.mul_(1.3)
    adapted = logits(model, ids)
    with model.disable_adapter():
        with model.disable_adapter():
            exactly(logits(model, ids), base)
        exactly(logits(model, ids), base)
    exactly(logits(model, ids), adapted)
    model.merge_adapter()
    merged = logits(model, ids)
    with model.disable_adapter():
        exactly(logits(model, ids), base)
    exactly(logits(model, ids), merged)


@pytest.mark.parametrize(
    "config",
    [CONFIG, LoraConfig(r=3, use_dora=True, init_lora_weights=False), IA3Config(init_ia3_weights=False)],
    ids=["lora", "dora", "ia3"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exactly_reversible(config: Any, dtype: torch.dtype, tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(dtype=dtype), config)
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    before = logits(model, ids)
    model.merge_adapter()
    model.merge_adapter()  # merging what is merged changes nothing
    if dtype is torch.float32:
        close(logits(model, ids), before)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert p is weights[name][0]
        exactly(p, weights[name][1])
    exactly(logits(model, ids), before)


def test_merging_one_after_the_other_is_merging_both(tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.add_adapter("b", OTHER)
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    one_by_one = logits(model, ids)
    model.unmerge_adapter()
    model.merge_adapter(["default", "b"])
    exactly(logits(model, ids), one_by_one)
    with pytest.raises(AdapterNameError, match="'b' is merged"):
        model.delete_adapter("b")
    with pytest.raises(AdapterNameError, match="cannot add 'c' while"):
        model.add_adapter("c", OTHER)


def test_merge_and_unload_takes_the_adapters_named(tiny: Any, ids: Tensor, capsys: Any) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.add_adapter("b", OTHER)
    model.set_adapter("b")
    wanted = logits(model, ids)
    model.set_adapter("default")
    plain = model.merge_and_unload(progressbar=True, safe_merge=True, adapter_names=["b"])
    assert type(plain) is LlamaForCausalLM
    assert set(plain.state_dict()) == set(tiny().state_dict())
    close(logits(plain, ids), wanted)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_base(tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.add_adapter("good", OTHER)
    model.merge_adapter(["good"])
    before = logits(model, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.adapters["default"]["lora_A"][0, 0] = torch.nan
    with pytest.raises(CompositionError, match=r"NaN or infinity in model\.layers\.1\.mlp\.down_proj"):
        model.merge_adapter(["default"], safe_merge=True)
    exactly(logits(model, ids), before)
    assert model.get_model_status().merged_adapters == ["good"]
