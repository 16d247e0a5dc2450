"""Descriptions against the modules of real models, and what is said where there is no description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BitNetConfig,
    BloomConfig,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MoshiConfig,
    OPTConfig,
    Qwen3Config,
    StableLmConfig,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
)

from veneer import LoraConfig, get_peft_model
from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Decoder
from veneer.model.blueprint.describe import describe, describe_config
from veneer.model.blueprint.parts import Attention, Experts, Linear, ShortConv, Strange

from .families import FAMILIES, SIZES, WIDE, model_of, rope

OPT: dict[str, Any] = {
    "hidden_size": 42, "ffn_dim": 58, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 97,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_described_with_its_shape(family: str) -> None:
    model, decoder = model_of(family), describe_config(FAMILIES[family])
    assert not decoder.strange
    assert decoder.listed
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert shapes(decoder) == real


def shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name, as the description has it."""
    table, found = decoder.embedding, dict[str, tuple[int, ...]]()
    found[f"{table.path}.weight"] = (table.n_tokens, table.width)
    if table.positions is not None:
        found[f"{table.positions.path}.weight"] = (table.positions.rows, table.width)
    for linear in decoder.linears:
        size = (linear.out_features, linear.in_features)
        found[f"{linear.path}.weight"] = size[::-1] if linear.transposed else size
        found |= {f"{linear.path}.bias": size[:1]} if linear.bias else {}
    for norm in decoder.norms:
        found |= {f"{norm.path}.weight": norm.shape} if norm.weight else {}
        found |= {f"{norm.path}.bias": norm.shape} if norm.bias else {}
    for block in decoder.blocks:
        if isinstance(block.attention, ShortConv):
            part = block.attention
            found[f"{part.conv}.weight"] = (part.width, 1, part.kernel)
            found |= {f"{part.conv}.bias": (part.width,)} if part.bias else {}
        if isinstance(block.feed_forward, Experts):
            for stack in (block.feed_forward.gate_up, block.feed_forward.down):
                n_experts, o, i = stack.shape
                found[stack.path] = (n_experts, i, o) if stack.transposed else stack.shape
                found |= {f"{stack.path}_bias": (n_experts, o)} if stack.bias else {}
        if isinstance(block.attention, Attention) and block.attention.sinks:
            found[block.attention.sinks] = (block.attention.heads.n_heads,)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tie_is_one_parameter(family: str) -> None:
    model, decoder = model_of(family), describe_config(FAMILIES[family])
    assert decoder.head is not None
    assert decoder.head.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_an_adapted_model_is_described_as_its_base() -> None:
    model = model_of("qwen3", torch.float32)
    before = describe(model)
    get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", modules_to_save=["input_layernorm", "lm_head"]))
    assert describe(model) == before


def test_a_model_too_large_for_memory_is_described() -> None:
    config = LlamaConfig(hidden_size=2**15, intermediate_size=2**17, num_attention_heads=2**8, vocab_size=2**18)
    decoder = describe_config(config)
    assert sum(linear.out_features * linear.in_features for linear in decoder.linears) > 5e11


def test_a_classifier_has_no_head() -> None:
    decoder = describe(LlamaForSequenceClassification(LlamaConfig(**SIZES)))
    assert decoder.head is None
    assert decoder.other == (
        Strange(path="", reason="it holds score, which the model description does not cover"),
    )  # fmt: skip


def test_roles_of_a_block() -> None:
    def roles(family: str) -> list[str]:
        return [linear.role for linear in describe_config(FAMILIES[family]).blocks[0].linears]

    assert roles("llama") == ["q", "k", "v", "o", "gate", "up", "down"]
    assert roles("phi3") == ["qkv", "o", "gate_up", "down"]
    assert roles("opt") == ["q", "k", "v", "o", "up", "down"]
    assert roles("qwen2 experts") == ["q", "k", "v", "o", "router", "shared_gate", "gate", "up", "down"]


