"""Low-rank pairs of many versions in Triton: two products for the rows of each segment, on the packed panels as they
are.

The first product is split along its depth into parts of one length, and the second adds the parts up in order. So a
row's result does not depend on the other rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.pairs import ACTIVATIONS, Factor, Segments, filled
from veneer.ops.reference import pairs as reference
from veneer.ops.triton.activations import activated, sigmoid, tanh
from veneer.ops.triton.launch import block, launch

_DEPTH, _PART, _WIDTH, _MOST_ROWS = 64, 1024, 64, 32
_START, _STOP, _FORM, _CORE, _BIAS, _ACTIVATION = (tl.constexpr(at) for at in range(1, 7))
_OUT_SCALE, _OUT_BIAS, _RANKS = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
_SHARED, _SCALES_Y = tl.constexpr(2), tl.constexpr(4)  # bits of a form
_RELU, _SQUARED, _TANH, _SIGMOID, _LEAKY, _IDENTITY = (
    tl.constexpr(ACTIVATIONS.index(kind))
    for kind in ("relu", "relu_squared", "tanh", "sigmoid", "leaky_relu", "identity")
)
_SILU, _GELU = tl.constexpr(ACTIVATIONS.index("silu")), tl.constexpr(ACTIVATIONS.index("gelu"))


def pack(factors: Sequence[Factor]) -> None:
    reference.pack(factors)


def add(x: Tensor, segments: Segments, ys: Sequence[Tensor]) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    pairs, table, i = segments.pairs, segments.table.to(x.device), segments.pairs.in_features
    longest = max(stop - start for _, start, stop in segments.parts)
    ranks = max(sum(rank + rank % 2 for rank in part.pairs.ranks) for part in segments.parts) or 1
    rows = block(longest, least=16, most=_MOST_ROWS)
    n_parts = triton.cdiv(i, _PART)
    inner = torch.empty(n_parts, len(x), ranks, dtype=torch.float32, device=x.device)
    half = x.dtype == pairs.dtype == torch.bfloat16  # products of float32 spill over larger tiles
    sizes = {
        "OUTS": pairs.out_features, "ROWS": rows, "RANKS": block(ranks, least=16, most=64 if half else 32),
        "FACTOR": tl.bfloat16 if pairs.dtype == torch.bfloat16 else tl.float32, "HALF": half, "num_stages": 2,
    }  # fmt: skip
    widest = max(max(part.pairs.ranks) for part in segments.parts)
    own = sizes | {"RANKS": block(widest, least=16, most=64 if half else 16)}
    tiles = triton.cdiv(longest, rows)
    grid = len(table), tiles, triton.cdiv(ranks, sizes["RANKS"]) * n_parts
    shape = len(x), ranks
    launch(
        _shrink_kernel, grid, x, x.stride(0), table, table.stride(0), inner, *shape, i, filled(i, pairs.dtype),
        DEPTH=_DEPTH if half else _DEPTH // 2, PART=_PART, **sizes,
    )  # fmt: skip
    for first, stop in _joined(ys):
        grid = len(table), tiles, sum(triton.cdiv(o, _WIDTH) for o in pairs.out_features[first:stop])
        launch(
            _expand_kernel, grid, inner, *shape, n_parts, table, table.stride(0), ys[first], ys[first].stride(0),
            filled(i, pairs.dtype), FIRST=first, END=stop, WIDTH=_WIDTH, **own,
        )  # fmt: skip


def _joined(ys: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Group the layers whose outputs are neighbouring columns of one tensor. Return the first layer of each group, and
    the layer after its last.
    """
    starts = [0]
    for layer, (y, z) in enumerate(itertools.pairwise(ys), start=1):
        if z.data_ptr() != y.data_ptr() + y.shape[1] * y.element_size() or z.stride() != y.stride():
            starts.append(layer)
    return list(itertools.pairwise([*starts, len(ys)]))


