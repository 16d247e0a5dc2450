"""Trained bias on B: ``y += scale · c`` with c (o,) starting at zero (PEFT's ``lora_bias``; no paper).

It serves adapters extracted from fully trained models, whose biases changed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch

from veneer.contract.parameters import Params, Shapes
from veneer.methods.variants import Variant
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.pair import Pair


class LoraBias(Variant):
    """Trained bias on the output of B, as a variant of LoRA."""

    switch = "lora_bias"
    disk_names: ClassVar[Mapping[str, str]] = {"lora_B_bias": "lora_B.bias"}
    outward = ("lora_B_bias",)
    inert = True

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        return {"lora_B_bias": (site.out_features,)}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        return {"lora_B_bias": torch.zeros(site.out_features)}

    def lower(self, config: Any, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
        added = params["lora_B_bias"] * cast(Pair, record.low_rank).scale
        return replace(record, bias=added if site.bias is None else site.bias + added)
