"""Tiny models of several families, with odd sizes and biases that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from models import gpt2_config

VOCAB = 101
_GROUPED = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], object]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, attention_bias=True),
    "llama-tied": lambda: LlamaConfig(**{**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**{**_GROUPED, "tie_word_embeddings": True}, head_dim=6, sliding_window=8),
    "gpt2": lambda: gpt2_config(vocab_size=VOCAB, n_embd=40, n_inner=53, n_head=4, n_positions=37),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        ffn_dim=53,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=40,
        max_position_embeddings=37,
    ),
}


def make_tiny(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh model in evaluation mode, every dropout off, the same for the same seed."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def make_tokens(seed: int = 1) -> torch.Tensor:
    """Two rows of thirteen token ids."""
    return torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(seed))


def make_random(model: torch.nn.Module, seed: int = 2) -> None:
    """Give everything that trains, or belongs to an adapter that is not active, values that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad or ".adapters." in name or ".copies." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def logits(model: Any, ids: Tensor) -> Tensor:
    """The logits of the model for these tokens; no gradient is kept."""
    with torch.no_grad():
        return model(ids).logits


def exactly(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def close(a: Tensor, b: Tensor) -> None:
    """Equal to the rounding of float32, which near zero is that of the terms of a sum: of the largest value."""
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6 * max(1.0, float(b.detach().abs().max()) / 8))


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    return make_tiny


@pytest.fixture
def ids() -> torch.Tensor:
    return make_tokens()


@pytest.fixture
def randomize() -> Callable[..., None]:
    return make_random


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
