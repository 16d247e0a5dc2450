"""A method's parameters at one place, and their declared shapes, by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Params = Mapping[str, Tensor]
