"""The low-rank parts of adapted layers where runs of rows have pairs of their own: what `ops.lora` does with one pair.

The pairs of a layer lie behind one another: ``a (R, i)`` and ``b (o, R)`` hold those of all adapters, R the sum of
their ranks. A row multiplies with the ranks of its own adapter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.projection import Projection


@dataclass(frozen=True, slots=True)
class _Share:
    """One run of tokens in all layers that share an input: for each that has a pair there, its index, its ranks, and
    where they are among the joined A-products of these tokens."""

    tokens: slice
    parts: tuple[tuple[int, slice, slice], ...]
    width: int


def add_low_rank_rows(
    x: Float[Tensor, "n i"], ys: Sequence[Float[Tensor, "n _"]], projections: Sequence[Projection]
) -> Float[Tensor, "n widest"]:
    """Add ``scale * B A x`` to the outputs of layers that share their input; the A-products come back."""
    shares = _shares(projections, x.shape[0])
    a_list, b_list = _factors(projections, x.dtype)
    u = x.new_empty(x.shape[0], max((share.width for share in shares), default=0))
    for share in shares:
        own = torch.mm(x[share.tokens], _joined(a_list, share).T)
        u[share.tokens, : share.width] = own
        for index, ranks, columns in share.parts:
            ys[index][share.tokens].addmm_(own[:, columns], b_list[index][ranks])
    return u


def low_rank_rows_backward(
    dys: Sequence[Float[Tensor, "n _"]],
    x: Float[Tensor, "n i"],
    u: Float[Tensor, "n widest"],
    projections: Sequence[Projection],
    input_grad: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Gradients in x (None where not asked for) and in every layer's a and b, from the u that the forward returned."""
    shares = _shares(projections, x.shape[0])
    a_list, b_list = _factors(projections, x.dtype)
    das = tuple(None if p.a is None else torch.zeros_like(p.a) for p in projections)
    # transposed, so that what is added to is contiguous
    dbs = [None if p.b is None else torch.zeros_like(p.b.T, memory_format=torch.contiguous_format) for p in projections]
    dx = torch.zeros_like(x) if input_grad else None
    for share in shares:
        own_x, own_u = x[share.tokens], u[share.tokens, : share.width]
        du = torch.empty_like(own_u, memory_format=torch.contiguous_format)
        for index, ranks, columns in share.parts:
            dy = dys[index][share.tokens]
            torch.mm(dy, b_list[index][ranks].T, out=du[:, columns])
            db = dbs[index]
            assert db is not None  # it has ranks
            db[ranks] += own_u[:, columns].T @ dy
        da = du.T @ own_x
        for index, ranks, columns in share.parts:
            own_da = das[index]
            assert own_da is not None
            own_da[ranks] += da[columns]
        if dx is not None:
            torch.mm(du, _joined(a_list, share), out=dx[share.tokens])
    scaled = (None if db is None else db.mul_(_scales(p)[:, None]).T for p, db in zip(projections, dbs, strict=True))
    return dx, das, tuple(scaled)


def _shares(projections: Sequence[Projection], n_tokens: int) -> list[_Share]:
    """The runs of all layers by their rows."""
    found: dict[tuple[int, int], list[tuple[int, slice]]] = {}
    each = 1
    for index, p in enumerate(projections):
        if p.rows is not None:
            each = n_tokens // p.rows.n_rows
            for run in p.rows.runs:
                found.setdefault((run.start, run.stop), []).append((index, run.ranks))
    return [_share(slice(start * each, stop * each), parts) for (start, stop), parts in found.items()]


def _share(tokens: slice, parts: Sequence[tuple[int, slice]]) -> _Share:
    width, placed = 0, []
    for index, ranks in parts:
        columns = slice(width, width + ranks.stop - ranks.start)
        placed.append((index, ranks, columns))
        width = columns.stop
    return _Share(tokens, tuple(placed), width)


def _joined(a_list: Sequence[Tensor | None], share: _Share) -> Tensor:
    parts = [a[ranks] for index, ranks, _ in share.parts if (a := a_list[index]) is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _factors(projections: Sequence[Projection], dtype: torch.dtype) -> tuple[list[Tensor | None], list[Tensor]]:
    """``a`` and ``(scale * b)ᵀ`` of every layer in the compute dtype."""
    a_list = [None if p.a is None else p.a.to(dtype) for p in projections]
    return a_list, [torch.empty(0) if p.b is None else (p.b * _scales(p)).to(dtype).T.contiguous() for p in projections]


def _scales(projection: Projection) -> Tensor:
    """The scale of every rank, (R,)."""
    assert projection.b is not None  # the callers asked
    assert projection.rows is not None
    scales = [1.0] * projection.b.shape[1]
    for run in projection.rows.runs:
        scales[run.ranks] = [run.scale] * (run.ranks.stop - run.ranks.start)
    return torch.tensor(scales, device=projection.b.device, dtype=projection.b.dtype)
