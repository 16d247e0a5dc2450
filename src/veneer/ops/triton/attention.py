"""Causal attention over packed sequences in Triton, in tiles (Dao 2023, arXiv 2307.08691).

A tile is some queries (or keys) of one sequence, so no mask over sequences exists. The gradients of keys and values
are summed over a group's query heads inside one program: without atomics, the result is deterministic.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import attention as reference
from veneer.ops.rows import same_dtype
from veneer.ops.triton.activations import tanh
from veneer.ops.triton.launch import block, is_served, launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_MOST_FEATURES = 256


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    if not _fits(q):
        return reference.attention_forward(q, k, v, cu_seqlens, scale, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    queries, keys, n_warps = _forward_tile(q)
    tiles = _tiles(tuple(cu_seqlens.tolist()), queries, q.device)
    places = _places(q, k, v, out)
    forms = {**_forms(q, window, softcap), "QUERIES": queries, "KEYS": keys, "num_warps": n_warps, "num_stages": 2}
    grid = len(tiles), q.shape[1]
    launch(_forward_kernel, grid, *places, lse, tiles, *_sizes(q, k), scale, window, softcap or 1.0, **forms)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(q):
        return reference.attention_backward(dout, q, k, v, out, lse, cu_seqlens, scale, window, softcap)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout = same_dtype(dout, q)
    size, n_warps = _backward_tile(q)
    tiles = _tiles(tuple(cu_seqlens.tolist()), size, q.device)
    delta = torch.empty_like(lse)
    heads = block(q.shape[1], most=16)
    features = block(q.shape[2], least=16)
    grid = q.shape[0], triton.cdiv(q.shape[1], heads)
    sizes = q.shape[0], q.shape[1], q.shape[2]
    launch(_delta_kernel, grid, *_places(dout, out), delta, *sizes, HEADS=heads, FEATURES=features)
    numbers = lse, delta, tiles, *_sizes(q, k), scale, window, softcap or 1.0
    forms = {**_forms(q, window, softcap), "QUERIES": size, "KEYS": size, "num_warps": n_warps, "num_stages": 1}
    launch(_query_gradient_kernel, (len(tiles), q.shape[1]), *_places(q, k, v, dout, dq), *numbers, **forms)
    launch(_key_gradient_kernel, (len(tiles), k.shape[1]), *_places(q, k, v, dout, dk, dv), *numbers, **forms)
    return dq, dk, dv


def _fits(q: Tensor) -> bool:
    return is_served(q) and q.shape[2] <= _MOST_FEATURES


def _forward_tile(q: Tensor) -> tuple[int, int, int]:
    """Return the numbers of queries, keys and warps of a program that fits into the shared memory of every card since
    Ampere.
    """
    features = block(q.shape[2], least=16)
    if q.dtype == torch.float32:
        return (32, 32, 4) if features <= 128 else (16, 16, 4)
    return {128: (64, 64, 4), 256: (64, 32, 8)}.get(features, (128, 64, 4))


def _backward_tile(q: Tensor) -> tuple[int, int]:
    features = block(q.shape[2], least=16)
    if q.dtype == torch.float32:
        return (32, 4) if features <= 64 else (16, 4)
    return {128: (64, 8), 256: (32, 8)}.get(features, (64, 4))


@lru_cache(maxsize=64)
def _tiles(bounds: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Return for each tile: its sequence's start, the sequence's length, and the tile's first token within it.

    The tiles that see most keys come first, so that the last programs to start are short. The result is cached, because
    every layer of a step has the same bounds.
    """
    tiles = [(a, b - a, first) for a, b in pairwise(bounds) for first in range(0, b - a, size)]
    tiles.sort(key=lambda tile: -tile[2])
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3).to(device)


def _places(*tensors: Tensor) -> list[Tensor | int]:
    """Return each tensor with the distances between its tokens and between its heads.

    A head's features are contiguous.
    """
    places: list[Tensor | int] = []
    for x in tensors:
        near = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
        places += [near, near.stride(0), near.stride(1)]
    return places


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """Return the numbers of tokens, of query heads for each key head, and of features."""
    return q.shape[0], q.shape[1] // max(k.shape[1], 1), q.shape[2]


