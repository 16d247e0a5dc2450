"""Mixtures whose experts' rows no grouped product takes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from veneer import LoraConfig, get_peft_model
from veneer.model.adapted.experts import fit_experts

SIZES: dict[str, Any] = {
    "vocab_size": 67, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
IDS = torch.tensor([[5, 61, 2, 33, 17, 8], [8, 8, 40, 1, 66, 3]])
NARROW = MixtralConfig(hidden_size=24, intermediate_size=13, num_local_experts=3, num_experts_per_tok=2, **SIZES)
ODD = Qwen3MoeConfig(hidden_size=20, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2, **SIZES)


def make(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).train()


@pytest.mark.parametrize(("config", "dtype"), [(NARROW, torch.float32), (ODD, torch.bfloat16)])
def test_they_train_one_by_one_where_torch_would_raise(
    config: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="16"):
        make(config, dtype)(input_ids=IDS, labels=IDS)
    model = make(config, dtype)
    with caplog.at_level(logging.WARNING):
        fit_experts(model)
    assert "experts run one by one" in caplog.text
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(ODD, torch.float32), (LlamaConfig(hidden_size=20, intermediate_size=13, **SIZES), torch.bfloat16)],
)
def test_others_stay_as_they_are(config: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = make(config, dtype)
    before = model.get_experts_implementation()
    with caplog.at_level(logging.WARNING):
        fit_experts(model)
    assert model.get_experts_implementation() == before
    assert caplog.text == ""
