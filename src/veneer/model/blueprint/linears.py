"""Describes a linear layer: its role, shape and bias."""

from __future__ import annotations

from collections.abc import Hashable
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.model.blueprint.parts import Linear, Role
from veneer.model.blueprint.source import BlockSource
from veneer.model.inplace import InPlace, base_of
from veneer.model.linear_class import computes_linear
from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.model.quantized.packed_linear import PackedLinear, PackedQuantLinear
from veneer.model.quantized.quant_linear import QuantLinear


def is_linear(module: nn.Module) -> bool:
    """Return True if a module is a linear layer, adapted or not: its class is known, or derived from `nn.Linear` with a
    forward that computes the same.
    """
    kind = _own_class(module)
    known = kind in (nn.Linear, Conv1D, QuantLinear, PackedLinear, PackedQuantLinear)
    return known or (issubclass(kind, nn.Linear) and computes_linear(cast(Hashable, kind)))


def read_linear(source: BlockSource, module: nn.Module, role: Role) -> Linear:
    """Return the description of a linear layer; the module must satisfy `is_linear`."""
    n_out, n_in = frozen_weight(module).shape
    return Linear(
        role=role,
        path=source.path(module),
        out_features=int(n_out),
        in_features=int(n_in),
        bias=cast("Tensor | None", module._parameters.get("bias")) is not None,
        transposed=_own_class(module) is Conv1D or bool(getattr(module, "is_transposed", False)),
    )


def _own_class(module: nn.Module) -> type[nn.Module]:
    return base_of(type(module)) if isinstance(module, InPlace) else type(module)