@triton.jit
def _place(rows, columns, n_rows, depth, PAIR: tl.constexpr):
    """Return the offset of a value of a matrix (n_rows, depth) in panels."""
    panel = rows // 64
    width = tl.minimum(64, tl.cdiv(n_rows, 16) * 16 - panel * 64)
    return panel * 64 * depth + (columns // PAIR) * width * PAIR + (rows % 64) * PAIR + columns % PAIR


@triton.jit
def _filled(rank, PAIR: tl.constexpr):
    return tl.cdiv(rank, PAIR) * PAIR


@triton.jit
def _rows_in_a(segment, OUTS: tl.constexpr, PAIR: tl.constexpr):
    """Return the number of rows of the stacked a: the ranks of all layers, or of one if the layers share a."""
    total = tl.load(segment) * 0
    for layer in tl.static_range(len(OUTS)):
        total += _filled(tl.load(segment + _RANKS + layer), PAIR)
    return tl.where((tl.load(segment + _FORM) & _SHARED) != 0, _filled(tl.load(segment + _RANKS), PAIR), total)


@triton.jit(do_not_specialize=["n"])  # a batch of another size is no variant
def _shrink_kernel(
    x,
    x_row,
    table,
    table_row,
    inner,
    n,
    ranks,
    i,
    depth,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    FACTOR: tl.constexpr,
    HALF: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
):
    """Compute a part of the first low-rank product for some rows of a segment: one slice of x's columns times the
    stacked factors a of all layers.
    """
    PAIR: tl.constexpr = 2 if tl.bfloat16 == FACTOR else 1
    segment = table + tl.program_id(0).to(tl.int64) * table_row
    stop = tl.load(segment + _STOP)
    rows = tl.load(segment + _START) + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n_tiles = tl.cdiv(ranks, RANKS)
    part = tl.program_id(2) // n_tiles
    of_a = (tl.program_id(2) % n_tiles) * RANKS + tl.arange(0, RANKS)
    n_of_a = _rows_in_a(segment, OUTS, PAIR)
    factors = tl.load(segment).to(tl.pointer_type(FACTOR))
    if (tl.min(rows, axis=0) < stop) & (tl.min(of_a, axis=0) < n_of_a):
        total = tl.zeros([ROWS, RANKS], tl.float32)
        for first in range(part * PART, tl.minimum(i, (part + 1) * PART), DEPTH):
            columns = first + tl.arange(0, DEPTH)
            inside = columns < i
            there = (rows < stop)[:, None] & inside[None, :]
            tile = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=there, other=0.0)
            place = _place(of_a[None, :], columns[:, None], n_of_a, depth, PAIR)
            weight = tl.load(factors + place, mask=inside[:, None] & (of_a < n_of_a)[None, :], other=0.0)
            if not HALF:
                tile, weight = tile.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(tile, weight, total, input_precision="ieee")
        to = inner + (part.to(tl.int64) * n + rows[:, None]) * ranks + of_a[None, :]
        tl.store(to, total, mask=(rows < stop)[:, None] & (of_a < ranks)[None, :])


@triton.jit
def _acted(u, kind):
    """Apply an activation, given by its number."""
    if kind == _IDENTITY:
        u = u
    elif kind == _RELU:
        u = tl.maximum(u, 0.0)
    elif kind == _SQUARED:
        u = tl.maximum(u, 0.0) * tl.maximum(u, 0.0)
    elif kind == _TANH:
        u = tanh(u)
    elif kind == _SIGMOID:
        u, _ = sigmoid(u)
    elif kind == _LEAKY:
        u = tl.where(u < 0, 0.01 * u, u)
    elif kind == _SILU:
        u, _ = activated(u, "silu")
    elif kind == _GELU:
        u, _ = activated(u, "gelu")
    else:
        u, _ = activated(u, "gelu_tanh")
    return u


@triton.jit
def _between(u, segment, places, inside):
    """Turn the first product's sums into the second product's input: apply the core, bias and activation that the
    segment has.
    """
    if tl.load(segment + _FORM) != 0:
        core, bias = tl.load(segment + _CORE), tl.load(segment + _BIAS)
        if core != 0:
            u *= tl.load(core.to(tl.pointer_type(tl.float32)) + places, mask=inside, other=0.0)[None, :]
        if bias != 0:
            u += tl.load(bias.to(tl.pointer_type(tl.float32)) + places, mask=inside, other=0.0)[None, :]
        u = _acted(u, tl.load(segment + _ACTIVATION))
    return u


@triton.jit
def _behind(y, segment, places, inside):
    """Apply the scale and bias that the segment has to the second product's sums, before they are added to y."""
    if tl.load(segment + _FORM) != 0:
        scale, bias = tl.load(segment + _OUT_SCALE), tl.load(segment + _OUT_BIAS)
        if scale != 0:
            y *= tl.load(scale.to(tl.pointer_type(tl.float32)) + places, mask=inside, other=0.0)[None, :]
        if bias != 0:
            y += tl.load(bias.to(tl.pointer_type(tl.float32)) + places, mask=inside, other=0.0)[None, :]
    return y


