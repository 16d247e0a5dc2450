"""Records raised to a method: a config that lowers to them, and the parameters of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from veneer.contract.targets import TargetedConfig
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True)
class Raised:
    """Adapter that lowers to given records: ``parameters`` is the inverse of ``lower`` under ``config``.

    The ``bias`` of a low-rank record is added to the layer's own.
    """

    config: TargetedConfig
    parameters: Callable[[LinearSite, LinearDelta], dict[str, Tensor]]
