"""Form of a term: its values in one of a few layouts that kernels support."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from veneer.records.terms.base import Base


@dataclass(frozen=True, slots=True)
class Form:
    """Linear map (o, i) of features, in a layout that kernels support.

    | kind | sizes | values |
    | --- | --- | --- |
    | blocks | k, b | (k, b, b): the blocks on the diagonal |
    | sparse | o, i | (n,), at the ``places`` (n,), counted row by row |
    | kronecker | o₁, i₁, o₂, i₂ | (o₁, i₁), and ``second`` (o₂, i₂): the factors |
    | circulant | m, n, b | (m, n, b): kernels, as `methods.c3a.Circulant` has them |
    | hadamard | o, i, r | A (r, i), and ``second`` B (o, r): ``W ⊙ (B A)`` with W the frozen weight ``base`` |
    """

    kind: Literal["blocks", "sparse", "kronecker", "circulant", "hadamard"]
    sizes: tuple[int, ...]
    values: Tensor
    second: Tensor | None = None
    places: Tensor | None = None
    base: Base | None = None

    def weighed(self, weight: float) -> Form:
        """Return the map times a number."""
        return replace(self, values=self.values * weight)
