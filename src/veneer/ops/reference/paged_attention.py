"""Paged attention in plain torch: the specification of the pages' contents, and of the keys that rows attend to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from veneer.ops.paged_attention import Heads, PagedRows, PagedStore, padded
from veneer.ops.reference.rotary import rotate_both


def append(store: PagedStore, layer: int, k: Tensor, v: Tensor, rows: PagedRows) -> None:
    keys, values = _views(store, layer)
    pair, filling = keys.shape[-1], (0, padded(store.head_dim) - store.head_dim)
    for pages, position, first, stop in rows.sequences():
        for row in range(first, stop):
            where = position + row - first
            page, slot = pages[where // store.block], where % store.block
            keys[page, :, slot] = functional.pad(k[row], filling).view(store.kv_heads, -1, pair)
            if slot % pair == 0 and row + 1 == stop:
                values[page, :, slot // pair] = 0  # in its pair a former holder may have left what is no number
            values[page, :, slot // pair, slot % pair] = functional.pad(v[row], filling)


def append_turned(
    store: PagedStore, layer: int, heads: Heads, rows: PagedRows, tables: tuple[Tensor, Tensor], interleaved: bool
) -> None:
    q, k, v = heads
    rotate_both(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *tables, interleaved, False)
    append(store, layer, k, v, rows)


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
    out = q.new_empty(q.shape)
    for pages, position, first, stop in rows.sequences():
        end, oldest = position + stop - first, max(0, position - window + 1) if window else 0
        start = oldest // store.block * store.block
        k, v = _held(store, layer, pages[start // store.block : -(-end // store.block)], end - start)
        group = q.shape[1] // store.kv_heads
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        scores = q[first:stop].float().transpose(0, 1) @ k.mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + (bias[:, None, start:end] - bias[:, position:end, None])
        behind = (torch.arange(position, end)[:, None] - torch.arange(start, end)).to(q.device)
        seen = (behind >= 0) & (behind < window) if window else behind >= 0
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, stop - first, 1)], dim=-1)
        p = scores.softmax(-1)[..., : end - start]
        out[first:stop] = (p @ v).transpose(0, 1).to(q.dtype)
    return out


def _held(store: PagedStore, layer: int, pages: list[int], n: int) -> tuple[Tensor, Tensor]:
    """Return the first n keys and values in the listed pages at one layer: (heads, n, head_dim) in float32."""
    keys, values = (x[pages] for x in _views(store, layer))
    heads_first = (keys.flatten(3, 4).transpose(0, 1), values.flatten(2, 3).transpose(0, 1))
    k, v = (x.flatten(1, 2)[:, :n, : store.head_dim].float() for x in heads_first)
    return k, v


def _views(store: PagedStore, layer: int) -> tuple[Tensor, Tensor]:
    """View a layer's K as (pages, heads, tokens, pairs of values, 2), and V as (pages, heads, pairs of tokens, 2,
    values).

    In float32 each pair is a single value or token.
    """
    pair, d, block = 2 if store.data.dtype == torch.bfloat16 else 1, padded(store.head_dim), store.block
    heads = (store.n_pages, store.n_layers, store.kv_heads, 2)
    keys = store.data.view(*heads, d // pair, block, pair)[:, layer, :, 0].transpose(-3, -2)
    return keys, store.data.view(*heads, block // pair, d, pair)[:, layer, :, 1].transpose(-2, -1)
