"""Modules adapted where a config names none, against PEFT's own choice for every type of model that it lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as SCALED,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LOW_RANK,
)
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.contract import LinearMethod
from veneer.contract.targets import matches_any
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import look_at
from veneer.model.sites.places import plan_of

from .conftest import close, logits

SMALL = {
    "vocab_size": 67, "hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 4, "num_key_value_heads": 2,
    "n_embd": 40, "n_head": 4, "d_model": 40, "num_heads": 4, "d_kv": 6, "d_ff": 53, "ffn_dim": 53, "rotary_dim": 4,
    "word_embed_proj_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_hidden_layers": 2,
    "n_layer": 2, "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2, "max_position_embeddings": 37,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "hidden_size": 40, "num_heads": 4},
    "nemotron_h": {"hidden_size": 40, "layers_block_type": ["mamba", "attention", "moe"]},
}
WHOLE = {"blip-2", "gemma4", "llama4"}  # models of several parts, in their sizes
LISTED = sorted(LOW_RANK.keys() & set(CONFIG_MAPPING))


def small_config(model_type: str) -> PreTrainedConfig:
    config = AutoConfig.for_model(model_type, **OWN.get(model_type, {}))
    for name, value in SMALL.items():
        if hasattr(config, name) and model_type not in WHOLE | OWN.keys():
            setattr(config, name, value)
    return config


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    kinds = CAUSAL if type(config) in CAUSAL and config.model_type not in WHOLE else MODEL_MAPPING
    with torch.device("meta"):
        return kinds[type(config)](config)


def meant(model: PreTrainedModel, config: LinearMethod) -> AttachPlan:
    return plan_of(look_at(model), config, fresh=True)


def scaled_inputs(model: PreTrainedModel, plan: AttachPlan) -> set[str]:
    assert isinstance(plan.config, IA3Config)
    sites = look_at(model).sites(plan.targets)
    return {s.name for s in sites if plan.config.shapes(s)["ia3_l"][0] == 1}


def adaptable(model: PreTrainedModel, patterns: Any) -> set[str]:
    return {path for path in look_at(model).index(LoraConfig()).adaptable if matches_any(path, patterns)}


@pytest.mark.parametrize("model_type", LISTED)
def test_on_every_type_that_peft_lists_they_are_pefts(model_type: str) -> None:
    model = on_meta(small_config(model_type))
    assert set(meant(model, LoraConfig()).targets) == adaptable(model, LOW_RANK[model_type])
    if model_type in SCALED:
        plan = meant(model, IA3Config())
        assert set(plan.targets) == adaptable(model, SCALED[model_type])
        assert scaled_inputs(model, plan) == adaptable(model, FEEDFORWARD[model_type])


def with_values(model_type: str) -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(small_config(model_type)).eval()


@pytest.mark.parametrize("model_type", ["stablelm", "mixtral", "cohere", "gpt2", "codegen"])
@pytest.mark.parametrize("config", [LoraConfig(r=3), IA3Config()], ids=["lora", "ia3"])
def test_they_are_written_so_that_peft_loads_them_on_types_that_it_does_not_list(
    config: LinearMethod, model_type: str, randomize: Any, tmp_path: Path
) -> None:
    ours = get_peft_model(with_values(model_type), config)
    randomize(ours)
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"]
    assert written.get("feedforward_modules", []) is not None
    ids = torch.tensor([[5, 61, 2, 33, 17], [8, 8, 40, 1, 66]])
    theirs = peft.PeftModel.from_pretrained(with_values(model_type), tmp_path).eval()
    assert not torch.allclose(logits(ours, ids), logits(with_values(model_type), ids), atol=1e-4)
    close(logits(ours, ids), logits(theirs, ids))
    close(logits(PeftModel.from_pretrained(with_values(model_type), tmp_path), ids), logits(theirs, ids))


@pytest.mark.parametrize(
    ("given", "targets", "feedforward"),
    [
        (["k_proj", "fc2"], ("k_proj", "fc2"), ("fc2",)),
        (["k_proj", "fc1"], ("k_proj", "fc1"), ()),
        (r".*(fc2|q_proj)", r".*(fc2|q_proj)", ("fc2",)),
        (
            ["0.self_attn.k_proj", "model.decoder.layers.1.fc2"],
            ("0.self_attn.k_proj", "model.decoder.layers.1.fc2"),
            ("model.decoder.layers.1.fc2",),
        ),
    ],
)
def test_feedforward_modules_left_out_are_those_targets_that_project_back(
    given: Any, targets: Any, feedforward: tuple[str, ...]
) -> None:
    config = meant(on_meta(small_config("opt")), IA3Config(target_modules=given)).config
    assert isinstance(config, IA3Config)
    assert (config.target_modules, config.feedforward_modules) == (targets, feedforward)


def test_a_name_that_means_both_kinds_of_layers_becomes_whole_paths() -> None:
    """GPT-2 calls the output of attention as it calls that of the feed-forward part."""
    config = meant(on_meta(small_config("gpt2")), IA3Config(target_modules=["c_proj"])).config
    assert isinstance(config, IA3Config)
    parts = ("attn.c_proj", "mlp.c_proj")
    assert config.target_modules == tuple(f"transformer.h.{i}.{part}" for i in range(2) for part in parts)
    assert config.feedforward_modules == tuple(f"transformer.h.{i}.mlp.c_proj" for i in range(2))
