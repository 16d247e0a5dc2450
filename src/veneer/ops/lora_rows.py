"""Low-rank parts of adapted layers where runs of rows have pairs of their own: what `ops.lora` does with one pair."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from veneer.ops.grouped_low_rank import (
    AdapterRuns,
    LowRankGroup,
    add_grouped_low_rank,
    grouped_low_rank_backward,
)
from veneer.ops.projection import Projection


def add_low_rank_rows(
    x: Float[Tensor, "n i"], ys: Sequence[Float[Tensor, "n _"]], projections: Sequence[Projection]
) -> Tensor:
    """Add ``scale * B A x`` to the outputs of layers that share their input; what `low_rank_rows_backward` reads
    comes back."""
    groups, runs = _shared(projections, x)
    adapted = [y for y, p in zip(ys, projections, strict=True) if p.rows is not None]
    return add_grouped_low_rank(x, groups, runs, adapted)


def low_rank_rows_backward(
    dys: Sequence[Float[Tensor, "n _"]],
    x: Float[Tensor, "n i"],
    u: Tensor,
    projections: Sequence[Projection],
    input_grad: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients in x (None where not asked for) and, as `projection.factors_of` lists them, in the factors, from the u
    that the forward returned."""
    groups, runs = _shared(projections, x)
    adapted = [dy for dy, p in zip(dys, projections, strict=True) if p.rows is not None]
    dx, das, dbs = grouped_low_rank_backward(adapted, x, u, groups, runs, input_grad=input_grad)
    found = (gradient for pair in zip(das, dbs, strict=True) for gradients in pair for gradient in gradients)
    factors = (factor for group in groups for factor in (*group.a, *group.b))
    own = iter([None if g is None or f is None else g.to(f.dtype) for g, f in zip(found, factors, strict=True)])
    gradients = []
    for p in projections:
        n_factors = 2 if p.rows is None else 2 * len(p.rows.group.scales)
        gradients += [None if p.rows is None else next(own) for _ in range(n_factors)]
    return dx, tuple(gradients)


def _shared(projections: Sequence[Projection], x: Tensor) -> tuple[list[LowRankGroup], AdapterRuns]:
    """The pairs of each layer that has some, and the runs of x's rows."""
    rows = [p.rows for p in projections if p.rows is not None]
    runs = rows[0].runs
    return [each.group for each in rows], runs.times(x.shape[0] // runs.n_rows)
