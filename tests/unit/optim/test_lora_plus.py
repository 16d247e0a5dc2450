"""LoRA+: B's rate is A's times the ratio, and nothing else has it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from veneer import LoraConfig, get_peft_model
from veneer.errors import ConfigError
from veneer.model.attach.attach import embedding_parameters
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
    with pytest.raises(ConfigError, match="none of the 1 trainable parameters is a factor on the output side"):
        lora_plus_groups([("linear.ia3_l", torch.nn.Parameter(torch.ones(3)))], lr=1e-4)
    with pytest.raises(ConfigError, match="ratio=0"):
        lora_plus_groups(named(), lr=1e-4, ratio=0)


def test_embeddings_that_are_named_are_meant_whatever_they_are_called():
    params = dict(named())
    given = {name for name in params if "q_proj" in name and "lora_" in name and "magnitude" not in name}
    groups = lora_plus_groups(params.items(), 1e-3, ratio=7, embedding_lr=3e-6, embeddings=given)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert [rates[id(p)] for p in params.values()] == pytest.approx([3e-6, 3e-6, 1e-3, 1e-3, 7e-3])


def test_a_model_tells_its_embeddings():
    config = LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=17,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.model.patch_embedder = torch.nn.Linear(12, 7)  # a linear layer with a name like a table's
    get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens", "patch_embedder", "q_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert embedding_parameters(model) == {name for name in trained if name.startswith("model.embed_tokens.")}
    assert len(embedding_parameters(model)) == 2
