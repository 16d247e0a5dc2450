"""Low-rank pair: ``scale * diag(b_scale) B diag(core) A``, added to the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.terms.term import RowsProduct, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Term):
    """Low-rank pair ``scale * diag(b_scale) B diag(core) A`` with A (r, i) and B (o, r).

    The vectors ``core`` (between A and B) and ``b_scale`` (applied after B) let layers share one A and B (VeRA). A
    vector that is None counts as ones. For experts stacked in one tensor, A and B have the experts as first axis.
    """

    a: Float[Tensor, "*experts r i"]
    core: Float[Tensor, " r"] | None = None
    b: Float[Tensor, "*experts o r"]
    b_scale: Float[Tensor, " o"] | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank r of the pair."""
        return self.a.shape[-2]

    @property
    def is_stacked(self) -> bool:
        """Return True for stacked pairs of experts."""
        return self.a.ndim > 2

    @property
    def is_plain(self) -> bool:
        """Return True if there is neither a core nor a scale of B."""
        return self.core is None and self.b_scale is None

    @property
    def plain_b(self) -> Float[Tensor, "*experts o r"]:
        """Factor ``diag(b_scale) B diag(core)``: the B of the plain pair with the same product."""
        b = self.b if self.core is None else self.b * self.core
        return b if self.b_scale is None else b * self.b_scale[:, None]

    @property
    def plain(self) -> Pair:
        """Pair with core and b_scale multiplied into B."""
        return self if self.is_plain else Pair(a=self.a, b=self.plain_b, scale=self.scale)

    def apply(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return the product with x, in the pair's dtype. A is applied first: the matrix ``B A`` is never formed."""
        return self.behind_a(torch.nn.functional.linear(x.to(self.a.dtype), self.a))

    def behind_a(
        self, inner: Float[Tensor, "*batch r"], linear: RowsProduct = torch.nn.functional.linear
    ) -> Float[Tensor, "*batch o"]:
        """Return ``scale * b_scale * B (core * inner)``, with ``inner`` = A x. ``linear`` multiplies by B."""
        scaled = inner if self.core is None else inner * self.core
        y = linear(scaled, self.b) * self.scale
        return y if self.b_scale is None else y * self.b_scale

    def look_up(
        self, index: Tensor, padding_idx: int | None = None, linear: RowsProduct = torch.nn.functional.linear
    ) -> Float[Tensor, "*batch o"]:
        """Return the columns of the change at token ids. The column of A at ``padding_idx`` gets no gradient."""
        return self.behind_a(torch.nn.functional.embedding(index, self.a.T, padding_idx), linear)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "*experts o i"]:
        """Return the change as a matrix."""
        return (self.plain_b.to(dtype) @ self.a.to(dtype)) * self.scale

    def weighed(self, weight: float) -> Pair:
        """Return the change times a number."""
        return replace(self, scale=self.scale * weight)

    def with_rows_times(self, factors: Float[Tensor, " o"]) -> Pair:
        """Return the change with each row of the matrix multiplied by a number."""
        factors = factors.to(self.b.dtype)
        return replace(self, b_scale=factors if self.b_scale is None else self.b_scale * factors)

    def transposed(self) -> Pair:
        """Return the change of the transposed weight (i, o)."""
        return Pair(a=self.plain_b.mT, b=self.a.mT, scale=self.scale)

    def of_rows(self, rows: slice) -> Pair:
        """Return the pair for some rows of the weight, or of stacked pairs for some experts."""
        return replace(
            self,
            a=self.a[rows] if self.is_stacked else self.a,
            b=self.b[rows],
            b_scale=None if self.b_scale is None else self.b_scale[rows],
        )

    def of_expert(self, expert: int) -> Pair:
        """Return the pair of one of the stacked experts."""
        return replace(self, a=self.a[expert], b=self.b[expert])


def joined(pairs: Sequence[Pair]) -> Pair:
    """Return one pair that is the exact sum of several: factors concatenated along the rank."""
    if len(pairs) == 1:
        return pairs[0]
    b = [pair.plain_b * pair.scale for pair in pairs]
    return Pair(a=torch.cat([pair.a for pair in pairs], dim=-2), b=torch.cat(b, dim=-1))
