"""Small models of the families whose blocks are fused, and the halves that do run so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from veneer.model.fused.block import FusedBlock, run_half
from veneer.model.sites.structure import SublayerKind

SIZES: dict[str, Any] = {
    "hidden_size": 42, "intermediate_size": 58, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 14, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
WIDE = {**SIZES, "hidden_size": 84}
PARTIAL: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}}
NEOX: dict[str, Any] = {
    **{k: v for k, v in WIDE.items() if k not in ("num_key_value_heads", "head_dim")}, **PARTIAL, "hidden_act": "gelu",
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(sliding_window=5, **SIZES),
    "gemma2": Gemma2Config(sliding_window=7, query_pre_attn_scalar=11, attn_logit_softcapping=3.0, **SIZES),
    "gemma3": Gemma3TextConfig(sliding_window=7, **SIZES),
    "phi": PhiConfig(**WIDE, **PARTIAL),
    "phi normed heads": PhiConfig(qk_layernorm=True, **WIDE, **PARTIAL),
    "phi3": Phi3Config(sliding_window=5, pad_token_id=0, **WIDE, **PARTIAL),
    "neox": GPTNeoXConfig(use_parallel_residual=True, **NEOX),
    "neox serial": GPTNeoXConfig(use_parallel_residual=False, **NEOX),
    "gpt2": GPT2Config(
        n_embd=42, n_layer=2, n_head=3, n_inner=58, vocab_size=97, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    ),
    "stablelm": StableLmConfig(**WIDE, **PARTIAL),
    "starcoder2": Starcoder2Config(sliding_window=5, **WIDE),
    "persimmon": PersimmonConfig(attention_dropout=0.0, **WIDE, **PARTIAL),
}


def base(family: str | PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small model of which no weight is neutral."""
    torch.manual_seed(3)
    config = FAMILIES[family] if isinstance(family, str) else family
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.25))
    return model.to(dtype)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The halves that ran fused."""
    ran: list[str] = []

    def spied(block: FusedBlock, kind: SublayerKind, *args: Any) -> Tensor:
        ran.append(kind)
        return run_half(block, kind, *args)

    monkeypatch.setattr("veneer.model.fused.block.run_half", spied)
    return ran
