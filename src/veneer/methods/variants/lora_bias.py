"""Trained bias on B: ``y += scale · c`` with c (o,) starting at zero (PEFT's ``lora_bias``; no paper).

It serves adapters extracted from fully trained models, whose biases changed too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.core.terms.pair import Pair

SWITCH = "lora_bias"
DISK_NAMES = {"lora_B_bias": "lora_B.bias"}
OUTWARD = ("lora_B_bias",)


def shapes(config: LinearMethod, site: LinearSite) -> Shapes:
    """Return the shape of the bias: one number per output."""
    return {"lora_B_bias": (site.out_features,)}


def init(config: LinearMethod, site: LinearSite, factors: Params) -> dict[str, Tensor]:
    """Return a bias of zero: the start changes nothing."""
    return {"lora_B_bias": torch.zeros(site.out_features)}


def lower(config: LinearMethod, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
    """Return the record with the layer's own bias plus the scaled new one."""
    added = params["lora_B_bias"] * cast(Pair, record.low_rank).scale
    return replace(record, bias=added if site.bias is None else site.bias + added)
