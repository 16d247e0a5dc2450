"""A whole adapter from one record per layer: the config and parameters that mean those records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.errors import CompositionError
from veneer.methods.ia3 import IA3Config
from veneer.methods.lora import LoraConfig


def config_of(records: Mapping[str, LinearDelta], targets: Sequence[str]) -> LoraConfig | IA3Config:
    """A config under which the records, by module path, are what the method lowers to: LoRA with a scale of one, or
    IA3.

    ``targets``: names that match exactly those paths. Raises CompositionError where no one method can be all of them.
    """
    ranks = {path: record.rank for path, record in records.items()}
    if not any(ranks.values()):
        inputs = tuple(path for path, record in records.items() if record.in_scale is not None)
        return IA3Config(target_modules=tuple(records), feedforward_modules=inputs)
    if not all(ranks.values()):
        raise CompositionError(
            "on some layers only adapters that rescale act (IA3), on others low-rank ones: no one method is both"
        )
    commonest = max(set(ranks.values()), key=list(ranks.values()).count)
    special = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != commonest}
    return LoraConfig(
        r=commonest,
        lora_alpha=commonest,
        target_modules=tuple(targets),
        rank_pattern=special,
        alpha_pattern=dict(special),
        lora_bias=any(record.bias is not None for record in records.values()),
    )


def parameters_of(record: LinearDelta, config: LoraConfig | IA3Config, site: LinearSite) -> dict[str, Tensor]:
    """The parameters of one layer under `config_of`. A low-rank record's ``bias`` is what it adds to the layer's
    own.
    """
    if isinstance(config, IA3Config):
        if record.in_scale is not None:  # a channel has one scale for all places of the window
            return {"ia3_l": record.in_scale[None, :: math.prod(site.window)]}
        return {"ia3_l": _given(record.out_scale)[:, None]}
    a, b = _given(record.a), _given(record.b)
    params = {"lora_A": a, "lora_B": b * (record.scale / site.repeats)}
    if config.lora_bias:
        params["lora_B_bias"] = torch.zeros_like(b[:, 0]) if record.bias is None else record.bias / site.repeats
    return params


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise CompositionError("the record does not have what its method needs: no factor or no scale")
    return tensor