@pytest.mark.parametrize(
    ("config", "path", "reason"),
    [
        (BloomConfig(hidden_size=42, n_layer=2, n_head=3, apply_residual_connection_post_layernorm=True),
         "transformer", "the residual stream continues from the outputs of its norms"),
        (OPTConfig(do_layer_norm_before=False, word_embed_proj_dim=42, **OPT),
         "model.decoder", "its norms come after the residual sums"),
        (OPTConfig(word_embed_proj_dim=30, **OPT), "", "holds model.decoder.project_in, model.decoder.project_out"),
        (StableLmConfig(qk_layernorm=True, **WIDE, **rope({"partial_rotary_factor": 0.3})),
         "model.layers.0.self_attn", "the norms q_layernorm and k_layernorm"),
        (BitNetConfig(**WIDE), "model.layers.0.self_attn", "holds attn_sub_norm"),
        (DeepseekV3Config(num_hidden_layers=1, hidden_size=42), "model.layers.0.self_attn", "no q, k, v and o"),
        (GptOssConfig(num_hidden_layers=1, num_local_experts=3, swiglu_limit=9.0),
         "model.layers.0.mlp", "its experts or their router are of another form"),
        (MambaConfig(hidden_size=42, num_hidden_layers=2), "backbone.layers.0.mixer", "it keeps a state"),
        (MoshiConfig(ffn_dim=58, audio_vocab_size=89, **SIZES),
         "model.layers.0.mlp", "no feed-forward part of known form"),
        (Qwen3Config(layer_types=["full_attention", "chunked_attention"] * 2, **SIZES),
         "model.layers.1.self_attn", "it is of type chunked_attention"),
        (LlamaConfig(**SIZES, **rope({"rope_type": "default", "llama_4_scaling_beta": 0.1})),
         "model.layers.0.self_attn", "rope_parameters hold llama_4_scaling_beta"),
        (LlamaConfig(**SIZES, **rope({"rope_type": "proportional", "factor": 2.0})),
         "model.layers.0.self_attn", "its rotation is of type proportional"),
        (LlamaConfig(hidden_act="tanh", **SIZES), "model.layers.0.mlp", "its activation is none of silu"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)  # fmt: skip
def test_what_is_not_described_says_which_part_and_why(config: Any, path: str, reason: str) -> None:
    strange = describe_config(config).strange
    assert any(part.path == path and reason in part.reason for part in strange), strange


def test_what_is_no_decoder_raises() -> None:
    with torch.device("meta"):
        encoder_decoder = T5ForConditionalGeneration(T5Config(num_layers=1))
        encoder = AutoModelForCausalLM.from_config(BertConfig(num_hidden_layers=1, is_decoder=True))
    for model in (encoder_decoder, encoder):
        with pytest.raises(DescriptionError, match="lists of layers: exactly one is supported"):
            describe(model)


def test_layers_of_other_classes_are_strange() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    model = model_of("llama", torch.float32)
    model.model.layers[2].self_attn.k_proj = Scaled(42, 28)
    model.model.layers[3].mlp.up_proj = Scaled(42, 58)
    assert {(part.path, part.reason) for part in describe(model).strange} == {
        ("model.layers.2.self_attn", "its projections are not all linear layers"),
        ("model.layers.3.mlp", "its layers are not all linear layers"),
    }


def test_a_linear_layer_says_how_its_weight_is_stored() -> None:
    (first, *_) = describe_config(FAMILIES["gpt2"]).linears
    path = "transformer.h.0.attn.c_attn"
    assert first == Linear(role="qkv", path=path, out_features=126, in_features=42, bias=True, transposed=True)


def test_a_table_that_multiplies_what_it_looks_up() -> None:
    model = AutoModelForCausalLM.from_config(XGLMConfig(d_model=42, ffn_dim=58, num_layers=2, attention_heads=3))
    embedding, ids = describe(model).embedding, torch.tensor([[5, 3, 8]])
    table: Any = model.get_input_embeddings()
    assert embedding.own_multiplier == embedding.multiplier == pytest.approx(42**0.5)
    assert torch.equal(table(ids), table.weight[ids] * embedding.own_multiplier)
    assert [part.reason for part in describe(model).strange][:1] == [
        "its positions are computed, not looked up in a table"
    ]
    granite = describe_config(FAMILIES["granite"]).embedding
    assert (granite.multiplier, granite.own_multiplier) == (1.7, 1.0)  # the model multiplies, not the table
    gemma = describe_config(FAMILIES["gemma3"]).embedding
    assert gemma.multiplier == gemma.own_multiplier != 1
