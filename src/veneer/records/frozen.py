"""Interfaces of frozen weights and of stacks of them. Methods do not depend on how the base is stored."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class FrozenWeight(Protocol):
    """Weight ``W (o, i)`` that is read and never trained, in any storage format."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i), whatever the layout in memory."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form, with everything needed to read it back."""
        ...

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return ``W x`` on the last axis, differentiable in x.

        A dense weight converts x to the weight's dtype and returns that dtype. A quantized weight returns x's dtype.
        Under autocast both return autocast's dtype.
        """
        ...

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        """Return ``Wᵀ dy`` on the last axis, the gradient of ``matmul`` in x; dtypes as in ``matmul``."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        """Return the whole weight as a matrix in ``dtype``; in the format's own dtype if it is None.

        The matrix may share memory with the weight: do not write to it.
        """
        ...


@runtime_checkable
class FrozenStack(Protocol):
    """Weights ``W (experts, o, i)`` of the experts of a layer, read and never trained, in any storage format."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (experts, o, i), whatever the layout in memory."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form, with everything needed to read it back."""
        ...

    def expert(self, number: int) -> FrozenWeight:
        """Return the weight (o, i) of one expert. It shares memory with the stack."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "experts o i"]:
        """Return all weights as one tensor in ``dtype``; in the format's own dtype if it is None.

        The tensor may share memory with the weights: do not write to it.
        """
        ...