@triton.jit
def _layer_of(tile, OUTS: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr):
    """Find the layer of a tile among the layers FIRST to END (exclusive). Return five numbers.

    They are the layer; the tile's number within it; the layer's number of outputs; the number of outputs of the layers
    from FIRST up to it; and that of all layers before it.
    """
    layer, o, in_front, behind = FIRST + tile * 0, OUTS[FIRST] + tile * 0, tile * 0, tile * 0
    own = tile
    for other in tl.static_range(END - 1):
        if other < FIRST:
            behind += OUTS[other]
        else:
            is_beyond = (layer == other) & (own >= tl.cdiv(OUTS[other], WIDTH))
            own = tl.where(is_beyond, own - tl.cdiv(OUTS[other], WIDTH), own)
            layer = tl.where(is_beyond, other + 1, layer)
            o = tl.where(is_beyond, OUTS[other + 1], o)
            in_front = tl.where(is_beyond, in_front + OUTS[other], in_front)
    return layer, own, o, in_front, behind + in_front


@triton.jit(do_not_specialize=["n"])  # a batch of another size is no variant
def _expand_kernel(
    inner,
    n,
    ranks,
    n_parts,
    table,
    table_row,
    y,
    y_row,
    depth,
    OUTS: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,
    HALF: tl.constexpr,
):
    """Compute the second low-rank product for some rows of a segment, and add it to y.

    The program's third index chooses one of the layers FIRST to END (exclusive), whose outputs are neighbouring columns
    of y, and a tile of its outputs.
    """
    PAIR: tl.constexpr = 2 if tl.bfloat16 == FACTOR else 1
    segment = table + tl.program_id(0).to(tl.int64) * table_row
    layer, tile, o, in_front, behind = _layer_of(tl.program_id(2), OUTS, FIRST, END, WIDTH)
    stop, rank = tl.load(segment + _STOP), tl.load(segment + _RANKS + layer)
    rows = tl.load(segment + _START) + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    scales_y = (tl.load(segment + _FORM) & _SCALES_Y) != 0
    if (tl.min(rows, axis=0) < stop) & ((rank > 0) | scales_y):
        before = rank * 0  # ranks of the layers in front of this one
        own = tl.cdiv(_rows_in_a(segment, OUTS, PAIR), 16) * 16 * depth  # values in front of its b
        for other in tl.static_range(END - 1):
            n_own = tl.where(other < layer, _filled(tl.load(segment + _RANKS + other), PAIR), 0)
            before += n_own
            own += tl.cdiv(OUTS[other], 16) * 16 * n_own
        factors = tl.load(segment).to(tl.pointer_type(FACTOR)) + own
        first_u = tl.where((tl.load(segment + _FORM) & _SHARED) != 0, 0, before)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for first in range(0, rank, RANKS):
            own_ranks = first + tl.arange(0, RANKS)
            inside = own_ranks < rank
            u = tl.zeros([ROWS, RANKS], tl.float32)
            for part in range(n_parts):
                at = inner + (tl.cast(part, tl.int64) * n + rows[:, None]) * ranks + (first_u + own_ranks)[None, :]
                u += tl.load(at, mask=(rows < stop)[:, None] & inside[None, :], other=0.0)
            u = _between(u, segment, before + own_ranks, inside)
            place = _place(columns[None, :], own_ranks[:, None], o, _filled(rank, PAIR), PAIR)
            weight = tl.load(factors + place, mask=inside[:, None] & (columns < o)[None, :], other=0.0)
            if HALF:
                u = u.to(tl.bfloat16)
            else:
                weight = weight.to(tl.float32)
            total = tl.dot(u, weight, total, input_precision="ieee")
        there = (rows < stop)[:, None] & (columns < o)[None, :]
        to = y + rows[:, None] * y_row + (in_front + columns)[None, :]
        given = tl.load(to, mask=there, other=0.0).to(tl.float32)
        total = _behind(total + tl.where(scales_y, given, 0.0), segment, behind + columns, columns < o)
        total += tl.where(scales_y, 0.0, given)
        tl.store(to, total.to(y.dtype.element_ty), mask=there)
