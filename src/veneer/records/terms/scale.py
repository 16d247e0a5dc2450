"""Scale of inputs or outputs: one number for each feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.terms.term import Term


@dataclass(frozen=True, slots=True)
class Scale(Term):
    """Map ``x ↦ vector * x`` of the inputs or the outputs of a layer."""

    vector: Float[Tensor, " n"]

    @property
    def width(self) -> int:
        """Number of features."""
        return len(self.vector)

    def apply(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return ``vector * x`` in the wider dtype of the two: the scale is never rounded to x's dtype."""
        return x * self.vector

    def fold_input(self, weight: Float[Tensor, "*experts o n"]) -> Float[Tensor, "*experts o n"]:
        """Return ``W diag(vector)``."""
        return weight * self.vector.to(weight.dtype)

    def fold_output(self, weight: Float[Tensor, "*experts n i"]) -> Float[Tensor, "*experts n i"]:
        """Return ``diag(vector) W``."""
        return weight * self.vector.to(weight.dtype)[:, None]

    def of_rows(self, rows: slice) -> Scale:
        """Return the scale of the features ``rows``."""
        return Scale(self.vector[rows])

    def transposed(self) -> Scale:
        """Return the scale itself: a diagonal matrix is its own transpose."""
        return self

    def after(self, other: Scale) -> Scale:
        """Return the product of both scales, applied one after the other."""
        return Scale(torch.stack([other.vector, self.vector]).prod(dim=0))
