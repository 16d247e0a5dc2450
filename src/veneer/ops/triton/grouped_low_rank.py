"""Grouped low-rank product in Triton.

A tile of rows is multiplied by the factors of each adapter that has a row in the tile. Tokens of one adapter are mostly
contiguous, so most tiles have rows of one adapter. Factors are stacked and padded to one rank, a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.dropout import Mask
from veneer.ops.grouped_low_rank import AdapterRuns, Factors, LowRankGroup, Run
from veneer.ops.matmul import add_matmul, converted, matmul
from veneer.ops.reference import grouped_low_rank as reference
from veneer.ops.rows import same_dtype, with_rows
from veneer.ops.triton import dropout
from veneer.ops.triton.launch import block, is_served, launch

_WIDTH = 64


def forward(x: Tensor, groups: Sequence[LowRankGroup], rows: AdapterRuns, ys: Sequence[Tensor]) -> Tensor:
    if _serves(x, groups) and _is_alone(groups, rows):
        return _add_alone(with_rows(x), groups, ys)
    if not _serves(x, groups) or not is_served(*ys) or any(y.stride(1) != 1 for y in ys):
        return reference.forward(x, groups, rows, ys)
    x, owner = with_rows(x), _owner(rows, x.device)
    for group, y in zip(groups, ys, strict=True):
        if not _is_empty(group):
            own = _dropped(x, group, rows)
            _expand(_shrink(own, _stacked(group.a, x), owner), _scaled_b(group, x), owner, y)
    return x.new_empty(0)


def backward(
    dys: Sequence[Tensor], x: Tensor, u: Tensor, groups: Sequence[LowRankGroup], rows: AdapterRuns, input_grad: bool
) -> tuple[Tensor | None, list[Factors], list[Factors]]:
    if not _serves(x, groups):
        return reference.backward(dys, x, u, groups, rows, input_grad)
    if _is_alone(groups, rows):
        return _alone_backward(dys, with_rows(x), u, groups, input_grad)
    x, owner = with_rows(x), _owner(rows, x.device)
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if input_grad else None
    das, dbs = [], []
    for group, given in zip(groups, dys, strict=True):
        if _is_empty(group):
            das.append(group.a)
            dbs.append(group.b)
            continue
        dy = with_rows(same_dtype(given, x))
        a, b = _stacked(group.a, x), _scaled_b(group, x)
        own = _dropped(x, group, rows)
        own_u, du = _shrink(own, a, owner), _shrink(dy, b, owner)
        if dx is not None:
            part = torch.zeros_like(dx) if group.masks else dx
            _expand(du, a, owner, part)
            _add_dropped(dx, part, group, rows)
        da, db = _outer(du, own, owner, len(group.a)), _outer(own_u, dy, owner, len(group.a))
        das.append(tuple(None if f is None else da[k, : f.shape[0]] for k, f in enumerate(group.a)))
        dbs.append(
            tuple(
                None if f is None else (db[k, : f.shape[1]].T * scale).contiguous()
                for k, (f, scale) in enumerate(zip(group.b, group.scales, strict=True))
            )
        )
    return None if dx is None else dx.to(x.dtype), das, dbs


def _is_alone(groups: Sequence[LowRankGroup], rows: AdapterRuns) -> bool:
    """Return True if one adapter acts on all rows of all layers, so that products of whole matrices suffice."""
    all_rows = rows.runs == (Run(0, 0, rows.n_rows),)
    return all_rows and all(len(group.a) == 1 and group.a[0] is not None for group in groups)


def _add_alone(x: Tensor, groups: Sequence[LowRankGroup], ys: Sequence[Tensor]) -> Tensor:
    """Return memory of which `_parts_alone` are ``A drop(x)`` of each layer, and the factors in x's dtype."""
    ones, others = _of_alone(groups)
    size = len(ones) * max(map(len, ones)) * (x.shape[1] + len(x)) + sum(b.numel() for b in others)
    kept = _room((size,), others, x)
    u, a, bs = _parts_alone(kept, len(x), groups)
    places = [*(place[: len(one)] for place, one in zip(a, ones, strict=True)), *bs]
    torch._foreach_copy_(places, [*ones, *others])
    torch.bmm(_read_alone(x, groups), a.mT, out=u)
    for group, y, own, b in zip(groups, ys, u, bs, strict=True):
        add_matmul(y, own[:, : b.shape[1]], b.T, group.scales[0])
    return kept


