"""Layers by role, as targets of adapters."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import DeepseekV3Config, T5Config, T5ForConditionalGeneration

from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.roles import names_for, role_names

from .families import model_of


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", ("q", "v"), ("q_proj", "v_proj")),
        ("neox", ("q", "v"), ("query_key_value",)),
        ("neox", ("k", "down"), ("query_key_value", "dense_4h_to_h")),
        ("gpt2", ("o", "down"), ("attn.c_proj", "mlp.c_proj")),
        ("phi3", ("gate", "v", "up"), ("gate_up_proj", "qkv_proj")),
        ("opt", ("up", "fc2"), ("fc1", "fc2")),
        ("gptj", ("k", "q", "down"), ("k_proj", "q_proj", "fc_out")),
        ("qwen2 experts", ("down",), ("down_proj",)),
    ],
)
def test_what_roles_mean_in_a_decoder(family: str, targets: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert names_for(model_of(family), targets) == names


def test_in_a_model_without_description_a_role_means_every_name_that_it_has_anywhere() -> None:
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11))
    for model in (t5, nn.Linear(3, 3)):
        names = names_for(model, ("q", "toy", "v"))
        assert names[:4] == ("q_proj", "query", "q", "query_proj")
        assert {"toy", "value", "v", "query_key_value"} <= set(names)
        assert len(names) == len(set(names))


def test_of_a_decoder_with_strange_blocks_the_known_layers_have_their_roles() -> None:
    decoder = describe_config(DeepseekV3Config(num_hidden_layers=1, hidden_size=42, intermediate_size=58))
    assert role_names(decoder, "down") == ("down_proj",)
    assert role_names(decoder, "q") == ()
