"""Parameters of a method at one site by name, their declared shapes, and their record."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.records.deltas import AttendedDelta, LinearDelta, PrefixDelta, PromptDelta, ResidualDelta

Shapes = dict[str, tuple[int, ...]]
Params = Mapping[str, Tensor]
Record = LinearDelta | ResidualDelta | AttendedDelta | PromptDelta | tuple[PrefixDelta, ...]
