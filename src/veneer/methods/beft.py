"""BEFT: ``W x + c + b``, a bias b trained at chosen layers (Wang et al. 2025, arXiv:2509.15974)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.peft_fields import PeftFields
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class BeftConfig(LinearMethod):
    """Settings of BEFT, with the names that PEFT gives them. By default it adapts the value projections.

    ``init_weights``: True starts the bias at zero, False draws it from a normal distribution. Merging adds a bias to
    layers that have none; PEFT refuses to merge there.
    """

    peft_type: ClassVar[str] = "BEFT"
    outward: ClassVar[frozenset[str]] = frozenset({"beft_bias"})
    default_targets: ClassVar[tuple[str, ...]] = ("v",)
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules", "layers_pattern", "layers_to_transform"))
    inert: ClassVar[frozenset[str]] = frozenset({"init_weights"})
    usual_learning_rate: ClassVar[float] = 5e-3

    init_weights: bool = True

    def shapes(self, site: LinearSite) -> Shapes:
        return {"beft_bias": (1, site.out_features)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["beft_bias"]
        return {"beft_bias": torch.zeros(shape) if self.init_weights else torch.randn(shape, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        bias = params["beft_bias"].flatten()
        return LinearDelta(bias=bias if site.bias is None else site.bias + bias)
