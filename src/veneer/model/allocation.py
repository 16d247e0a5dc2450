"""The making of a new adapter's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Allocation:
    """The way in which the parameters of a new adapter are made.

    ``values``: the method's start values; otherwise they are left empty, to be loaded. ``widen``: float32 beside a
    16-bit base, otherwise the base's dtype.
    """

    values: bool = True
    widen: bool = True

    def parameters(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        init: Callable[[], Mapping[str, Tensor]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.ParameterDict:
        """Fresh parameters of these shapes on a device; ``dtype`` is the base's, used where they are not widened."""
        values = init() if self.values else {name: torch.empty(shape) for name, shape in shapes.items()}
        kept = torch.promote_types(dtype, torch.float32) if self.widen else dtype
        return nn.ParameterDict({name: nn.Parameter(value.to(device, kept)) for name, value in values.items()})
