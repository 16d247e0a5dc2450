"""Experts packed for serving."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.model.adapted.experts import hold_stack
from veneer.model.quantized.packed_stack import PackedCodedStack, packed_coded
from veneer.model.quantized.stack import CodedStack, PackedParameterStack, as_maps
from veneer.ops.experts import PackedStack
from veneer.ops.packed import ROWS


def pack_experts(
    model: PreTrainedModel, paths: tuple[str, ...], *, give_up: bool
) -> tuple[PackedStack, PackedStack] | None:
    """Pack the weights of experts at two paths, dense or quantized, for serving, and return the two packed stacks.

    Return None if the weights are not on a CPU, in another dtype than the model, or in codes that cannot be packed. If
    ``give_up``, the packed stacks replace the weights, whose own storage is freed.
    """
    places = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    if model.dtype not in ROWS or not all(_fits(*place, model.dtype) for place in places):
        return None
    found = [_packed(*place, model.dtype) for place in places]
    stacks = [stack for stack in found if stack is not None]
    if len(stacks) < len(places):
        return None
    for (module, name), stack in zip(places, stacks, strict=True) if give_up else ():
        own = module._modules.get(name)
        if isinstance(own, CodedStack):
            module._modules[name] = PackedCodedStack(own, stack)
        else:
            hold_stack(module, name, PackedParameterStack(cast(nn.Parameter, module._parameters[name]), stack))
    inner, down = stacks
    return inner, down


def _fits(module: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Return True if the weights under a name are in CPU memory, and have this dtype or are quantized and not merged.
    Packing needs this, and more.
    """
    own = module._modules.get(name)
    if isinstance(own, CodedStack):
        return own.weight.is_cpu and own.merged is None
    weights = module._parameters.get(name)
    return weights is not None and weights.is_cpu and weights.dtype == dtype


def _packed(module: nn.Module, name: str, dtype: torch.dtype) -> PackedStack | None:
    own = module._modules.get(name)
    bias = module._parameters.get(f"{name}_bias")
    if isinstance(own, CodedStack):
        packed = packed_coded(own, dtype)
    else:
        packed = PackedStack.pack(as_maps(module, cast(Tensor, module._parameters[name])))
    if packed is None or bias is None:
        return packed
    return replace(packed, bias=bias.detach().to(dtype).contiguous())
