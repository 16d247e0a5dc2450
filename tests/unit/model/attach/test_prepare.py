"""The changes of `prepare_model_for_kbit_training`, and that a model prepared by it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import llama_config
from veneer.adapters.peft_model import get_peft_model
from veneer.methods.lora import LoraConfig
from veneer.model.attach.prepare import prepare_model_for_kbit_training
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = llama_config(vocab_size=53, hidden_size=28, num_attention_heads=2, tie_word_embeddings=True)
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    for layer in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = getattr(layer.mlp, name)
            layout = FourBitLayout((dense.out_features, dense.in_features), "nf4", dtype=torch.bfloat16)
            setattr(layer.mlp, name, QuantLinear.from_dense(dense, FourBitSpec(layout)))
    return base


def test_frozen_and_wide_but_for_the_codes() -> None:
    prepared = prepare_model_for_kbit_training(model())
    assert not any(p.requires_grad for p in prepared.parameters())
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert prepared.lm_head.weight is prepared.model.embed_tokens.weight
    layer = prepared.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    assert layer.spec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "checkpointing"),
    [
        ({}, True),
        ({"use_gradient_checkpointing": False}, False),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, True),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, True),
    ],
)
def test_checkpointing_and_gradients_of_the_inputs(kwargs: dict[str, Any], checkpointing: bool) -> None:
    prepared = prepare_model_for_kbit_training(model(), **kwargs)
    block = prepared.model.layers[0]
    assert block.gradient_checkpointing == checkpointing
    assert prepared.get_input_embeddings()(torch.tensor([1])).requires_grad == checkpointing
    if checkpointing:
        asked = kwargs.get("gradient_checkpointing_kwargs", {"use_reentrant": False})
        assert block._gradient_checkpointing_func.keywords == asked


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_on_it_gets_the_gradients_that_it_has_without_checkpointing(reentrant: bool) -> None:
    ids = torch.arange(14).view(2, 7)
    gradients = []
    for kwargs in (
        {"use_gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        torch.manual_seed(0)
        adapted = get_peft_model(
            prepare_model_for_kbit_training(model(), **kwargs),  # type: ignore[arg-type]
            LoraConfig(r=3, target_modules=("up_proj", "down_proj"), init_lora_weights=False),
        )
        adapted.train()
        adapted(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 8
    for name, gradient in plain.items():
        assert gradient is not None
        assert float(gradient.abs().max()) > 0
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6)
