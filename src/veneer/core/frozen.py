"""The interface of a frozen weight. No method knows how the base is stored."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class FrozenWeight(Protocol):
    """A weight ``W (o, i)`` that is read and never trained, in any storage format."""

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i), whatever the layout in memory."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the stored form takes, with everything it needs to be read back."""
        ...

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """``W x`` on the last axis; differentiable in x.

        In the dtype that the plain layer would answer in: the weight's own where it is dense (x is converted to it),
        x's where it is kept in codes, and autocast's under autocast.
        """
        ...

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        """``Wᵀ dy`` on the last axis: the gradient of ``matmul`` in x, in the dtype that ``matmul`` has for dy."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        """The whole weight as a matrix; None keeps the format's dtype. May share memory: do not write into it."""
        ...
