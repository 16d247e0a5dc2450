"""A frozen linear layer with what adapters add to it, as the LoRA ops take it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from veneer.core.frozen import FrozenWeight

Weight = Float[Tensor, "o i"] | FrozenWeight


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of the batch from ``start`` to ``stop`` that take ``ranks`` of the layer's pairs, times ``scale``."""

    start: int
    stop: int
    ranks: slice
    scale: float


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """Runs of a batch of ``n_rows`` rows, in order; rows in none of them take no pair. A row may be many tokens."""

    runs: tuple[Run, ...]
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A frozen layer ``W (o, i)`` and the low-rank pair on it; ``a`` and ``b`` are both None where it has none.

    ``a (r, i)`` and ``b (o, r)`` may be wider than x (float32 beside bf16): they are rounded to x's dtype for the
    products, which accumulate in float32, and their gradients come back in their own dtype. ``rows``: a and b hold the
    pairs of several adapters behind one another, and each run of rows takes one, with a scale of its own.
    """

    weight: Weight
    bias: Float[Tensor, " o"] | None = None
    a: Float[Tensor, "r i"] | None = None
    b: Float[Tensor, "o r"] | None = None
    scale: float = 1.0
    rows: LowRankRows | None = None
