"""Ops whose gradients are kernels' have no second derivative, and say so instead of leaving terms of it out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.kernels.differentiable import attention, glu, grouped_low_rank, layer_norm, rms_norm, rotary
from flat_records import flat_record
from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.fused.decoder import fuse
from veneer.ops.attention import AttentionOptions
from veneer.ops.cross_entropy import linear_cross_entropy
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linear


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


SCALED = flat_record(out_scale=drawn(5))
OPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda x: linear(x, LinearLayer(weight=drawn(5, 7), records=(SCALED,))), (3, 7)),
    "rms_norm": (lambda x: rms_norm(x, drawn(7), 1e-5), (3, 7)),
    "layer_norm": (lambda x: layer_norm(x, drawn(7), drawn(7), 1e-5), (3, 7)),
    "glu": (lambda x: glu(x, drawn(3, 7), "silu"), (3, 7)),
    "rotary": (lambda x: rotary(x, drawn(2, 1, 5, 6), drawn(1, 5, 3), drawn(1, 5, 3))[0], (2, 3, 5, 6)),
    "attention": (
        lambda x: attention(x, drawn(5, 1, 8), drawn(5, 1, 8), torch.tensor([0, 2, 5]), AttentionOptions()), (5, 3, 8),
    ),
    "cross_entropy": (lambda x: linear_cross_entropy(x, drawn(11, 7), torch.tensor([2, 10, 5])), (3, 7)),
    "grouped_low_rank": (
        lambda x: grouped_low_rank(x, [drawn(2, 7)], [drawn(5, 2)], [0.7], torch.zeros(3, dtype=torch.int64)), (3, 7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_ops(op: str) -> None:
    function, shape = OPS[op]
    x = drawn(*shape).requires_grad_()
    y = function(x).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    assert gradient.any()
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("config", [LoraConfig(r=3, init_lora_weights=False), IA3Config()], ids=["lora", "ia3"])
def test_adapted_models(config: MethodConfig, fused: bool) -> None:
    small = LlamaConfig(
        hidden_size=20, intermediate_size=28, num_hidden_layers=1, num_attention_heads=2, vocab_size=31
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(small), config).train()
    assert not fused or fuse(model)
    tokens = torch.arange(7)[None]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        torch.stack([g.square().sum() for g in gradients]).sum().backward()
