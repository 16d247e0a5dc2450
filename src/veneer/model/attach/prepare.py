"""Preparation of a quantized model for training adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def widen(module: nn.Module) -> None:
    """Freeze a module's parameters, and cast those in 16 bits to float32."""
    for parameter in module.parameters():
        parameter.requires_grad = False
        # bitsandbytes may label the bytes of its codes with a 16-bit dtype
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.float32)


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """Freeze the model, cast its 16-bit parameters (norms, embeddings, head) to float32, switch checkpointing on.

    Quantized weights stay unchanged. With ``use_gradient_checkpointing`` the inputs of the first block get a gradient
    if checkpoints are reentrant (torch's older kind, and the default without ``use_reentrant``). Without that gradient
    a frozen model would train nothing. The model is changed in place and returned.
    """
    widen(model)
    if use_gradient_checkpointing:
        kwargs = dict(gradient_checkpointing_kwargs or {})
        if kwargs.get("use_reentrant", True):
            model.enable_input_require_grads()
        # transformers is renaming the method
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs or None)
    return model