def _forms(q: Tensor, window: int, softcap: float) -> dict[str, int | bool]:
    return {"WINDOW": window > 0, "SOFTCAP": softcap > 0, "FEATURES": block(q.shape[2], least=16)}


@triton.jit
def _tile(x, tokens, token_stride, length, d, FEATURES: tl.constexpr):
    """Load rows of a head, with zeros beyond the sequence's end."""
    features = tl.arange(0, FEATURES)
    inside = (tokens < length)[:, None] & (features < d)[None, :]
    return tl.load(x + tokens[:, None] * token_stride + features[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, tokens, token_stride, length, d, values, FEATURES: tl.constexpr):
    features = tl.arange(0, FEATURES)
    inside = (tokens < length)[:, None] & (features < d)[None, :]
    tl.store(x + tokens[:, None] * token_stride + features[None, :], values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def scored(product, ahead, scale, window, softcap, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return scores in units of log 2 (-inf if the query does not see the key), and the slope of the soft cap.

    ahead: the query's place minus the key's. Keys beyond the sequence's end need no mask, because they come after all
    of its queries. Queries beyond the end have scores that are not used.
    """
    scores = product * scale
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if SOFTCAP:
        bent = tanh(scores / softcap)
        scores = bent * softcap
        slope = 1.0 - bent * bent
    visible = ahead >= 0
    if WINDOW:
        visible = visible & (ahead < window)
    return tl.where(visible, scores * LOG2E, float("-inf")), slope


@triton.jit
def _first_key(first, window, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Return the start of the first tile of keys that the query ``first`` may see; 0 without a window."""
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    return low


@triton.jit
def _forward_kernel(
    q,
    q_token,
    q_head,
    k,
    k_token,
    k_head,
    v,
    v_token,
    v_head,
    out,
    out_token,
    out_head,
    lse,
    tiles,
    n,
    group,
    d,
    scale,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FEATURES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    start, length, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group
    queries = first + tl.arange(0, QUERIES)
    q_tile = _tile(q + start * q_token + head * q_head, queries, q_token, length, d, FEATURES)
    k_start = k + start * k_token + kv_head * k_head
    v_start = v + start * v_token + kv_head * v_head
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, FEATURES], tl.float32)
    low = _first_key(first, window, KEYS, WINDOW)
    for begin in range(low, tl.minimum(length, first + QUERIES), KEYS):
        keys = begin + tl.arange(0, KEYS)
        k_tile = _tile(k_start, keys, k_token, length, d, FEATURES)
        v_tile = _tile(v_start, keys, v_token, length, d, FEATURES)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        ahead = queries[:, None] - keys[None, :]
        scores, _ = scored(product, ahead, scale, window, softcap, WINDOW, SOFTCAP)
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        # A query that has seen no key yet has a sum of 0, whatever it is shifted by.
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        p = tl.exp2(scores - shift[:, None])
        factor = tl.exp2(most - shift)
        total = total * factor + tl.sum(p, axis=1)
        mixed = tl.dot(p.to(v_tile.dtype), v_tile, mixed * factor[:, None], input_precision="ieee")
        most = new_most
    _store(out + start * out_token + head * out_head, queries, out_token, length, d, mixed / total[:, None], FEATURES)
    tl.store(lse + head * n + start + queries, (most + tl.log2(total)) * LN2, mask=queries < length)


@triton.jit
def _delta_kernel(
    dout,
    dout_token,
    dout_head,
    out,
    out_token,
    out_head,
    delta,
    n,
    n_heads,
    d,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Store the row sums of dout * out, which the softmax's gradient subtracts."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    a = _tile(dout + token * dout_token, heads, dout_head, n_heads, d, FEATURES).to(tl.float32)
    b = _tile(out + token * out_token, heads, out_head, n_heads, d, FEATURES).to(tl.float32)
    tl.store(delta + heads.to(tl.int64) * n + token, tl.sum(a * b, axis=1), mask=heads < n_heads)


@triton.jit
def _query_gradient_kernel(
    q,
    q_token,
    q_head,
    k,
    k_token,
    k_head,
    v,
    v_token,
    v_head,
    dout,
    dout_token,
    dout_head,
    dq,
    dq_token,
    dq_head,
    lse,
    delta,
    tiles,
    n,
    group,
    d,
    scale,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FEATURES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    start, length, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group
    queries = first + tl.arange(0, QUERIES)
    q_tile = _tile(q + start * q_token + head * q_head, queries, q_token, length, d, FEATURES)
    dout_tile = _tile(dout + start * dout_token + head * dout_head, queries, dout_token, length, d, FEATURES)
    place = head * n + start + queries
    log_sum = tl.load(lse + place, mask=queries < length, other=0.0) * LOG2E
    taken_off = tl.load(delta + place, mask=queries < length, other=0.0)
    k_start = k + start * k_token + kv_head * k_head
    v_start = v + start * v_token + kv_head * v_head
    gradient = tl.zeros([QUERIES, FEATURES], tl.float32)
    low = _first_key(first, window, KEYS, WINDOW)
    for begin in range(low, tl.minimum(length, first + QUERIES), KEYS):
        keys = begin + tl.arange(0, KEYS)
        k_tile = _tile(k_start, keys, k_token, length, d, FEATURES)
        v_tile = _tile(v_start, keys, v_token, length, d, FEATURES)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        ahead = queries[:, None] - keys[None, :]
        scores, slope = scored(product, ahead, scale, window, softcap, WINDOW, SOFTCAP)
        p = tl.exp2(scores - log_sum[:, None])
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - taken_off[:, None]) * slope
        gradient = tl.dot(ds.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")
    _store(dq + start * dq_token + head * dq_head, queries, dq_token, length, d, gradient * scale, FEATURES)


@triton.jit
def _key_gradient_kernel(
    q,
    q_token,
    q_head,
    k,
    k_token,
    k_head,
    v,
    v_token,
    v_head,
    dout,
    dout_token,
    dout_head,
    dk,
    dk_token,
    dk_head,
    dv,
    dv_token,
    dv_head,
    lse,
    delta,
    tiles,
    n,
    group,
    d,
    scale,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FEATURES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    start, length, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    kv_head = tl.program_id(1).to(tl.int64)
    keys = first + tl.arange(0, KEYS)
    k_tile = _tile(k + start * k_token + kv_head * k_head, keys, k_token, length, d, FEATURES)
    v_tile = _tile(v + start * v_token + kv_head * v_head, keys, v_token, length, d, FEATURES)
    key_gradient = tl.zeros([KEYS, FEATURES], tl.float32)
    value_gradient = tl.zeros([KEYS, FEATURES], tl.float32)
    high = length
    if WINDOW:
        high = tl.minimum(length, first + KEYS - 1 + window)
    for member in range(group):
        head = kv_head * group + member
        q_start = q + start * q_token + head * q_head
        dout_start = dout + start * dout_token + head * dout_head
        place = head * n + start
        for begin in range(first, high, QUERIES):
            queries = begin + tl.arange(0, QUERIES)
            q_tile = _tile(q_start, queries, q_token, length, d, FEATURES)
            dout_tile = _tile(dout_start, queries, dout_token, length, d, FEATURES)
            # Queries beyond the end: an infinite sum makes their probabilities zero.
            log_sum = tl.load(lse + place + queries, mask=queries < length, other=float("inf")) * LOG2E
            taken_off = tl.load(delta + place + queries, mask=queries < length, other=0.0)
            product = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            ahead = queries[None, :] - keys[:, None]
            scores, slope = scored(product, ahead, scale, window, softcap, WINDOW, SOFTCAP)
            p = tl.exp2(scores - log_sum[None, :])
            value_gradient = tl.dot(p.to(dout_tile.dtype), dout_tile, value_gradient, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            ds = p * (dp - taken_off[None, :]) * slope
            key_gradient = tl.dot(ds.to(q_tile.dtype), q_tile, key_gradient, input_precision="ieee")
    _store(dk + start * dk_token + kv_head * dk_head, keys, dk_token, length, d, key_gradient * scale, FEATURES)
    _store(dv + start * dv_token + kv_head * dv_head, keys, dv_token, length, d, value_gradient, FEATURES)
