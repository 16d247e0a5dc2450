"""Optimizers of LoRA's two factors, against closed forms and PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer as of_peft
from torch import nn

from methods_in_peft import TARGETS, TOKENS, base, near
from veneer import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    create_lorafa_optimizer,
    create_riemannian_optimizer,
    get_peft_model,
)
from veneer.errors import ConfigError
from veneer.model.attach.attach import named_live_parameters

SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "init_lora_weights": False}


def factors(model: nn.Module, path: str = "layers.0.self_attn.q_proj") -> list[nn.Parameter]:
    held = model.model.get_submodule(path).adapters["default"]
    return [held["lora_A"], held["lora_B"]]


def test_riemannian_steps_are_pefts(tmp_path):
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**SETTINGS)).train()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    for model, make in ((theirs, of_peft), (ours, create_riemannian_optimizer)):
        optimizer = make(model, torch.optim.AdamW, lr=1e-2, reg=0.3, weight_decay=0.1)
        for _ in range(2):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = peft.get_peft_model_state_dict(theirs)
    found = named_live_parameters(ours, "default")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        near(found[key][1].detach(), value)


def test_lora_fa_trains_b_along_the_projected_gradient():
    torch.manual_seed(5)
    model = get_peft_model(base(), LoraConfig(**SETTINGS, bias="lora_only")).train()
    a, b = factors(model)
    first = a.detach().clone()
    optimizer = create_lorafa_optimizer(model, 3, 7, lr=1e-2)
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = b.grad @ torch.linalg.inv(a @ a.T) / (7 / 3) ** 2
    optimizer.step()
    assert a.grad is None
    assert torch.equal(a, first)
    near(optimizer.state[b]["exp_avg"], 0.1 * expected.detach())
    assert a not in optimizer.state
    assert any(p in optimizer.state for name, p in model.named_parameters() if name.endswith("bias"))


def test_what_they_refuse():
    with pytest.raises(ConfigError, match="no linear layer trains LoRA's A and B: attach LoraConfig first"):
        create_riemannian_optimizer(base(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="no linear layer trains LoRA's B: attach LoraConfig first"):
        create_lorafa_optimizer(base())
    model = get_peft_model(base(), LoraConfig(**SETTINGS))
    with pytest.raises(
        ConfigError, match=r"lora_alpha=9 is not the 7.* of the adapter: leave it out; r=5 is not the 3"
    ):
        create_lorafa_optimizer(model, 5, 9)
    for other in (LoraConfig(**SETTINGS, use_qalora=True, qalora_group_size=2), AdaLoraConfig(total_step=9)):
        with pytest.raises(
            ConfigError, match=r"by adapter 'default' is not the product of its A and B alone, .* use_bdlora"
        ):
            create_riemannian_optimizer(get_peft_model(base(), other), torch.optim.SGD, lr=0.1)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match=r"step\(\) has a closure"):
        optimizer.step(lambda: 0.0)
