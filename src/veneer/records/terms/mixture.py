"""Mixture: a change of the weight that depends on the input, so that no matrix has its effect."""

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
    """Change that weighs matrices by the tokens of its input: ``matmul`` alone says what it does.

    It is added to the weight's product like any other, and has a gradient like any other. It cannot be folded, combined
    or turned: `dense` and `matmul_t` raise CompositionError.
    """

    @abstractmethod
    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]: ...

    def is_made_for(self, n_rows: int, dtype: torch.dtype) -> bool:
        """Return False: there is no matrix."""
        return False

    def rounded(self, dtype: torch.dtype) -> Self:
        """Return the change itself, unless a subclass knows what chooses its matrices: that is not rounded."""
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
    """Mixture of pairs that share A: ``ΔW x = B v``, with v and B made of the ``A x`` of all tokens."""

    a: Float[Tensor, "r i"]

    @abstractmethod
    def outward(self, inner: Float[Tensor, "*batch r"]) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "k o"]]:
        """Return v and Bᵀ in the dtype of ``inner``, which is ``A x``."""

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        inner, b = self.outward(torch.nn.functional.linear(x, self.a.to(x.dtype)))
        return inner @ b
