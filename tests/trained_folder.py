"""A model of a folder with LoRA of fixed values, beside that of another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.peft_model import get_peft_model
from veneer.methods.lora import LoraConfig
from veneer.store.source import load_model


def trained(folder: Path, ids: Tensor, **fields: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The model with LoRA of these fields, its logits, and the gradients of its factors."""
    model = get_peft_model(load_model(folder), LoraConfig(r=3, lora_alpha=7, **fields))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    logits = model(ids).logits
    logits.log_softmax(-1)[..., 5].sum().backward()
    return model, logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= 1e-5 * expected.norm()
