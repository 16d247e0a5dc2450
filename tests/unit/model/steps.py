"""One training step of a small adapted model, fused and on the general path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer import LoraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.fused.decoder import fused, is_fused
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.int8 import Int8Spec
from veneer.quant.spec import StorageSpec

LORA = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear")
IDS = (torch.arange(3 * 17).view(3, 17) * 31 + 5) % 97
PADDING = torch.ones(3, 17, dtype=torch.long)
PADDING[1, 12:], PADDING[2, :5] = 0, 0
PACKED = torch.cat([torch.arange(4), torch.arange(13)])[None].expand(3, -1)
BATCHES: dict[str, dict[str, Any]] = {
    "whole": {},
    "packed": {"position_ids": PACKED},
    "padded": {"attention_mask": PADDING},
}
Result = tuple[Tensor, float, dict[str, Tensor]]


def adapted(model: PreTrainedModel, config: MethodConfig = LORA) -> PreTrainedModel:
    """With an adapter whose every tensor is away from its start."""
    get_peft_model(model, config)
    stir(model)
    return model.train()


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)


def quantized(model: PreTrainedModel, quant_type: str, compute_dtype: torch.dtype | None = None) -> PreTrainedModel:
    for name, module in list(model.base_model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            shape, dtype = tuple(module.weight.shape), module.weight.dtype
            spec: StorageSpec = Int8Spec(shape, dtype, compute_dtype)
            if quant_type != "int8":
                spec = FourBitSpec(FourBitLayout(shape, quant_type, 64, dtype), True, compute_dtype)
            model.base_model.layers.set_submodule(name, QuantLinear.from_dense(module, spec))
    return model


def step(model: PreTrainedModel, batch: dict[str, Any]) -> Result:
    """Logits of real tokens, the loss over them, and all gradients."""
    model.zero_grad()
    real = batch.get("attention_mask", torch.ones_like(IDS))
    real = real.bool() if real.ndim == 2 else torch.ones_like(IDS, dtype=torch.bool)
    torch.manual_seed(5)
    logits = model(input_ids=IDS, **{"use_cache": False, **batch}).logits[:, -17:][real].double()
    loss = nn.functional.cross_entropy(logits[:-1], IDS[real][1:])
    loss.backward()
    grads = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.item(), grads


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    apart = sum((found[k] - expected[k]).square().sum() for k in expected)
    return float((apart / sum(v.square().sum() for v in expected.values())).sqrt())


def assert_same(model: PreTrainedModel, batch: dict[str, Any] | None = None) -> None:
    """Fused and general path are alike; where they are not, float64 says that the fused one is off by little more.

    Where one key takes all of a softmax, attention's backward pass loses digits: it takes the sum of ``p dp`` from the
    rounded output (FlashAttention-2, arXiv 2307.08691, section 3.1).
    """
    expected = step(model, batch or {})
    with fused(model) as takes:
        assert takes
        found = step(model, batch or {})
    assert not is_fused(model)
    assert found[1] == pytest.approx(expected[1], rel=2e-5)
    found[2][""], expected[2][""] = found[0], expected[0]
    assert found[2].keys() == expected[2].keys()
    apart = [n for n, v in expected[2].items() if (found[2][n] - v).norm() > 2e-5 * v.norm()]
    if apart:
        logits, _, exact = step(copy.deepcopy(model).double(), batch or {})
        exact[""] = logits
        assert error(found[2], exact) <= min(4 * error(expected[2], exact), 5e-5)
        for name in apart:
            assert (found[2][name] - exact[name]).norm() <= 1e-4 * exact[name].norm(), name


def assert_all_fused(model: PreTrainedModel, batch: dict[str, Any], halves: list[str]) -> None:
    """`assert_same`, and both halves of both blocks ran in the kernels; ``halves`` lists those that did."""
    assert_same(model, batch)
    assert halves.count("attention") == halves.count("mlp") >= 4


def assert_near_under_autocast(model: PreTrainedModel, halves: list[str]) -> None:
    """In bfloat16 beside a float32 stream the fused path is off by at most twice what the general one is."""
    exact = step(copy.deepcopy(model).double(), BATCHES["packed"])
    with torch.autocast("cpu", torch.bfloat16):
        general = step(model, BATCHES["packed"])
        with fused(model):
            halves.clear()
            found = step(model, BATCHES["packed"])
    assert len(halves) == 4
    assert (found[0] - exact[0]).norm() <= 2 * (general[0] - exact[0]).norm()
    assert error(found[2], exact[2]) <= 2 * error(general[2], exact[2])
