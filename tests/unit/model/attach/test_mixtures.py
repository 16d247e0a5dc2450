"""Mixtures of experts: what "all-linear" takes, what it leaves out and says, and "all-experts"."""

import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.errors import TargetError

WIDE = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 67, "pad_token_id": 0}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
MIXTURES = {
    "mixtral": transformers.MixtralConfig(**WIDE, **HEADS, num_local_experts=5, num_experts_per_tok=2),
    "phimoe": transformers.PhimoeConfig(**WIDE, num_attention_heads=3, num_key_value_heads=1, num_local_experts=5),
    "llama4": transformers.Llama4TextConfig(**WIDE, **HEADS, intermediate_size_mlp=20, num_local_experts=5),
    "granitemoe": transformers.GraniteMoeConfig(
        **WIDE, num_attention_heads=3, num_key_value_heads=1, num_local_experts=5
    ),
}  # fmt: skip


def made(kind):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(MIXTURES[kind], dtype=torch.float32)


def test_all_linear_says_what_it_leaves_out_and_takes_no_router_that_answers_otherwise(caplog):
    ids = torch.arange(7)[None]
    for kind in MIXTURES:
        caplog.clear()
        model = get_peft_model(made(kind), LoraConfig(r=3, target_modules="all-linear"))
        model(input_ids=ids, labels=ids).loss.backward()
        named = {path for path, module in model.named_modules() if hasattr(module, "adapters")}
        assert named
        assert not any(path.endswith("router") for path in named), kind
        assert "the experts are not adapted" in caplog.text, kind
        assert "adapter.experts: true" in caplog.text


def test_all_experts_adapts_the_stacks_with_the_parameters_that_were_told(caplog):
    for kind in MIXTURES:
        caplog.clear()
        attention = get_peft_model(made(kind), LoraConfig(r=3, target_modules="all-linear"))
        told = int(caplog.text.partition("adapts them: ")[2].partition(" parameters")[0].replace(",", ""))
        caplog.clear()
        config = LoraConfig(r=3, target_modules="all-linear", target_parameters=["all-experts"])
        everything = get_peft_model(made(kind), config)
        trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (attention, everything)]
        assert trained[1] - trained[0] == 2 * told, kind  # two layers
        assert "not adapted" not in caplog.text
        saved = everything.peft_config["default"].target_parameters
        assert "all-experts" not in saved
        assert all("." in name for name in saved)
        experts = get_peft_model(made(kind), LoraConfig(r=3, target_parameters=["all-experts"]))
        assert sum(p.numel() for p in experts.parameters() if p.requires_grad) == 2 * told


def test_other_methods_are_told_without_a_cost_and_models_without_experts_refuse_the_name(caplog):
    get_peft_model(made("mixtral"), IA3Config(target_modules="all-linear", feedforward_modules=[]))
    assert "adapts them" in caplog.text
    assert "parameters more a layer" not in caplog.text
    dense = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**WIDE, **HEADS), dtype=torch.float32)
    with pytest.raises(TargetError, match="has no stacks of experts: leave it out"):
        get_peft_model(dense, LoraConfig(target_parameters=["all-experts"]))
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        get_peft_model(dense, LoraConfig(target_modules="all-linear"))
    assert "not adapted" not in caplog.text


def test_a_linear_class_with_another_forward_counts_if_it_computes_the_same():
    falcon = transformers.FalconConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, vocab_size=67)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(falcon, dtype=torch.float32), LoraConfig(target_modules="all-linear")
    )
    assert {path.rpartition(".")[2] for path, m in model.named_modules() if hasattr(m, "site_name")} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
