"""Products with a frozen weight under autograd: the backward pass keeps only the weight, never a dense copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.product import recorded_product


class CodedWeight(ABC):
    """Frozen weight ``W (o, i)`` in quantized codes.

    Products are computed in ``compute_dtype``, or in the input's dtype if it is None, and returned in the input's
    dtype. Autocast overrules both, as for a dense layer.
    """

    __slots__ = ()
    compute_dtype: torch.dtype | None

    @abstractmethod
    def multiply(self, x: Tensor, transposed: bool) -> Tensor:
        """Multiply the last axis of x by W, or by Wᵀ if ``transposed``, in x's own dtype. Autograd records nothing."""

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return self._product(x, False)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return self._product(dy, True)

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            autocast_dtype = torch.get_autocast_dtype(x.device.type)
            return cast(Tensor, _record(x.to(autocast_dtype), self, transposed))
        y = _record(x if self.compute_dtype is None else x.to(self.compute_dtype), self, transposed)
        return cast(Tensor, y.to(x.dtype))


# The kernels are opaque to the compiler: a compiled model calls them between its graphs.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record(x: Tensor, weight: CodedWeight, transposed: bool) -> Tensor:
    return recorded_product(x, weight.multiply, transposed)
