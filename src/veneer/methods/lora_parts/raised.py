"""Records as LoRA: plain factors with a scale of one, and a bias on B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


def fields_of(records: Mapping[str, LinearDelta]) -> dict[str, Any] | None:
    """Return the fields of a config for these records, by module path; None if one is more than a pair and a bias.

    If only biases change, the factors are zero.
    """
    if not all(record.only_adds and not record.changes for record in records.values()):
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
    like = record.tensors[0]
    zeros = like.new_zeros(1, site.in_features), like.new_zeros(site.out_features, 1)
    a, b = record.factors() if record.adds else zeros
    params = {"lora_A": a, "lora_B": b / site.repeats}
    if with_bias:
        zero = torch.zeros_like(b[:, 0])
        params["lora_B_bias"] = zero if record.bias is None else record.bias / site.repeats
    return params
