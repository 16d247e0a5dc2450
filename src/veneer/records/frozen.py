"""Interfaces of a frozen weight, and of a stack of them. No method knows how the base is stored."""

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

        The dtype is that of the plain layer's output. A dense weight gives its own dtype, and x is converted to it. A
        quantized weight gives x's dtype. Under autocast it is autocast's.
        """
        ...

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        """Return ``Wᵀ dy`` on the last axis: the gradient of ``matmul`` in x, in ``matmul``'s dtype for dy."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        """Return the whole weight as a matrix; None keeps the format's dtype. It may share memory: do not write into
        it.
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
        """Return all weights as one tensor; None keeps the format's dtype. It may share memory: do not write into
        it.
        """
        ...
