"""Keys of configs: back over the config that transformers makes of a file, they give the config again."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from veneer.store.gguf.config import GgufContents, mended_config
from veneer.store.gguf.keys import said_of, value_of
from veneer.store.gguf.registry import by_architecture, by_model_type

from ...export.gguf.tiny import SETTINGS, YARN


def config_of(family: str, **changes: Any) -> Any:
    model_type, settings = SETTINGS[family]
    return AutoConfig.for_model(model_type, **{**settings, **changes})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config_comes_back_from_its_keys(name: str) -> None:
    config = config_of(name)
    family = by_model_type()[config.model_type]
    said = said_of(family, config)
    assert said.problems == ()
    if by_architecture().get(family.architecture) is not family:
        return  # not read
    prefix = f"{family.architecture}."
    contents = GgufContents(
        architecture=family.architecture,
        pairs={pair.key.removeprefix(prefix): pair.value for pair in said.pairs},
        shapes={"token_embd.weight": (config.vocab_size, config.hidden_size)},
        factors=said.factors,
    )
    read = mended_config(AutoConfig.for_model(config.model_type, num_hidden_layers=config.num_hidden_layers), contents)
    for entry in family.fields:
        assert value_of(entry, read) == pytest.approx(value_of(entry, config)), entry.key
    if family.rotary == "rope_parameters":
        known = {key: value for key, value in config.rope_parameters.items() if value != "default"}
        for key, value in known.items():
            assert read.rope_parameters[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' has no key: the runtime computes 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor 0.5"),
        ("llama-yarn", {"rope_parameters": {**YARN, "mscale": 0.7}}, "mscale 0.7"),
        ("llama-yarn", {"rope_parameters": {**YARN, "beta_fast": 20.0}}, "beta_fast 20.0"),
        ("qwen2", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "beta_slow 2.0"),
        ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}, "attention_factor 1.3"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "do not alternate"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv 3.0"),
        ("olmoe", {"num_key_value_heads": 2}, "fewer heads of keys"),
        ("ministral3", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale 0.7"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "sliding windows"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "layers without experts"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("gemma2", {"query_pre_attn_scalar": 31}, "query_pre_attn_scalar 31 has no key: the runtime computes 32"),
        ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping 3.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gptneox", {"attention_bias": False}, "attention_bias False"),
        ("olmo3", {"rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "rope_theta 10000.0 in layers with windows"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers"),
        ("granite", {"mlp_bias": True}, "mlp_bias True"),
    ],
)  # fmt: skip
def test_what_has_no_key_is_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    config = config_of(name, **changes)
    problems = said_of(by_model_type()[config.model_type], config).problems
    assert len(problems) == 1
    assert reason in problems[0]


def test_bounds_of_yarn_that_the_runtime_rounds_are_a_note() -> None:
    config = config_of("gpt_oss", rope_parameters={**YARN, "truncate": False})
    [note] = said_of(by_model_type()["gpt_oss"], config).notes
    assert "truncate false has no key" in note


@pytest.mark.parametrize(("name", "window"), [("mistral", 50), ("mixtral", 50), ("ministral3", 50), ("phi3", 899)])
def test_a_window_on_every_layer_bounds_the_context(name: str, window: int) -> None:
    config = config_of(name, sliding_window=window)
    family = by_model_type()[config.model_type]
    said = said_of(family, config)
    assert not said.problems
    lengths = {pair.key: pair.value for pair in said.pairs}
    assert lengths[f"{family.architecture}.context_length"] == window
    assert f"context_length {window} instead of {config.max_position_embeddings}" in said.notes[0]
    config.sliding_window = config.max_position_embeddings
    assert not said_of(family, config).notes


def test_windows_on_other_layers_are_written_out() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = config_of("gemma2", layer_types=kinds)
    found = {pair.key: pair.value for pair in said_of(by_model_type()["gemma2"], config).pairs}
    assert found["gemma2.attention.sliding_window_pattern"] == [False, True, True]
    usual = said_of(by_model_type()["gemma2"], config_of("gemma2")).pairs
    assert "gemma2.attention.sliding_window_pattern" not in {pair.key for pair in usual}
