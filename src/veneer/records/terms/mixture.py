"""Mixture: a change of the weight that depends on the input, so no fixed matrix equals it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import CompositionError
from veneer.records.terms.change import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture(Change, ABC):
    """Change that is a weighted sum of matrices, with weights that depend on the input's tokens. Only ``matmul``
    defines it.

    Its product is added like that of any change, and is differentiable. It cannot be folded, combined or transposed:
    `dense` and `matmul_t` raise CompositionError.
    """

    @abstractmethod
    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]: ...

    def is_made_for(self, n_rows: int, dtype: torch.dtype) -> bool:
        """Return False: there is no matrix."""
        return False

    def rounded(self, dtype: torch.dtype) -> Self:
        """Return the change unchanged. Subclasses may round all tensors but those that compute the mixture weights."""
        return self

    def dense(self, dtype: torch.dtype | None = None) -> NoReturn:
        raise CompositionError(
            "the adapter's update depends on the input tokens, so no fixed weight has its effect: keep the adapter "
            "unmerged"
        )

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> NoReturn:
        self.dense()


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankMixture(Mixture):
    """Mixture of pairs that share A: ``ΔW x = B v``, with v and B computed from the ``A x`` of all tokens."""

    a: Float[Tensor, "r i"]

    @abstractmethod
    def outward(self, inner: Float[Tensor, "*batch r"]) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "k o"]]:
        """Return v and Bᵀ, whose product ``v Bᵀ`` is the mixture's output, in the dtype of ``inner``. ``inner`` is
        ``A x``.
        """

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        inner, b = self.outward(torch.nn.functional.linear(x, self.a.to(x.dtype)))
        return inner @ b
