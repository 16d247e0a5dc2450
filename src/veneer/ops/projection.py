"""A frozen linear layer with what adapters add to it, as the LoRA ops take it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from veneer.core.frozen import FrozenWeight
from veneer.ops.grouped_low_rank import AdapterRuns, LowRankGroup

Weight = Float[Tensor, "o i"] | FrozenWeight


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """The pairs of several adapters on one layer, and which rows of the batch take which. A row may be many tokens."""

    group: LowRankGroup
    runs: AdapterRuns


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A frozen layer ``W (o, i)`` and the low-rank pair on it; ``a`` and ``b`` are both None where it has none.

    ``a (r, i)`` and ``b (o, r)`` may be wider than x (float32 beside bf16): they are rounded to x's dtype for the
    products, which accumulate in float32, and their gradients come back in their own dtype. ``rows`` stands in place of
    the pair where rows take pairs of their own; layers that share their input have the same runs.
    """

    weight: Weight
    bias: Float[Tensor, " o"] | None = None
    a: Float[Tensor, "r i"] | None = None
    b: Float[Tensor, "o r"] | None = None
    scale: float = 1.0
    rows: LowRankRows | None = None


def factors_of(projections: Iterable[Projection]) -> tuple[Tensor | None, ...]:
    """The factors that gradients flow to, layer by layer: a and b, or all a and then all b of those of its rows."""
    return tuple(
        factor for p in projections for factor in ((p.a, p.b) if p.rows is None else (*p.rows.group.a, *p.rows.group.b))
    )
