"""Folding adapters into the weights of their layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.core.linear import compose_linear, fold_linear
from veneer.model.attach import adapted_layers


@torch.no_grad()
def merge_into_base(model: nn.Module, names: tuple[str, ...]) -> None:
    """Replace the weights of adapted layers by those with the named adapters folded in."""
    for layer in adapted_layers(model).values():
        present = [name for name in names if name in layer.adapters]
        if present:
            site = layer.site()
            delta = compose_linear([layer.record(name, site) for name in present], site.bias)
            weight, bias = fold_linear(delta, layer.frozen_weight().dense(), site.bias)
            stored = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
            layer.weight = nn.Parameter(stored, requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias, requires_grad=False)
