"""LoRA+: B's rate is A's times the ratio, and nothing else has it."""

import pytest
import torch

from veneer.errors import ConfigError
from veneer.optim import lora_plus_groups

NAMES = {
    "model.layers.0.self_attn.q_proj.adapters.default.lora_A": (3, 7),
    "model.layers.0.self_attn.q_proj.adapters.default.lora_B": (11, 3),
    "model.layers.0.self_attn.q_proj.adapters.default.lora_magnitude_vector": (11,),
    "model.embed_tokens.adapters.default.lora_A": (3, 101),
    "model.embed_tokens.adapters.default.lora_B": (7, 3),
}


def named(frozen: str = "") -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, torch.nn.Parameter(torch.ones(s), requires_grad=n != frozen)) for n, s in NAMES.items()]


def test_rates_and_decay():
    params = named()
    groups = lora_plus_groups(params, lr=2e-4, ratio=5, weight_decay=0.1, embedding_lr=3e-6)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = [(2e-4, 0.1), (1e-3, 0.1), (2e-4, 0.0), (3e-6, 0.1), (3e-6, 0.1)]
    for (_, p), (lr, decay) in zip(params, expected, strict=True):
        assert found[id(p)] == (pytest.approx(lr), decay)


def test_frozen_parameters_are_left_out():
    params = named(frozen="model.embed_tokens.adapters.default.lora_A")
    groups = lora_plus_groups(params, lr=1e-4)
    assert sum(len(g["params"]) for g in groups) == 4


def test_without_a_factor_b_it_says_so():
    with pytest.raises(ConfigError, match="needs a trainable LoRA factor B"):
        lora_plus_groups([("linear.ia3_l", torch.nn.Parameter(torch.ones(3)))], lr=1e-4)
    with pytest.raises(ConfigError, match="ratio=0"):
        lora_plus_groups(named(), lr=1e-4, ratio=0)
