"""Products with a frozen weight under autograd: the backward pass keeps the weight alone, never a dense copy of it."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from veneer.ops.product import recorded_product


@runtime_checkable
class Multiplies(Protocol):
    """A weight that can multiply in x's own dtype, without recording anything."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What to compute in; None: the dtype of the input."""
        ...

    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        """``W x``, or ``Wᵀ x``, on the last axis."""
        ...


def product(weight: Multiplies, x: Tensor, transposed: bool = False) -> Tensor:
    """``W x`` (or ``Wᵀ x``) computed in the weight's compute dtype (None: that of x) and returned in x's dtype.

    Autocast overrules both, as it does for a dense layer.
    """
    if torch.is_autocast_enabled(x.device.type):
        autocast_dtype = torch.get_autocast_dtype(x.device.type)
        return cast(Tensor, _record(x.to(autocast_dtype), weight, transposed))
    y = _record(x if weight.compute_dtype is None else x.to(weight.compute_dtype), weight, transposed)
    return cast(Tensor, y.to(x.dtype))


# The kernels are opaque to the compiler: a compiled model calls them between its graphs.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record(x: Tensor, weight: Multiplies, transposed: bool) -> Tensor:
    return recorded_product(x, weight.multiply, transposed)
