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
    """Adapter whose records are given: ``parameters`` returns the parameters for which ``lower`` of ``config`` gives a
    record.

    The ``bias`` of a low-rank record is added to the layer's own bias.
    """

    config: TargetedConfig
    parameters: Callable[[LinearSite, LinearDelta], dict[str, Tensor]]
