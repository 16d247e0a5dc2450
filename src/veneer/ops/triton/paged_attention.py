"""Paged attention in Triton, in tiles (Dao 2023, arXiv 2307.08691): keys and values are read from their pages.

A program has the rows of one sequence and the query heads that share a key head, so that keys are read once for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.paged_attention import Heads, PagedRows, PagedStore, padded
from veneer.ops.reference import paged_attention as reference
from veneer.ops.triton.attention import LOG2E, scored
from veneer.ops.triton.launch import block, launch
from veneer.ops.triton.rotary import MOST_HEADS, pair_at, turn

_MOST_FEATURES = 256
_OF_A_STEP = ["pages", "first_page", "first_row", "positions", "n"]  # sizes and places that vary are no variants


def append(store: PagedStore, layer: int, k: Tensor, v: Tensor, rows: PagedRows) -> None:
    grid = rows.n_rows, store.kv_heads
    heads = k, *k.stride()[:2], v, *v.stride()[:2]
    launch(_append_kernel, grid, store.data, *_place(store, layer), *_numbers(rows), *heads, **_forms(store))


def append_turned(
    store: PagedStore, layer: int, heads: Heads, rows: PagedRows, tables: tuple[Tensor, Tensor], interleaved: bool
) -> None:
    n_heads, half = heads[0].shape[1], tables[0].shape[-1]
    size = block(n_heads, most=MOST_HEADS)
    grid = rows.n_rows, triton.cdiv(n_heads, size) + store.kv_heads
    places = [number for x in heads for number in (x, *x.stride()[:2])]
    angles = [number for x in tables for number in (x, x.stride(-2))]
    sizes = {"HEADS": size, "HALF": block(half), "INTERLEAVED": interleaved}
    launch(
        _append_turned_kernel, grid, store.data, *_place(store, layer), *_numbers(rows), *places, *angles, n_heads,
        half, **sizes, **_forms(store),
    )  # fmt: skip


def attend(
    store: PagedStore,
    layer: int,
    q: Tensor,
    rows: PagedRows,
    scale: float,
    window: int,
    softcap: float,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    if store.head_dim > _MOST_FEATURES:
        return reference.attend(store, layer, q, rows, scale, window, softcap, bias, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // store.kv_heads
    width, keys, n_warps = _tile(q, group, rows)
    height = width // group
    # a sequence has at most one tile more than its rows fill
    grid = rows.n_rows // height + len(rows.position), store.kv_heads
    heads = q, *q.stride()[:2], out, *out.stride()[:2]
    numbers = group, scale, window, softcap or 1.0, q if bias is None else bias, 0 if bias is None else bias.shape[1]
    sizes = {"ROWS": height, "WIDTH": width, "KEYS": keys, "WINDOW": window > 0, "SOFTCAP": softcap > 0}
    sizes |= {"BIASED": bias is not None, "SUNK": sinks is not None}
    options = {"num_warps": n_warps, "num_stages": 2}
    place = _place(store, layer)
    launch(
        _attend_kernel,
        grid,
        store.data,
        *place,
        *_numbers(rows),
        *heads,
        *numbers,
        q if sinks is None else sinks,
        **sizes,
        **_forms(store),
        **options,
    )
    return out


def _place(store: PagedStore, layer: int) -> tuple[int, int, int]:
    """Return three numbers of values: the size of a page, the layer's offset within a page, and the size of one head's
    keys in it.
    """
    values = store.block * padded(store.head_dim)
    return store.data.stride(0), layer * store.kv_heads * 2 * values, values


def _numbers(rows: PagedRows) -> tuple[Tensor | int, ...]:
    return rows.pages, rows.first_page, rows.first_row, rows.position, len(rows.position)


def _forms(store: PagedStore) -> dict[str, int]:
    """Return the kernel's constants.

    D is the width of a head, PADDED that width in the page, and FEATURES a power of two at least as large. PAIR is the
    number of features stored together, and BLOCK the number of tokens of a page.
    """
    pair = 2 if store.data.dtype == torch.bfloat16 else 1
    d = store.head_dim
    return {"D": d, "PADDED": padded(d), "FEATURES": block(padded(d)), "PAIR": pair, "BLOCK": store.block}


def _tile(q: Tensor, group: int, rows: PagedRows) -> tuple[int, int, int]:
    """Return the numbers of queries, keys and warps of a program that fits into the shared memory of every card since
    Ampere.
    """
    least, wide = block(group, least=16), q.shape[2] > 128
    decodes = rows.n_rows == len(rows.position)
    if q.dtype == torch.float32:
        return max(least, 16 if decodes or wide else 32), 16 if wide else 32, 4
    return max(least, 16 if decodes else 64), 32 if wide else 64, 8 if q.shape[2] > 64 else 4


@triton.jit
def _last_not_above(bounds, n, value, HEIGHT: tl.constexpr):
    """Return the last sequence whose first tile has a number of at most ``value``.

    The tiles of sequence s begin at number ``bounds[s] // HEIGHT + s``.
    """
    low, high = value * 0, value * 0 + n
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(bounds + middle) // HEIGHT + middle <= value:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _sequence_of(bounds, n, row):
    """Find the sequence of a row."""
    low, high = row * 0, row * 0 + n
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(bounds + middle) <= row:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _page_of(row, pages, first_page, first_row, positions, n, BLOCK: tl.constexpr):
    """Return the page of a row, the row's place in it, and whether the row is the last of its sequence."""
    sequence = _sequence_of(first_row, n, row)
    at = tl.load(positions + sequence) + row - tl.load(first_row + sequence)
    page = tl.load(pages + tl.load(first_page + sequence) + at // BLOCK)
    return page, at % BLOCK, row + 1 == tl.load(first_row + sequence + 1)


@triton.jit
def _key_at(slots, features, BLOCK: tl.constexpr, PAIR: tl.constexpr):
    """Return the offset of a feature of a key from the start of the head's keys in a page. ``slots`` is the token's
    place in the page.
    """
    return (features // PAIR) * (BLOCK * PAIR) + slots * PAIR + features % PAIR


@triton.jit
def _value_at(slots, features, PADDED: tl.constexpr, PAIR: tl.constexpr):
    return (slots // PAIR) * (PADDED * PAIR) + features * PAIR + slots % PAIR


@triton.jit(do_not_specialize=_OF_A_STEP)
def _append_kernel(
    data,
    page_values,
    layer_at,
    head_values,
    pages,
    first_page,
    first_row,
    positions,
    n,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    FEATURES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    page, slot, is_last = _page_of(row, pages, first_page, first_row, positions, n, BLOCK)
    features = tl.arange(0, FEATURES)
    own = data + page * page_values + layer_at + head * 2 * head_values
    x = tl.load(k + row * k_row + head * k_head + features, mask=features < D, other=0.0)
    tl.store(own + _key_at(slot, features, BLOCK, PAIR), x, mask=features < PADDED)  # zeros behind a head's values
    x = tl.load(v + row * v_row + head * v_head + features, mask=features < D, other=0.0)
    _put_value(own + head_values, slot, features, x, is_last, PADDED, PAIR)


@triton.jit
def _put_value(own, slot, features, x, is_last, PADDED: tl.constexpr, PAIR: tl.constexpr):
    """Write a token's value into its page.

    If the token is the last of its sequence in this step and the first of a pair, zero the other half of the pair.
    """
    tl.store(own + _value_at(slot, features, PADDED, PAIR), x, mask=features < PADDED)
    # in its pair a former holder may have left what is no number
    is_alone = (slot % PAIR + 1 < PAIR) & is_last
    there = features < tl.where(is_alone, PADDED, 0)
    tl.store(own + _value_at(slot + 1, features, PADDED, PAIR), tl.zeros_like(x), mask=there)


@triton.jit
def _put_turned(own, slot, key, first, second, c, s, inside, BLOCK: tl.constexpr, PAIR: tl.constexpr):
    """Rotate the feature pairs (``first``, ``second``) of a key by the cosines c and sines s, and write them into the
    key's page.
    """
    x1 = tl.load(key + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(key + second, mask=inside, other=0.0).to(tl.float32)
    dtype = own.dtype.element_ty
    tl.store(own + _key_at(slot, first, BLOCK, PAIR), (x1 * c - x2 * s).to(dtype), mask=inside)
    tl.store(own + _key_at(slot, second, BLOCK, PAIR), (x2 * c + x1 * s).to(dtype), mask=inside)


@triton.jit(do_not_specialize=_OF_A_STEP)
def _append_turned_kernel(
    data,
    page_values,
    layer_at,
    head_values,
    pages,
    first_page,
    first_row,
    positions,
    n,
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    cos,
    cos_row,
    sin,
    sin_row,
    n_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    FEATURES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate a few query heads of a row in place, or write a rotated key and its value into the pages."""
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, HALF)
    inside = pairs < half
    c = tl.load(cos + row * cos_row + pairs, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + row * sin_row + pairs, mask=inside, other=0.0).to(tl.float32)
    first, second = pair_at(pairs, half, INTERLEAVED)
    tile, tiles = tl.program_id(1), tl.cdiv(n_heads, HEADS)
    if tile < tiles:
        heads = (tile * HEADS + tl.arange(0, HEADS))[:, None]
        own_heads = q + row * q_row + heads * q_head
        there = (heads < n_heads) & inside[None, :]
        turn(own_heads, 1, own_heads, 1, first[None, :], second[None, :], c[None, :], s[None, :], there)
    else:
        head = (tile - tiles).to(tl.int64)
        page, slot, is_last = _page_of(row, pages, first_page, first_row, positions, n, BLOCK)
        own = data + page * page_values + layer_at + head * 2 * head_values
        key, features = k + row * k_row + head * k_head, tl.arange(0, FEATURES)
        _put_turned(own, slot, key, first, second, c, s, inside, BLOCK, PAIR)
        x = tl.load(key + features, mask=features < D, other=0.0)
        behind = (features >= 2 * half) & (features < PADDED)  # features that do not turn, and zeros
        tl.store(own + _key_at(slot, features, BLOCK, PAIR), x, mask=behind)
        x = tl.load(v + row * v_row + head * v_head + features, mask=features < D, other=0.0)
        _put_value(own + head_values, slot, features, x, is_last, PADDED, PAIR)


@triton.jit(do_not_specialize=_OF_A_STEP)
def _attend_kernel(
    data,
    page_values,
    layer_at,
    head_values,
    pages,
    first_page,
    first_row,
    positions,
    n,
    q,
    q_row,
    q_head,
    out,
    out_row,
    out_head,
    group,
    scale,
    window,
    softcap,
    bias,
    n_biases,
    sinks,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    SUNK: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    FEATURES: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sequence = _last_not_above(first_row, n, tile, ROWS)
    start = tl.load(first_row + sequence)
    first = (tile - start // ROWS - sequence) * ROWS
    n_rows = tl.load(first_row + sequence + 1) - start
    if first < n_rows:
        position = tl.load(positions + sequence)
        members = tl.arange(0, WIDTH)
        rows, features = first + members // group, tl.arange(0, FEATURES)
        heads = head * group + members % group
        there_rows, of_heads = (members < ROWS * group) & (rows < n_rows), bias + heads * n_biases
        inside = there_rows[:, None] & (features < D)[None, :]
        q_at = (start + rows) * q_row + heads * q_head
        queries = tl.load(q + q_at[:, None] + features[None, :], mask=inside, other=0.0)
        if BIASED:
            of_rows = tl.load(of_heads + position + rows, mask=there_rows, other=0.0)
        own = data + layer_at + head * 2 * head_values
        own_pages = pages + tl.load(first_page + sequence)
        most, total = tl.full([WIDTH], float("-inf"), tl.float32), tl.zeros([WIDTH], tl.float32)
        mixed = tl.zeros([WIDTH, FEATURES], tl.float32)
        oldest, end = position * 0, position + tl.minimum(n_rows, first + ROWS)
        if WINDOW:
            oldest = tl.maximum(position + first - window + 1, 0)
        for begin in range(oldest // KEYS * KEYS, end, KEYS):
            keys = begin + tl.arange(0, KEYS)
            seen = (keys >= oldest) & (keys < end)  # pages in front of a window may have any number
            page = own + tl.load(own_pages + keys // BLOCK, mask=seen, other=0) * page_values
            there = seen[:, None] & (features < D)[None, :]
            key_at = _key_at((keys % BLOCK)[:, None], features[None, :], BLOCK, PAIR)
            k_tile = tl.load(page[:, None] + key_at, mask=there, other=0.0)
            value_at = head_values + _value_at((keys % BLOCK)[:, None], features[None, :], PADDED, PAIR)
            v_tile = tl.load(page[:, None] + value_at, mask=there, other=0.0)
            product = tl.dot(queries, tl.trans(k_tile), input_precision="ieee")
            ahead = (position + rows)[:, None] - keys[None, :]
            scores, _ = scored(product, ahead, scale, window, softcap, WINDOW, SOFTCAP)
            if BIASED:
                both = there_rows[:, None] & seen[None, :]
                of_keys = tl.load(of_heads[:, None] + keys[None, :], mask=both, other=0.0)
                scores += (of_keys - of_rows[:, None]) * LOG2E
            new_most = tl.maximum(most, tl.max(scores, axis=1))
            shift = tl.where(new_most == float("-inf"), 0.0, new_most)  # of a query that has seen no key yet
            p = tl.exp2(scores - shift[:, None])
            factor = tl.exp2(most - shift)
            total = total * factor + tl.sum(p, axis=1)
            mixed = tl.dot(p.to(v_tile.dtype), v_tile, mixed * factor[:, None], input_precision="ieee")
            most = new_most
        if SUNK:
            total += tl.exp2(tl.load(sinks + heads).to(tl.float32) * LOG2E - most)
        to = (start + rows) * out_row + heads * out_head
        tl.store(out + to[:, None] + features[None, :], (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
