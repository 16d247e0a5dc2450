"""Paged attention by csrc/paged_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.cpu.rotary import rotate_both
from veneer.ops.memory import address
from veneer.ops.paged_attention import Heads, PagedRows, PagedStore


def append(store: PagedStore, layer: int, k: Tensor, v: Tensor, rows: PagedRows) -> None:
    kernels().paged_attention_append(*_store(store), layer, *_rows(rows), *_heads(k), *_heads(v))


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
    out = torch.empty(q.shape, dtype=q.dtype)
    biases = (0, 0) if bias is None else (address(bias), bias.shape[1])
    kernels().paged_attention_attend(
        *_store(store),
        layer,
        *_rows(rows),
        q.shape[1],
        *_heads(q),
        *_heads(out),
        scale,
        window,
        softcap,
        *biases,
        0 if sinks is None else address(sinks),
    )
    return out


def _store(store: PagedStore) -> tuple[int, ...]:
    data = store.data
    return address(data), DTYPES[data.dtype], store.block, store.n_layers, store.kv_heads, store.head_dim


def _rows(rows: PagedRows) -> tuple[int, ...]:
    numbers = (rows.pages, rows.first_page, rows.first_row, rows.position)
    return len(rows.position), *(address(t) for t in numbers)


def _heads(x: Tensor) -> tuple[int, int, int]:
    return address(x), x.stride(0), x.stride(1)
