"""A scale of inputs or outputs: one number for each feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.core.terms.term import Term


@dataclass(frozen=True, slots=True)
class Scale(Term):
    """``x ↦ vector * x`` in front of a layer or behind it."""

    vector: Float[Tensor, " n"]

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.vector)

    def apply(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """``vector * x`` in the wider dtype of the two: the scale is never rounded to x's."""
        return x * self.vector

    def fold_input(self, weight: Float[Tensor, "*experts o n"]) -> Float[Tensor, "*experts o n"]:
        """``W diag(vector)``."""
        return weight * self.vector.to(weight.dtype)

    def fold_output(self, weight: Float[Tensor, "*experts n i"]) -> Float[Tensor, "*experts n i"]:
        """``diag(vector) W``."""
        return weight * self.vector.to(weight.dtype)[:, None]

    def of_rows(self, rows: slice) -> Scale:
        """The scale of some features."""
        return Scale(self.vector[rows])

    def transposed(self) -> Scale:
        """The scale itself: a diagonal matrix is its transpose."""
        return self

    def after(self, other: Scale) -> Scale:
        """Both scales, one after the other."""
        return Scale(torch.stack([other.vector, self.vector]).prod(dim=0))
