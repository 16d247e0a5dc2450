"""Every linear method trains fused: no half of any block falls back, and gradients are the general path's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import veneer
from veneer.contract import LinearMethod
from veneer.model.fused import block
from veneer.model.fused.decoder import fused

N_LAYERS = 2
LLAMA = LlamaConfig(
    hidden_size=42, intermediate_size=58, num_hidden_layers=N_LAYERS, num_attention_heads=6, num_key_value_heads=2,
    head_dim=14, vocab_size=97, attention_bias=True,
)  # fmt: skip
TOKENS = torch.arange(3 * 17).view(3, 17) * 31 % 97


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The halves of blocks that ran fused, in their order."""
    ran: list[str] = []
    for name, half in (("attention_half", block.attention_half), ("mlp_half", block.mlp_half)):

        def spied(*args: Any, name: str = name, half: Any = half) -> Any:
            ran.append(name)
            return half(*args)

        monkeypatch.setattr(block, name, spied)
    return ran


def adapted(config: LinearMethod) -> PreTrainedModel:
    """With an adapter on every linear layer, all of it away from its start."""
    torch.manual_seed(41)
    model: Any = AutoModelForCausalLM.from_config(LLAMA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter)
    model = veneer.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.train()


def step(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients of one pass."""
    model.zero_grad()
    torch.manual_seed(5)  # dropout draws the same keys on both paths
    logits = model(input_ids=TOKENS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def assert_trains_fused(config: LinearMethod, halves: list[str]) -> None:
    model = adapted(config)
    expected = step(model)
    assert not halves
    with fused(model):
        halves.clear()  # of the check before
        found = step(model)
    assert halves == ["attention_half", "mlp_half"] * N_LAYERS
    assert found.keys() == expected.keys()
    assert any(value.abs().max() > 1e-4 for name, value in found.items() if name not in ("loss", "logits"))
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 5e-5 * value.norm(), name


def test_every_method(config: LinearMethod, halves: list[str]) -> None:
    config = dataclasses.replace(config, **{"target_modules": "all-linear"})
    assert_trains_fused(config, halves)
    rates = [field.name for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    if rates:
        halves.clear()
        dropping = dataclasses.replace(config, **dict.fromkeys(rates, 0.3))
        assert dropping.dropout == 0.3
        assert_trains_fused(dropping, halves)


def test_a_method_dropped_into_the_folder(toy: Any, halves: list[str]) -> None:
    assert_trains_fused(toy(strength=3.0), halves)
