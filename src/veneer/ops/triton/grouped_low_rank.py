"""The grouped low-rank product in Triton.

A tile of rows asks for each adapter whether it has rows of it, and multiplies with those that it has: tokens of one
adapter mostly lie together, so a tile mostly meets one. Factors are stacked and padded to one rank, a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.grouped_low_rank import LowRankGroup
from veneer.ops.reference import grouped_low_rank as reference
from veneer.ops.rows import same_dtype, with_rows
from veneer.ops.triton.launch import block, is_served, launch

_WIDTH = 64


def forward(x: Tensor, group: LowRankGroup, onto: Tensor | None) -> Tensor:
    if not is_served(x, *group.a, *group.b, *([] if onto is None else [onto])):
        return reference.forward(x, group, onto)
    x, owner = with_rows(x), group.row_to_adapter.contiguous()
    a, b = _stacked(group.a, x), _scaled_b(group, x)
    return _expand(_shrink(x, a, owner), b, owner, onto)


def backward(
    dy: Tensor, x: Tensor, group: LowRankGroup, input_grad: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    if not is_served(x, *group.a, *group.b):
        return reference.backward(dy, x, group, input_grad)
    x, dy, owner = with_rows(x), with_rows(same_dtype(dy, x)), group.row_to_adapter.contiguous()
    a, b = _stacked(group.a, x), _scaled_b(group, x)
    u, du = _shrink(x, a, owner), _shrink(dy, b, owner)
    dx = _expand(du, a, owner, None) if input_grad else None
    da, db = _outer(du, x, owner, len(group.a)), _outer(u, dy, owner, len(group.a))
    ranks = [pair.shape[0] for pair in group.a]
    das = [da[k, :r] for k, r in enumerate(ranks)]
    dbs = [(db[k, :r].T * scale).contiguous() for k, (r, scale) in enumerate(zip(ranks, group.scales, strict=True))]
    return dx, das, dbs


def _stacked(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Factors (r, width) as one (adapters, rank, width) in x's dtype."""
    rank = block(max(f.shape[0] for f in factors), least=16)
    out = x.new_zeros(len(factors), rank, factors[0].shape[1])
    for place, factor in zip(out, factors, strict=True):
        place[: factor.shape[0]] = factor
    return out


def _scaled_b(group: LowRankGroup, x: Tensor) -> Tensor:
    return _stacked([(b * scale).T for b, scale in zip(group.b, group.scales, strict=True)], x)


def _tiles(n: int, rank: int) -> tuple[int, dict[str, int]]:
    """How many tiles the rows make, and their sizes."""
    rows = block(n, least=16, most=64)
    return triton.cdiv(n, rows), {"ROWS": rows, "RANKS": min(rank, 64), "WIDTH": _WIDTH, "num_stages": 2}


def _shrink(x: Tensor, factors: Tensor, owner: Tensor) -> Tensor:
    """Each row times its adapter's factor, (n, rank); rows without an adapter are left as they come."""
    adapters, rank, width = factors.shape
    out = x.new_empty(len(x), rank)
    n_tiles, sizes = _tiles(len(x), rank)
    grid = n_tiles, adapters, rank // sizes["RANKS"]
    launch(_shrink_kernel, grid, x, x.stride(0), factors, owner, out, len(x), rank, width, **sizes)
    return out


def _expand(u: Tensor, factors: Tensor, owner: Tensor, onto: Tensor | None) -> Tensor:
    """``onto`` plus each row of u times its adapter's factor transposed, (n, width)."""
    adapters, rank, width = factors.shape
    out = u.new_empty(len(u), width, dtype=u.dtype if onto is None else onto.dtype)
    base = out if onto is None else with_rows(onto)
    n_tiles, sizes = _tiles(len(u), rank)
    grid = n_tiles, triton.cdiv(width, _WIDTH)
    args = u, factors, owner, base, base.stride(0), out, len(u), adapters, rank, width
    launch(_expand_kernel, grid, *args, ONTO=onto is not None, **sizes)
    return out


def _outer(u: Tensor, x: Tensor, owner: Tensor, adapters: int) -> Tensor:
    """Of each adapter the sum over its rows of u's row times x's, (adapters, rank, width) in float32."""
    rank, width = u.shape[1], x.shape[1]
    out = torch.empty(adapters, rank, width, dtype=torch.float32, device=x.device)
    _, sizes = _tiles(len(u), rank)
    grid = triton.cdiv(width, _WIDTH), adapters, rank // sizes["RANKS"]
    launch(_outer_kernel, grid, u, x, x.stride(0), owner, out, len(u), rank, width, **sizes)
    return out


@triton.jit
def _shrink_kernel(
    x,
    x_row,
    factors,
    owner,
    out,
    n,
    rank,
    width,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    adapter = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    own = tl.load(owner + rows, mask=rows < n, other=-1) == adapter
    if tl.sum(own.to(tl.int32), axis=0) > 0:
        total = tl.zeros([ROWS, RANKS], tl.float32)
        factor = factors + (adapter.to(tl.int64) * rank + ranks[None, :]) * width
        for first in range(0, width, WIDTH):
            columns = first + tl.arange(0, WIDTH)
            inside = columns < width
            tile = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=own[:, None] & inside[None, :], other=0.0)
            weight = tl.load(factor + columns[:, None], mask=inside[:, None] & (ranks < rank)[None, :], other=0.0)
            total = tl.dot(tile, weight, total, input_precision="ieee")
        place = out + rows[:, None] * rank + ranks[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=own[:, None])


@triton.jit
def _expand_kernel(
    u,
    factors,
    owner,
    onto,
    onto_row,
    out,
    n,
    adapters,
    rank,
    width,
    ONTO: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (columns < width)[None, :]
    owners = tl.load(owner + rows, mask=rows < n, other=-1)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for adapter in range(0, adapters):
        own = owners == adapter
        if tl.sum(own.to(tl.int32), axis=0) > 0:
            for first in range(0, rank, RANKS):
                ranks = first + tl.arange(0, RANKS)
                tile = tl.load(u + rows[:, None] * rank + ranks[None, :], mask=own[:, None], other=0.0)
                factor = factors + (tl.cast(adapter, tl.int64) * rank + ranks[:, None]) * width
                weight = tl.load(factor + columns[None, :], mask=(columns < width)[None, :], other=0.0)
                total = tl.dot(tile, weight, total, input_precision="ieee")
    if ONTO:
        total += tl.load(onto + rows[:, None] * onto_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    place = out + rows[:, None] * width + columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _outer_kernel(
    u,
    x,
    x_row,
    owner,
    out,
    n,
    rank,
    width,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    adapter = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros([RANKS, WIDTH], tl.float32)
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        own = tl.load(owner + rows, mask=rows < n, other=-1) == adapter
        if tl.sum(own.to(tl.int32), axis=0) > 0:
            left = tl.load(u + rows[:, None] * rank + ranks[None, :], mask=own[:, None], other=0.0)
            inside = own[:, None] & (columns < width)[None, :]
            right = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    place = out + (adapter.to(tl.int64) * rank + ranks[:, None]) * width + columns[None, :]
    tl.store(place, total, mask=(columns < width)[None, :])
