"""What acts on the layers of a fused model now, for the description of what its halves keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from veneer.model.blueprint.decoder import Block, Decoder
from veneer.model.blueprint.describe import blocks_of
from veneer.model.fused.block import FusedBlock, attention_of, mlp_of
from veneer.model.fused.kept import Acting
from veneer.model.linear import AdaptedLinear
from veneer.ops.linear.layer import LinearLayer


def acting_on(
    model: PreTrainedModel, decoder: Decoder, stream: torch.dtype, dtype: torch.dtype
) -> dict[str, Acting] | None:
    """What acts on the layers of a fused model's blocks by their paths, given dtypes as `kept.Pass` has them.

    None where it has no description: a half that is fused by its shape does not run so now (it is hooked, trained,
    drops by itself), or the rows of a batch have adapters of their own.
    """
    found: dict[str, Acting] = {}
    for block, described in zip(blocks_of(model)[1], decoder.blocks, strict=True):
        layers = _layers(block, described, stream, dtype) if isinstance(block, FusedBlock) else None
        if layers is None:
            return None
        for linear, layer in zip(described.linears, layers, strict=True):
            module = model.get_submodule(linear.path)
            if layer.runs is not None:
                return None
            if layer.records:
                drops = isinstance(module, AdaptedLinear) and any(module.rates())
                found[linear.path] = Acting.of(layer.record, drops=drops)
    return found


def _layers(
    block: FusedBlock, described: Block, stream: torch.dtype, dtype: torch.dtype
) -> Sequence[LinearLayer] | None:
    """The layers of both halves in the order of `Block.linears`."""
    attention, mlp = attention_of(block, stream, dtype), mlp_of(block, stream, dtype)
    if attention is None or mlp is None:
        return None
    return (*attention.qkv, attention.out, *mlp.gate_up, mlp.down)
