"""Experts packed for serving."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from veneer.model.adapted.experts import hold_stack
from veneer.model.quantized.stack import PackedExpertStack
from veneer.ops.experts import PackedStack
from veneer.ops.packed import ROWS


def pack_experts(
    model: PreTrainedModel, paths: tuple[str, ...], *, give_up: bool
) -> tuple[PackedStack, PackedStack] | None:
    """Return the packed stacks of experts' weights at two paths, or None if they are quantized or not on a CPU.

    If ``give_up``, the packed stacks replace the parameters, whose own storage is freed.
    """
    places = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    for module, name in places:
        weights = module._parameters.get(name)
        if weights is None or not weights.is_cpu or weights.dtype != model.dtype or weights.dtype not in ROWS:
            return None
    inner, down = (_packed(module, name, give_up=give_up) for module, name in places)
    return inner, down


def _packed(module: nn.Module, name: str, *, give_up: bool) -> PackedStack:
    parameter = cast(nn.Parameter, module._parameters[name])
    packed = PackedStack.pack(parameter)
    if give_up:
        hold_stack(module, name, PackedExpertStack(parameter, packed))
    return packed
