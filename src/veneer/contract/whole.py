"""Contract of methods that train parts of the base as they are, and have no parameters of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.contract.parameters import Params, Shapes
from veneer.contract.places import Placed, ShapesByKey
from veneer.contract.targets import TargetedConfig
from veneer.records.deltas import LinearDelta


@dataclass(frozen=True, kw_only=True)
class WholeMethod(TargetedConfig):
    """Method that trains its target modules whole, or only the rows ``rows`` of them. It has no sites.

    If there are rows and no targets, the rows are those of the input embeddings.
    """

    @property
    def rows(self) -> tuple[int, ...]:
        """Indices of the rows to train; empty if the modules are trained whole."""
        return ()

    @property
    def draws_rows(self) -> bool:
        """Return True if the rows start from random values, False if from those of their table."""
        return False

    def shapes(self, site: Any) -> Shapes:
        return {}

    def init(self, site: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {}

    def lower(self, site: Any, params: Params) -> LinearDelta:
        return LinearDelta()

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed]:
        return {}
