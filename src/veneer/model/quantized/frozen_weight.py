"""Frozen weight of a linear layer of any class."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.quant.dense import DenseWeight
from veneer.records.frozen import FrozenWeight


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """Return the weight of a linear layer of any class as W (o, i)."""
    stored = getattr(module, "frozen_format", None)
    if stored is not None:
        return cast(FrozenWeight, stored())
    weight = cast(Tensor, module.weight)
    return DenseWeight(weight.T if isinstance(module, Conv1D) else weight)