def _alone_backward(
    dys: Sequence[Tensor], x: Tensor, kept: Tensor, groups: Sequence[LowRankGroup], input_grad: bool
) -> tuple[Tensor | None, list[Factors], list[Factors]]:
    u, a, bs = _parts_alone(kept, len(x), groups)
    du, dbs = _room(u.shape, bs, x), []
    for group, given, own_u, own_du, b in zip(groups, dys, u, du, bs, strict=True):
        dy, rank, scale = same_dtype(given, x), b.shape[1], group.scales[0]
        matmul(dy, b, x.dtype, out=own_du[:, :rank], scale=scale)
        dbs.append(matmul(dy.T, own_u[:, :rank], x.dtype, scale=scale))
    joined = torch.bmm(du.mT, _read_alone(x, groups))
    factors = [*(da[: b.shape[1]] for da, b in zip(joined, bs, strict=True)), *dbs]
    wide = converted(factors, [torch.promote_types(x.dtype, torch.float32)] * len(factors))
    das, dbs = wide[: len(groups)], wide[len(groups) :]
    dx = _summed(torch.bmm(du, a), groups) if input_grad else None
    return dx, [(da,) for da in das], [(db,) for db in dbs]


def _of_alone(groups: Sequence[LowRankGroup]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the a and the b of the only adapter on each layer."""
    return [cast(Tensor, group.a[0]) for group in groups], [cast(Tensor, group.b[0]) for group in groups]


def _parts_alone(kept: Tensor, n_rows: int, groups: Sequence[LowRankGroup]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return views of the memory that `_add_alone` returned: ``A drop(x)`` of k layers (k, n, largest rank), a of all
    layers (k, largest rank, i), with zeros after an a of lower rank, and b of each.
    """
    ones, others = _of_alone(groups)
    k, rank, i = len(ones), max(map(len, ones)), ones[0].shape[1]
    a, *bs, u = torch.split(kept, [k * rank * i, *(b.numel() for b in others), k * n_rows * rank])
    own = [part.view(b.shape) for part, b in zip(bs, others, strict=True)]
    return u.view(k, n_rows, rank), a.view(k, rank, i), own


def _room(shape: Sequence[int], bs: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return memory for parts of the layers' ranks, with zeros if ranks differ."""
    return like.new_empty(shape) if len({b.shape[1] for b in bs}) == 1 else like.new_zeros(shape)


def _read_alone(x: Tensor, groups: Sequence[LowRankGroup]) -> Tensor:
    """Return what the a of each layer reads, (k, n, i)."""
    masks = _masks_alone(groups)
    return x.expand(len(groups), *x.shape) if masks is None else dropout.drop_each(x, masks)


def _summed(parts: Tensor, groups: Sequence[LowRankGroup]) -> Tensor:
    """Return the gradient in x of `_read_alone`, given that in its result."""
    masks = _masks_alone(groups)
    if masks is not None:
        return dropout.kept_sum(parts, masks)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _masks_alone(groups: Sequence[LowRankGroup]) -> list[Mask] | None:
    """Return the mask on each layer, one that keeps all where a layer has none; None if no layer has one."""
    masks = [group.mask_of(0) for group in groups]
    first = next((mask for mask in masks if mask is not None), None)
    return None if first is None else [replace(first, p=0.0) if mask is None else mask for mask in masks]


@lru_cache(maxsize=64)
def _owner(rows: AdapterRuns, device: torch.device) -> Tensor:
    """Return the index of each row's adapter, -1 for none. The tensor is copied to the GPU once for all layers of a
    step.
    """
    return rows.row_to_adapter(device)


def _dropped(x: Tensor, group: LowRankGroup, rows: AdapterRuns) -> Tensor:
    """Return x with the dropout of each run's adapter on this layer, as the factor a reads it; x itself if the layer
    has no masks.
    """
    if not group.masks:
        return x
    own = x.clone()
    for k, start, stop in rows.runs:
        mask, run = group.masks[k], slice(start, stop)
        if mask is not None and group.a[k] is not None:
            own[run] = mask.drop(x[run], run, backend="triton")
    return own


def _add_dropped(dx: Tensor, part: Tensor, group: LowRankGroup, rows: AdapterRuns) -> None:
    """Add ``part``, the gradient of the result of `_dropped`, to ``dx`` where the masks keep values. Do nothing if both
    are one tensor.

    ``dx`` is the gradient with respect to x.
    """
    if part is dx:
        return
    for k, start, stop in rows.runs:
        mask, run = group.masks[k], slice(start, stop)
        if group.a[k] is None:
            continue  # its part is zero
        if mask is None:
            dx[run] += part[run]
        else:
            dropout.add_dropped(dx[run], part[run], mask.threshold, mask.key, mask.ids[run])


def _serves(x: Tensor, groups: Sequence[LowRankGroup]) -> bool:
    return is_served(x, *(f for group in groups for f in (*group.a, *group.b) if f is not None))


def _is_empty(group: LowRankGroup) -> bool:
    """Return True if no adapter has a low-rank pair on the group's layer."""
    return all(a is None for a in group.a)


def _stacked(factors: Factors | list[Tensor | None], x: Tensor) -> Tensor:
    """Stack factors (r, width) as (adapters, rank, width) in x's dtype, with zeros for None."""
    given = [f for f in factors if f is not None]
    rank = block(max(f.shape[0] for f in given), least=16)
    out = x.new_zeros(len(factors), rank, given[0].shape[1])
    for place, factor in zip(out, factors, strict=True):
        if factor is not None:
            place[: factor.shape[0]] = factor
    return out


def _scaled_b(group: LowRankGroup, x: Tensor) -> Tensor:
    return _stacked([None if b is None else (b * scale).T for b, scale in zip(group.b, group.scales, strict=True)], x)


def _tiles(n: int, rank: int) -> tuple[int, dict[str, int]]:
    """Return the number of tiles that n rows make, and the tiles' sizes."""
    rows = block(n, least=16, most=64)
    return triton.cdiv(n, rows), {"ROWS": rows, "RANKS": min(rank, 64), "WIDTH": _WIDTH, "num_stages": 2}


def _shrink(x: Tensor, factors: Tensor, owner: Tensor) -> Tensor:
    """Multiply each row by its adapter's factor, (n, rank). Rows without an adapter are left undefined."""
    adapters, rank, width = factors.shape
    out = x.new_empty(len(x), rank)
    n_tiles, sizes = _tiles(len(x), rank)
    grid = n_tiles, adapters, rank // sizes["RANKS"]
    launch(_shrink_kernel, grid, x, x.stride(0), factors, owner, out, len(x), rank, width, **sizes)
    return out


def _expand(u: Tensor, factors: Tensor, owner: Tensor, out: Tensor) -> None:
    """Multiply each row of u by its adapter's transposed factor, and add it to out (n, width)."""
    adapters, rank, width = factors.shape
    n_tiles, sizes = _tiles(len(u), rank)
    grid = n_tiles, triton.cdiv(width, _WIDTH)
    args = u, factors, owner, out, out.stride(0), len(u), adapters, rank, width
    launch(_expand_kernel, grid, *args, **sizes)


def _outer(u: Tensor, x: Tensor, owner: Tensor, adapters: int) -> Tensor:
    """For each adapter, sum the outer products of its rows of u and x: (adapters, rank, width) in float32."""
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
    out,
    out_row,
    n,
    adapters,
    rank,
    width,
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
    place = out + rows[:, None] * out_row + columns[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
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
