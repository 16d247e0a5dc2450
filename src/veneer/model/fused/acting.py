"""Adapters that act on the layers of a model now, for the description of what its halves keep."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.model.blueprint.decoder import Decoder
from veneer.model.fused.block import FusedBlock, halves_of
from veneer.model.fused.kept import Acting
from veneer.model.linear import AdaptedLinear
from veneer.model.residual import residual_adapters


def acting_on(model: PreTrainedModel, decoder: Decoder) -> dict[str, Acting] | None:
    """Adapters that act on the layers of a model's blocks, by the layers' paths, on any device, meta too.

    None where the rows of a batch have adapters of their own, and where a bottleneck acts: what is kept then is not
    described.
    """
    if any(holder.acting for holder in residual_adapters(model).values()):
        return None
    found: dict[str, Acting] = {}
    for linear in (linear for block in decoder.blocks for linear in block.linears):
        module = model.get_submodule(linear.path)
        records, runs = module.acting_records() if isinstance(module, AdaptedLinear) else ((), None)
        if runs is not None:
            return None
        if isinstance(module, AdaptedLinear) and records:
            found[linear.path] = Acting.of(records[0], drops=any(module.rates()))
    return found


def runs_fused(model: nn.Module, stream: torch.dtype, dtype: torch.dtype) -> bool:
    """Return True if both halves of every fused block run so now, and not as the model wrote them (hooked, trained,
    dropping by themselves or within their block); the dtypes are those of `kept.Pass`.
    """
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    return bool(blocks) and all(None not in halves_of(block, stream, dtype) for block in blocks)
