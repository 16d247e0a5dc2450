"""Records as LoRA: plain factors with a scale of one, and a bias on B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite


def fields_of(records: Mapping[str, LinearDelta]) -> dict[str, Any] | None:
    """Return the fields of a config for these records, by module path; None if one of them scales.

    Where only biases change, the factors are zero.
    """
    if any(r.in_scale is not None or r.out_scale is not None for r in records.values()):
        return None
    ranks = {path: max(record.rank, 1) for path, record in records.items()}
    commonest = max(set(ranks.values()), key=list(ranks.values()).count)
    special = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != commonest}
    return {
        "r": commonest,
        "lora_alpha": commonest,
        "rank_pattern": special,
        "alpha_pattern": dict(special),
        "lora_bias": any(record.bias is not None for record in records.values()),
    }


def parameters_of(site: LinearSite, record: LinearDelta, with_bias: bool) -> dict[str, Tensor]:
    """Return the parameters that lower to a record."""
    like = next(t for t in (record.a, record.bias) if t is not None)
    a = like.new_zeros(1, site.in_features) if record.a is None else record.a
    b = like.new_zeros(site.out_features, 1) if record.b is None else record.b
    params = {"lora_A": a, "lora_B": b * (record.scale / site.repeats)}
    if with_bias:
        zero = torch.zeros_like(b[:, 0])
        params["lora_B_bias"] = zero if record.bias is None else record.bias / site.repeats
    return params
