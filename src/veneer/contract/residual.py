"""The contract of methods in the residual stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.contract.config import MethodConfig
from veneer.contract.parameters import Params, Shapes
from veneer.core.records import ResidualDelta
from veneer.core.sites import ResidualSite


@dataclass(frozen=True, kw_only=True)
class ResidualMethod(MethodConfig):
    """A method in the residual stream, with parameters of its own after each sub-layer that it names."""

    @property
    @abstractmethod
    def sublayers(self) -> tuple[str, ...]:
        """The sub-layers that get a bottleneck: of ``"attention"``, ``"cross_attention"`` and ``"mlp"``."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The indices of the blocks that get bottlenecks (from 0, through the whole model); None is all of them."""
        return None

    @property
    def dropout(self) -> float:
        """Probability of zeroing an output of the bottleneck in training."""
        return 0.0

    @abstractmethod
    def shapes(self, site: ResidualSite) -> Shapes:
        """Names and shapes of the parameters trained at one site."""

    @abstractmethod
    def init(self, site: ResidualSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU."""

    @abstractmethod
    def lower(self, site: ResidualSite, params: Params) -> ResidualDelta:
        """The record that these parameters mean at this site."""

    def disk_names(self, site: ResidualSite) -> dict[str, str]:
        """For each parameter, what follows the site's name in its key in ``adapter_model.safetensors``."""
        return {name: name for name in self.shapes(site)}

    def features(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The width of the stream that parameters of these shapes belong to; None where they do not tell it."""
        return None
