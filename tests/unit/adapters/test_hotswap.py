"""Exchange of an adapter for a saved one, beside PEFT's function of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer import IA3Config, LoraConfig, OFTConfig, get_peft_model, hotswap_adapter
from veneer.errors import AdapterNameError, CompositionError, FormatError

SAME = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
OTHERS = {
    "values": SAME,
    "rank": LoraConfig(r=5, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "layers": LoraConfig(r=3, lora_alpha=7, target_modules=["down_proj"], init_lora_weights=False),
    "method": IA3Config(init_ia3_weights=False),
    "rotation": OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
}


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    for seed, (name, config) in enumerate(OTHERS.items()):
        model = tiny()
        torch.manual_seed(seed)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    return tmp_path


@torch.no_grad()
def answer(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(ids).logits


@pytest.mark.parametrize("name", OTHERS)
def test_the_model_is_that_of_the_saved_adapter(name: str, tiny: Any, ids: Tensor, saved: Path) -> None:
    model = get_peft_model(tiny(), SAME)
    before = answer(model, ids)
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    hotswap_adapter(model, saved / name, "default")
    wanted = get_peft_model(tiny(), OTHERS[name])
    wanted.load_adapter(saved / name, "default")
    assert torch.equal(answer(model, ids), answer(wanted, ids))
    assert not torch.allclose(answer(model, ids), before)
    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
    now = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert now
    assert name != "values" or all(now[key] is p for key, p in parameters.items())


def test_others_stay_as_they_are(tiny: Any, ids: Tensor, saved: Path) -> None:
    model = get_peft_model(tiny(), SAME)
    model.add_adapter("second", OTHERS["layers"])
    model.set_adapter(["default", "second"])
    hotswap_adapter(model, saved / "rank", "default")
    assert list(model.peft_config) == model.active_adapters == ["default", "second"]
    model.set_adapter("second")
    hotswap_adapter(model, saved / "values", "default")
    assert model.active_adapters == ["second"]


def test_an_adapter_that_cannot_act_with_the_others_leaves_the_one_before(tiny: Any, ids: Tensor, saved: Path) -> None:
    model = get_peft_model(tiny(), SAME)
    model.add_adapter("second", OTHERS["rank"])
    model.set_adapter(["default", "second"])
    before, trained = answer(model, ids), [key for key, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(CompositionError):
        hotswap_adapter(model, saved / "rotation", "default")
    assert list(model.peft_config) == model.active_adapters == ["default", "second"]
    assert [key for key, p in model.named_parameters() if p.requires_grad] == trained
    assert torch.equal(answer(model, ids), before)


def test_a_frozen_adapter_s_exchange_leaves_the_model_in_training(tiny: Any, saved: Path) -> None:
    model = get_peft_model(tiny(), SAME)
    model.load_adapter(saved / "values", "frozen")
    model.set_adapter(["default", "frozen"])
    model.train()
    model.lm_head.eval()
    hotswap_adapter(model, saved / "rank", "frozen")
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.training
    assert not model.lm_head.training
    assert model.adapter_state.trainable == {"default"}


def test_a_failed_exchange_leaves_the_adapter(tiny: Any, ids: Tensor, saved: Path) -> None:
    model = get_peft_model(tiny(), SAME)
    before = answer(model, ids)
    (saved / "rank" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError):
        hotswap_adapter(model, saved / "rank", "default")
    with pytest.raises(AdapterNameError, match="no adapter is named 'other'"):
        hotswap_adapter(model, saved / "values", "other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model, ids), before)
    model.merge_adapter()
    with pytest.raises(AdapterNameError, match="merged"):
        hotswap_adapter(model, saved / "values", "default")
