"""Contract of methods in the residual stream."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from veneer.contract.config import MethodConfig
from veneer.contract.keys import SUBLAYER, Place
from veneer.contract.parameters import Params, Shapes
from veneer.contract.places import Placed, ShapesByKey, module_places
from veneer.records.deltas import ResidualDelta
from veneer.records.sites import ResidualSite

_NAME = re.compile(rf"(?:.*\.)?(\d+)\.{SUBLAYER}(attention|cross_attention|mlp)")
_SAMPLE = ResidualSite(name="", layer=0, sublayer="mlp", features=1024)


@dataclass(frozen=True, kw_only=True)
class ResidualMethod(MethodConfig):
    """Method in the residual stream, with parameters of its own after each sub-layer that it names."""

    @property
    @abstractmethod
    def sublayers(self) -> tuple[str, ...]:
        """Sub-layers that get a bottleneck: some of ``"attention"``, ``"cross_attention"`` and ``"mlp"``."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Indices of the blocks that get bottlenecks (from 0, through the whole model); None means all of them."""
        return None

    @abstractmethod
    def shapes(self, site: ResidualSite) -> Shapes: ...

    @abstractmethod
    def init(self, site: ResidualSite, generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    @abstractmethod
    def lower(self, site: ResidualSite, params: Params) -> ResidualDelta: ...

    @property
    def samples(self) -> tuple[ResidualSite, ...]:
        return (_SAMPLE,)

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        return module_places(self, shapes, source, _named)


def _named(sample: ResidualSite, place: Place) -> ResidualSite | None:
    match = _NAME.fullmatch(place.path)
    if match is None:
        return None
    sublayer = cast(Literal["attention", "cross_attention", "mlp"], match[2])
    return replace(sample, name=place.path, layer=int(match[1]), sublayer=sublayer)
